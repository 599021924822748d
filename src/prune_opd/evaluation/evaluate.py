"""Avg@k on held-out problems."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from prune_opd.config import EvaluationSection
from prune_opd.data.prompts import Prompt
from prune_opd.errors import DataError
from prune_opd.evaluation.graders import grade
from prune_opd.sampling.base import Sampler, rollout_uniforms

EVALUATION_STREAM = 1  # training samples from stream 0, so the two never share a random number


@dataclass(frozen=True)
class Evaluation:
    """accuracy is the mean over problems of the share of k samples that are right, in [0, 1]."""

    accuracy: float
    ci95: tuple[float, float]
    per_problem: list[float]
    mean_length: float
    eos_rate: float
    seconds: float


def evaluate(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: EvaluationSection,
) -> Evaluation:
    """Sample k answers to each prompt and grade them.

    The random numbers are the same at every call, so that two checkpoints, or two arms, differ by their weights alone.
    """
    ungraded = next((p for p in prompts if p.answer is None), None)
    if ungraded is not None:
        raise DataError(
            f"{ungraded.source}: no gold answer to grade against; name the column with data.answer_column, "
            "or unset evaluation.data"
        )
    began = time.perf_counter()
    repeated = [prompt for prompt in prompts for _ in range(settings.k)]
    rollouts = sampler.sample(
        [prompt.token_ids for prompt in repeated],
        rollout_uniforms(0, 0, range(len(repeated)), settings.max_tokens, stream=EVALUATION_STREAM),
        temperature=settings.temperature,
        top_p=settings.top_p,
    )
    texts = tokenizer.batch_decode(rollouts.response_ids, skip_special_tokens=True)
    right = np.array([grade(text, prompt.answer) for text, prompt in zip(texts, repeated, strict=True)])
    per_problem = right.reshape(len(prompts), settings.k).mean(axis=1)
    return Evaluation(
        accuracy=float(per_problem.mean()),
        ci95=bootstrap_ci95(per_problem),
        per_problem=per_problem.tolist(),
        mean_length=rollouts.lengths.double().mean().item(),
        eos_rate=rollouts.finished.double().mean().item(),
        seconds=time.perf_counter() - began,
    )


def bootstrap_ci95(per_problem: Sequence[float], *, resamples: int = 2000) -> tuple[float, float]:
    """95% interval of the mean by resampling problems, which are what a benchmark has few of."""
    scores = np.asarray(per_problem, dtype=float)
    draws = np.random.default_rng(0).integers(len(scores), size=(resamples, len(scores)))
    low, high = np.quantile(scores[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
