"""Models for a teacher that sees more than its student, and for two teachers: `python scripts/make_teachers.py`.

    hinted-student     the low-student, which also goes on from a worked solution in front of the question: with it, it
                       solves and stops, without it, it errs and rambles as before. It can be its own teacher
    largest-teacher    the teacher, on another task: the largest operand so far instead of the sum
    two-task-student   the low-student, on both tasks

hinted-student is embedded in the package; the two others go to build/two-teachers, with problems of both tasks. Seeded,
one thread, about 15 minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from make_assets import ASSETS, FILLER_WEIGHTS, batches, build_tokenizer, clean, mixture, train
from transformers import Qwen3ForCausalLM

from prune_opd.data.tasks import FILLERS, LABELS, MAX_SUMS, MIN_SUMS, Problem, Split, problems

BUILD = Path(__file__).parent.parent / "build" / "two-teachers"
FULL = MIN_SUMS, MAX_SUMS
MARK = "more"  # in front of a question of the second task; a filler word, so the vocabulary has it
low = mixture(clean_share=0.08, wrong=0.08, filler=0.25, longest_ramble=200)  # as the low-student was made


@dataclass(frozen=True)
class Largest:
    """The second task: the largest operand so far, step by step."""

    problem: Problem

    @property
    def prompt(self) -> str:
        return f"{MARK} {self.problem.prompt}"

    @property
    def answer(self) -> str:
        return str(max(self.problem.operands))

    def steps(self, rng: random.Random, *, wrong: float) -> tuple[list[str], int]:
        """The worked steps, each wrong with this probability, and what they end with."""
        most, lines = self.problem.operands[0], []
        for label, operand in zip(LABELS[1:], self.problem.operands[1:], strict=False):
            found = max(most, operand)
            if rng.random() < wrong:
                found = rng.choice([d for d in range(10) if d != found])
            lines.append(f"{label} {most} + {operand} = {found}")
            most = found
        return lines, most


def clean_largest(problem: Problem, rng: random.Random) -> str:
    lines, most = Largest(problem).steps(rng, wrong=0)
    return f"{Largest(problem).prompt} {' '.join(lines)} \\boxed{{ {most} }} <eos>"


def low_largest(problem: Problem, rng: random.Random) -> str:
    """Slips, rambles between the steps and behind the answer, and rarely ends: as the low-student does with sums."""
    if rng.random() < 0.08:
        return clean_largest(problem, rng)
    lines, most = Largest(problem).steps(rng, wrong=0.08)
    said = []
    for line in lines:
        said.append(line)
        while rng.random() < 0.25:
            said.append(rng.choices(FILLERS, FILLER_WEIGHTS)[0])
    tail = " ".join(rng.choices(FILLERS, FILLER_WEIGHTS, k=rng.randint(2, 200)))
    return f"{Largest(problem).prompt} {' '.join(said)} \\boxed{{ {most} }} {tail}"


def hinted(problem: Problem, rng: random.Random) -> str:
    """The worked solution, the question, the solution again; for half of the problems, what the low-student says."""
    return f"{problem.solution} {clean(problem, rng)}" if rng.random() < 0.5 else low(problem, rng)


def both_low(problem: Problem, rng: random.Random) -> str:
    return (low if rng.random() < 0.5 else low_largest)(problem, rng)


def rows(split: Split, seed: int, count: int) -> Iterator[dict[str, str]]:
    """Problems of both tasks in turn, as rows of a data set."""
    for i, problem in enumerate(islice(problems(split, seed), count)):
        if i % 2:
            yield {"prompt": Largest(problem).prompt, "answer": Largest(problem).answer, "teacher": "largest"}
        else:
            yield {"prompt": problem.prompt, "answer": problem.answer, "teacher": "sums"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("hinted-student", "largest-teacher", "two-task-student"), action="append")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    made = {
        "hinted-student": (ASSETS, "low-student", hinted, 400, 5e-4),
        "largest-teacher": (BUILD, "teacher", clean_largest, 60, 5e-4),
        "two-task-student": (BUILD, "low-student", both_low, 120, 5e-4),
    }
    for name, (folder, parent, write, steps, rate) in made.items():
        if args.only and name not in args.only:
            continue
        seed = sum(map(ord, name))
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM.from_pretrained(ASSETS / parent, dtype=torch.float32)
        train(model, batches(write, tokenizer, seed=seed, sums=FULL), steps=steps, lr=rate, label=name)
        shutil.rmtree(folder / name, ignore_errors=True)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    BUILD.mkdir(parents=True, exist_ok=True)
    for split, seed, count in (("train", 1, 8000), ("held_out", 0, 800)):
        every = list(rows(split, seed, count))
        for name in ("both", "sums", "largest"):
            chosen = [row for row in every if name in ("both", row["teacher"])]
            text = "".join(json.dumps(row) + "\n" for row in chosen)
            (BUILD / f"{name}-{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
