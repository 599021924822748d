"""Tasks in words for a real language model: short problems with a worked solution and an answer that can be checked.

    running_sum     What is 7 + 5 + 9?
                    We begin at 7. Adding 5 to 7 gives 12. Next is 9, and 12 plus 9 is 21. So the sum is \\boxed{21}.
    count_animals   How many of these are animals: dog, lamp, cow?
                    Let's go through the list. First is dog, which is an animal, so the count is 1. ...

Each sentence is one of several phrasings, drawn anew, so that a model which has learnt the task still has a choice of
words at every step. As with `tasks.problems`, problems never end, and the problem itself decides its split.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from prune_opd.data.tasks import Split

ANIMALS = (
    "dog cat horse cow pig sheep goat lion tiger bear wolf fox rabbit mouse deer elephant monkey zebra camel donkey "
    "frog snake duck eagle owl shark whale dolphin turtle chicken"
).split()
THINGS = (
    "chair table hammer spoon lamp car boat shirt hat shoe book pencil bottle cup knife phone clock door window bread "
    "guitar rope brick ladder bucket pillow mirror candle carpet basket"
).split()
HELD_OUT_SHARE = 8  # one in so many


@dataclass(frozen=True)
class RunningSum:
    """A sum of one-digit numbers."""

    numbers: tuple[int, ...]

    LENGTHS: ClassVar = (6, 10)
    QUESTIONS: ClassVar = ("What is {}?", "Work out {}.", "Add these up: {}.")
    FIRST: ClassVar = ("We begin at {}.", "The first number is {}.", "Start with {}.")
    NEXT: ClassVar = (
        "Adding {x} to {t} gives {u}.",
        "Next is {x}, and {t} plus {x} is {u}.",
        "Then {t} + {x} = {u}.",
        "With {x} more, {t} becomes {u}.",
    )
    LAST: ClassVar = (
        "The answer is \\boxed{{{}}}.",
        "So the sum is \\boxed{{{}}}.",
        "That makes \\boxed{{{}}} in total.",
    )

    @classmethod
    def draw(cls, rng: random.Random) -> RunningSum:
        """A problem with a number of terms uniform in `LENGTHS`."""
        return cls(tuple(rng.randint(1, 9) for _ in range(rng.randint(*cls.LENGTHS))))

    @property
    def key(self) -> str:
        """What tells this problem from all others."""
        return " + ".join(map(str, self.numbers))

    @property
    def question(self) -> str:
        """The problem in words; which words follows from the problem."""
        return self.QUESTIONS[zlib.crc32(b"q" + self.key.encode()) % len(self.QUESTIONS)].format(self.key)

    @property
    def answer(self) -> str:
        return str(sum(self.numbers))

    def solution(self, rng: random.Random, *, slip: float = 0.0) -> str:
        """The worked solution in phrasings drawn from `rng`; each sum is wrong with probability `slip`."""
        total, said = self.numbers[0], [rng.choice(self.FIRST).format(self.numbers[0])]
        for number in self.numbers[1:]:
            result = total + number
            if rng.random() < slip:
                result = max(1, result + rng.choice((-10, -2, -1, 1, 2, 10)))
            said.append(rng.choice(self.NEXT).format(x=number, t=total, u=result))
            total = result
        return " ".join([*said, rng.choice(self.LAST).format(total)])


@dataclass(frozen=True)
class CountAnimals:
    """A list of words, some of them animals."""

    words: tuple[str, ...]

    LENGTHS: ClassVar = (5, 9)
    FIRST: ClassVar = ("Let's go through the list.", "We look at one word after the other.", "One by one:")
    NEXT: ClassVar = ("Next is {}, ", "Then comes {}, ", "After that there is {}, ")
    YES: ClassVar = ("which is an animal, so the count is {}.", "an animal, which makes {}.")
    NO: ClassVar = ("which is not an animal, so the count stays {}.", "no animal, so still {}.")

    @classmethod
    def draw(cls, rng: random.Random) -> CountAnimals:
        """A problem with a number of words uniform in `LENGTHS`; each is an animal as often as not."""
        kinds = rng.choices((ANIMALS, THINGS), k=rng.randint(*cls.LENGTHS))
        return cls(tuple(rng.choice(kind) for kind in kinds))

    @property
    def key(self) -> str:
        """What tells this problem from all others."""
        return ", ".join(self.words)

    @property
    def question(self) -> str:
        """The problem in words."""
        return f"How many of these are animals: {self.key}?"

    @property
    def answer(self) -> str:
        return str(sum(word in ANIMALS for word in self.words))

    def solution(self, rng: random.Random, *, slip: float = 0.0) -> str:
        """The worked solution in phrasings drawn from `rng`; each word is misjudged with probability `slip`."""
        count, said = 0, [rng.choice(self.FIRST)]
        for place, word in enumerate(self.words):
            is_animal = (word in ANIMALS) != (rng.random() < slip)
            count += is_animal
            head = f"First is {word}, " if place == 0 else rng.choice(self.NEXT).format(word)
            said.append(head + rng.choice(self.YES if is_animal else self.NO).format(count))
        return " ".join([*said, f"The answer is \\boxed{{{count}}}."])


WorkedProblem = RunningSum | CountAnimals
WORKED_TASKS: dict[str, type[RunningSum] | type[CountAnimals]] = {
    "running_sum": RunningSum,
    "count_animals": CountAnimals,
}


def worked_problems(task: str, split: Split, seed: int) -> Iterator[WorkedProblem]:
    """An endless stream of problems of `split`, reproducible from `seed`; one problem in eight is held out."""
    rng = random.Random(f"{task}-{split}-{seed}")
    while True:
        problem = WORKED_TASKS[task].draw(rng)
        if (zlib.crc32(problem.key.encode()) % HELD_OUT_SHARE == 0) == (split == "held_out"):
            yield problem
