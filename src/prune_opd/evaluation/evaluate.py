"""Avg@k and pass@k on held-out problems."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from prune_opd.config import EvaluationSection
from prune_opd.distributed.world import ALONE, World
from prune_opd.errors import DataError, EngineError, ServerError
from prune_opd.evaluation.graders import are_right, check_gradable
from prune_opd.rollout.base import Sampler, rollout_uniforms
from prune_opd.types import Prompt, Rollouts

EVALUATION_STREAM = 1  # training samples from stream 0, so the two never share a random number


@dataclass(frozen=True)
class Evaluation:
    """What k answers to each problem came to; intervals are 95% intervals over problems, see `ci95`.

    accuracy: Avg@k, the mean over problems of the share of right answers (per_problem), in [0, 1] · pass_at_k: for 1,
    2, 4 ... and k, the unbiased chance that one of so many answers is right · mean_length: tokens of an answer ·
    eos_rate: share of answers that ended by themselves · tokens: sampled in all · seconds: sampling and grading ·
    sample_seconds: sampling alone.
    """

    accuracy: float
    ci95: tuple[float, float]
    per_problem: list[float]
    pass_at_k: dict[int, float]
    pass_at_k_ci95: dict[int, tuple[float, float]]
    mean_length: float
    eos_rate: float
    tokens: int
    seconds: float
    sample_seconds: float


def evaluate(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: EvaluationSection,
    *,
    seed: int = 0,
    responses_path: Path | None = None,
    problems_at_once: int | None = None,
    on_progress: Callable[[int, int], None] = lambda problems, right: None,
    world: World = ALONE,
) -> Evaluation:
    """Sample k answers to each prompt and grade them.

    The random numbers depend on `seed` alone, so that two checkpoints, or two arms, differ by their weights alone.
    problems_at_once: how many problems are sampled in one go; all of them when unset. on_progress(problems done, right
    answers so far) is called after each go. responses_path: every answer is written there as one JSON line, as soon as
    it is graded. Ranks share the problems and know the whole result; on_progress and responses_path see a rank's own.
    DataError when a prompt has nothing to grade against.
    """
    if not prompts:
        raise DataError("no problem to evaluate; name some with evaluation.data")
    check_gradable(prompts, "an evaluation", "unset evaluation.data")
    began, sample_seconds = time.perf_counter(), 0.0
    k, at_once = settings.k, problems_at_once or len(prompts)
    right, lengths, finished = np.zeros((3, len(prompts), k), dtype=int)
    with ExitStack() as stack:
        file = stack.enter_context(responses_path.open("w", encoding="utf-8")) if responses_path else None
        mine = range(world.rank, len(prompts), world.size)
        most = len(range(0, len(prompts), world.size))  # of rank 0: all ranks sample equally often
        for start in range(0, most, at_once):
            batch = list(mine[start : start + at_once])
            numbers = [problem * k + sample for problem in batch for sample in range(k)]
            sampling_began = time.perf_counter()
            with world.raising_together(ServerError, EngineError):
                rollouts = sampler.sample(
                    [prompts[problem].token_ids for problem in batch for _ in range(k)],
                    rollout_uniforms(seed, 0, numbers, settings.max_tokens, stream=EVALUATION_STREAM),
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                )
            lengths[batch] = rollouts.lengths.reshape(-1, k).cpu()
            finished[batch] = rollouts.finished.reshape(-1, k).cpu()
            sample_seconds += time.perf_counter() - sampling_began
            texts = list(response_texts(rollouts, tokenizer))
            verdicts = are_right([prompts[number // k] for number in numbers], texts)
            for number, text, verdict in zip(numbers, texts, verdicts, strict=True):
                problem, sample = divmod(number, k)
                right[problem, sample] = verdict
                if file:
                    record = {
                        "problem": problem,
                        "sample": sample,
                        "source": prompts[problem].source,
                        "gold": prompts[problem].answer,
                        "response": text,
                        "right": bool(right[problem, sample]),
                        "length": int(lengths[problem, sample]),
                        "finished": bool(finished[problem, sample]),
                    }
                    print(json.dumps(record), file=file, flush=True)
            on_progress(start + len(batch), int(right.sum()))
    # What a rank did not sample is zero there.
    right, lengths, finished = (sum(parts) for parts in zip(*world.gather((right, lengths, finished)), strict=True))
    return _summary(right, lengths, finished, seconds=time.perf_counter() - began, sample_seconds=sample_seconds)


def _summary(right: np.ndarray, lengths: np.ndarray, finished: np.ndarray, **seconds: float) -> Evaluation:
    """The scores of (problems, k) answers."""
    k, per_problem = right.shape[1], right.mean(axis=1)
    ks = sorted({2**i for i in range(k.bit_length())} | {k})  # 1, 2, 4 ... and k
    chances = {j: [pass_at_k(k, int(count), j) for count in right.sum(axis=1)] for j in ks}
    return Evaluation(
        accuracy=float(per_problem.mean()),
        ci95=ci95(per_problem),
        per_problem=per_problem.tolist(),
        pass_at_k={j: float(np.mean(values)) for j, values in chances.items()},
        pass_at_k_ci95={j: ci95(values) for j, values in chances.items()},
        mean_length=float(lengths.mean()),
        eos_rate=float(finished.mean()),
        tokens=int(lengths.sum()),
        **seconds,
    )


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that at least one of k answers is right, drawn without replacement from n of which `right` are.

    An unbiased estimate of pass@k, while 1 - (1 - right/n)^k is biased. Source: Chen et al., arXiv 2107.03374, eq. 1.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def ci95(
    per_problem: Sequence[float] | np.ndarray, *, least: float = 0.0, most: float = 1.0, resamples: int = 2000
) -> tuple[float, float]:
    """95% interval of the mean of scores in [least, most], by resampling problems, which a benchmark has few of.

    Where all scores are the same, resampling would give an interval without width. Then it is exact instead: at most a
    share b = 1 - 0.025^(1/n) of all problems scores otherwise (Clopper and Pearson, Biometrika 26, 1934, for 0 of n),
    and those may score anything. So 0 of 8 problems right is 0 to 36.9%.
    """
    scores = np.asarray(per_problem, dtype=float)
    if np.ptp(scores) < 1e-12:  # means of the same numbers in another order
        b, score = 1 - 0.025 ** (1 / len(scores)), float(scores[0])
        return (1 - b) * score + b * least, (1 - b) * score + b * most
    draws = np.random.default_rng(0).integers(len(scores), size=(resamples, len(scores)))
    low, high = np.quantile(scores[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def response_texts(rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The text of each rollout's kept tokens, special tokens left out: what is graded."""
    for ids, length in zip(rollouts.response_ids.tolist(), rollouts.lengths.tolist(), strict=True):
        yield tokenizer.decode(ids[:length], skip_special_tokens=True)
