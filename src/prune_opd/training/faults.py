"""Steps that met NaN and are skipped, and gradient norms out of line."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from prune_opd.errors import NonFiniteError
from prune_opd.training.checkpoint import Totals, latest_checkpoint
from prune_opd.training.files import append_json
from prune_opd.types import Prompt

SPIKE = 10.0
"""A gradient norm this many times the usual one is logged as a spike."""
USUAL_AFTER = 20  # steps whose norms make up the usual one, before which nothing is called a spike


@dataclass
class Faults:
    """Counts what goes wrong in the steps of a run. note: says a warning · writes: whether this rank keeps rollouts."""

    run_dir: Path
    totals: Totals
    limit: int
    tokenizer: PreTrainedTokenizerBase
    note: Callable[[str], None]
    writes: bool

    def skip(self, step: int, prompts: Sequence[Prompt], error: NonFiniteError) -> None:
        """Count a step that met NaN and keep its rollouts for a look. prompts: of each of the step's rollouts."""
        if self.writes:
            write_skipped(self.run_dir / "skipped.jsonl", step, prompts, error, self.tokenizer)
        self.totals.skipped_steps += 1
        self.totals.student_tokens += error.rollouts.generated if error.rollouts else 0  # they were paid for
        self.note(f"  {error}: step skipped, {self.totals.skipped_steps} so far")

    @property
    def too_many(self) -> bool:
        """Whether more than `training.max_skipped_steps` of the run were skipped."""
        return self.totals.skipped_steps > self.limit

    def final(self, error: NonFiniteError) -> NonFiniteError:
        """The error that stops a run with too many skipped steps; `error` is that of the last one."""
        last_good, _ = latest_checkpoint(self.run_dir / "checkpoints")
        kept = f"the last good checkpoint is {last_good}" if last_good else "no checkpoint had been written yet"
        return NonFiniteError(
            f"{error}. It is skipped step {self.totals.skipped_steps}, and training.max_skipped_steps = {self.limit}: "
            f"training stopped; {kept}. The rollouts are in {self.run_dir / 'skipped.jsonl'}; lower "
            "training.learning_rate, or try training.bf16 = false"
        )

    def watch_norm(self, step: int, norm: float) -> float | None:
        """Say so when a gradient norm is a spike; returns what was usual until now."""
        totals = self.totals
        usual = totals.usual_grad_norm
        if usual is not None and totals.updates >= USUAL_AFTER and norm > SPIKE * usual:
            self.note(f"  step {step}: the gradient norm is {norm:.3g}, {norm / usual:.0f} times the usual {usual:.3g}")
        totals.usual_grad_norm = running_norm(usual, norm, totals.updates)
        totals.updates += 1
        return usual


def write_skipped(
    path: Path, step: int, prompts: Sequence[Prompt], error: NonFiniteError, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Add the rollouts with a NaN or an infinity to skipped.jsonl, or all of the batch when no single one has it.

    prompts: of each of the step's rollouts.
    """
    rollouts = error.rollouts
    if rollouts is None:
        return
    rows = error.rows.nonzero().flatten().tolist() if error.rows is not None else range(len(error.numbers))
    for row in rows:
        number = error.numbers[row]
        ids = rollouts.response_ids[row, : rollouts.lengths[row]].tolist()
        append_json(
            path,
            {
                "step": step,
                "reason": str(error),
                "rollout": number,
                "source": prompts[number].source,
                "prompt": prompts[number].text,
                "response": tokenizer.decode(ids),
                "prompt_ids": list(prompts[number].token_ids),
                "response_ids": ids,
            },
        )


def running_norm(usual: float | None, norm: float, steps: int) -> float | None:
    """The running geometric mean of gradient norms after one more; `steps` were in it. A norm of 0 changes nothing."""
    if norm == 0:
        return usual
    if usual is None:
        return norm
    return math.exp(math.log(usual) + (math.log(norm) - math.log(usual)) / min(steps + 1, USUAL_AFTER))
