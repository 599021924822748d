"""The evaluation on held-out problems that a run does now and then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from prune_opd.config import EvaluationSection
from prune_opd.distributed.world import World
from prune_opd.evaluation.evaluate import evaluate
from prune_opd.rollout.base import Sampler
from prune_opd.training.checkpoint import Totals
from prune_opd.types import Prompt


@dataclass
class HeldOut:
    """Evaluates the student on `problems`; without any there is nothing to evaluate."""

    problems: Sequence[Prompt]
    settings: EvaluationSection
    sampler: Sampler
    tokenizer: PreTrainedTokenizerBase
    totals: Totals
    console: Console
    world: World

    def due(self, done: int, *, last: bool) -> bool:
        """Whether the student is evaluated after this many steps."""
        return bool(self.problems) and (last or done % self.settings.every == 0)

    def record(self, step: int) -> dict[str, Any]:
        """Evaluate the student after this many steps; what is logged of it."""
        found = evaluate(self.sampler, self.tokenizer, self.problems, self.settings, world=self.world)
        self.totals.eval_seconds += found.seconds
        low, high = found.ci95
        self.console.print(
            f"  step {step}: held-out accuracy [bold]{found.accuracy:.3f}[/] (95% {low:.3f}-{high:.3f}, "
            f"Avg@{self.settings.k} on {len(self.problems)} problems), mean length {found.mean_length:.0f}, ended "
            f"{found.eos_rate:.0%}, {found.seconds:.0f} s",
            highlight=False,
        )
        return {
            "eval/accuracy": found.accuracy,
            "eval/ci95": found.ci95,
            "eval/per_problem": found.per_problem,
            "eval/mean_length": found.mean_length,
            "eval/eos_rate": found.eos_rate,
            "time/eval": found.seconds,
        }
