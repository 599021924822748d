"""No step is trained on NaN: what student and teacher said of a batch is looked at before anything is made of it."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_opd.errors import NonFiniteError
from prune_opd.types import Rollouts, TeacherScores


def check_student(step: int, rollouts: Rollouts) -> None:
    """NonFiniteError with the rollouts whose student top-k (B, T, K) has NaN on a kept token.

    One NaN or +inf among the logits of a position makes all its log-probabilities NaN, so the top-k shows it. -inf is
    a forbidden token and fine, except as the likeliest one.
    """
    assert rollouts.student is not None
    logprobs = rollouts.student.logprobs
    bad = logprobs.isnan().any(-1) | ~logprobs[..., 0].isfinite()
    _refuse(step, "student", bad & rollouts.response_mask, rollouts)


def check_teacher(step: int, rollouts: Rollouts, scores: TeacherScores) -> None:
    """The same for the teacher: NaN or +inf at its top-k, the student's candidates or the sampled token."""
    topk = scores.topk.logprobs
    bad = ~topk[..., 0].isfinite()
    for logprobs in (topk, scores.candidate_logprobs, scores.sampled_logprobs.unsqueeze(-1)):
        bad = bad | (logprobs.isnan() | (logprobs == torch.inf)).any(-1)
    _refuse(step, "teacher", bad & rollouts.response_mask, rollouts)


def _refuse(step: int, whose: str, bad: Tensor, rollouts: Rollouts) -> None:
    if bad.any():
        row, position = bad.nonzero()[0].tolist()
        raise NonFiniteError(
            f"step {step}: the {whose}'s logits are NaN or infinite at {int(bad.sum())} tokens, first in rollout {row} "
            f"at token {position}; the weights were not updated",
            rollouts=rollouts,
            rows=bad.any(-1),
        )
