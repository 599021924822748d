"""Tasks of reasoning-gym: problems without end in logic, algorithms, games and more, each with its own verifier.

`reasoning_gym:NAME`, or with settings of the task as in a web address: `reasoning_gym:NAME?min_terms=2&max_terms=3`.
This module imports neither torch nor transformers, because the grader's process imports it too.
"""

from __future__ import annotations

import difflib
import functools
import json
from typing import Any
from urllib.parse import parse_qsl

from prune_opd.errors import ConfigError

GYM_PREFIX = "reasoning_gym:"
HELD_OUT_SEEDS = 1_000_000  # a problem's seed says which split it is in: held-out ones are below this
ALL_SEEDS = 2**32  # numpy, which some tasks seed, takes no more


@functools.lru_cache(maxsize=16)  # the k answers to a problem are graded one after another
def gym_problem(task: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """(data set, entry): the problem that `seed` stands for. `data_set.score_answer(answer, entry)` is its verifier.

    task: with or without the prefix. Each problem is the first of a data set of its own, since the later ones of some
    tasks depend on the size too.
    Raises ConfigError when reasoning-gym is not installed, or has no such task or setting.
    """
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
        data_set = reasoning_gym.create_dataset(name, seed=seed, size=1, **settings)
        return data_set, data_set[0]
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"{GYM_PREFIX}{task}: reasoning-gym does not take these settings: {error}") from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
