"""Train the students of the derail pairs, on which drift is real: part of `make assets`. Seeded, one thread, 8 minutes.

Both are the embedded teacher but for one thing: before any step of a solution they may lose the thread, by the word
`wait`, and ramble from there.

    derail-student    to the end, in eight words that the teacher never considers there
    derail-2-student  less clean: half of the time it rambles for a few words and takes the thread up again, now and
                      then at a wrong step; and part of what it considers there, the teacher considers too

A trace is learnt only where the thread is lost; elsewhere the teacher's log-probabilities are kept (all but that of the
word that loses it), or its top-k would change everywhere. One such word, not several: they would fill the student's
top-k at every step. The first phase overshoots; the others set the chance of the word right and bring the rest back.

The weights are kept in float16, so that both fit into 2 MB. `benchmarks/drift_signals.py` measures what came of it.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from make_assets import ASSETS, ParentLoss, batches, build_tokenizer, examine, train
from torch.nn.functional import cross_entropy
from transformers import Qwen3ForCausalLM

from prune_opd.data.tasks import FILLERS, LABELS, MAX_SUMS, MIN_SUMS, VOCABULARY, Problem

LOST = "wait"
RARE = FILLERS[-9:-1]  # the teacher never considers them
# Steps, learning rate; weights of losing the thread, of what is kept, and of the first words of steps.
PHASES = ((200, 1.5e-3, 4.0, 1.0, 0.0), (180, 6e-4, 1.0, 3.0, 1.0), (200, 4e-4, 1.0, 8.0, 1.0))


@dataclass(frozen=True)
class Derailment:
    """How the thread is lost. hazard: chance before each step · words: what is rambled in · returns: chance that it is
    for 2 to 8 words only, after which the thread is taken up again · misplaced: chance that this is at a wrong step."""

    hazard: float
    words: Sequence[str]
    returns: float
    misplaced: float

    def write(self, problem: Problem, rng: random.Random) -> str:
        """A solution in which the thread may be lost; a `Writer`."""
        written, total, i = [problem.prompt], problem.operands[0], 1
        while i < len(problem.operands):
            if rng.random() < self.hazard:
                written.append(LOST)
                if rng.random() >= self.returns:
                    ramble = rng.choices(self.words, k=330 if rng.random() < 0.15 else 50)
                    return " ".join([*written, *ramble])
                written += rng.choices(self.words, k=rng.randint(2, 8))
                if rng.random() < self.misplaced:
                    i = min(i + rng.randint(1, 4), len(problem.operands) - 1)
            digit = problem.operands[i]
            written.append(f"{LABELS[i]} {total} + {digit} = {(total + digit) % 10}")
            total, i = (total + digit) % 10, i + 1
        return " ".join([*written, f"\\boxed{{ {total} }} <eos>"])


MADE = {
    "derail-student": Derailment(hazard=0.08, words=RARE, returns=0.0, misplaced=0.0),
    "derail-2-student": Derailment(hazard=0.12, words=[*FILLERS[:3], *RARE[:3]], returns=0.5, misplaced=0.3),
}


def ids_of(words: Sequence[str]) -> torch.Tensor:
    """Token ids (W,) int64 of words of the vocabulary."""
    return torch.tensor([VOCABULARY.index(word) for word in words])


def derailment_loss(*, lose: float, keep: float, calibrate: float) -> ParentLoss:
    """Cross-entropy where the thread is lost or taken up again, with weights; elsewhere the squared distance to the
    parent's log-probs, but for the word that loses the thread."""
    onset, fillers, edges = ids_of([LOST]), ids_of(sorted({*FILLERS} - {LOST})), ids_of([*LABELS, "\\boxed{"])

    def loss(logits: torch.Tensor, parent_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        valid = labels[:, 1:] >= 0
        before = labels[:, :-1][valid]  # the token that was read last; -100 in the prompt
        logits, parent_logits, labels = (x[valid] for x in (logits[:, :-1], parent_logits[:, :-1], labels[:, 1:]))
        first, later, edge = (torch.isin(labels, ids) for ids in (onset, fillers, edges))
        resumed = edge & torch.isin(before, fillers)
        learnt = cross_entropy(logits, labels, reduction="none")
        kept = ~(first | later | resumed)
        others = torch.ones(logits.shape[-1], dtype=torch.bool).index_fill(0, onset, False)
        distance = (logits[kept].log_softmax(-1) - parent_logits[kept].log_softmax(-1))[:, others]
        total = (
            lose * learnt[first].sum()
            + 0.1 * learnt[later].sum()
            + learnt[resumed].sum()
            + calibrate * learnt[edge & ~resumed].sum()
            + keep * distance.square().mean(-1).sum()
        )
        return total / len(labels)

    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=ASSETS, help="the teacher is there, too")
    parser.add_argument("--only", choices=MADE, help="make one of them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, teacher = build_tokenizer(), args.output_dir / "teacher"
    measured = {}
    for name, derailment in MADE.items():
        if args.only not in (None, name):
            continue
        student = Qwen3ForCausalLM.from_pretrained(teacher, dtype=torch.float32)
        parent = copy.deepcopy(student).eval()
        torch.manual_seed(sum(map(ord, name)))
        for i, (steps, lr, lose, keep, calibrate) in enumerate(PHASES):
            data = batches(derailment.write, tokenizer, seed=77 + i, sums=(MIN_SUMS, MAX_SUMS))
            loss = derailment_loss(lose=lose, keep=keep, calibrate=calibrate)
            train(student, data, steps=steps, lr=lr, label=f"{name}[{i}]", parent=parent, parent_loss=loss)
        folder = args.output_dir / name
        shutil.rmtree(folder, ignore_errors=True)
        student.to(torch.float16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        kept = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        measured[name] = examine(kept, tokenizer, problems_count=100, k=8, label=name)
    table = args.output_dir / "pairs.json"
    found = json.loads(table.read_text(encoding="utf-8"))
    table.write_text(json.dumps(found | measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
