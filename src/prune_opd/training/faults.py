"""What a NaN leaves behind: the rollouts of a step that was skipped for it; and gradient norms out of line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from prune_opd.errors import NonFiniteError
from prune_opd.training.files import append_json
from prune_opd.types import Prompt

SPIKE = 10.0
"""A gradient norm this many times the usual one is logged as a spike."""
USUAL_AFTER = 20  # steps whose norms make up the usual one, before which nothing is called a spike


def write_skipped(
    path: Path, step: int, prompts: Sequence[Prompt], error: NonFiniteError, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Add the rollouts with a NaN or an infinity to skipped.jsonl, or all of the batch when no single one has it.

    prompts: of each of the step's rollouts.
    """
    rollouts = error.rollouts
    if rollouts is None:
        return
    rows = error.rows.nonzero().flatten().tolist() if error.rows is not None else range(len(error.numbers))
    for row in rows:
        number = error.numbers[row]
        ids = rollouts.response_ids[row, : rollouts.lengths[row]].tolist()
        append_json(
            path,
            {
                "step": step,
                "reason": str(error),
                "rollout": number,
                "source": prompts[number].source,
                "prompt": prompts[number].text,
                "response": tokenizer.decode(ids),
                "prompt_ids": list(prompts[number].token_ids),
                "response_ids": ids,
            },
        )


def running_norm(usual: float | None, norm: float, steps: int) -> float | None:
    """The running geometric mean of gradient norms after one more; `steps` were in it. A norm of 0 changes nothing."""
    if norm == 0:
        return usual
    if usual is None:
        return norm
    return math.exp(math.log(usual) + (math.log(norm) - math.log(usual)) / min(steps + 1, USUAL_AFTER))
