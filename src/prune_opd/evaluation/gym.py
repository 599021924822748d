"""Tasks of reasoning-gym: problems without end in logic, algorithms, games and more, each with its own verifier.

`reasoning_gym:NAME`, or with settings of the task as in a web address: `reasoning_gym:NAME?min_terms=2&max_terms=3`.
This module imports neither torch nor transformers, because the grader's process imports it too.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from prune_opd.errors import ConfigError

GYM_PREFIX = "reasoning_gym:"
# One data set of reasoning-gym is made for so many seeds: making it may mean reading a dictionary. It has a fixed size,
# since problems of some tasks depend on the size of their data set.
BLOCK = 64
HELD_OUT_SEEDS = 2**20  # a problem's seed says which split it is in: held-out ones are below this
ALL_SEEDS = 2**32  # numpy, which some tasks seed, takes no more


def training_seeds(seed: int, step: int) -> Iterator[int]:
    """Seeds without end, in blocks drawn at random, none of them held out."""
    rng = np.random.default_rng([seed, step])
    while True:
        block = int(rng.integers(HELD_OUT_SEEDS // BLOCK, ALL_SEEDS // BLOCK))
        yield from range(block * BLOCK, (block + 1) * BLOCK)


def gym_problem(task: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """(data set, entry): the problem that `seed` stands for. `data_set.score_answer(answer, entry)` is its verifier.

    task: with or without the prefix. Raises ConfigError when reasoning-gym is not installed, or has no such task or
    setting.
    """
    return _data_set(task, seed // BLOCK), _entry(task, seed)


@functools.lru_cache(maxsize=64)  # some take a second to make, and k answers to each are graded
def _entry(task: str, seed: int) -> dict[str, Any]:
    return _data_set(task, seed // BLOCK)[seed % BLOCK]


@functools.lru_cache(maxsize=4)
def _data_set(task: str, block: int) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError(f"{GYM_PREFIX}{task} needs the package reasoning-gym ({error}): make setup-smollm") from error
    name, _, query = task.removeprefix(GYM_PREFIX).partition("?")
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, 3) or sorted(DATASETS)
        raise ConfigError(f"reasoning-gym has no task {name!r}; there are {', '.join(near)}")
    settings = {key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True)}
    try:
        return reasoning_gym.create_dataset(name, seed=block * BLOCK, size=BLOCK, **settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"{GYM_PREFIX}{task}: reasoning-gym does not take these settings: {error}") from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
