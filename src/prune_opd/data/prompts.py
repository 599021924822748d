"""Prompts from files and data sets, tokenised the way the student will see them.

Rows keep their order and their duplicates (DAPO-Math-17K has some): what a benchmark holds is what is
measured, and what a recipe trains on is its author's choice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from prune_opd.config import DataSection
from prune_opd.data.columns import answer_of, lack_of, prompt_of
from prune_opd.data.rendering import longest_token, may_fit, render, tokenize
from prune_opd.data.rows import rows_of
from prune_opd.data.teacher_prompts import Asked, TeacherView
from prune_opd.errors import DataError
from prune_opd.types import Prompt


@dataclass(frozen=True)
class PromptSet:
    """What was loaded, in the order of the source, and how many prompts were too long."""

    prompts: tuple[Prompt, ...]
    dropped_too_long: int


def load_prompts(data: DataSection, tokenizer: PreTrainedTokenizerBase, view: TeacherView | None = None) -> PromptSet:
    """Read, render and tokenise the prompts of `data.train`.

    data.train: a JSONL or parquet file (taken whole, whatever `data.split` says), a folder of those or one written by
    `save_to_disk`, or a Hub id (`owner/name`, or `owner/name:config`).

    The prompt is a string or a chat list of {role, content}, in `prompt_column` or else the first of `prompt`,
    `messages`, `problem`, `question` that a row has. Assistant turns at the end of a chat are the answer and are left
    out. A chat goes through the tokenizer's chat template with a generation prompt. So does a string, as one user
    turn, when the tokenizer has a template; without one it is tokenised as it is.

    The gold answer is `answer_column` (a dot reaches into a struct), or else `reward_model.ground_truth` or
    `answer` where that is text or a number. Of worked answers that end in `#### N`, N is kept, without
    thousands separators.

    `prompt_suffix` goes after the string or the last user turn, with a space if neither brings white space, unless the
    text ends with it already. Prompts of more than `max_prompt_length` tokens are left out and counted.

    view: what the teacher reads of them; prompts of which that is too long are left out and counted too.

    Raises DataError, or MissingColumnError, that names the file and line or row.
    """
    texts, lacks, asked = [], [], []
    for where, row in rows_of(data.train, data.split):
        name, prompt = prompt_of(where, row, data.prompt_column)
        texts.append(render(f"{where}, column {name!r}", prompt, tokenizer, data))
        answer = answer_of(where, row, data.answer_column)
        lacks.append("" if answer else lack_of(row, data.answer_column))
        asked.append(Asked(where, prompt, row if view else {}, answer))
    if not texts:
        raise DataError(f"{data.train}: there is no row in it; expected one prompt a row")

    longest = data.max_prompt_length
    fit = may_fit(texts, longest, tokenizer)
    tokens = dict(zip(fit, tokenize([texts[i] for i in fit], tokenizer), strict=True))
    for i, ids in tokens.items():
        if not ids:
            raise DataError(f"{asked[i].where}: the tokenizer makes no token of this prompt; remove the row")
    kept = {i: tuple(ids) for i, ids in tokens.items() if len(ids) <= longest}
    if not kept:
        shortest = min(map(len, tokens.values()), default=min(map(len, texts)) // longest_token(tokenizer))
        raise DataError(
            f"{data.train}: all {len(texts)} prompts have more than {longest} tokens, the shortest "
            f"{'' if tokens else 'at least '}{shortest}; raise data.max_prompt_length to at least that"
        )
    prompts = [Prompt(texts[i], ids, asked[i].answer, asked[i].where, lack=lacks[i]) for i, ids in kept.items()]
    if view:
        for_teacher = view.prompts([asked[i] for i in kept])
        prompts = [replace(one, teacher=theirs) for one, theirs in zip(prompts, for_teacher, strict=True) if theirs]
        if not prompts:
            raise DataError(
                f"{data.train}: of all {len(kept)} prompts the teacher would read more than {view.longest} tokens; "
                "raise data.max_teacher_prompt_length, or shorten what it reads"
            )
    return PromptSet(tuple(prompts), dropped_too_long=len(texts) - len(prompts))
