"""One rollout as `rollouts.jsonl` keeps it: text, weights, and the candidates of both models at each token."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from prune_opd.config import TrackingSection
from prune_opd.core.overlap import shared_candidates
from prune_opd.types import Prompt, TopK

if TYPE_CHECKING:
    from prune_opd.step import StepResult


def rollout_record(
    result: StepResult,
    row: int,
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    tracking: TrackingSection,
) -> dict[str, Any]:
    """Rollout `row` of a step, JSON-ready. `shared` is how many candidates both models have at each position.

    The lists under token_ids and after it go by token and end after `tracking.rollout_tokens`; `texts` has the text of
    every id among them. Log-probabilities are in nats, to two decimals.
    """
    rollouts, drift, scores = result.rollouts, result.drift, result.scores
    assert rollouts.student is not None
    length = int(rollouts.lengths[row])
    shown = min(length, tracking.rollout_tokens)
    sampled = rollouts.response_ids[row, :shown].tolist()
    at = slice(row, row + 1), slice(shown)
    shared = shared_candidates(rollouts.student.ids[at], scores.topk.ids[at]).sum(-1)
    student = _candidates(rollouts.student, row, shown, tracking.rollout_candidates)
    teacher = _candidates(scores.topk, row, shown, tracking.rollout_candidates)
    ids = {*sampled, *(v for side in (student, teacher) for at in side["ids"] for v in at)}
    return {
        "prompt": prompt.text,
        "answer": prompt.answer,
        "response": tokenizer.decode(rollouts.response_ids[row, :length]),
        "length": length,
        "finished": bool(rollouts.finished[row]),
        "stopped": bool(rollouts.stopped[row]),
        "effective_length": int(drift.effective_length[row]),
        "onset": int(drift.onset[row]),
        **({} if result.rewards is None else {"reward": _or_none(result.rewards[row].item())}),
        "token_ids": sampled,
        "weight": _rounded(result.weight[row, :shown].tolist(), 3),
        "shared": shared[0].tolist(),
        "events": result.events[row, :shown].nonzero().flatten().tolist(),
        "teacher_logprob": _rounded(scores.sampled_logprobs[row, :shown].tolist()),
        "student": student,
        "teacher": teacher,
        "texts": {str(v): token_text(tokenizer, v) for v in sorted(ids)},
    }


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """The text that a token adds behind another one: with its space, which many tokenizers drop at the very front."""
    once, twice = tokenizer.decode([token_id]), tokenizer.decode([token_id, token_id])
    return twice.removeprefix(once) if twice.startswith(once) else once  # bytes of half a character may join up


def _candidates(topk: TopK, row: int, shown: int, count: int) -> dict[str, Any]:
    return {
        "ids": topk.ids[row, :shown, :count].tolist(),
        "logprobs": [_rounded(at) for at in topk.logprobs[row, :shown, :count].tolist()],
    }


def _rounded(values: Iterable[float], digits: int = 2) -> list[float]:
    # A forbidden token has log-probability -inf, which JSON has no number for.
    return [round(max(v, -999.0), digits) + 0.0 for v in values]  # + 0.0: no "-0.0"


def _or_none(number: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(number) else number
