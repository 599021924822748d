"""Objectives. p is the student, q the frozen teacher; every loss is minimised; units are nats.

Each returns `(loss, sums)`: the loss normalised over the tensors at hand, and the sums it was made of. A step that
spreads over micro-batches or processes adds up the sums and divides once, so that no micro-batch weighs more than
its tokens: gradients of `sums.loss` add, and are divided by the total of `sums.tokens` or `sums.weights`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prune_opd.core.choices import Normalization, RewardWeightMode, TopKStrategy, VocabularyLoss
from prune_opd.core.overlap import shared_candidates

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

LOGPROB_FLOOR = -50.0
"""Log-probabilities below this (a teacher that forbids a token says -inf) count as this; exp(-50) is 2e-22."""


@dataclass(frozen=True)
class LossSums:
    """loss: Σ over valid tokens, a scalar with graph · tokens: valid tokens · weights: Σ w over them (detached)."""

    loss: Float[Tensor, ""]
    tokens: Int[Tensor, ""]
    weights: Float[Tensor, ""]

    def denominator(self, normalization: Normalization) -> Tensor:
        """What the loss sum is divided by: `token_mean` (the paper) the valid tokens, `weight_mean` their weights."""
        return self.tokens if normalization == "token_mean" else self.weights


def candidates(
    student_ids: Int[Tensor, "B T K"], teacher_ids: Int[Tensor, "B T K"], strategy: TopKStrategy
) -> tuple[Int[Tensor, "B T C"], Bool[Tensor, "B T C"]]:
    """Candidate ids of the top-k objective and which of them count: (B, T, C) int64 and bool, C = K, or 2K for union.

    only_stu: S_t (the paper) · only_tch: T_t · intersection: S_t ∩ T_t · union: S_t ∪ T_t, shared ids counted once.
    """
    everything = torch.ones_like(student_ids, dtype=torch.bool)
    match strategy:
        case "only_stu":
            return student_ids, everything
        case "only_tch":
            return teacher_ids, everything
        case "intersection":
            return student_ids, shared_candidates(student_ids, teacher_ids)
        case "union":
            news = ~shared_candidates(teacher_ids, student_ids)
            return torch.cat([student_ids, teacher_ids], dim=-1), torch.cat([everything, news], dim=-1)
        case _:
            raise ValueError(f"unknown top_k_strategy {strategy!r}; one of only_stu, only_tch, intersection, union")


def topk_reverse_kl(
    student_logprobs: Float[Tensor, "B T C"],
    teacher_logprobs: Float[Tensor, "B T C"],
    mask: Bool[Tensor, "B T"],
    weight: Float[Tensor, "B T"] | None = None,
    *,
    candidate_mask: Bool[Tensor, "B T C"] | None = None,
    reward_weight_mode: RewardWeightMode = "student_p",
    normalization: Normalization = "token_mean",
) -> tuple[Float[Tensor, ""], LossSums]:
    """The paper's objective: reverse KL restricted to the candidates, as a reward-weighted policy gradient.

    student_logprobs, teacher_logprobs: full-vocabulary log p_t(v), log q_t(v) gathered on the candidates; gradient
    flows into the student's alone. mask: valid response tokens. weight: w_t of `drift_report` (1 when None).

        r_t(v) = c_t(v) · (log q_t(v) - log p_t(v)),   loss_t = -Σ_v stopgrad(w_t r_t(v)) · p_θ(v) / stopgrad(p_θ(v))

    c is p renormalised over the candidates (`student_p`, the paper), q renormalised (`teacher_p`), or 1 (`none`).
    Value: w_t Σ_v c (log p - log q). Gradient taken: w_t Σ_v c (log p - log q) ∇ log p_θ(v), which is not the
    gradient of the value: c and the reward are constants. Zero when p = q. No baseline, no advantage normalisation.
    At k = 1 under `student_p` it is still non-zero, unlike a KL of two renormalised distributions.
    Source: method.md §1 (arXiv 2605.07804).
    """
    if candidate_mask is None:
        candidate_mask = torch.ones_like(student_logprobs, dtype=torch.bool)
    counted = candidate_mask & mask.unsqueeze(-1)
    terms = topk_reverse_kl_terms(student_logprobs, teacher_logprobs, counted, reward_weight_mode=reward_weight_mode)
    return weighted_mean(terms, mask, weight, normalization)


def topk_reverse_kl_terms(
    student_logprobs: Float[Tensor, "B T C"],
    teacher_logprobs: Float[Tensor, "B T C"],
    counted: Bool[Tensor, "B T C"],
    *,
    reward_weight_mode: RewardWeightMode = "student_p",
) -> Float[Tensor, "B T"]:
    """`topk_reverse_kl` position by position, before weights and mean: 0 where no candidate is counted."""
    # Padding may hold anything, NaN included: replace it before it meets arithmetic, for value and gradient alike.
    log_p = student_logprobs.masked_fill(~counted, 0)
    log_q = teacher_logprobs.detach().masked_fill(~counted, 0)
    frozen_p = log_p.detach()
    match reward_weight_mode:
        case "student_p":
            share = _renormalise(frozen_p, counted)
        case "teacher_p":
            share = _renormalise(log_q, counted)
        case "none":
            share = counted.to(log_p.dtype)
        case _:
            raise ValueError(f"unknown reward_weight_mode {reward_weight_mode!r}; one of student_p, teacher_p, none")
    reward = share * (log_q.clamp(min=LOGPROB_FLOOR) - frozen_p.clamp(min=LOGPROB_FLOOR))
    # exp(log p - stopgrad log p) is 1 with gradient ∇ log p; -inf - -inf would be NaN, so such candidates take no part.
    ratio = (log_p - frozen_p.nan_to_num(neginf=0)).masked_fill(frozen_p == -torch.inf, 0).exp()
    return -(reward * ratio).sum(-1)


def sampled_token_loss(
    student_logprobs: Float[Tensor, "B T"],
    teacher_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    weight: Float[Tensor, "B T"] | None = None,
    *,
    normalization: Normalization = "token_mean",
) -> tuple[Float[Tensor, ""], LossSums]:
    """Policy gradient on the sampled token y_t with advantage A_t = w_t (log q(y_t) - log p(y_t)), detached.

    loss_t = -A_t · p_θ(y_t) / stopgrad(p_θ(y_t)); gradient -A_t ∇ log p_θ(y_t), whose expectation over y_t ~ p is the
    full reverse-KL gradient. Its expectation vanishes if A_t does not depend on y_t (a scalar KL per position, say):
    the advantage must be the sampled token's own. Source: Thinking Machines, "On-Policy Distillation" (2025).
    """
    log_p = student_logprobs.detach().masked_fill(~mask, 0)
    log_q = teacher_logprobs.detach().masked_fill(~mask, 0).clamp(min=LOGPROB_FLOOR)
    return policy_gradient(student_logprobs, log_q - log_p, mask, weight, normalization=normalization)


def policy_gradient(
    student_logprobs: Float[Tensor, "B T"],
    advantage: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    weight: Float[Tensor, "B T"] | None = None,
    *,
    normalization: Normalization = "token_mean",
) -> tuple[Float[Tensor, ""], LossSums]:
    """Policy gradient on the sampled token y_t: loss_t = -w_t A_t · p_θ(y_t) / stopgrad(p_θ(y_t)).

    student_logprobs: log p(y_t), full vocabulary, with gradient. advantage: A_t, detached; positive makes y_t more
    likely. Value: -w_t A_t. Gradient taken: -w_t A_t ∇ log p_θ(y_t). Source: Williams (1992), REINFORCE.
    """
    log_p = student_logprobs.masked_fill(~mask, 0)
    ratio = (log_p - log_p.detach()).exp()
    return weighted_mean(-advantage.detach().masked_fill(~mask, 0) * ratio, mask, weight, normalization)


def group_advantage(rewards: Float[Tensor, " B"], group_size: int) -> Float[Tensor, " B"]:
    """How much better than its siblings a rollout was: A_i = (r_i - mean) / (std + 1e-6) within each group.

    rewards: of whole rollouts; consecutive `group_size` ones answer the same prompt. NaN is no reward: such a rollout
    takes no part, neither in its group's mean and standard deviation (the unbiased one) nor with an advantage. Exactly
    zero where all rewards of a group are equal, or fewer than two are left: nothing tells its rollouts apart.
    ValueError if B is no multiple of group_size. Source: GRPO (arXiv 2402.03300), in the form of slime.
    """
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not split into groups of {group_size}")
    groups = rewards.unflatten(0, (-1, group_size))
    counted = ~groups.isnan()
    count = counted.sum(-1, keepdim=True)
    mean = groups.masked_fill(~counted, 0).sum(-1, keepdim=True) / count.clamp(min=1)
    distance = (groups - mean).masked_fill(~counted, 0)
    std = (distance.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    # Compared, not by std = 0: the mean of three times 0.1 is not 0.1, and 1e-17 / 1e-6 would be an advantage.
    least, most = groups.masked_fill(~counted, torch.inf).amin(-1), groups.masked_fill(~counted, -torch.inf).amax(-1)
    return (distance / (std + 1e-6)).masked_fill((least >= most).unsqueeze(-1), 0).flatten()


def forward_kl(
    student_logits: Float[Tensor, "B T V"],
    teacher_logits: Float[Tensor, "B T V"],
    mask: Bool[Tensor, "B T"],
    weight: Float[Tensor, "B T"] | None = None,
    *,
    normalization: Normalization = "token_mean",
) -> tuple[Float[Tensor, ""], LossSums]:
    """KL(q‖p) = Σ_v q (log q - log p) over the full vocabulary: covers the teacher's modes.

    Ordinary gradient in the student's logits: w_t (p - q). Source: Agarwal et al., GKD (arXiv 2306.13649).
    """
    terms = divergence_terms(*_without_padding(student_logits, teacher_logits, mask), loss="forward_kl")
    return weighted_mean(terms, mask, weight, normalization)


def reverse_kl(
    student_logits: Float[Tensor, "B T V"],
    teacher_logits: Float[Tensor, "B T V"],
    mask: Bool[Tensor, "B T"],
    weight: Float[Tensor, "B T"] | None = None,
    *,
    normalization: Normalization = "token_mean",
) -> tuple[Float[Tensor, ""], LossSums]:
    """KL(p‖q) = Σ_v p (log p - log q) over the full vocabulary: seeks the teacher's mode.

    Ordinary gradient in the student's logits: w_t p (log p - log q - KL). Source: GKD (arXiv 2306.13649), MiniLLM.
    """
    terms = divergence_terms(*_without_padding(student_logits, teacher_logits, mask), loss="reverse_kl")
    return weighted_mean(terms, mask, weight, normalization)


def jsd(
    student_logits: Float[Tensor, "B T V"],
    teacher_logits: Float[Tensor, "B T V"],
    mask: Bool[Tensor, "B T"],
    weight: Float[Tensor, "B T"] | None = None,
    *,
    beta: float = 0.5,
    normalization: Normalization = "token_mean",
) -> tuple[Float[Tensor, ""], LossSums]:
    """Generalised Jensen-Shannon divergence β KL(q‖m) + (1-β) KL(p‖m), m = β q + (1-β) p; symmetric at β = 0.5.

    0 < β < 1, else ValueError: the ends are zero, not the KLs; those are `forward_kl` and `reverse_kl`.
    Ordinary autograd gradient, in the student's logits. Source: GKD (arXiv 2306.13649), eq. 1.
    """
    terms = divergence_terms(*_without_padding(student_logits, teacher_logits, mask), loss="jsd", beta=beta)
    return weighted_mean(terms, mask, weight, normalization)


def divergence_terms(
    student_logits: Float[Tensor, "*N V"],
    teacher_logits: Float[Tensor, "*N V"],
    *,
    loss: VocabularyLoss,
    beta: float = 0.5,
) -> Float[Tensor, "*N"]:
    """`forward_kl`, `reverse_kl` or `jsd` position by position, before weights and mean."""
    log_p, log_q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    match loss:
        case "forward_kl":
            return _kl(log_q, log_p)
        case "reverse_kl":
            return _kl(log_p, log_q)
        case "jsd":
            if not 0 < beta < 1:
                raise ValueError(
                    f"jsd needs 0 < beta < 1, got {beta}; for the ends use forward_kl or reverse_kl by name"
                )
            log_beta, log_rest = torch.tensor([beta, 1 - beta], dtype=log_p.dtype, device=log_p.device).log()
            # Floored: logaddexp of two -inf has a NaN gradient.
            log_m = torch.logaddexp(
                log_q.clamp(min=LOGPROB_FLOOR) + log_beta, log_p.clamp(min=LOGPROB_FLOOR) + log_rest
            )
            return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)
        case _:
            raise ValueError(f"unknown loss {loss!r}; one of forward_kl, reverse_kl, jsd")


def _renormalise(logprobs: Tensor, counted: Tensor) -> Tensor:
    """Probabilities over the counted candidates alone; all zero where none counts."""
    return logprobs.masked_fill(~counted, -torch.inf).softmax(-1).nan_to_num(nan=0)


def _without_padding(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    padding = ~mask.unsqueeze(-1)
    return student_logits.masked_fill(padding, 0), teacher_logits.masked_fill(padding, 0)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a‖b) per position (B, T); tokens that a forbids contribute nothing."""
    return (log_a.exp() * (log_a.clamp(min=LOGPROB_FLOOR) - log_b.clamp(min=LOGPROB_FLOOR))).sum(-1)


def weighted_mean(
    per_token: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    weight: Float[Tensor, "B T"] | None = None,
    normalization: Normalization = "token_mean",
) -> tuple[Float[Tensor, ""], LossSums]:
    """The mean of losses given position by position, Σ w_t loss_t over valid tokens divided as `normalization` says."""
    if normalization not in ("token_mean", "weight_mean"):
        raise ValueError(f"unknown weight normalisation {normalization!r}; one of token_mean, weight_mean")
    weight = mask.to(per_token.dtype) if weight is None else weight.detach().masked_fill(~mask, 0)
    sums = LossSums((weight * per_token.masked_fill(~mask, 0)).sum(), mask.sum(), weight.sum())
    denominator = sums.denominator(normalization).to(sums.loss.dtype)
    return sums.loss / denominator.clamp(min=torch.finfo(sums.loss.dtype).tiny), sums
