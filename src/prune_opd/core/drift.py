"""Drift: events along a rollout, the reliability that they use up, and the weights that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class DriftReport:
    """What drift did to each rollout.

    reliability (B, T) float32, R_t, 0 on padding · weight (B, T) float32, w_t = R_t + w_base, 0 on padding ·
    effective_length (B,) int64, E = number of valid positions with R_t > eps · onset (B,) int64, position of the
    first event, -1 where there was none.
    """

    reliability: Float[Tensor, "B T"]
    weight: Float[Tensor, "B T"]
    effective_length: Int[Tensor, " B"]
    onset: Int[Tensor, " B"]


class DriftMonitor:
    """Streaming twin of `drift_report`: feed a rollout's positions in chunks of any size, ask who is spent.

    The state is the number of events of each rollout, all that the rule needs: C_t = Σ_{i≤t} B_i (inclusive, the
    event's own position is already decayed) and R_t = clip(1 - w_drop · C_t, 0, 1). R_t is computed in float64, since
    float32 can leave a residue above eps where 1/w_drop events should leave exactly zero.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        w_drop: float = 0.01,
        w_base: float = 0.5,
        eps: float = 1e-8,
        device: torch.device | str | None = None,
    ) -> None:
        self.w_drop, self.w_base, self.eps = w_drop, w_base, eps
        self.events_so_far = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.positions_so_far = 0
        self.onset = torch.full((batch_size,), -1, dtype=torch.long, device=device)
        self.effective_length = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.reliability: list[Tensor] = []
        self.weight: list[Tensor] = []

    def update(self, events: Bool[Tensor, "B t"], mask: Bool[Tensor, "B t"]) -> Bool[Tensor, " B"]:
        """Take the next t positions; returns (B,) bool, true where reliability is spent (R ≤ eps)."""
        events = events & mask
        counts = self.events_so_far.unsqueeze(-1) + events.long().cumsum(-1)
        reliability = self._reliability(counts)
        self.effective_length = self.effective_length + ((reliability > self.eps) & mask).sum(-1)
        first = events.long().argmax(-1) + self.positions_so_far if events.shape[-1] else self.onset
        self.onset = torch.where((self.onset < 0) & events.any(-1), first, self.onset)
        self.events_so_far = self.events_so_far + events.sum(-1)
        self.positions_so_far += events.shape[-1]
        self.reliability.append(reliability.masked_fill(~mask, 0).float())
        self.weight.append((reliability + self.w_base).masked_fill(~mask, 0).float())
        return self._reliability(self.events_so_far) <= self.eps

    def report(self) -> DriftReport:
        """Everything seen so far, as `drift_report` of the concatenated chunks would give it."""
        empty = torch.zeros(len(self.onset), 0, device=self.onset.device)
        return DriftReport(
            torch.cat([empty, *self.reliability], dim=-1),
            torch.cat([empty, *self.weight], dim=-1),
            self.effective_length,
            self.onset,
        )

    def _reliability(self, counts: Tensor) -> Tensor:
        return (1 - self.w_drop * counts.double()).clamp(0, 1)


def drift_report(
    events: Bool[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    w_drop: float = 0.01,
    w_base: float = 0.5,
    eps: float = 1e-8,
) -> DriftReport:
    """Reliability, weights and effective lengths of whole rollouts (no gradient).

    events: true where compatibility fell short; ignored on padding. mask: valid response positions.
    w_drop: reliability lost per event. w_base: weight kept when reliability is gone; it does not count towards the
    effective length. eps: reliability at or below it is spent. Source: method.md §2.
    """
    monitor = DriftMonitor(len(events), w_drop=w_drop, w_base=w_base, eps=eps, device=events.device)
    monitor.update(events, mask)
    return monitor.report()
