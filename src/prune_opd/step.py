"""Prune-OPD on one page: one training step, top to bottom. This is the code that trains.

    sample → teacher scores → drift → weights → loss → optimiser → window
       └──── stop in flight ────┘

The student answers each prompt with at most M tokens, and its top-k is kept as it samples. The teacher scores the same
positions. Where the two top-k sets part, drift events add up; they lower the weight of everything after them, and how
far reliability reaches decides the next step's M. With `pruning.in_flight` the teacher scores while the student still
writes, and a rollout ends where its reliability does (inflight.py).

Source: arXiv 2605.07804. Where we differ from it, and why:

  * One optimiser step a batch: the policy that sampled is the policy that is trained, so p_θ / stopgrad(p_θ) has the
    same gradient as the importance ratio at its starting point, 1, and no old-log-prob pass exists.
  * R_t is computed in float64: in float32, 1 - w_drop · C_t can miss zero by more than ε, and E would not stop.
  * −∞ log-probs of a teacher that forbids tokens are floored at −50 nats (core/objective.py), so rewards stay finite.
  * Ids beyond the vocabulary that both models share (padded embedding rows) are cut from samples and normalisers.
  * M starts at 1024 in the default recipe; the paper gives 1024, 2048 and 6144 in different places.
  * Options beyond the paper, off by default: stopping in flight, the repetition guard, `weight_mean`, `overlap_mass`,
    losses other than `topk_reverse_kl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prune_opd.config import Config, ObjectiveSection
from prune_opd.core.drift import DriftReport, drift_report
from prune_opd.core.head import candidate_logprobs
from prune_opd.core.objective import (
    LossSums,
    candidates,
    forward_kl,
    jsd,
    reverse_kl,
    sampled_token_loss,
    topk_reverse_kl,
)
from prune_opd.core.window import TrainingWindow, WindowChange
from prune_opd.errors import NonFiniteError
from prune_opd.events import drift_events
from prune_opd.inflight import InFlightStop, audited
from prune_opd.modeling import hidden_states, output_head, packed_inputs
from prune_opd.sampling.base import Sampler, rollout_uniforms
from prune_opd.teachers.base import Teacher
from prune_opd.tracking.metrics import Stopwatch
from prune_opd.types import Packed, Rollouts, TeacherScores, pack

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True)
class StepResult:
    """What one step did. events, weight (B, T) · audit (B,) bool · spent_at (B,) as in `DriftMonitor`, when in flight ·
    loss per `weight_normalization`, in nats · packed_tokens: columns that the update fed, padding included.
    """

    rollouts: Rollouts
    scores: TeacherScores
    events: Tensor
    drift: DriftReport
    weight: Tensor
    audit: Tensor
    spent_at: Tensor | None
    window: WindowChange | None
    loss: float
    grad_norm: float
    packed_tokens: int
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
    watch = Stopwatch(device)

    # 1. The student answers on its own policy, up to the window; in flight, the teacher reads along and may end it.
    max_length = window.length if window else config.rollout.max_completion_length
    audit = audited(training.seed, step, len(prompts), pruning.in_flight.audit_share)
    in_flight = None
    if config.stops_in_flight:
        stream = teacher.stream(prompts, max_length, top_k=objective.top_k, slots=config.rollout.slots)
        in_flight = InFlightStop(stream, pruning, audit, watch)
    with watch.phase("rollout"):
        rollouts = sampler.sample(
            prompts,
            rollout_uniforms(training.seed, step, range(len(prompts)), max_length),
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=objective.top_k,
            watcher=in_flight,
        )
    assert rollouts.student is not None

    # 2. The teacher scores every position: its own top-k, the student's candidates, the sampled token.
    with watch.phase("teacher"):
        width = rollouts.response_ids.shape[1]
        scores = in_flight.scores_of(width) if in_flight else teacher.score(rollouts, top_k=objective.top_k)

    # 3. Drift: events, what they leave of reliability, and the weight that follows.
    with watch.phase("drift"):
        mask = rollouts.response_mask
        events = drift_events(rollouts.response_ids, mask, rollouts.student, scores.topk, pruning)
        drift = drift_report(events, mask, w_drop=pruning.w_drop, w_base=pruning.w_base, eps=pruning.positive_eps)
        weight = drift.weight if pruning.enable else mask.float()

    # 4. The objective on the kept tokens. Gradients of loss sums add up, so the grouping into micro-batches is free.
    with watch.phase("update"):
        denominator = float((mask if objective.weight_normalization == "token_mean" else weight).sum())
        loss_sum, packed_tokens = 0.0, 0
        optimizer.zero_grad(set_to_none=True)
        for part in pack(rollouts, training.micro_batch_tokens):
            with torch.autocast(device.type, torch.bfloat16, enabled=training.bf16):
                hidden = hidden_states(student, packed_inputs(student, part))[part.row, part.column]
            sums = loss_sums(student, hidden, vocab_size, rollouts, scores, weight, part, teacher, objective)
            if not torch.isfinite(sums.loss):
                raise NonFiniteError(f"step {step}: the loss is {sums.loss.item()}; the weights were not updated")
            (sums.loss / denominator).backward()
            loss_sum += sums.loss.item()
            packed_tokens += part.input_ids.numel()

        # 5. One optimiser step on the mean over the whole batch.
        parameters = [p for p in student.parameters() if p.grad is not None]
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        if not torch.isfinite(grad_norm):
            raise NonFiniteError(f"step {step}: the gradient norm is {grad_norm.item()}; the weights were not updated")
        optimizer.step()

    # 6. How far reliability reached decides how long the next responses may be.
    change = window.update(drift.effective_length) if window else None
    return StepResult(
        rollouts=rollouts,
        scores=scores,
        events=events,
        drift=drift,
        weight=weight,
        audit=audit,
        spent_at=in_flight.monitor.spent_at if in_flight else None,
        window=change,
        loss=loss_sum / denominator,
        grad_norm=grad_norm.item(),
        packed_tokens=packed_tokens,
        seconds=dict(watch.seconds),
    )


def loss_sums(
    student: torch.nn.Module,
    hidden: Tensor,
    vocab_size: int,
    rollouts: Rollouts,
    scores: TeacherScores,
    weight: Tensor,
    part: Packed,
    teacher: Teacher,
    objective: ObjectiveSection,
) -> LossSums:
    """The chosen objective's sums over the N kept tokens of a micro-batch, from hidden states (N, H) with gradient.

    Tensors of shape (N, ...) enter the objectives as (1, N, ...): one rollout of N tokens, all of them valid.
    """
    where = part.rollout, part.position
    assert rollouts.student is not None
    head = output_head(student)
    mask, weights = torch.ones_like(part.rollout, dtype=torch.bool)[None], weight[where][None]
    match objective.loss:
        case "topk_reverse_kl":
            student_ids, teacher_ids = rollouts.student.ids[where][None], scores.topk.ids[where][None]
            ids, counted = candidates(student_ids, teacher_ids, objective.top_k_strategy)
            at_student_ids, at_teacher_ids = scores.candidate_logprobs[where], scores.topk.logprobs[where]
            teacher_logprobs = {
                "only_stu": at_student_ids,
                "intersection": at_student_ids,
                "only_tch": at_teacher_ids,
                "union": torch.cat([at_student_ids, at_teacher_ids], dim=-1),
            }[objective.top_k_strategy]
            logprobs = candidate_logprobs(hidden, head, ids[0], vocab_size=vocab_size)
            return topk_reverse_kl(
                logprobs[None],
                teacher_logprobs[None],
                mask,
                weights,
                candidate_mask=counted,
                reward_weight_mode=objective.reward_weight_mode,
            )[1]
        case "sampled_token":
            sampled = rollouts.response_ids[where].unsqueeze(-1)
            logprobs = candidate_logprobs(hidden, head, sampled, vocab_size=vocab_size)
            return sampled_token_loss(logprobs.T, scores.sampled_logprobs[where][None], mask, weights)[1]
        case "forward_kl" | "reverse_kl" | "jsd":
            logits, teacher_logits = head.logits(hidden)[None, :, :vocab_size], teacher.logits(part)[None]
            if objective.loss == "jsd":
                return jsd(logits, teacher_logits, mask, weights, beta=objective.jsd_beta)[1]
            divergence = forward_kl if objective.loss == "forward_kl" else reverse_kl
            return divergence(logits, teacher_logits, mask, weights)[1]
