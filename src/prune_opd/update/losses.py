"""Which tensors the chosen objective needs of the student, and its sums over a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from prune_opd.config import ObjectiveSection
from prune_opd.core.ends import merge_asked, with_ends
from prune_opd.core.head import OutputHead, candidate_logprobs, over_vocabulary
from prune_opd.core.objective import (
    LossSums,
    candidates,
    divergence_terms,
    policy_gradient,
    sampled_token_loss,
    topk_reverse_kl,
    weighted_mean,
)
from prune_opd.models.packing import Packed
from prune_opd.teachers.base import Teacher
from prune_opd.types import Rollouts, TeacherScores


@dataclass(frozen=True)
class StudentTerms:
    """What a loss needs of the student at N tokens, with gradient.

    candidates (N, C): log-probs of the objective's candidates, of which `counted` (N, C) bool count; or, where the loss
    runs over the whole vocabulary, divergences (N,) from the teacher, and None · sampled (N,): log-probs of the sampled
    tokens.
    """

    candidates: Tensor
    counted: Tensor | None
    sampled: Tensor


def student_terms(
    head: OutputHead,
    hidden: Tensor,
    part: Packed,
    rollouts: Rollouts,
    scores: TeacherScores,
    teacher: Teacher,
    objective: ObjectiveSection,
    *,
    vocab_size: int,
    ends: Sequence[int] = (),
    liger: bool = False,
) -> StudentTerms:
    """Of hidden states (N, H) at the kept tokens of a micro-batch, without ever holding an (N, V) tensor.

    ends: ids that count as one action, here and in the teacher's scores (core/ends.py) · liger: the candidates'
    log-probs by Liger's kernel (models/liger_head.py).
    """
    where = part.rollout, part.position
    sampled = rollouts.response_ids[where].unsqueeze(-1)
    if objective.vocabulary_loss:
        divergences, at_sampled = over_vocabulary(
            partial(divergence_terms, loss=objective.vocabulary_loss, beta=objective.jsd_beta),
            (hidden, head),
            teacher.before_head(part),
            sampled,
            vocab_size=vocab_size,
            ends=ends,
        )
        return StudentTerms(divergences, None, at_sampled.squeeze(-1))
    assert rollouts.student is not None  # of no use to sampled_token, and free beside a pass over the vocabulary
    ids, counted = candidates(rollouts.student.ids[where][None], scores.topk.ids[where][None], objective.top_k_strategy)
    ids = torch.cat([ids[0], sampled], dim=-1)
    if liger:
        from prune_opd.models.liger_head import liger_logprobs  # Liger is an extra, which few have installed

        logprobs = merge_asked(liger_logprobs(hidden, head, with_ends(ids, ends), vocab_size=vocab_size), ids, ends)
    else:
        logprobs = candidate_logprobs(hidden, head, ids, vocab_size=vocab_size, ends=ends)
    return StudentTerms(logprobs[:, :-1], counted[0], logprobs[:, -1])


def loss_sums(
    terms: StudentTerms,
    part: Packed,
    scores: TeacherScores,
    weight: Tensor,
    advantage: Tensor | None,
    objective: ObjectiveSection,
) -> tuple[LossSums, LossSums | None]:
    """Sums over the N kept tokens of a micro-batch: the chosen objective's, and, where there is an advantage (B, T),
    those of the policy gradient on the sampled tokens.

    Tensors of shape (N, ...) enter the objectives as (1, N, ...): one rollout of N tokens, all of them valid.
    """
    where = part.rollout, part.position
    at_candidates, at_sampled = terms.candidates[None], terms.sampled[None]
    mask, weights = torch.ones_like(part.rollout, dtype=torch.bool)[None], weight[where][None]
    match objective.loss:
        case "topk_reverse_kl":
            assert terms.counted is not None
            at_student_ids, at_teacher_ids = scores.candidate_logprobs[where], scores.topk.logprobs[where]
            teacher_logprobs = {
                "only_stu": at_student_ids,
                "intersection": at_student_ids,
                "only_tch": at_teacher_ids,
                "union": torch.cat([at_student_ids, at_teacher_ids], dim=-1),
            }[objective.top_k_strategy]
            of_teacher = topk_reverse_kl(
                at_candidates,
                teacher_logprobs[None],
                mask,
                weights,
                candidate_mask=terms.counted[None],
                reward_weight_mode=objective.reward_weight_mode,
            )
        case "sampled_token":
            of_teacher = sampled_token_loss(at_sampled, scores.sampled_logprobs[where][None], mask, weights)
        case _:  # a divergence over the whole vocabulary
            of_teacher = weighted_mean(at_candidates, mask, weights)
    if advantage is None:
        return of_teacher[1], None
    return of_teacher[1], policy_gradient(at_sampled, advantage[where][None], mask)[1]
