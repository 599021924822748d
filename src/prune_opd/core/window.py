"""The training window: one maximum response length for the whole next batch, steered by how far reliability reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Int


@dataclass(frozen=True)
class WindowChange:
    """One update: lengths in tokens before and after, the share of rollouts that hit, and misses in a row so far."""

    previous_length: int
    length: int
    hit_ratio: float
    misses: int


class TrainingWindow:
    """M of method.md §3.

        hit = mean_i 1[E_i ≥ max(min_len, M - margin)]
        hit ≥ hit_ratio:  M ← min(M + step, max_len), misses ← 0
        else:             misses ← misses + 1; after shrink_patience of them M ← max(M - step, min_len), misses ← 0

    All lengths in tokens. With hit_ratio = 0.1 it follows the 90th percentile of E, and grows by at most `step` per
    update. Raises ValueError for settings that cannot work.
    """

    def __init__(
        self,
        *,
        init_len: int,
        min_len: int,
        max_len: int,
        step: int,
        hit_ratio: float,
        margin: int,
        shrink_patience: int,
    ) -> None:
        if not 1 <= min_len <= init_len <= max_len:
            raise ValueError(
                f"the training window needs 1 <= min_len <= init_len <= max_len, got min_len={min_len}, "
                f"init_len={init_len}, max_len={max_len}; change the one that is out of order"
            )
        if step < 1 or margin < 0 or shrink_patience < 1 or not 0 < hit_ratio <= 1:
            raise ValueError(
                "the training window needs step >= 1, margin >= 0, shrink_patience >= 1 and 0 < hit_ratio <= 1, got "
                f"step={step}, margin={margin}, shrink_patience={shrink_patience}, hit_ratio={hit_ratio}"
            )
        self.min_len, self.max_len, self.step = min_len, max_len, step
        self.hit_ratio, self.margin, self.shrink_patience = hit_ratio, margin, shrink_patience
        self.length, self.misses = init_len, 0

    @property
    def hit_length(self) -> int:
        """A rollout hits when its effective length is at least this many tokens."""
        return max(self.min_len, self.length - self.margin)

    def update(self, effective_length: Int[Tensor, " B"]) -> WindowChange:
        """Take the effective lengths (B,) of one batch; sets and reports the next length. ValueError if it is empty."""
        if effective_length.numel() == 0:
            raise ValueError("the training window cannot be updated from an empty batch; skip the update instead")
        return self.steer(int((effective_length >= self.hit_length).sum()) / effective_length.numel())

    def steer(self, hit_ratio: float) -> WindowChange:
        """`update` for those who know only the share of rollouts whose effective length is at least `hit_length`."""
        previous = self.length
        if hit_ratio >= self.hit_ratio:
            self.length, self.misses = min(previous + self.step, self.max_len), 0
        else:
            self.misses += 1
            if self.misses >= self.shrink_patience:
                self.length, self.misses = max(previous - self.step, self.min_len), 0
        return WindowChange(previous, self.length, hit_ratio, self.misses)

    def state_dict(self) -> dict[str, Any]:
        """What changes over time; settings come from the recipe."""
        return {"length": self.length, "misses": self.misses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; raises ValueError when the length lies outside [min_len, max_len]."""
        if not self.min_len <= state["length"] <= self.max_len:
            raise ValueError(
                f"window length {state['length']} lies outside [{self.min_len}, {self.max_len}]; "
                "this state belongs to other window settings"
            )
        self.length, self.misses = int(state["length"]), int(state["misses"])


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
