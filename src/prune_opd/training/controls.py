"""Controls: what a saving of Prune-OPD must be held against. They are no part of the method; `compare` runs them.

A saving proves something about drift only if a plain length schedule, or pruning as many tokens blindly, would not have
given it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prune_opd.core.window import WindowChange
from prune_opd.distributed.world import ALONE, World
from prune_opd.rollout.base import rollout_uniforms

RANDOM_TOKENS_STREAM = 3  # of random numbers; training samples from 0, evaluation from 1, audits from 2


class LengthSchedule:
    """Stands in for `TrainingWindow` with lengths that were fixed beforehand, in tokens, one for each step.

    After the last of them the length stays. `update` ignores drift, and reports as hits the rollouts that were reliable
    to the very end.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths, self.steps_done = list(lengths), 0

    @property
    def length(self) -> int:
        """The length of the step that comes next."""
        return self.lengths[min(self.steps_done, len(self.lengths) - 1)]

    @property
    def hit_length(self) -> int:
        """A rollout hits when its effective length is at least this many tokens."""
        return self.length

    def update(self, effective_length: Tensor) -> WindowChange:
        """See `TrainingWindow.update`; effective_length (B,)."""
        return self.steer((effective_length >= self.hit_length).double().mean().item())

    def steer(self, hit_ratio: float) -> WindowChange:
        """See `TrainingWindow.steer`."""
        previous = self.length
        self.steps_done += 1
        return WindowChange(previous, self.length, hit_ratio, misses=0)

    def state_dict(self) -> dict[str, Any]:
        """What changes over time; the lengths come from the recipe."""
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.steps_done = int(state["steps_done"])


def linear_ramp(start: int, end: int, steps: int) -> list[int]:
    """`steps` lengths from `start` to `end`, both included, in equal increments rounded to whole tokens."""
    return [round(start + (end - start) * i / max(steps - 1, 1)) for i in range(steps)]


def random_tokens(
    mask: Tensor, count: int, *, seed: int, step: int, numbers: Sequence[int], world: World = ALONE
) -> Tensor:
    """(B, T) float32: 1 on `count` valid tokens drawn without replacement, 0 elsewhere; on all if there are fewer.

    mask (B, T) bool; numbers: which of the step's rollouts these are, while `world` has the others. The draw depends on
    (seed, step) and on each token's place alone, whatever the number of ranks.
    """
    ticket = rollout_uniforms(seed, step, numbers, mask.shape[1], stream=RANDOM_TOKENS_STREAM).to(mask.device)
    everyone = torch.cat(world.gather(ticket[mask].cpu()))
    if count >= len(everyone):
        return mask.float()
    return (mask & (ticket <= everyone.kthvalue(count).values.to(mask.device))).float()
