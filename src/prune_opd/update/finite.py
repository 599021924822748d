"""No step is trained on NaN: what student and teacher said of a batch is looked at before anything is made of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prune_opd.distributed.world import World
from prune_opd.errors import NonFiniteError
from prune_opd.types import Rollouts, TeacherScores


def check_finite(step: int, numbers: Sequence[int], rollouts: Rollouts, scores: TeacherScores, world: World) -> None:
    """NonFiniteError where student or teacher said NaN or infinite numbers on kept tokens; on all ranks alike."""
    _check_student(step, numbers, rollouts, world)
    _check_teacher(step, numbers, rollouts, scores, world)


def _check_student(step: int, numbers: Sequence[int], rollouts: Rollouts, world: World) -> None:
    """NonFiniteError with the rollouts whose student top-k (B, T, K) has NaN on a kept token; on all ranks alike.

    One NaN or +inf among the logits of a position makes all its log-probabilities NaN, so the top-k shows it. -inf is
    a forbidden token and fine, except as the likeliest one.
    """
    assert rollouts.student is not None
    logprobs = rollouts.student.logprobs
    bad = logprobs.isnan().any(-1) | ~logprobs[..., 0].isfinite()
    _refuse(step, "student", bad & rollouts.response_mask, numbers, rollouts, world)


def _check_teacher(step: int, numbers: Sequence[int], rollouts: Rollouts, scores: TeacherScores, world: World) -> None:
    """The same for the teacher: NaN or +inf at its top-k, the student's candidates or the sampled token."""
    topk = scores.topk.logprobs
    bad = ~topk[..., 0].isfinite()
    for logprobs in (topk, scores.candidate_logprobs, scores.sampled_logprobs.unsqueeze(-1)):
        bad = bad | (logprobs.isnan() | (logprobs == torch.inf)).any(-1)
    _refuse(step, "teacher", bad & rollouts.response_mask, numbers, rollouts, world)


def _refuse(step: int, whose: str, bad: Tensor, numbers: Sequence[int], rollouts: Rollouts, world: World) -> None:
    count = int(bad.sum())
    row, position = bad.nonzero()[0].tolist() if count else (0, 0)
    seen = [found for found in world.gather((count, numbers[row], position) if count else None) if found]
    if seen:
        _, rollout, position = min(seen, key=lambda found: found[1])
        raise NonFiniteError(
            f"step {step}: the {whose}'s logits are NaN or infinite at {sum(c for c, _, _ in seen)} tokens, first in "
            f"rollout {rollout} at token {position}; the weights were not updated",
            rollouts=rollouts,
            numbers=numbers,
            rows=bad.any(-1),
        )
