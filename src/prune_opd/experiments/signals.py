"""What could tell that a student has drifted, token by token: `probe` and the benchmark hold them side by side."""

from __future__ import annotations

from torch import Tensor

from prune_opd.core.overlap import mass_above, overlap_mass, shared_candidates, topk_overlap
from prune_opd.types import Rollouts, TeacherScores

OVERLAPS = (4, 8, 16)  # K of the overlap ratio, where the candidates that were kept go so far


def drift_signals(rollouts: Rollouts, scores: TeacherScores) -> dict[str, Tensor]:
    """(B, T) float64 for each signal, higher where it takes the token for more drifted; anything on padding.

    1 - overlap ratio of the K likeliest tokens · 1 - student mass on the shared ones · teacher nucleus: its mass on
    tokens above the sampled one (1 where that is not among its candidates) · teacher's surprise, -log q of the sampled
    token · Σ|log q - log p| of the sampled tokens so far (IW-OPD, arXiv 2606.22600, weighs by its share of the whole,
    which is known only afterwards) · entropy of the student less the teacher's · how many of the two likeliest tokens
    lie outside the other model's candidates (0, 1, 2).

    Needs `rollouts.student` and `rollouts.sampled_logprobs`; candidates of both as many, the likeliest first.
    """
    student, teacher, mask = rollouts.student, scores.topk, rollouts.response_mask
    assert student is not None and rollouts.sampled_logprobs is not None
    kept = student.ids.shape[-1]
    found = {
        f"1 - overlap, K = {k}": 1 - topk_overlap(student.ids[..., :k], teacher.ids[..., :k])
        for k in sorted({k for k in OVERLAPS if k < kept} | {kept})
    }
    apart = (scores.sampled_logprobs - rollouts.sampled_logprobs).abs().masked_fill(~mask, 0)
    outside = (
        ~shared_candidates(student.ids[..., :1], teacher.ids)
        + 0
        + ~shared_candidates(teacher.ids[..., :1], student.ids)
    )
    found |= {
        "1 - overlap mass": 1 - overlap_mass(student.ids, student.logprobs, teacher.ids),
        "teacher nucleus": mass_above(rollouts.response_ids, teacher.ids, teacher.logprobs).clamp(max=1),
        "teacher's surprise": -scores.sampled_logprobs,
        "sum of |log q - log p|": apart.double().cumsum(-1),
        "entropy gap": student.entropy - teacher.entropy,
        "top-1 outside": outside.squeeze(-1),
    }
    return {name: values.double() for name, values in found.items()}
