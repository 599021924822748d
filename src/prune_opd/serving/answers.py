"""What an answer must be before anything is made of it: token ids, and log-probabilities of one distribution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prune_opd.serving.exchange import BadAnswer

MOST_MASS = 1 + 1e-3  # of a distribution; the rest is rounding
LEAST_MASS = 0.25  # that it can have, see `check_mass`
LOWEST = -3.4e38  # of float32, in which log-probabilities are kept
CANDIDATE_BYTES = 256  # of a token or candidate in JSON, with its text, on average
TOKEN = "token_id:"  # how a server writes a token's id where OpenAI's format has its text


def answer_bytes(tokens: int, candidates: int = 0) -> int:
    """The most bytes that an answer about so many tokens can have, with so many candidates each."""
    return 2**16 + CANDIDATE_BYTES * tokens * (2 + candidates)


def only_choice(answer: Any) -> dict[str, Any]:
    """The one choice of a completion in OpenAI's format; BadAnswer unless there is exactly one."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadAnswer("expected an object with one choice")
    return choices[0]


def is_id(value: Any, below: int) -> bool:
    """Whether it is a token id: a whole number (true is none) in [0, below)."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def token_ids(values: Any, below: int) -> list[int]:
    """A list of token ids; BadAnswer for anything else."""
    if not isinstance(values, list) or not all(is_id(value, below) for value in values):
        raise BadAnswer(f"expected a list of token ids in [0, {below}), got none or others")
    return values


def logprob(value: Any, where: str) -> float:
    """A log-probability that float32 can hold; BadAnswer for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadAnswer(f"{where}: a log-probability is no number")
    if not LOWEST <= value <= 1e-3:  # also NaN; whole numbers beyond all floats compare well
        raise BadAnswer(f"{where}: a log-probability is not finite in float32, or above 0")
    return float(value)


def distribution(entry: Any, where: str, vocab_size: int, *, prefix: str = "") -> dict[int, float]:
    """{id: log-probability} of {"5": -0.3} or {"5": {"logprob": -0.3}}; before the number of a key stands `prefix`.

    BadAnswer unless the keys are different ids in [0, vocab_size) and their mass is at most 1.
    """
    if not isinstance(entry, Mapping):
        raise BadAnswer(f"{where}: expected an object of candidates")
    listed: dict[int, float] = {}
    for key, value in entry.items():
        digits = key.removeprefix(prefix)
        if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
            raise BadAnswer(f"{where}: a candidate is no token id")
        if not is_id(int(digits), vocab_size):
            raise BadAnswer(f"{where}: id {digits} is beyond the {vocab_size} that student and server share")
        listed[int(digits)] = logprob(value.get("logprob") if isinstance(value, Mapping) else value, where)
    if len(listed) < len(entry):
        raise BadAnswer(f"{where}: a candidate stands there twice")
    mass = math.fsum(map(math.exp, listed.values()))
    if mass > MOST_MASS:
        raise BadAnswer(f"{where}: these are no log-probabilities of one distribution, their mass is {mass:.4g}")
    return listed


def check_mass(listed: Mapping[int, float], best: Sequence[tuple[int, float]], vocab_size: int, where: str) -> None:
    """BadAnswer where candidates cannot be the likeliest of a distribution over `vocab_size` ids.

    best: the likeliest that were asked for, in order. None that is not listed is likelier than the last of them, so
    mass of the listed + (V - listed) · the last is at least 1. A quarter is asked: a server may have more ids than V.
    """
    reach = math.fsum(map(math.exp, listed.values())) + max(vocab_size - len(listed), 0) * math.exp(best[-1][1])
    if reach < LEAST_MASS:
        raise BadAnswer(
            f"{where}: all {vocab_size} ids together can have no more than {reach:.3g} of the probability when the "
            f"{len(best)} likeliest have so little; these are no log-probabilities of the likeliest tokens"
        )
