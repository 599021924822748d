"""Local compatibility of student and teacher: does the teacher still consider what the student considers?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from prune_opd.core.choices import DriftMetric


def compatibility(
    metric: DriftMetric,
    student_ids: Int[Tensor, "B T K"],
    student_logprobs: Float[Tensor, "B T K"],
    teacher_ids: Int[Tensor, "B T K"],
    teacher_logprobs: Float[Tensor, "B T K"],
) -> Float[Tensor, "B T"]:
    """What `pruning.threshold` is compared with, in [0, 1]: a position below it is a drift event.

    `teacher_top_p_accept` has no threshold (`nucleus_accept`); for it this is the overlap ratio, which is logged.
    """
    match metric:
        case "overlap_mass":
            return overlap_mass(student_ids, student_logprobs, teacher_ids)
        case _:
            return topk_overlap(student_ids, teacher_ids)


def shared_candidates(student_ids: Int[Tensor, "B T K"], teacher_ids: Int[Tensor, "B T J"]) -> Bool[Tensor, "B T K"]:
    """Which of the student's candidates are also among the teacher's. Ids within one position must be distinct."""
    shared = torch.zeros_like(student_ids, dtype=torch.bool)
    for teacher_id in teacher_ids.unbind(-1):  # so that there is never a (B, T, K, J)
        shared |= student_ids == teacher_id.unsqueeze(-1)
    return shared


def topk_overlap(student_ids: Int[Tensor, "B T K"], teacher_ids: Int[Tensor, "B T K"]) -> Float[Tensor, "B T"]:
    """Overlap ratio O_t = |S_t ∩ T_t| / K, float32 in [0, 1]. Not differentiable.

    The count is divided, not averaged, so that 7 of 10 equals 0.7 and `overlap < 0.7` is no event.
    Source: method.md §2 (arXiv 2605.07804).
    """
    return shared_candidates(student_ids, teacher_ids).sum(-1) / torch.tensor(
        student_ids.shape[-1], dtype=torch.float32, device=student_ids.device
    )


def overlap_mass(
    student_ids: Int[Tensor, "B T K"], student_logprobs: Float[Tensor, "B T K"], teacher_ids: Int[Tensor, "B T K"]
) -> Float[Tensor, "B T"]:
    """Student probability mass on the shared ids, Σ_{v ∈ S_t ∩ T_t} p_t(v), in [0, 1].

    Unlike the overlap ratio it knows that disagreeing on the sixteenth candidate is not drift. Ours: the paper states
    the missing mass as a limit of its metric. Swap the arguments for the teacher's mass on the shared ids.
    """
    shared = shared_candidates(student_ids, teacher_ids)
    return student_logprobs.exp().masked_fill(~shared, 0).sum(-1)


def mass_above(
    response_ids: Int[Tensor, "B T"], teacher_ids: Int[Tensor, "B T K"], teacher_logprobs: Float[Tensor, "B T K"]
) -> Float[Tensor, "B T"]:
    """Teacher probability, float64, of the tokens that it ranks above the sampled one; +inf if y_t is not among the K.

    Teacher ids need not be sorted; of equally likely tokens the one that is listed first ranks first.
    """
    logprobs, order = teacher_logprobs.sort(dim=-1, descending=True, stable=True)
    probs = logprobs.double().exp()
    above = probs.cumsum(-1) - probs
    sampled = teacher_ids.gather(-1, order) == response_ids.unsqueeze(-1)
    return above.masked_fill(~sampled, torch.inf).amin(-1)


def nucleus_accept(
    response_ids: Int[Tensor, "B T"],
    teacher_ids: Int[Tensor, "B T K"],
    teacher_logprobs: Float[Tensor, "B T K"],
    top_p: float,
) -> Bool[Tensor, "B T"]:
    """True where the sampled token y_t lies in the teacher's nucleus: the smallest set of tokens with mass ≥ top_p.

    A token is inside when the mass ranked above it is still below top_p. When the K returned tokens hold less than
    top_p together, all K are the nucleus. Source: method.md §2, the stricter control.
    """
    return mass_above(response_ids, teacher_ids, teacher_logprobs) < top_p
