"""Write docs/matrix.md from the cases of tests/invariant/matrix.py: `make docs`. A test holds that the two agree."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.invariant.matrix import FACTORS, NO_EFFECT, REFUSED, SERVED, cases, refusal, sample  # noqa: E402

PAGE = ROOT / "docs" / "matrix.md"

HEAD = """\
# Settings in pairs

Two settings that work may not work together, and say nothing. So each of those below, and each pair of them, makes two
optimiser steps by the functions that a recipe's run is built with, on random models of two layers. What comes of them
is held against the plain path in float64: one rollout at a time, eager attention, all logits, autograd, adapters
multiplied out. Compared are the likeliest tokens of student and teacher with their log-probabilities, drift events,
weights and effective lengths, the loss, the gradients and their norm, and all weights after each step. How near is
near, by type of number, is in `tests/invariant/test_matrix.py`.

`make test-engines` runs all {count} cases; the ordinary suite {sample} pairs, drawn by a seed, that have every setting
but vLLM and `model.compile`.

This page is written by `make docs` from `tests/invariant/matrix.py`.

## Settings

| name | what it is |
|---|---|
"""


def page() -> str:
    """The whole page."""
    head = HEAD.format(count=len(list(cases())), sample=len(sample()))
    rows = "".join(f"| {name} | {factor.says} |\n" for name, factor in FACTORS.items())
    return head + rows + "\n" + "\n".join(_table()) + "\n"


def _table() -> Iterator[str]:
    numbers = {pair: i for i, pair in enumerate(_apart(), start=1)}
    yield "## Pairs\n\n= the numbers of the plain path · w likewise, with a warning · r refused by name\n"
    yield "| | " + " | ".join(FACTORS) + " |"
    yield "|---|" + "---|" * len(FACTORS)
    for i, name in enumerate(FACTORS):
        cells = [_cell(name, other, numbers) if j < i else "" for j, other in enumerate(FACTORS)]
        yield f"| **{name}** | " + " | ".join(cells) + " |"
    yield "\n| | pair | error | why, or the warning |\n|---|---|---|---|"
    for pair, number in numbers.items():
        names = " + ".join(name for name in FACTORS if name in pair)
        why = REFUSED.get(pair)
        cells = (f"r{number}", names, why.error, why.why) if why else (f"w{number}", names, "", NO_EFFECT[pair])
        yield f"| {' | '.join(cells)} |"


def _apart() -> list[frozenset[str]]:
    """The pairs that are not simply equal."""
    pairs = map(frozenset, combinations(FACTORS, 2))
    return [pair for pair in pairs if pair in REFUSED or pair in NO_EFFECT]


def _cell(one: str, other: str, numbers: dict[frozenset[str], int]) -> str:
    pair = frozenset({one, other})
    if pair == SERVED:
        return ""
    if pair in numbers:
        return f"{'r' if refusal(f'{one}+{other}') else 'w'}{numbers[pair]}"
    return "="


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
