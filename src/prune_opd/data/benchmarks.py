"""Benchmarks by name, from local files or the Hub, with the number of problems that each must have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from prune_opd.config import DataSection
from prune_opd.data.prompts import load_prompts
from prune_opd.data.source import TASK_PREFIX, held_out_prompts
from prune_opd.errors import DataError
from prune_opd.evaluation.graders import check_gradable
from prune_opd.evaluation.gym import GYM_PREFIX
from prune_opd.types import Prompt

BOXED_SUFFIX = "Please reason step by step, and put your final answer within \\boxed{}."
ENDLESS_PROBLEMS = 100  # how many are taken of a source that has no end, when nobody says
NO_LIMIT = 2**31  # a benchmark's problems are all measured, however long


@dataclass(frozen=True)
class Benchmark:
    """Where it is on the Hub, its columns, and the number of problems that every faithful copy has."""

    hub_id: str
    split: str
    prompt_column: str
    answer_column: str
    problems: int


BENCHMARKS = {
    # Two sets go by the name AMC23: the usual one of 40, and the 83 of AMC 12 of 2022 and 2023 that the paper's
    # release evaluates. Their scores cannot be compared, so "amc23" alone is no name.
    "amc23-40": Benchmark("math-ai/amc23", "test", "question", "answer", 40),
    "amc23-83": Benchmark("AI-MO/aimo-validation-amc", "train", "problem", "answer", 83),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", "problem", "answer", 30),
    "aime25": Benchmark("MathArena/aime_2025", "train", "problem", "answer", 30),
    "aime26": Benchmark("MathArena/aime_2026", "train", "problem", "answer", 30),
    "hmmt-feb-24": Benchmark("MathArena/hmmt_feb_2024", "train", "problem", "answer", 30),
    "hmmt-feb-25": Benchmark("MathArena/hmmt_feb_2025", "train", "problem", "answer", 30),
    "hmmt-feb-26": Benchmark("MathArena/hmmt_feb_2026", "train", "problem", "answer", 33),
    "math-500": Benchmark("HuggingFaceH4/MATH-500", "test", "problem", "answer", 500),
    "gsm8k": Benchmark("openai/gsm8k:main", "test", "question", "answer", 1319),
}


def load_benchmark(
    name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data_dir: str | Path | None = None,
    split: str = "test",
    num_problems: int | None = None,
    prompt_suffix: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
) -> Sequence[Prompt]:
    """The problems of a benchmark as prompts, the first `num_problems` or all.

    name_or_path: a name of `BENCHMARKS`, in any spelling (AIME24, aime_24); or task:NAME or reasoning_gym:NAME, whose
    held-out problems have no end (100 when num_problems is unset); or a file, a folder or a Hub id, read as it is.
    `split` matters only for the last three.

    prompt_column, answer_column: of a file, folder or Hub id; unset, they are found (`load_prompts`).

    prompt_suffix: unset, benchmarks by name get `BOXED_SUFFIX`, since only a stated answer is graded, and others none.

    A name is looked for in `data_dir` first: amc23_40.parquet, amc23-40.jsonl, a folder AMC23-40 and so on; then on
    the Hub. DataError when there are more or fewer problems than the benchmark has, or some without a gold answer.
    """
    endless = name_or_path.startswith((TASK_PREFIX, GYM_PREFIX))
    as_it_is = endless or Path(name_or_path).exists()
    name = None if as_it_is else {_plain(known): known for known in BENCHMARKS}.get(_plain(name_or_path))
    if prompt_suffix is None:
        prompt_suffix = BOXED_SUFFIX if name else ""
    data = DataSection(
        train=name_or_path,
        split=split,
        prompt_suffix=prompt_suffix,
        prompt_column=prompt_column,
        answer_column=answer_column,
        max_prompt_length=NO_LIMIT,
    )
    if name is None:
        if not as_it_is and not re.search(r"[/.]", name_or_path):
            raise DataError(
                f"{name_or_path!r} is no benchmark, file or folder; there are {', '.join(BENCHMARKS)}, "
                f"{TASK_PREFIX}chain_sum, {TASK_PREFIX}running_sum, {GYM_PREFIX}NAME, a path, and Hub ids (owner/name)"
            )
        if num_problems is None:
            num_problems = ENDLESS_PROBLEMS if endless else NO_LIMIT
        return held_out_prompts(name_or_path, data, tokenizer, count=num_problems)

    benchmark = BENCHMARKS[name]
    local = _find(name, Path(data_dir).expanduser()) if data_dir is not None else None
    on_the_hub = {
        "train": benchmark.hub_id,
        "split": benchmark.split,
        "prompt_column": benchmark.prompt_column,
        "answer_column": benchmark.answer_column,
    }
    prompts = load_prompts(data.model_copy(update={"train": str(local)} if local else on_the_hub), tokenizer).prompts
    if len(prompts) != benchmark.problems:
        raise DataError(
            f"{local or benchmark.hub_id}: {len(prompts)} problems, but {name} has {benchmark.problems}; it is another "
            "variant, or a part. Give its path instead of the name to evaluate it as it is"
        )
    check_gradable(prompts[:num_problems], "an evaluation", f"give another file than {local or benchmark.hub_id}")
    return prompts[:num_problems]


def _plain(name: str) -> str:
    """Letters and digits alone: AIME-24, aime_24 and aime2024 are one."""
    return re.sub(r"20(?=\d\d$)", "", re.sub(r"[^a-z0-9]", "", name.lower()))


def _find(name: str, data_dir: Path) -> Path | None:
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder; give one with the benchmarks' files as --data-dir, or none")
    wanted = {_plain(name), _plain(name) + "test"}
    found = [
        path
        for path in sorted(data_dir.iterdir())
        if _plain(path.stem) in wanted and (path.is_dir() or path.suffix in (".parquet", ".jsonl", ".json"))
    ]
    if len(found) > 1:
        raise DataError(
            f"{data_dir}: {' and '.join(path.name for path in found)} may both be {name}; "
            "give the path of the one that you mean instead of the name"
        )
    return found[0] if found else None
