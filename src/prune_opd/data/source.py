"""Prompts by step: a function of (seed, step) and nothing else, so a run can stop and go on anywhere."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from prune_opd.config import DataSection
from prune_opd.data.prompts import load_prompts
from prune_opd.data.rendering import render, tokenize
from prune_opd.data.tasks import Split, problems
from prune_opd.data.teacher_prompts import Asked, TeacherView
from prune_opd.data.worked import WORKED_TASKS, worked_problems
from prune_opd.errors import ConfigError, DataError
from prune_opd.evaluation.graders import check_gradable, grade_gym
from prune_opd.evaluation.gym import GYM_PREFIX, HELD_OUT_SEEDS, gym_problem, training_seeds
from prune_opd.types import Prompt

TASK_PREFIX = "task:"


class PromptSource(Protocol):
    """Where the trainer gets its prompts."""

    dropped_too_long: int

    def batch(self, step: int, count: int, first: int | None = None) -> Sequence[Prompt]:
        """The prompts of one step (0-based). first: how many all steps before had, where that is not step · count."""
        ...


class DatasetSource:
    """A finite data set, reshuffled every epoch."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, dropped_too_long: int) -> None:
        self.prompts, self.seed, self.dropped_too_long = prompts, seed, dropped_too_long

    def check_gradable(self) -> None:
        """DataError where a prompt has nothing to grade against. Call it before the first step, to lose no run."""
        check_gradable(self.prompts, "reward.function = 'grade'", "name a reward function of your own")

    def batch(self, step: int, count: int, first: int | None = None) -> Sequence[Prompt]:
        """See `PromptSource.batch`; a step may straddle two epochs."""
        size = len(self.prompts)
        first = step * count if first is None else first
        places = range(first, first + count)
        orders = {
            epoch: np.random.default_rng([self.seed, epoch]).permutation(size) for epoch in {p // size for p in places}
        }
        return [self.prompts[orders[place // size][place % size]] for place in places]


class TaskSource:
    """A task that comes with the package: fresh training problems at every step."""

    dropped_too_long = 0

    def __init__(
        self, data: DataSection, tokenizer: PreTrainedTokenizerBase, *, seed: int, view: TeacherView | None = None
    ) -> None:
        self.data, self.tokenizer, self.seed, self.view = data, tokenizer, seed, view

    def batch(self, step: int, count: int, first: int | None = None) -> Sequence[Prompt]:
        """See `PromptSource.batch`."""
        seed = self.seed * 1_000_003 + step
        return task_prompts(self.data.train, "train", self.data, self.tokenizer, seed=seed, count=count, view=self.view)


def task_prompts(
    task: str,
    split: Split,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    count: int,
    view: TeacherView | None = None,
) -> list[Prompt]:
    """`count` problems of a task of the package as prompts. view: what the teacher reads of them.

    Those of chain_sum are what they are; the worded ones are user turns, as rows of a data set would be.
    """
    pairs = _worked if task.removeprefix(TASK_PREFIX) in WORKED_TASKS else _sums
    return _fitting(pairs(task, split, data, tokenizer, seed), data, count, view)


Pair = tuple[Prompt, Asked]  # as the student sees it, and before it was written out


def _sums(task: str, split: Split, data: DataSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[Pair]:
    for i, problem in enumerate(problems(split, seed)):
        source, ids = f"{task} {split}[{i}]", tuple(tokenizer(problem.prompt)["input_ids"])
        prompt = Prompt(problem.prompt, ids, problem.answer, source)
        yield prompt, Asked(source, problem.prompt, {"solution": problem.solution}, problem.answer, as_it_is=True)


def _worked(
    task: str, split: Split, data: DataSection, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Iterator[Pair]:
    for i, problem in enumerate(worked_problems(task.removeprefix(TASK_PREFIX), split, seed)):
        source, question = f"{task} {split}[{i}]", problem.question
        prompt = Prompt(*_rendered(source, question, data, tokenizer), problem.answer, source)
        row = {"solution": problem.solution(random.Random(source))}
        yield prompt, Asked(source, question, row, problem.answer)


def _rendered(
    source: str, question: str, data: DataSection, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, tuple[int, ...]]:
    text = render(source, question, tokenizer, data)
    (ids,) = tokenize([text], tokenizer)
    return text, tuple(ids)


def _fitting(
    pairs: Iterable[Pair], data: DataSection, count: int, view: TeacherView | None, hint: str = ""
) -> list[Prompt]:
    """The first `count` prompts that are short enough for the student and, by `view`, for the teacher; DataError when
    there are hardly any.
    """
    found: list[Prompt] = []
    shortest: int | None = None
    for tried, (prompt, asked) in enumerate(pairs, start=1):
        length = len(prompt.token_ids)
        shortest = length if shortest is None else min(shortest, length)
        if length <= data.max_prompt_length:
            theirs = view.prompts([asked])[0] if view else None
            if theirs or not view:
                found.append(replace(prompt, teacher=theirs))
        if len(found) == count:
            break
        if tried >= 100 + 10 * count:
            too_long_for_teacher = f" and at most {view.longest} for the teacher" if view else ""
            raise DataError(
                f"{data.train}: of {tried} prompts only {len(found)} have at most data.max_prompt_length = "
                f"{data.max_prompt_length} tokens{too_long_for_teacher}, the shortest has {shortest}; raise it{hint}"
            )
    return found


class GymSource:
    """A task of reasoning-gym: fresh problems at every step, none of them from a held-out seed."""

    dropped_too_long = 0

    def __init__(
        self, data: DataSection, tokenizer: PreTrainedTokenizerBase, *, seed: int, view: TeacherView | None = None
    ) -> None:
        self.data, self.tokenizer, self.seed, self.view = data, tokenizer, seed, view
        self.batch(0, 1)  # an unknown task or setting is found before the first step

    def batch(self, step: int, count: int, first: int | None = None) -> Sequence[Prompt]:
        """See `PromptSource.batch`; problems that are too long are replaced by others."""
        seeds = training_seeds(self.seed, step)
        return gym_prompts(self.data, self.tokenizer, seeds=seeds, count=count, view=self.view)


def gym_prompts(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seeds: Iterable[int],
    count: int,
    view: TeacherView | None = None,
) -> list[Prompt]:
    """The first `count` problems of task `data.train` from `seeds` whose prompts are short enough.

    Raises DataError when so many prompts have more than `data.max_prompt_length` tokens that the search gives up.
    """
    hint = f", or ask for easier problems with settings of the task, as in {GYM_PREFIX}chain_sum?max_terms=3"
    return _fitting(_gym(data, tokenizer, seeds), data, count, view, hint)


def _gym(data: DataSection, tokenizer: PreTrainedTokenizerBase, seeds: Iterable[int]) -> Iterator[Pair]:
    for seed in seeds:
        source = f"{data.train} seed {seed}"
        _, entry = gym_problem(data.train, seed)
        text, ids = _rendered(source, entry["question"], data, tokenizer)
        answer = None if entry["answer"] is None else str(entry["answer"])
        prompt = Prompt(text, ids, answer, source, functools.partial(grade_gym, task=data.train, seed=seed))
        yield prompt, Asked(source, entry["question"], {}, answer)


def training_prompts(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, *, seed: int, view: TeacherView | None = None
) -> PromptSource:
    """The source that `data.train` names. view: what the teacher reads, where that is not the student's prompt."""
    if data.train.startswith(TASK_PREFIX):
        _check_task(data.train, "data.train")
        return TaskSource(data, tokenizer, seed=seed, view=view)
    if data.train.startswith(GYM_PREFIX):
        return GymSource(data, tokenizer, seed=seed, view=view)
    loaded = load_prompts(data, tokenizer, view)
    return DatasetSource(loaded.prompts, seed=seed, dropped_too_long=loaded.dropped_too_long)


def held_out_prompts(
    source: str, data: DataSection, tokenizer: PreTrainedTokenizerBase, *, count: int, split: str | None = None
) -> Sequence[Prompt]:
    """The first `count` validation problems of `source`; the same ones for every seed and arm.

    data: how they are read and rendered; its `train` is not used, and its `split` only where `split` is None.
    DataError where one has nothing to grade against.
    """
    data = data.model_copy(update={"train": source, "split": split or data.split})
    if source.startswith(TASK_PREFIX):
        _check_task(source, "evaluation.data")
        return task_prompts(source, "held_out", data, tokenizer, seed=0, count=count)
    if source.startswith(GYM_PREFIX):
        return gym_prompts(data, tokenizer, seeds=range(HELD_OUT_SEEDS), count=count)
    found = load_prompts(data, tokenizer).prompts[:count]
    check_gradable(found, "an evaluation", "unset evaluation.data")
    return found


def _check_task(name: str, setting: str) -> None:
    known = [f"{TASK_PREFIX}{task}" for task in ("chain_sum", *WORKED_TASKS)]
    if name not in known:
        raise ConfigError(f"{setting} = {name!r} is no embedded task; there are {', '.join(known)}")
