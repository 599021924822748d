"""Prune-OPD on one page: one training step, top to bottom. This is the code that trains.

    sample → teacher scores → drift → weights → window → loss → optimiser
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
    losses other than `topk_reverse_kl`, a reward of the task beside the teacher's signal, and rollouts of a policy that
    is not the trained one: another engine's, that of one update ago, or its weights rounded (correction.py).
  * A batch in which no token carries weight is no update: momentum alone would move the weights.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prune_opd.config import Config, ObjectiveSection
from prune_opd.core.drift import DriftReport, drift_report
from prune_opd.core.head import candidate_logprobs, over_vocabulary
from prune_opd.core.objective import (
    LossSums,
    candidates,
    divergence_terms,
    group_advantage,
    policy_gradient,
    sampled_token_loss,
    topk_reverse_kl,
    weighted_mean,
)
from prune_opd.core.window import TrainingWindow, WindowChange
from prune_opd.distributed.world import ALONE, World, whole
from prune_opd.errors import NonFiniteError
from prune_opd.models.causal_lm import (
    PACKED_ATTENTION,
    attended_by,
    attends_packed_rows,
    compiled,
    output_head,
    packed_states,
)
from prune_opd.models.packing import Packed, pack
from prune_opd.rollout.base import Sampler
from prune_opd.rollout.events import drift_events
from prune_opd.rollout.sample import sample_rollouts
from prune_opd.teachers.base import Teacher
from prune_opd.timing import Stopwatch
from prune_opd.training.controls import LengthSchedule, random_tokens
from prune_opd.types import Rollouts, TeacherScores
from prune_opd.update.correction import corrected
from prune_opd.update.finite import check_student, check_teacher

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from prune_opd.rollout.ahead import RolloutsAhead


@dataclass(frozen=True)
class StepResult:
    """What one step did. numbers: which of the step's rollouts these are (a rank's share) · events, weight (B, T) ·
    audit (B,) bool · spent_at (B,) as in `DriftMonitor`, when in flight · rewards (B,) float64 of the task, NaN where
    it gave none; None without one · loss, of all ranks: teacher's per `weight_normalization`, in nats, and the task's ·
    packed_tokens: columns that the update fed, of which `padding` held nothing · trainer_logprobs (B, T) of the
    sampled tokens before the update, where another policy sampled them.
    """

    numbers: Sequence[int]
    rollouts: Rollouts
    scores: TeacherScores
    events: Tensor
    drift: DriftReport
    weight: Tensor
    audit: Tensor
    spent_at: Tensor | None
    rewards: Tensor | None
    window: WindowChange | None
    loss: float
    grad_norm: float
    packed_tokens: int
    padding: int
    trainer_logprobs: Tensor | None
    seconds: dict[str, float]


def prune_opd_step(
    *,
    step: int,
    prompts: Sequence[Sequence[int]],
    student: torch.nn.Module,
    sampler: Sampler,
    teacher: Teacher,
    optimizer: Optimizer,
    window: TrainingWindow | LengthSchedule | None,
    vocab_size: int,
    config: Config,
    reward: Callable[[Sequence[int], Rollouts], Tensor] | None = None,
    world: World = ALONE,
    ahead: RolloutsAhead | None = None,
) -> StepResult:
    """Sample, score, weigh, update, steer the window. `window` None: every response may use the whole budget.

    reward: given which of the prompts they answer, what the task says of each rollout, (B,) float64, NaN where nothing;
    `config.rollout.num_generations` consecutive prompts are the same one.

    Each rank of `world` is given all prompts and takes its share. Rollouts, loss, gradient and window are those of one
    process, whatever the number of ranks.

    ahead: may have sampled this step's rollouts already, and begins on the next ones as soon as their length is known.

    Where no token carries weight there is nothing to learn: a warning, and no update (momentum would move the weights).
    Raises NonFiniteError, with the rollouts and before the weights are touched, when logits of student or teacher, the
    loss or the gradient are NaN or infinite.
    """
    objective, pruning, training = config.objective, config.pruning, config.training
    device = next(student.parameters()).device
    watch = Stopwatch(device)

    # 1. The student answers on its own policy, up to the window; in flight, the teacher reads along and may end it.
    with watch.phase("rollout"):
        sampled = ahead.take() if ahead else None
        if sampled is None:
            max_length = window.length if window else config.rollout.max_completion_length
            sampled = sample_rollouts(step, prompts, max_length, sampler, teacher, config, watch, world)
    numbers, rollouts, in_flight = sampled.numbers, sampled.rollouts, sampled.in_flight
    assert rollouts.student is not None
    check_student(step + 1, numbers, rollouts, world)

    # 2. The teacher scores every position: its own top-k, the student's candidates, the sampled token.
    with watch.phase("teacher"):
        width = rollouts.response_ids.shape[1]
        scores = in_flight.scores_of(width) if in_flight else teacher.score(rollouts, top_k=objective.top_k)
    check_teacher(step + 1, numbers, rollouts, scores, world)

    # 3. Drift: events, what they leave of reliability, and the weight that follows.
    with watch.phase("drift"):
        mask = rollouts.response_mask
        events = drift_events(rollouts.response_ids, mask, rollouts.student, scores.topk, pruning)
        drift = drift_report(events, mask, w_drop=pruning.w_drop, w_base=pruning.w_base, eps=pruning.positive_eps)
        weight = drift.weight if config.weighs_tokens else mask.float()
        if config.teacher_ends_with_reliability:
            weight = weight.masked_fill(drift.reliability <= pruning.positive_eps, 0)
        if config.control.kept_tokens:  # the control of `compare` that prunes at random
            kept = config.control.kept_tokens[step]
            weight = random_tokens(mask, kept, seed=training.seed, step=step, numbers=numbers, world=world)

    # 4. A task that can check answers adds how much better a rollout was than the others of its prompt, on every token.
    rewards = advantage = None
    if reward is not None:
        with watch.phase("reward"):
            rewards = reward(numbers, rollouts)
            everyone = group_advantage(world.in_order(numbers, rewards), config.rollout.num_generations)
            advantage = everyone[numbers].float().to(device).unsqueeze(-1).expand(mask.shape)

    # 5. How far reliability reached decides how long the next responses may be.
    change = window.update(world.in_order(numbers, drift.effective_length.cpu())) if window else None
    if ahead:
        ahead.begin(step + 1, window.length if window else config.rollout.max_completion_length)

    # 6. The objective on the kept tokens. Gradients of loss sums add up, so the grouping into micro-batches is free.
    with watch.phase("update"), attended_by(student, PACKED_ATTENTION):
        tokens, weighed = world.sum(float(mask.sum())), world.sum(float(weight.sum()))
        denominator = tokens if objective.weight_normalization == "token_mean" else weighed
        teacher_factor = config.reward.opd_kl_coef / denominator if weighed else 0.0
        loss_sum, packed_tokens, padding = 0.0, 0, 0
        trainer_logprobs = None if rollouts.sampled_logprobs is None else torch.zeros_like(rollouts.sampled_logprobs)
        states = compiled(packed_states) if config.model.compile else packed_states
        long_rows = attends_packed_rows(student, compile=config.model.compile and not training.bf16)
        optimizer.zero_grad(set_to_none=True)
        for part in world.equal_count(
            pack(rollouts, training.micro_batch_tokens, long_rows=long_rows), Packed.empty(device)
        ):
            with torch.autocast(device.type, torch.bfloat16, enabled=training.bf16):
                hidden = states(student, part)[part.row, part.column]
            part_weight, part_advantage = weight, advantage
            at_candidates, at_sampled = from_hidden(
                student, hidden, vocab_size, rollouts, scores, part, teacher, objective, liger=config.model.liger_head
            )
            if trainer_logprobs is not None:  # another policy sampled: how far is it from the policy that is trained?
                trainer_logprobs[part.rollout, part.position] = at_sampled.detach()
                part_weight, part_advantage = corrected(weight, advantage, rollouts, trainer_logprobs, config)
            of_teacher, of_task = loss_sums(
                at_candidates, at_sampled, rollouts, scores, part_weight, part_advantage, part, objective
            )
            loss = teacher_factor * of_teacher.loss
            if of_task is not None and tokens:
                loss = loss + of_task.loss / tokens
            loss.backward()
            loss_sum += loss.item()
            packed_tokens, padding = packed_tokens + part.input_ids.numel(), padding + part.padding
        loss_sum = world.sum(loss_sum)
        if not math.isfinite(loss_sum):
            raise NonFiniteError(
                f"step {step + 1}: the loss is {loss_sum}; the weights were not updated",
                rollouts=rollouts,
                numbers=numbers,
            )

        # 7. One optimiser step on the mean over the whole batch, of all ranks.
        parameters = [p for p in student.parameters() if p.grad is not None]
        world.sum_gradients(parameters)
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm))
        if not torch.isfinite(grad_norm):
            raise NonFiniteError(
                f"step {step + 1}: the gradient norm is {grad_norm.item()}; the weights were not updated",
                rollouts=rollouts,
                numbers=numbers,
            )
        if weighed or (advantage is not None and tokens):
            optimizer.step()
        else:
            warnings.warn(f"step {step + 1}: no token carries weight; the update was skipped", stacklevel=2)

    return StepResult(
        numbers=numbers,
        rollouts=rollouts,
        scores=scores,
        events=events,
        drift=drift,
        weight=weight,
        audit=sampled.audit,
        spent_at=in_flight.monitor.spent_at if in_flight else None,
        rewards=rewards,
        window=change,
        loss=loss_sum,
        grad_norm=grad_norm.item(),
        packed_tokens=packed_tokens,
        padding=padding,
        trainer_logprobs=trainer_logprobs,
        seconds=dict(watch.seconds),
    )


def from_hidden(
    student: torch.nn.Module,
    hidden: Tensor,
    vocab_size: int,
    rollouts: Rollouts,
    scores: TeacherScores,
    part: Packed,
    teacher: Teacher,
    objective: ObjectiveSection,
    *,
    liger: bool = False,
) -> tuple[Tensor, Tensor]:
    """All that the losses need of the student, from hidden states (N, H), with gradient, and never (N, V) of anything.

    Log-probs (N, C) of the objective's candidates, or divergences (N,) from the teacher where it runs over the whole
    vocabulary; and log-probs (N,) of the sampled tokens. liger: the candidates' by Liger's kernel.
    """
    where = part.rollout, part.position
    head, sampled = output_head(student), rollouts.response_ids[where].unsqueeze(-1)
    if objective.vocabulary_loss:
        divergences, at_sampled = over_vocabulary(
            partial(divergence_terms, loss=objective.vocabulary_loss, beta=objective.jsd_beta),
            (hidden, head),
            teacher.before_head(part),
            sampled,
            vocab_size=vocab_size,
        )
        return divergences, at_sampled.squeeze(-1)
    assert rollouts.student is not None  # of no use to sampled_token, and free beside a pass over the vocabulary
    ids, _ = candidates(rollouts.student.ids[where][None], scores.topk.ids[where][None], objective.top_k_strategy)
    ids = torch.cat([ids[0], sampled], dim=-1)
    if liger:
        from prune_opd.models.liger_head import liger_logprobs

        logprobs = liger_logprobs(hidden, head, ids, vocab_size=vocab_size)
    else:
        logprobs = candidate_logprobs(hidden, head, ids, vocab_size=vocab_size)
    return logprobs[:, :-1], logprobs[:, -1]


def loss_sums(
    at_candidates: Tensor,
    at_sampled: Tensor,
    rollouts: Rollouts,
    scores: TeacherScores,
    weight: Tensor,
    advantage: Tensor | None,
    part: Packed,
    objective: ObjectiveSection,
) -> tuple[LossSums, LossSums | None]:
    """Sums over the N kept tokens of a micro-batch, from what `from_hidden` returns: the chosen objective's, and,
    where there is an advantage (B, T), those of the policy gradient on the sampled tokens.

    Tensors of shape (N, ...) enter the objectives as (1, N, ...): one rollout of N tokens, all of them valid.
    """
    where = part.rollout, part.position
    assert rollouts.student is not None
    at_candidates, at_sampled = at_candidates[None], at_sampled[None]
    mask, weights = torch.ones_like(part.rollout, dtype=torch.bool)[None], weight[where][None]
    match objective.loss:
        case "topk_reverse_kl":
            student_ids, teacher_ids = rollouts.student.ids[where][None], scores.topk.ids[where][None]
            _, counted = candidates(student_ids, teacher_ids, objective.top_k_strategy)
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
                candidate_mask=counted,
                reward_weight_mode=objective.reward_weight_mode,
            )
        case "sampled_token":
            of_teacher = sampled_token_loss(at_sampled, scores.sampled_logprobs[where][None], mask, weights)
        case _:  # a divergence over the whole vocabulary
            of_teacher = weighted_mean(at_candidates, mask, weights)
    if advantage is None:
        return of_teacher[1], None
    return of_teacher[1], policy_gradient(at_sampled, advantage[where][None], mask)[1]
