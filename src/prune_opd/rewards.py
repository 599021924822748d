"""What the task itself says of a rollout: the reward function that a recipe names with `reward.function`.

`grade` is the one that is built in: 1 where the prompt's own grader calls the response right, else 0. That is
math-verify against the gold answer, or the verifier of a reasoning-gym task, each in a process of its own, so that a
response on which it hangs or dies costs that response (evaluation/graders.py). Anything else is the import path of

    def my_reward(prompts, completions, answers, **kwargs) -> list[float | None]

which is called once a step, by keyword, with three lists of one entry a rollout: the prompt as the model saw it, the
text that it answered, and the gold answer (None where the data has none). Rollouts of one prompt follow one another.
It returns one finite number a rollout, greater for better, or None where it has nothing to say. Take `**kwargs`, as
for TRL, so that an argument which a later version adds breaks nothing.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prune_opd.errors import ConfigError, RewardError
from prune_opd.evaluation.graders import are_right
from prune_opd.types import Prompt

GRADE = "grade"
RewardFunction = Callable[[Sequence[Prompt], Sequence[str]], Tensor]
"""(B prompts, B completions) -> (B,) float64, NaN where there is no reward."""


def load_reward(name: str) -> RewardFunction:
    """The function that `reward.function = name` means. Its module may stand in the folder you started in.

    Raises ConfigError when the module cannot be imported, or has nothing callable of that name. What it returns raises
    RewardError where the function raises, or gives anything but one finite number or None for each rollout.
    """
    if name == GRADE:
        return _grade
    module_name, _, attributes = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file there takes the place of an installed package
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # an import runs code, which may raise anything
        raise ConfigError(
            f"reward.function = {name!r}: the module {module_name} cannot be imported ({type(error).__name__}: "
            f"{error}); expected package.module:name, installed or in the folder you started in"
        ) from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            near = difflib.get_close_matches(attribute, [n for n in vars(found) if not n.startswith("_")], 1)
            hint = f"did you mean {near[0]}?" if near else "correct the name after the colon"
            raise ConfigError(f"reward.function = {name!r}: there is no {attribute} in {module_name}; {hint}")
        found = getattr(found, attribute)
    if not callable(found):
        raise ConfigError(f"reward.function = {name!r} is a {type(found).__name__}, no function; name a function")
    return functools.partial(_call, name, found)


def _grade(prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
    return torch.tensor(list(are_right(prompts, completions)), dtype=torch.float64)


def _call(name: str, function: Callable[..., Any], prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
    try:
        given = function(
            prompts=[prompt.text for prompt in prompts],
            completions=list(completions),
            answers=[prompt.answer for prompt in prompts],
        )
    except Exception as error:
        raise RewardError(
            f"reward.function = {name!r} raised {type(error).__name__}: {error}; it is called with the keywords "
            "prompts, completions and answers, three lists. Repair it; where it cannot judge, it may return None"
        ) from error
    try:
        values = list(given)
    except TypeError:
        raise RewardError(
            f"reward.function = {name!r} returned a {type(given).__name__}; return a list of one number a completion"
        ) from None
    if len(values) != len(completions):
        raise RewardError(
            f"reward.function = {name!r} returned {len(values)} rewards for {len(completions)} completions; "
            "return one a completion, in their order"
        )
    numbers = [_number(name, *row) for row in zip(values, prompts, completions, strict=True)]
    return torch.tensor(numbers, dtype=torch.float64)


def _number(name: str, value: Any, prompt: Prompt, completion: str) -> float:
    if value is None:
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(
            f"reward.function = {name!r} returned {value!r} for an answer to {prompt.source} that begins "
            f"{completion[:60]!r}; return a finite number, or None where there is no reward"
        )
    return number
