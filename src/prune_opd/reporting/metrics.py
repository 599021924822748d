"""Metrics as sums and counts, so that means are right over micro-batches of any size; and where the time went."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from prune_opd.config import Config, RepetitionSection
from prune_opd.core.drift import repetition_events
from prune_opd.core.objective import LOGPROB_FLOOR, group_advantage
from prune_opd.core.overlap import overlap_mass, topk_overlap
from prune_opd.step import StepResult
from prune_opd.types import Rollouts, TeacherScores


def distillation_metrics(rollouts: Rollouts, scores: TeacherScores) -> dict[str, float]:
    """How student and teacher compare, over all kept tokens and by position (`/pos_<a>_<b>`, [a, b) in tokens).

    overlap_ratio · student_mass, teacher_mass: probability that each model puts on the shared candidates · reverse_kl
    over the student's candidates, its p renormalised on them · entropy_gap, |H(p) - H(q)|. Nats.
    """
    student, teacher = rollouts.student, scores.topk
    assert student is not None
    share = student.logprobs.softmax(-1)
    quantities = {
        "overlap_ratio": topk_overlap(student.ids, teacher.ids),
        "student_mass": overlap_mass(student.ids, student.logprobs, teacher.ids),
        "teacher_mass": overlap_mass(teacher.ids, teacher.logprobs, student.ids),
        "reverse_kl": (share * (student.logprobs - scores.candidate_logprobs.clamp(min=LOGPROB_FLOOR))).sum(-1),
        "entropy_gap": (student.entropy - teacher.entropy).abs(),
    }
    counts = rollouts.response_mask.sum(0).double()
    return {
        key: mean
        for name, values in quantities.items()
        for key, mean in position_means(
            f"distillation/{name}", values.double().masked_fill(~rollouts.response_mask, 0).sum(0), counts
        )
    }


def engine_metrics(rollouts: Rollouts, trainer_logprobs: Tensor | None) -> dict[str, float]:
    """How far the engine that sampled is from the policy that is trained, when they are two; nats, over kept tokens."""
    if rollouts.sampled_logprobs is None or trainer_logprobs is None:
        return {}
    gap = (trainer_logprobs - rollouts.sampled_logprobs)[rollouts.response_mask].double()
    return {
        "rollout/logprob_gap_mean": gap.abs().mean().item(),
        "rollout/logprob_gap_max": gap.abs().max().item(),
        # k3 estimate of KL(engine || trainer): unbiased, never negative. Schulman, "Approximating KL divergence" (2020)
        "rollout/engine_kl": (gap.exp() - 1 - gap).mean().item(),
    }


def position_means(key: str, sums: Tensor, counts: Tensor) -> Iterator[tuple[str, float]]:
    """Overall mean and means of position buckets from sums (T,) and counts (T,) by position.

    Buckets are [0, 16), [16, 32), [32, 64) and so on: drift is fastest early.
    """
    yield key, (sums.sum() / counts.sum()).item()
    start, stop = 0, 16
    while start < len(sums) and counts[start:stop].sum() > 0:
        yield f"{key}/pos_{start}_{stop}", (sums[start:stop].sum() / counts[start:stop].sum()).item()
        start, stop = stop, 2 * stop


def stop_metrics(
    rollouts: Rollouts, events: Tensor, audit: Tensor, spent_at: Tensor, guard: RepetitionSection
) -> dict[str, float]:
    """Stops by cause, and how many audit rollouts came back after the point of a stop.

    events (B, T) bool, audit (B,) bool, spent_at (B,) int64 as in `DriftMonitor`. A stop is the repetition guard's if
    its last token stood in a loop. An audit rollout that would have been stopped came back if the median token after
    that point was no drift event, in other words if its compatibility was above the threshold again.
    """
    mask, lengths, audit, spent_at = rollouts.response_mask, rollouts.lengths, audit.cpu(), spent_at.cpu()
    looped = torch.zeros_like(rollouts.stopped)
    if guard.enable:
        looping = repetition_events(rollouts.response_ids, mask, max_period=guard.max_period, min_run=guard.min_run)
        looped = rollouts.stopped & looping.gather(-1, (lengths - 1).clamp(min=0)[:, None]).squeeze(-1)
    would_stop = audit & (spent_at >= 0) & (spent_at < lengths.cpu())
    after = mask.cpu() & (torch.arange(mask.shape[1]) >= spent_at[:, None])
    came_back = would_stop & (2 * (events.cpu() & after).sum(-1) < after.sum(-1))
    return {
        "completions/stopped_by_drift": (rollouts.stopped & ~looped).double().mean().item(),
        "completions/stopped_by_repetition": looped.double().mean().item(),
        "audit/rollouts": int(audit.sum()),
        "audit/would_stop": int(would_stop.sum()),
        "audit/came_back": int(came_back.sum()),
    }


def reward_metrics(rewards: Tensor, group_size: int) -> dict[str, float]:
    """rewards (B,) float64, NaN where a rollout has none; consecutive `group_size` ones answer the same prompt.

    mean and std over the rollouts that have one, left out where none has · frac_zero_std: share of prompts whose
    rollouts all got the same reward, which teaches nothing · missing: share of rollouts without a reward.
    """
    given = rewards[~rewards.isnan()]
    counted = group_advantage(rewards, group_size).unflatten(0, (-1, group_size))
    found = {
        "reward/frac_zero_std": (counted == 0).all(-1).double().mean().item(),
        "reward/missing": 1 - len(given) / len(rewards),
    }
    if len(given):
        found |= {"reward/mean": given.mean().item(), "reward/std": given.std(correction=0).item()}
    return found


def repetition_rate(response_ids: Tensor, mask: Tensor, *, n: int = 8) -> float:
    """Share of n-grams that already stood earlier in the same rollout; response_ids and mask (B, T)."""
    repeated = total = 0
    for ids, valid in zip(response_ids.tolist(), mask.sum(-1).tolist(), strict=True):
        grams = [tuple(ids[i : i + n]) for i in range(valid - n + 1)]
        repeated, total = repeated + len(grams) - len(set(grams)), total + len(grams)
    return repeated / total if total else 0.0


def metrics_of(result: StepResult, config: Config) -> dict[str, Any]:
    """The metrics record of one step; keys are listed in docs/metrics.md."""
    rollouts, scores, drift, change = result.rollouts, result.scores, result.drift, result.window
    lengths, effective = rollouts.lengths, drift.effective_length.double()
    budget = config.rollout.max_completion_length
    cap = change.previous_length if change else budget
    unfinished = ~rollouts.finished
    trained = int(lengths.sum())
    record = {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "prune_opd/current_max_response_length": cap,
        "prune_opd/next_max_response_length": change.length if change else cap,
        "prune_opd/effective_response_length_mean": effective.mean().item(),
        "prune_opd/effective_response_length_max": effective.max().item(),
        "prune_opd/effective_response_length_min": effective.min().item(),
        "prune_opd/effective_response_length_p90": effective.quantile(0.9).item(),
        "prune_opd/loss_weight_mean": (result.weight.sum() / trained).item(),
        **distillation_metrics(rollouts, scores),
        **engine_metrics(rollouts, result.trainer_logprobs),
        "completions/mean_length": lengths.double().mean().item(),
        "completions/eos_rate": rollouts.finished.double().mean().item(),
        "completions/clipped_ratio": (unfinished & ~rollouts.stopped).double().mean().item(),
        "completions/repetition_rate": repetition_rate(rollouts.response_ids, rollouts.response_mask),
        "tokens/generated": rollouts.generated,
        "tokens/scored": scores.scored,
        "tokens/trained": trained,
        "tokens/update_padding": result.padding / result.packed_tokens,
        # Upper bounds: a rollout that was cut might have ended by itself before the whole budget was used.
        "tokens/saved": int((budget - lengths)[unfinished].sum()),
        "tokens/saved_by_stops": int((cap - lengths)[rollouts.stopped].sum()),
        "rollout/slot_occupancy": rollouts.generated / max(rollouts.slot_steps, 1),
        **{f"time/{name}": seconds for name, seconds in result.seconds.items()},
    }
    if change:
        record["prune_opd/effective_response_length_hit_ratio"] = change.hit_ratio
    if result.rewards is not None:
        record |= reward_metrics(result.rewards, config.rollout.num_generations)
    if result.spent_at is not None:
        guard = config.pruning.repetition
        record |= stop_metrics(rollouts, result.events, result.audit, result.spent_at, guard)
    return record
