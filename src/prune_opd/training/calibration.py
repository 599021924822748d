"""`pruning.threshold = "auto"`: γ from the pair itself, before the first step.

The teacher answers the prompts of the first step, and the student reads along. Those responses are what the teacher
would have gone to; a threshold that calls them drift is too high. The student's own responses to the same prompts are
measured beside them, to say how much the threshold finds there. The share is SAFE_SHARE, the same as in `replay`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prune_opd.config import Config, PruningSection
from prune_opd.core.choices import DriftMetric
from prune_opd.core.drift import SAFE_SHARE, drift_report
from prune_opd.core.head import head_statistics
from prune_opd.core.overlap import compatibility
from prune_opd.errors import CheckpointError, ModelError
from prune_opd.models.causal_lm import output_head
from prune_opd.models.loading import end_ids
from prune_opd.models.packed_attention import packed_states, packing_of, use_packed_attention
from prune_opd.models.packing import pack
from prune_opd.reporting.records import Calibration, read_object
from prune_opd.rollout.base import Sampler, rollout_uniforms
from prune_opd.rollout.local import LocalSampler
from prune_opd.teachers.base import Teacher
from prune_opd.teachers.local import LocalTeacher
from prune_opd.types import Prompt, Rollouts, TopK

CALIBRATION = "calibration.json"
CALIBRATION_STREAM = 4  # of random numbers; 0 to 3 are training, evaluation, audits and the random control


@dataclass(frozen=True)
class Written:
    """One response to each prompt, by the student or by the teacher, and both models' candidates along it."""

    rollouts: Rollouts
    student: TopK
    teacher: TopK

    def compatibility(self, metric: DriftMetric) -> Tensor:
        """(B, T) float32: what `pruning.threshold` is compared with; anything on padding."""
        student, teacher = self.student, self.teacher
        return compatibility(metric, student.ids, student.logprobs, teacher.ids, teacher.logprobs)

    def summary(self, pruning: PruningSection, threshold: float) -> dict[str, float]:
        """Mean compatibility, share of events, and share of responses that are reliable to their last token."""
        compatible, mask = self.compatibility(pruning.metric), self.rollouts.response_mask
        return {
            "responses": len(mask),
            "tokens": int(mask.sum()),
            "compatibility": compatible[mask].double().mean().item(),
            "events": (compatible < threshold)[mask].double().mean().item(),
            "whole": share_whole(compatible, mask, pruning, threshold),
        }


def student_written(config: Config, prompts: Sequence[Prompt], sampler: Sampler, teacher: Teacher) -> Written:
    """The student's responses of up to the longest that training allows, and the teacher's candidates along them."""
    rollouts = sampler.sample(
        [prompt.token_ids for prompt in prompts],
        _uniforms(config, prompts),
        temperature=config.rollout.temperature,
        top_k=config.objective.top_k,
    )
    assert rollouts.student is not None
    asked = replace(rollouts, teacher_prompts=[prompt.for_teacher for prompt in prompts])
    return Written(rollouts, rollouts.student, teacher.score(asked, top_k=config.objective.top_k).topk)


def teacher_written(
    config: Config,
    prompts: Sequence[Prompt],
    student: torch.nn.Module,
    teacher: LocalTeacher,
    tokenizer: PreTrainedTokenizerBase,
) -> Written:
    """The teacher's responses at temperature 1, and the student's candidates along them."""
    sampler = LocalSampler(
        teacher.model,
        pad_id=tokenizer.pad_token_id,
        eos_ids=teacher.ends or end_ids(teacher.model.generation_config, tokenizer),
        vocab_size=teacher.vocab_size,
        ends=teacher.ends,
        slots=config.rollout.slots,
    )
    asked = [prompt.for_teacher.token_ids for prompt in prompts]
    rollouts = sampler.sample(asked, _uniforms(config, prompts), top_k=config.objective.top_k)
    assert rollouts.student is not None  # whoever samples keeps its candidates there; here it is the teacher
    read = replace(rollouts, prompts=[prompt.token_ids for prompt in prompts])
    seen = candidates_along(student, read, config.objective.top_k, teacher.vocab_size, ends=teacher.ends)
    return Written(rollouts, seen, rollouts.student)


@torch.no_grad()
def candidates_along(
    model: Any,
    rollouts: Rollouts,
    top_k: int,
    vocab_size: int,
    token_budget: int | None = None,
    *,
    ends: Sequence[int] = (),
) -> TopK:
    """The K likeliest tokens of `model` at every position of responses that something else wrote."""
    batch, length = rollouts.response_ids.shape
    found = TopK.empty(batch, length, top_k, rollouts.response_ids.device)
    head, was_training = output_head(model), model.training
    model.eval()
    for part in pack(rollouts, token_budget, **packing_of(model)):
        with use_packed_attention(model):
            hidden = packed_states(model, part)[part.row, part.column]
        statistics = head_statistics(hidden, head, top_k=top_k, vocab_size=vocab_size, ends=ends)
        where = part.rollout, part.position
        found.ids[where], found.logprobs[where] = statistics.topk_ids, statistics.topk_logprobs
        found.entropy[where] = statistics.entropy
    model.train(was_training)
    return found


def share_whole(compatible: Tensor, mask: Tensor, pruning: PruningSection, threshold: float) -> float:
    """Share of responses (B, T) that are reliable to their last token under this threshold."""
    drift = drift_report(
        (compatible < threshold) & mask, mask, w_drop=pruning.w_drop, w_base=pruning.w_base, eps=pruning.positive_eps
    )
    return (drift.effective_length == mask.sum(-1)).double().mean().item()


def largest_safe_threshold(compatible: Tensor, mask: Tensor, pruning: PruningSection, top_k: int) -> float | None:
    """The largest threshold that leaves SAFE_SHARE of these responses whole; None if none does.

    Thresholds are counts of K for the overlap ratio, hundredths for other metrics: others make no difference, or
    little. compatible, mask (B, T) of responses that should not be cut.
    """
    levels = top_k if pruning.metric == "overlap_ratio" else 100
    safe = (
        t
        for t in (level / levels for level in range(levels, 0, -1))
        if share_whole(compatible, mask, pruning, t) >= SAFE_SHARE
    )
    return next(safe, None)


def with_known_threshold(config: Config, run_dir: Path) -> tuple[Config, dict[str, Any] | None]:
    """A recipe whose threshold is "auto" with the number instead, if there is one already, and what it was found from.

    A run that goes on keeps the threshold that its directory has. Where nothing is pruned by a threshold, only logged
    numbers depend on it, and it is the default. Else the recipe comes back as it is: the threshold must be measured.
    """
    if config.pruning.threshold != "auto":
        return config, None
    if not config.calibrates:
        return config.with_threshold(PruningSection.model_fields["threshold"].default), None
    path = run_dir / CALIBRATION
    if not path.is_file():
        return config, None
    found = read_object(path, Calibration, CheckpointError)
    return config.with_threshold(found["threshold"]), found


def calibrate(
    config: Config,
    prompts: Sequence[Prompt],
    *,
    student: PreTrainedModel,
    sampler: Sampler,
    teacher: LocalTeacher,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """γ and what it was found from, as it goes into calibration.json. Costs one response of each model to each prompt.

    Raises ModelError when even the lowest threshold would cut the teacher's own responses.
    """
    began = time.perf_counter()
    by_teacher = teacher_written(config, prompts, student, teacher, tokenizer)
    by_student = student_written(config, prompts, sampler, teacher)
    pruning = config.pruning
    threshold = largest_safe_threshold(
        by_teacher.compatibility(pruning.metric), by_teacher.rollouts.response_mask, pruning, config.objective.top_k
    )
    if threshold is None:
        raise ModelError(
            'pruning.threshold = "auto" found none: even at the lowest threshold, reliability does not last to the end '
            f"of {SAFE_SHARE:.0%} of the teacher's own responses. Lower pruning.w_drop = {pruning.w_drop:g}, or set a "
            "threshold"
        )
    return {
        "threshold": threshold,
        "metric": pruning.metric,
        "share": SAFE_SHARE,
        "teacher_written": by_teacher.summary(pruning, threshold),
        "student_written": by_student.summary(pruning, threshold),
        "seconds": time.perf_counter() - began,
    }


def calibration_text(found: dict[str, Any]) -> str:
    """What `calibrate` found, in a sentence."""
    ours, theirs = found["student_written"], found["teacher_written"]
    return (
        f"threshold {found['threshold']:g}, calibrated in {found['seconds']:.0f} s on {ours['responses']} prompts: "
        f"{theirs['whole']:.0%} of the teacher's responses stay reliable to the end, {ours['whole']:.0%} of the "
        f"student's; compatibility {theirs['compatibility']:.3f} and {ours['compatibility']:.3f}, events "
        f"{theirs['events']:.1%} and {ours['events']:.1%}"
    )


def _uniforms(config: Config, prompts: Sequence[Prompt]) -> Tensor:
    return rollout_uniforms(
        config.training.seed, 0, range(len(prompts)), config.longest_response, stream=CALIBRATION_STREAM
    )
