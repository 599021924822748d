"""The embedded task: long chains of additions modulo 10, every step written out.

    prompt      Q a 3 b 5 c 9 :
    solution    b 3 + 5 = 8 c 8 + 9 = 7 \\boxed{ 7 } <eos>

A stand-in for long-horizon reasoning that a 0.4 M-parameter model can master on one CPU core: each step fetches an
operand from the prompt by its letter and adds it to the running total, an early slip spoils everything after it, and
the answer can be checked. Problems are unlimited; training and held-out problems never coincide, because the operands
themselves decide which split a problem belongs to.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "held_out"]

MIN_SUMS, MAX_SUMS = 10, 28
LABELS = [chr(ord("a") + i % 26) * (1 + i // 26) for i in range(MAX_SUMS + 1)]
FILLERS = (
    "so well now then okay hmm let me see wait next we have got this that is right maybe just add it up again "
    "carefully step by first second check yes no good fine here there which gives us the new total of and with "
    "plus another one more to do going on still left keep in mind before after that's sum value number digit "
    "chain part line think look back at what was were will be should must can could would if because since but "
    "or not also even really actually simply quite about around over under between through until while"
).split()
VOCABULARY = (
    ["<pad>", "<eos>", "Q", ":", "+", "=", "\\boxed{", "}"]
    + [str(d) for d in range(10)]
    + LABELS
    + sorted(set(FILLERS))
)


@dataclass(frozen=True)
class Problem:
    """One chain of additions: `operands` are digits, the answer is their sum modulo 10."""

    operands: tuple[int, ...]

    @property
    def prompt(self) -> str:
        pairs = zip(LABELS, self.operands, strict=False)
        return f"Q {' '.join(f'{label} {operand}' for label, operand in pairs)} :"

    @property
    def answer(self) -> str:
        return str(sum(self.operands) % 10)

    @property
    def steps(self) -> list[str]:
        """The worked steps, one string each, for example ``b 3 + 5 = 8``."""
        total, lines = self.operands[0], []
        for label, operand in zip(LABELS[1:], self.operands[1:], strict=False):
            lines.append(f"{label} {total} + {operand} = {(total + operand) % 10}")
            total = (total + operand) % 10
        return lines

    @property
    def solution(self) -> str:
        """The full worked solution without the end-of-sequence token."""
        return " ".join([*self.steps, f"\\boxed{{ {self.answer} }}"])


def sound_words(problem: Problem, words: Sequence[str]) -> int:
    """How many words of a response are sound: those up to its last one that goes on with the worked solution.

    Fillers are passed over, so a response that rambles and takes the thread up again is sound until then. What follows
    the sound words is the first wrong word, a ramble without return, or the first word past the answer.
    """
    solution, reached, sound = [*problem.solution.split(), "<eos>"], 0, 0
    for position, word in enumerate(words, start=1):
        if reached < len(solution) and word == solution[reached]:
            reached, sound = reached + 1, position
        elif word not in FILLERS:
            break
    return sound


def split_of(operands: tuple[int, ...]) -> Split:
    """The split a problem belongs to, decided by its operands alone: one in eight is held out."""
    return "held_out" if zlib.crc32(bytes(operands)) % 8 == 0 else "train"


def problems(split: Split, seed: int, *, min_sums: int = MIN_SUMS, max_sums: int = MAX_SUMS) -> Iterator[Problem]:
    """An endless stream of problems of `split`, reproducible from `seed`; chain lengths are uniform."""
    rng = random.Random(f"{split}-{seed}")
    while True:
        operands = tuple(rng.randrange(10) for _ in range(rng.randint(min_sums, max_sums) + 1))
        if split_of(operands) == split:
            yield Problem(operands)
