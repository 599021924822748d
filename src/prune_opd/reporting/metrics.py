"""The metrics of a step, from sums and counts of each rank, so that means are right for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prune_opd.config import Config, RepetitionSection
from prune_opd.core.drift import repetition_events
from prune_opd.core.objective import LOGPROB_FLOOR, group_advantage
from prune_opd.core.overlap import overlap_mass, topk_overlap
from prune_opd.distributed.merging import Share
from prune_opd.step import StepResult
from prune_opd.types import Rollouts, TeacherScores


def step_share(result: StepResult, config: Config) -> Share:
    """What `metrics_of` needs of this rank's rollouts: a few numbers for each, and sums by position."""
    rollouts, drift = result.rollouts, result.drift
    ngrams = repeated_ngrams(rollouts.response_ids, rollouts.response_mask)
    counts = {
        "generated": rollouts.generated,
        "slot_steps": rollouts.slot_steps,
        "scored": result.scores.scored,
        "packed_tokens": result.packed_tokens,
        "padding": result.padding,
        "repeated_ngrams": ngrams[0],
        "ngrams": ngrams[1],
    }
    rows: dict[str, Tensor | list[Any]] = {
        "length": rollouts.lengths,
        "finished": rollouts.finished,
        "stopped": rollouts.stopped,
        "effective_length": drift.effective_length,
    }
    if config.model.teachers:
        rows |= teacher_rows(result)
    if result.rewards is not None:
        rows["reward"] = result.rewards
    if result.spent_at is not None:
        rows |= stop_rows(rollouts, result.events, result.audit, result.spent_at, config.pruning.repetition)
    gap_sums, peaks = engine_gap(rollouts, result.trainer_logprobs)
    sums = {
        "weight": result.weight.sum(),
        **{name: torch.tensor(count, dtype=torch.long) for name, count in counts.items()},
        **distillation_sums(rollouts, result.scores),
        **gap_sums,
    }
    return Share(result.numbers, rows, sums, peaks)


def teacher_rows(result: StepResult) -> dict[str, Tensor | list[Any]]:
    """Of each rollout (B,): the number of its teacher, and sums over its tokens of overlap, events and weight."""
    rollouts, mask = result.rollouts, result.rollouts.response_mask
    assert rollouts.student is not None and rollouts.teacher_prompts is not None
    overlap = topk_overlap(rollouts.student.ids, result.scores.topk.ids).double().masked_fill(~mask, 0)
    return {
        "teacher": torch.tensor([prompt.teacher for prompt in rollouts.teacher_prompts], dtype=torch.long),
        "overlap": overlap.sum(-1),
        "events": (result.events & mask).sum(-1),
        "weight": result.weight.double().sum(-1),
    }


def teacher_metrics(rows: Any, names: Sequence[str], budget: int) -> Iterator[tuple[str, float]]:
    """The same numbers as of a step, of the rollouts of each teacher; of one that was not asked, only that."""
    for number, name in enumerate(names):
        own = rows["teacher"] == number
        yield f"teacher/{name}/rollouts", int(own.sum())
        if not own.any():
            continue
        lengths, finished = rows["length"].cpu()[own], rows["finished"].cpu()[own]
        tokens = int(lengths.sum())
        for quantity, row in (("overlap_ratio", "overlap"), ("events", "events"), ("loss_weight_mean", "weight")):
            yield f"teacher/{name}/{quantity}", rows[row].cpu()[own].sum().item() / tokens
        effective = rows["effective_length"].cpu()[own].double()
        yield f"teacher/{name}/effective_response_length_mean", effective.mean().item()
        yield f"teacher/{name}/mean_length", lengths.double().mean().item()
        yield f"teacher/{name}/eos_rate", finished.double().mean().item()
        yield f"teacher/{name}/tokens_saved", int((budget - lengths)[~finished].sum())


def distillation_sums(rollouts: Rollouts, scores: TeacherScores) -> dict[str, Tensor]:
    """Sums over rollouts at each position, (T,) float64, of how student and teacher compare; `positions` counts them.

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
    mask = rollouts.response_mask
    sums = {f"distillation/{name}": v.double().masked_fill(~mask, 0).sum(0) for name, v in quantities.items()}
    return sums | {"positions": mask.sum(0).double()}


def distillation_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Means of `distillation_sums` over all kept tokens and by position (`/pos_<a>_<b>`, [a, b) in tokens)."""
    return {
        key: mean
        for name, values in sums.items()
        if name.startswith("distillation/")
        for key, mean in position_means(name, values, sums["positions"])
    }


def engine_gap(rollouts: Rollouts, trainer_logprobs: Tensor | None) -> tuple[dict[str, Tensor], dict[str, float]]:
    """How far the engine that sampled is from the policy that is trained, when they are two: sums, and the largest."""
    if rollouts.sampled_logprobs is None or trainer_logprobs is None:
        return {}, {}
    gap = (trainer_logprobs - rollouts.sampled_logprobs)[rollouts.response_mask].double()
    # k3 estimate of KL(engine || trainer): unbiased, never negative. Schulman, "Approximating KL divergence" (2020)
    sums = {"engine_gap": gap.abs().sum(), "engine_kl": (gap.exp() - 1 - gap).sum()}
    return sums, {"engine_gap": gap.abs().max().item() if len(gap) else 0.0}


def position_means(key: str, sums: Tensor, counts: Tensor) -> Iterator[tuple[str, float]]:
    """Overall mean and means of position buckets from sums (T,) and counts (T,) by position.

    Buckets are [0, 16), [16, 32), [32, 64) and so on: drift is fastest early.
    """
    yield key, (sums.sum() / counts.sum()).item()
    start, stop = 0, 16
    while start < len(sums) and counts[start:stop].sum() > 0:
        yield f"{key}/pos_{start}_{stop}", (sums[start:stop].sum() / counts[start:stop].sum()).item()
        start, stop = stop, 2 * stop


def stop_rows(
    rollouts: Rollouts, events: Tensor, audit: Tensor, spent_at: Tensor, guard: RepetitionSection
) -> dict[str, Tensor | list[Any]]:
    """Of each rollout, (B,) bool: was it stopped in a loop, is it an audit, would it have been stopped, came it back?

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
    return {"looped": looped, "audit": audit, "would_stop": would_stop, "came_back": came_back}


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


def repeated_ngrams(response_ids: Tensor, mask: Tensor, *, n: int = 8) -> tuple[int, int]:
    """n-grams that already stood earlier in the same rollout, and all n-grams; response_ids and mask (B, T)."""
    repeated = total = 0
    for ids, valid in zip(response_ids.tolist(), mask.sum(-1).tolist(), strict=True):
        grams = [tuple(ids[i : i + n]) for i in range(valid - n + 1)]
        repeated, total = repeated + len(grams) - len(set(grams)), total + len(grams)
    return repeated, total


def metrics_of(result: StepResult, config: Config, share: Share | None = None) -> dict[str, Any]:
    """The metrics record of one step; keys are listed in docs/metrics.md.

    share: of all ranks (`merged`), where there are several; from the result comes what all ranks have alike.
    """
    share, change = share or step_share(result, config), result.window
    rows: Any = share.rows
    lengths, finished, stopped = rows["length"], rows["finished"], rows["stopped"]
    effective, sums = rows["effective_length"].double(), share.sums
    count = {name: int(value) for name, value in sums.items() if value.dtype == torch.long}
    budget = config.rollout.max_completion_length
    cap = change.previous_length if change else budget
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
        "prune_opd/loss_weight_mean": (sums["weight"] / trained).item(),
        **distillation_metrics(sums),
        "completions/mean_length": lengths.double().mean().item(),
        "completions/eos_rate": finished.double().mean().item(),
        "completions/clipped_ratio": (~finished & ~stopped).double().mean().item(),
        "completions/repetition_rate": count["repeated_ngrams"] / max(count["ngrams"], 1),
        "tokens/generated": count["generated"],
        "tokens/scored": count["scored"],
        "tokens/trained": trained,
        "tokens/update_padding": count["padding"] / count["packed_tokens"],
        # Upper bounds: a rollout that was cut might have ended by itself before the whole budget was used.
        "tokens/saved": int((budget - lengths)[~finished].sum()),
        "tokens/saved_by_stops": int((cap - lengths)[stopped].sum()),
        "rollout/slot_occupancy": count["generated"] / max(count["slot_steps"], 1),
        **{f"time/{name}": seconds for name, seconds in result.seconds.items()},
    }
    if config.rollout.token_budget is not None:
        record["rollout/prompts"] = len(lengths) // config.rollout.num_generations
    if "teacher" in rows:
        record |= teacher_metrics(rows, [teacher.name for teacher in config.model.teachers], budget)
    if change:
        record["prune_opd/effective_response_length_hit_ratio"] = change.hit_ratio
    if "engine_gap" in sums:
        record["rollout/logprob_gap_mean"] = (sums["engine_gap"] / trained).item()
        record["rollout/logprob_gap_max"] = share.peaks["engine_gap"]
        record["rollout/engine_kl"] = (sums["engine_kl"] / trained).item()
    if "reward" in rows:
        record |= reward_metrics(rows["reward"], config.rollout.num_generations)
    if "audit" in rows:
        record["completions/stopped_by_drift"] = (stopped & ~rows["looped"]).double().mean().item()
        record["completions/stopped_by_repetition"] = rows["looped"].double().mean().item()
        record["audit/rollouts"] = int(rows["audit"].sum())
        record["audit/would_stop"] = int(rows["would_stop"].sum())
        record["audit/came_back"] = int(rows["came_back"].sum())
    return record
