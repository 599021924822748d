"""Drift: events along a rollout, the reliability that they use up, and the weights that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

SAFE_SHARE = 0.9
"""A threshold is safe if it leaves at least this share of the responses that should not be cut reliable to the end."""


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
    """Streaming twin of `drift_report`: feed rollouts' positions in chunks of any size, ask who is spent.

    The state is the number of events of each rollout, all that the rule needs: C_t = Σ_{i≤t} B_i (inclusive, the
    event's own position is already decayed) and R_t = clip(1 - w_drop · C_t, 0, 1). R_t is computed in float64, since
    float32 can leave a residue above eps where 1/w_drop events should leave exactly zero.

    `onset` (B,) and `effective_length` (B,) are those of `DriftReport`, so far; `spent_at` (B,) int64 is the number of
    positions up to and including the event that spent reliability (R ≤ eps), -1 while some is left.
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
        self.positions_so_far = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.effective_length = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.onset = torch.full((batch_size,), -1, dtype=torch.long, device=device)
        self.spent_at = torch.full((batch_size,), -1, dtype=torch.long, device=device)
        self.chunks: list[tuple[Tensor, Tensor, Tensor]] = []  # rollout, position, reliability of valid positions

    def update(
        self, events: Bool[Tensor, "R t"], mask: Bool[Tensor, "R t"], rows: Int[Tensor, " R"] | None = None
    ) -> Bool[Tensor, " R"]:
        """Take the next t positions; returns (R,) bool, true where reliability is spent.

        Without `rows` the chunk is of all B rollouts. With `rows` (R,), distinct, it is of these rollouts only, each of
        which goes on where it was; then chunks are right-padded, and a rollout advances by its valid positions.
        """
        everyone = rows is None
        rows = torch.arange(len(self.onset), device=self.onset.device) if rows is None else rows
        events = events & mask
        counts = self.events_so_far[rows].unsqueeze(-1) + events.long().cumsum(-1)
        reliability = (1 - self.w_drop * counts.double()).clamp(0, 1)
        spent = (reliability <= self.eps) & mask
        here = self.positions_so_far[rows]
        self.effective_length[rows] += (~spent & mask).sum(-1)
        self.onset[rows] = _first(events, here, known=self.onset[rows])
        self.spent_at[rows] = _first(spent, here + 1, known=self.spent_at[rows])
        chunk, column = mask.nonzero(as_tuple=True)
        self.chunks.append((rows[chunk], here[chunk] + column, reliability[mask]))
        self.events_so_far[rows] += events.sum(-1)
        self.positions_so_far[rows] += events.shape[-1] if everyone else mask.sum(-1)
        return (1 - self.w_drop * self.events_so_far[rows].double()).clamp(0, 1) <= self.eps

    def report(self) -> DriftReport:
        """Everything seen so far, as `drift_report` of the concatenated chunks would give it."""
        width = int(self.positions_so_far.max()) if len(self.onset) else 0
        reliability = torch.zeros(len(self.onset), width, dtype=torch.float64, device=self.onset.device)
        weight = torch.zeros_like(reliability)
        for rollout, position, value in self.chunks:
            reliability[rollout, position] = value
            weight[rollout, position] = value + self.w_base
        return DriftReport(reliability.float(), weight.float(), self.effective_length.clone(), self.onset.clone())


def _first(happened: Tensor, offset: Tensor, *, known: Tensor) -> Tensor:
    """(R,) offset + index of the first true of happened (R, t), where there is one and none is known (-1) yet."""
    if happened.shape[-1] == 0:
        return known
    return torch.where((known < 0) & happened.any(-1), happened.long().argmax(-1) + offset, known)


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


def repetition_events(
    response_ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, max_period: int, min_run: int
) -> Bool[Tensor, "B T"]:
    """True where a rollout loops: each of its last `min_run` tokens equals the token some p <= max_period before it.

    Causal: position t looks back min_run - 1 + max_period tokens at most. Student and teacher agree well inside a loop,
    so overlap takes it for reliable. Ours; the paper leaves it open.
    """
    looping = torch.zeros_like(mask)
    for period in range(1, min(max_period, mask.shape[-1] - 1) + 1):
        same = (response_ids[:, period:] == response_ids[:, :-period]) & mask[:, period:] & mask[:, :-period]
        run = torch.nn.functional.pad(same.long().cumsum(-1), (min_run, 0))
        looping[:, period:] |= run[:, min_run:] - run[:, :-min_run] == min_run
    return looping
