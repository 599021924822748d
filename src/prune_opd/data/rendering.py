"""Prompts as a model sees them: chat template, suffix, tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from prune_opd.config import DataSection
from prune_opd.data.columns import check_characters
from prune_opd.data.rows import kind_of
from prune_opd.errors import DataError

MUCH_SPACE = 1_000_000  # characters of white space in one prompt that are tokenised to see what is left of them

Chat = list[dict[str, str]]


def longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of the longest token of the vocabulary."""
    return max(map(len, tokenizer.get_vocab()))


def may_fit(texts: Sequence[str], longest: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Which texts may have at most `longest` tokens, by their characters: megabytes without a space take a tokenizer
    minutes and gigabytes. White space may be dropped or joined up, so little of it counts for nothing.
    """
    most = longest * longest_token(tokenizer)
    return [i for i, text in enumerate(texts) if len(text) <= most + MUCH_SPACE and len(" ".join(text.split())) <= most]


def tokenize(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> list[list[int]]:
    """The token ids of texts that `render` wrote; a chat template has written the special tokens itself."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=not (chat_template or tokenizer.chat_template))["input_ids"]


def render(
    where: str, prompt: Any, tokenizer: PreTrainedTokenizerBase, data: DataSection, chat_template: str | None = None
) -> str:
    """The text that a model sees of `prompt`, a string or a chat (see `load_prompts`); `where` is for errors.

    chat_template: another one than the tokenizer's.
    """
    chat_template = chat_template or tokenizer.chat_template
    if isinstance(prompt, str):
        _check_text(where, prompt)
        text = _with_suffix(prompt, data.prompt_suffix)
        if not chat_template:
            return text
        chat = [{"role": "user", "content": text}]
    elif isinstance(prompt, Sequence):
        chat = chat_of(where, prompt)
        chat[-1]["content"] = _with_suffix(chat[-1]["content"], data.prompt_suffix)
        if not chat_template:
            raise DataError(
                f"{where}: the prompt is a chat, but the tokenizer has no chat template to write it with; "
                "use a tokenizer that has one (chat_template.jinja beside it), or a column with plain strings"
            )
    else:
        raise DataError(
            f"{where}: expected text or a chat list of {{role, content}}, got {kind_of(prompt)}; repair the row"
        )
    try:
        return tokenizer.apply_chat_template(
            chat,
            chat_template=chat_template,
            tokenize=False,
            add_generation_prompt=True,
            **data.chat_template_kwargs,
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(turn["role"] for turn in chat)
        raise DataError(
            f"{where}: the tokenizer's chat template refuses a chat of roles {roles} ({error}); "
            "change the row, or use another chat template"
        ) from error


def chat_of(where: str, turns: Sequence[Any]) -> Chat:
    """The turns up to the last user turn, which must be the one to answer."""
    chat = []
    for i, turn in enumerate(turns):
        fields = turn if isinstance(turn, Mapping) else {}
        if not (isinstance(fields.get("role"), str) and isinstance(fields.get("content"), str)):
            raise DataError(
                f"{where}, turn {i}: expected an object with role and content, both text, got "
                f"{kind_of(turn) if not fields else ', '.join(f'{k}: {kind_of(v)}' for k, v in fields.items())}; "
                "repair the row"
            )
        for text in (fields["role"], fields["content"]):
            check_characters(f"{where}, turn {i}", text)
        chat.append({"role": fields["role"], "content": fields["content"]})
    while chat and chat[-1]["role"] == "assistant":
        chat.pop()
    if not chat or chat[-1]["role"] != "user":
        found = ", ".join(turn["role"] for turn in turns) or "none"
        raise DataError(
            f"{where}: expected a chat whose last turn, before any of the assistant, is the user's; "
            f"its roles: {found}; repair or remove the row"
        )
    _check_text(where, chat[-1]["content"])
    return chat


def _check_text(where: str, text: str) -> None:
    check_characters(where, text)
    if not text.strip():
        raise DataError(f"{where}: the prompt is empty; expected some text; fill in or remove the row")


def _with_suffix(text: str, suffix: str) -> str:
    # In the wild a \boxed{{}} that missed its str.format is the same instruction as \boxed{}.
    plain_text, plain_suffix = (" ".join(part.replace("{{}}", "{}").split()) for part in (text, suffix))
    if text.endswith(suffix) or (plain_suffix and plain_text.endswith(plain_suffix)):
        return text
    glue = "" if text[-1].isspace() or suffix[0].isspace() else " "
    return f"{text}{glue}{suffix}"
