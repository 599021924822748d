"""Prune-OPD on one page: one training step, top to bottom. This is the code that trains.

    sample → student forward → teacher scores → drift → weights → loss → optimiser → window

The student answers each prompt with at most M tokens. One forward with gradient gives its top-k at every position;
the teacher scores the same positions. Where the two top-k sets part, drift events add up; they lower the weight of
everything after them, and how far reliability reaches decides the next step's M.

Source: arXiv 2605.07804. Where we differ from it, and why:

  * Log-probs at sampling time are not kept: one optimiser step a batch, so the policy that sampled is the policy that
    is trained, and p_θ / stopgrad(p_θ) has the same gradient as the importance ratio at its starting point, 1.
  * R_t is computed in float64: in float32, 1 - w_drop · C_t can miss zero by more than ε, and E would not stop.
  * −∞ log-probs of a teacher that forbids tokens are floored at −50 nats (core/objective.py), so rewards stay finite.
  * Ids beyond the vocabulary that both models share (padded embedding rows) are cut from samples and normalisers.
  * M starts at 1024 in the default recipe; the paper gives 1024, 2048 and 6144 in different places.
  * `weight_mean`, `overlap_mass`, and the other losses are options beyond the paper; the defaults are the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prune_opd.config import Config, ObjectiveSection, PruningSection
from prune_opd.core.drift import DriftReport, drift_report
from prune_opd.core.objective import (
    LossSums,
    candidates,
    forward_kl,
    jsd,
    reverse_kl,
    sampled_token_loss,
    topk_reverse_kl,
)
from prune_opd.core.overlap import nucleus_accept, overlap_mass, topk_overlap
from prune_opd.core.window import TrainingWindow, WindowChange
from prune_opd.errors import NonFiniteError
from prune_opd.sampling.base import Sampler, rollout_uniforms
from prune_opd.teachers.base import Teacher
from prune_opd.teachers.local import response_logits
from prune_opd.tracking.metrics import PositionMeans, Stopwatch
from prune_opd.types import Rollouts, TeacherScores

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True)
class StepResult:
    """What one step did. drift holds all rollouts in order; loss is per `weight_normalization`, in nats."""

    rollouts: Rollouts
    drift: DriftReport
    window: WindowChange | None
    loss: float
    grad_norm: float
    position_means: PositionMeans
    seconds: dict[str, float]


def prune_opd_step(
    *,
    step: int,
    prompts: Sequence[Sequence[int]],
    student: torch.nn.Module,
    sampler: Sampler,
    teacher: Teacher,
    optimizer: Optimizer,
    window: TrainingWindow | None,
    vocab_size: int,
    config: Config,
) -> StepResult:
    """Sample, score, weigh, update, steer the window. `window` None: every response may use the whole budget.

    Raises NonFiniteError before the weights are touched when the loss or the gradient is NaN or infinite.
    """
    objective, pruning, training = config.objective, config.pruning, config.training
    device = next(student.parameters()).device
    watch, means = Stopwatch(device), PositionMeans()

    # 1. The student answers on its own policy, up to the window.
    max_length = window.length if window else config.rollout.max_completion_length
    with watch.phase("rollout"):
        uniforms = rollout_uniforms(training.seed, step, range(len(prompts)), max_length)
        rollouts = sampler.sample(prompts, uniforms, temperature=config.rollout.temperature, top_p=config.rollout.top_p)

    # 2. Micro-batch by micro-batch; gradients of loss sums add up, so the grouping changes nothing.
    drifts: list[DriftReport] = []
    order: list[Tensor] = []
    loss_sum, denominator = 0.0, 0.0
    optimizer.zero_grad(set_to_none=True)
    for rows in micro_batches(rollouts, training.micro_batch_tokens):
        part = rollouts.select(rows)
        mask = part.response_mask

        # 2a. One forward with gradient: top-k and detached log-probs come from it as well.
        with watch.phase("update"):
            with torch.autocast(device.type, torch.bfloat16, enabled=training.bf16):
                logits = response_logits(student, part, vocab_size)
            log_z = logits.logsumexp(-1, keepdim=True)
            student_ids = logits.detach().topk(objective.top_k, dim=-1).indices
            student_logprobs = logits.detach().gather(-1, student_ids) - log_z.detach()

        # 2b. The teacher scores every position: its own top-k, the student's candidates, the sampled token.
        with watch.phase("teacher"):
            scores = teacher.score(
                part,
                torch.cat([student_ids, part.response_ids.unsqueeze(-1)], dim=-1),
                top_k=objective.top_k,
                full_logits=objective.loss in ("forward_kl", "reverse_kl", "jsd"),
            )

        with watch.phase("update"):
            # 2c. Drift: events, what they leave of reliability, and the weight that follows.
            events = drift_events(part.response_ids, student_ids, student_logprobs, scores, pruning)
            drift = drift_report(events, mask, w_drop=pruning.w_drop, w_base=pruning.w_base, eps=pruning.positive_eps)
            weight = drift.weight if pruning.enable else mask.float()

            # 2d. The objective on the kept tokens.
            sums = loss_sums(logits, log_z, student_ids, scores, part, weight, objective)
            if not torch.isfinite(sums.loss):
                raise NonFiniteError(f"step {step}: the loss is {sums.loss.item()}; the weights were not updated")
            sums.loss.backward()

            loss_sum += sums.loss.item()
            denominator += sums.denominator(objective.weight_normalization).item()
            drifts.append(drift)
            order.append(rows)
            measure(means, logits.detach() - log_z.detach(), student_ids, student_logprobs, scores, mask, weight)

    # 3. One optimiser step on the mean over the whole batch.
    with watch.phase("update"):
        parameters = [p for p in student.parameters() if p.grad is not None]
        for parameter in parameters:
            parameter.grad.div_(denominator)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm).item()
        if not torch.isfinite(torch.tensor(grad_norm)):
            raise NonFiniteError(f"step {step}: the gradient norm is {grad_norm}; the weights were not updated")
        optimizer.step()

    # 4. How far reliability reached decides how long the next responses may be.
    drift = in_rollout_order(drifts, order, width=rollouts.response_ids.shape[1])
    change = window.update(drift.effective_length) if window else None
    return StepResult(rollouts, drift, change, loss_sum / denominator, grad_norm, means, dict(watch.seconds))


def drift_events(
    response_ids: Tensor,
    student_ids: Tensor,
    student_logprobs: Tensor,
    scores: TeacherScores,
    pruning: PruningSection,
) -> Tensor:
    """(B, T) bool: positions where student and teacher are not compatible under `pruning.metric`."""
    match pruning.metric:
        case "overlap_ratio":
            return topk_overlap(student_ids, scores.topk_ids) < pruning.threshold
        case "overlap_mass":
            return overlap_mass(student_ids, student_logprobs, scores.topk_ids) < pruning.threshold
        case "teacher_top_p_accept":
            return ~nucleus_accept(response_ids, scores.topk_ids, scores.topk_logprobs, pruning.teacher_top_p)


def loss_sums(
    logits: Tensor,
    log_z: Tensor,
    student_ids: Tensor,
    scores: TeacherScores,
    part: Rollouts,
    weight: Tensor,
    objective: ObjectiveSection,
) -> LossSums:
    """The chosen objective's sums; gradient flows through `logits` (B, T, V) and `log_z` (B, T, 1)."""
    mask = part.response_mask
    match objective.loss:
        case "topk_reverse_kl":
            ids, counted = candidates(student_ids, scores.topk_ids, objective.top_k_strategy)
            at_student_ids = scores.candidate_logprobs[..., :-1]
            teacher_logprobs = {
                "only_stu": at_student_ids,
                "intersection": at_student_ids,
                "only_tch": scores.topk_logprobs,
                "union": torch.cat([at_student_ids, scores.topk_logprobs], dim=-1),
            }[objective.top_k_strategy]
            return topk_reverse_kl(
                logits.gather(-1, ids) - log_z,
                teacher_logprobs,
                mask,
                weight,
                candidate_mask=counted,
                reward_weight_mode=objective.reward_weight_mode,
            )[1]
        case "sampled_token":
            sampled = logits.gather(-1, part.response_ids.unsqueeze(-1)) - log_z
            return sampled_token_loss(sampled.squeeze(-1), scores.candidate_logprobs[..., -1], mask, weight)[1]
        case "forward_kl":
            return forward_kl(logits, scores.logits, mask, weight)[1]
        case "reverse_kl":
            return reverse_kl(logits, scores.logits, mask, weight)[1]
        case "jsd":
            return jsd(logits, scores.logits, mask, weight, beta=objective.jsd_beta)[1]


def measure(
    means: PositionMeans,
    logprobs: Tensor,
    student_ids: Tensor,
    student_logprobs: Tensor,
    scores: TeacherScores,
    mask: Tensor,
    weight: Tensor,
) -> None:
    """Diagnostics of one micro-batch, by position: compatibility, masses, divergence, entropies."""
    share = student_logprobs.softmax(-1)
    means.add(
        mask,
        overlap_ratio=topk_overlap(student_ids, scores.topk_ids),
        student_mass=overlap_mass(student_ids, student_logprobs, scores.topk_ids),
        teacher_mass=overlap_mass(scores.topk_ids, scores.topk_logprobs, student_ids),
        reverse_kl=(share * (student_logprobs - scores.candidate_logprobs[..., :-1])).sum(-1),
        entropy_gap=(torch.special.entr(logprobs.exp()).sum(-1) - scores.entropy).abs(),
        loss_weight=weight,
    )


def micro_batches(rollouts: Rollouts, token_budget: int) -> Iterator[Tensor]:
    """Row indices of micro-batches of at most `token_budget` padded tokens, long rollouts first, one row at least.

    Rollouts of like length share a micro-batch, so little of the budget is padding.
    """
    totals = (rollouts.prompt_mask.sum(-1) + rollouts.lengths).tolist()
    rows = sorted(range(len(totals)), key=lambda row: -totals[row])
    start = 0
    while start < len(rows):
        count = max(1, token_budget // totals[rows[start]])
        yield torch.tensor(rows[start : start + count], device=rollouts.response_ids.device)
        start += count


def in_rollout_order(drifts: list[DriftReport], order: list[Tensor], *, width: int) -> DriftReport:
    """Join the reports of micro-batches and put the rollouts back into the order they were sampled in."""
    back = torch.cat(order).argsort()

    def join(name: str) -> Tensor:
        parts = [getattr(drift, name) for drift in drifts]
        if parts[0].dim() == 2:
            parts = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
        return torch.cat(parts)[back]

    return DriftReport(join("reliability"), join("weight"), join("effective_length"), join("onset"))
