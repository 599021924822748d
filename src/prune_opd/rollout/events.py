"""Which positions are drift events, by the settings of a recipe."""

from __future__ import annotations

from torch import Tensor

from prune_opd.config import PruningSection
from prune_opd.core.drift import repetition_events
from prune_opd.core.overlap import compatibility, nucleus_accept
from prune_opd.types import TopK


def drift_events(response_ids: Tensor, mask: Tensor, student: TopK, teacher: TopK, pruning: PruningSection) -> Tensor:
    """(B, T) bool: positions where student and teacher are not compatible under `pruning.metric`, or loops if guarded.

    response_ids (B, T), mask (B, T) valid positions. An event depends on its own position and, with the repetition
    guard, on tokens before it, so chunks of a rollout give the events of the whole.
    """
    assert pruning.threshold != "auto", "a threshold is calibrated before the first step"
    if pruning.metric == "teacher_top_p_accept":
        events = ~nucleus_accept(response_ids, teacher.ids, teacher.logprobs, pruning.teacher_top_p)
    else:
        candidates = student.ids, student.logprobs, teacher.ids, teacher.logprobs
        events = compatibility(pruning.metric, *candidates) < pruning.threshold
    guard = pruning.repetition
    if guard.enable:
        events |= repetition_events(response_ids, mask, max_period=guard.max_period, min_run=guard.min_run)
    return events & mask
