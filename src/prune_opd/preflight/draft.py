"""What `prune-opd init` writes: a recipe for two models and a data set, from what these say themselves.

Nothing is asked and no weights are loaded. Where a number is a choice, it is the paper's, in the paper's proportions to
the longest response; the recipe says in comments what was found and why a value stands there.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from prune_opd.config import Config, parse_config, with_settings
from prune_opd.config.values import MOST
from prune_opd.data.columns import ANSWER_COLUMNS, PROMPT_COLUMNS
from prune_opd.data.prompts import PromptSet, load_prompts
from prune_opd.data.rows import first_row
from prune_opd.errors import DataError, MissingColumnError, ModelError
from prune_opd.models import loading as models
from prune_opd.models.loading import read_model_config
from prune_opd.preflight.doctor import check_memory
from prune_opd.preflight.memory import estimate_memory

PAPER_RESPONSE, PAPER_EVENTS, PAPER_PROMPTS, PAPER_STEPS = 12288, 100, 64, 203
OTHER_PROMPTS = ("instruction", "input", "query", "text", "prompts", "problems", "questions")
OTHER_ANSWERS = ("ground_truth", "gold", "target", "label", "solution", "final_answer", "answers", "key")
HELD_OUT_WORDS = {"test", "validation", "valid", "val", "dev", "eval", "heldout", "held"}
MANY_PARAMETERS = 1_000_000_000  # from here on the paper's learning rate


@dataclass(frozen=True)
class Wishes:
    """What the user said: the pair, the data, and what the data cannot tell by itself."""

    student: str
    teacher: str
    data: str
    held_out: str | None = None
    prompt_column: str | None = None
    answer_column: str | None = None


def draft_recipe(wishes: Wishes, name: str) -> str:
    """The text of a commented recipe, to be saved as `name`.

    Raises TokenizerError where the two models differ in tokens, DataError or MissingColumnError where the data cannot
    be read, ModelError where a model cannot, or has no room for a response.
    """
    base: dict[str, Any] = {
        "model": {"model_name_or_path": wishes.student, "teacher_model_name_or_path": wishes.teacher},
        "data": {"train": wishes.data, "max_prompt_length": MOST},
    }
    config = parse_config(base, where="prune-opd init")
    tokenizers = [models.load_tokenizer(name, config.model) for name in (wishes.student, wishes.teacher)]
    models.check_token_maps(*tokenizers)
    facts = {**vars(wishes), "name": name, **_data_facts(config, wishes, tokenizers[0])}
    facts |= _length_facts(config, facts, tokenizers[0])
    device = models.resolve_device("auto")
    facts |= {"device": str(device), "accelerated": device.type != "cpu"}
    facts["vllm"] = device.type == "cuda" and find_spec("vllm") is not None
    facts["prompts_per_step"] = min(PAPER_PROMPTS if facts["accelerated"] else 16, facts["rows"])
    facts["epochs"] = f"{PAPER_STEPS * facts['prompts_per_step'] / facts['rows']:.1f}"
    few = _has_few_parameters(config, facts)
    for checkpointing, lora in ((False, False), (True, False), (True, True)):
        text = _rendered({**facts, "checkpointing": checkpointing, "lora": lora, **_rate(few, lora)})
        if check_memory(parse_config(tomllib.loads(text), where=name), lambda *finding: None):
            break
    return text


# ---- data ----


def _data_facts(config: Config, wishes: Wishes, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Columns, numbers of rows and answers, token counts of the prompts, held-out problems."""
    columns = _flat(first_row(wishes.data, config.data.split))
    prompt = wishes.prompt_column or _column(columns, (*PROMPT_COLUMNS, *OTHER_PROMPTS), str | Sequence)
    texts = [column for column, value in columns.items() if isinstance(value, str)]
    if prompt is None and len(texts) == 1:
        prompt = texts[0]
    if prompt is None:
        raise MissingColumnError(
            f"{wishes.data}: no column is called {', '.join(PROMPT_COLUMNS)} or the like; there are: "
            f"{', '.join(columns)}; name the one with the prompt: prune-opd init ... --prompt-column NAME"
        )
    rest = {column: value for column, value in columns.items() if column != prompt}
    answer = wishes.answer_column or _column(rest, (*ANSWER_COLUMNS, *OTHER_ANSWERS), str | int | float)
    loaded = _loaded(config, wishes.data, prompt, answer, tokenizer)
    golds = [gold for p in loaded.prompts if (gold := p.answer)]
    held_out, problems, why = _held_out(config, wishes, prompt, answer, tokenizer)
    numbers = sum(re.fullmatch(r"[-+$]?[\d.,/ %]+", gold) is not None for gold in golds)
    return {
        "prompt_column": prompt,
        "answer_column": answer if golds else None,
        "rows": len(loaded.prompts),
        "answers": len(golds),
        "lengths": sorted(len(p.token_ids) for p in loaded.prompts),
        "boxed": bool(tokenizer.chat_template) and numbers > len(loaded.prompts) / 2,
        "thinks": "enable_thinking" in str(tokenizer.chat_template or ""),
        "held_out": held_out,
        "problems": min(100, problems),
        "no_held_out": why,
    }


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row, fields of a struct as `struct.field`."""
    inner = {f"{k}.{f}": v for k, struct in row.items() if isinstance(struct, Mapping) for f, v in struct.items()}
    return {**row, **inner}


def _column(columns: Mapping[str, Any], names: Sequence[str], kind: Any) -> str | None:
    """The first of the names that a column has, in any case, with a value of that kind."""
    lower = {column.lower(): column for column, value in columns.items() if value and isinstance(value, kind)}
    return next((lower[name] for name in names if name in lower), None)


def _loaded(
    config: Config, source: str, prompt: str, answer: str | None, tokenizer: PreTrainedTokenizerBase
) -> PromptSet:
    columns = {"train": source, "prompt_column": prompt, "answer_column": answer}
    return load_prompts(config.data.model_copy(update=columns), tokenizer)


def _held_out(
    config: Config, wishes: Wishes, prompt: str, answer: str | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[str | None, int, str]:
    """(the file with held-out problems, how many it has, or why there is none)."""
    for source in [wishes.held_out] if wishes.held_out else _beside(Path(wishes.data)):
        try:
            found = _loaded(config, source, prompt, answer, tokenizer).prompts
        except DataError:
            if wishes.held_out:
                raise
            continue
        if all(problem.answer for problem in found):
            return source, len(found), ""
        if wishes.held_out:
            raise DataError(f"{source}: not every row has an answer to grade against; name the column: --answer-column")
    return None, 0, "no file of test or validation rows lies beside the training file" if answer else "no answers"


def _beside(path: Path) -> Iterator[str]:
    """Files beside a training file whose names say that they are held out."""
    if path.is_file():
        for other in sorted(path.parent.glob(f"*{path.suffix}")):
            if other != path and set(re.split(r"[^a-z]+", other.stem.lower())) & HELD_OUT_WORDS:
                yield str(other)


# ---- numbers ----


def _length_facts(config: Config, facts: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Prompt and response lengths that both models have positions for, and the window in the paper's proportions."""
    limits = []
    for model in (facts["student"], facts["teacher"]):
        found = read_model_config(model, config.model, local_files_only=False)
        if found is None:
            raise ModelError(
                f"config.json of {model!r} cannot be read: no folder of a model, not on the Hub, or no network"
            )
        limits.append(getattr(found, "max_position_embeddings", None))
    positions = min((limit for limit in limits if limit), default=None)
    longest = facts["lengths"][-1]
    prompt = -(-longest // 32) * 32
    if positions and prompt > positions // 2:  # what is longer is left out, and doctor counts it
        prompt = positions // 2
    most = min(PAPER_RESPONSE, positions - prompt) if positions else PAPER_RESPONSE
    events = min(PAPER_EVENTS, max(10, most // 8))
    return {
        "longest": longest,
        "max_prompt_length": prompt,
        "positions": positions if positions and most < PAPER_RESPONSE else None,
        "most": most,
        "min_len": max(1, most // 12),
        "step": max(1, round(most * 100 / PAPER_RESPONSE)),
        "w_drop": f"{1 / events:.4g}",
        "top_k": 16 if len(tokenizer) >= 1000 else 8,
    }


def _has_few_parameters(config: Config, facts: Mapping[str, Any]) -> bool:
    """Whether the student is known to have fewer than a billion."""
    sized = {"data.max_prompt_length": facts["max_prompt_length"], "rollout.max_completion_length": facts["most"]}
    weights = estimate_memory(with_settings(config, **sized, **{"pruning.enable": False})).student  # in float32
    return weights is not None and weights // 4 < MANY_PARAMETERS


def _rate(few: bool, lora: bool) -> dict[str, str]:
    """The learning rate, and the reason for it."""
    reason = "ten times the paper's 1e-6, for less than a billion parameters" if few else "the paper's"
    return {
        "learning_rate": f"1e-{6 - few - lora}",
        "rate_reason": f"{reason}, and ten times that for adapters" if lora else reason,
    }


# ---- text ----


def _rendered(facts: Mapping[str, Any]) -> str:
    template = (files("prune_opd.preflight") / "templates" / "recipe.toml.j2").read_text("utf-8")
    environment = jinja2.Environment(  # noqa: S701 (TOML, not HTML)
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["toml"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template).render(**facts)
