"""Five steps of rollouts with both models' top-k, and what the method makes of them in float64 numpy.

Every engine is held against it: through our step, TRL and verl the same rollouts must give the same weights, effective
lengths, windows and losses. The models do not learn between the steps, so each step stands alone but for the window,
which says how long its rollouts may be.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from prune_opd.config import DynamicResponseLengthSection, ObjectiveSection, PruningSection
from prune_opd.rollout.base import rollout_uniforms
from prune_opd.rollout.local import LocalSampler
from prune_opd.teachers.local import LocalTeacher
from prune_opd.types import Rollouts, TeacherScores
from tests.core import reference
from tests.families import EOS, PAD, VOCAB, tiny_model, tiny_prompts

STEPS, TOP_K, BUDGET = 5, 4, 16
OBJECTIVE = ObjectiveSection(top_k=TOP_K)
WINDOW = DynamicResponseLengthSection(
    init_len=10, min_len=4, max_len=BUDGET, step=2, hit_ratio=0.5, margin=1, shrink_patience=1
)
PRUNING = PruningSection(threshold=0.5, w_drop=0.2, w_base=0.5, dynamic_response_length=WINDOW)


@dataclass(frozen=True)
class EngineStep:
    """One batch, and what must come of it: weight (B, T) float64, effective_length (B,), the window before and after,
    the mean loss over valid tokens in nats."""

    rollouts: Rollouts
    scores: TeacherScores
    weight: np.ndarray
    effective_length: list[int]
    window_before: int
    window_after: int
    loss: float


@cache
def models():
    """(student, teacher): tiny, random, related."""
    from tests.test_step import related

    student = tiny_model("qwen3", seed=3)
    return student, related(student)


@cache
def engine_steps() -> tuple[EngineStep, ...]:
    student, teacher = models()
    sampler = LocalSampler(student, pad_id=PAD, eos_ids=[EOS], vocab_size=VOCAB)
    scorer = LocalTeacher(teacher, vocab_size=VOCAB)
    steps: list[EngineStep] = []
    for step in range(STEPS):
        before = steps[-1].window_after if steps else WINDOW.init_len
        prompts = tiny_prompts((5, 3, 7, 2))
        rollouts = sampler.sample(prompts, rollout_uniforms(0, step, range(len(prompts)), before), top_k=TOP_K)
        scores = scorer.score(rollouts, top_k=TOP_K)
        mask = rollouts.response_mask.numpy()
        overlap = reference.topk_overlap(rollouts.student.ids.numpy(), scores.topk.ids.numpy())
        events = (overlap < PRUNING.threshold) & mask
        _, weight, effective, _ = reference.drift(events, mask, PRUNING.w_drop, PRUNING.w_base)
        batches = [step.effective_length for step in steps] + [effective.tolist()]
        after = reference.window_trace(batches, **WINDOW.model_dump(exclude={"enable"}))[-1][1]
        log_p, log_q = rollouts.student.logprobs.numpy(), scores.candidate_logprobs.numpy()
        loss, tokens, _, _ = reference.topk_reverse_kl(log_p, log_q, mask, weight)
        steps.append(EngineStep(rollouts, scores, weight, batches[-1], before, after, loss / tokens))
    return tuple(steps)
