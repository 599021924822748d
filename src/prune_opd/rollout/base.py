"""What a sampler must do, whatever engine is behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from prune_opd.types import Rollouts, Span, TopK


class Watcher(Protocol):
    """Looks at rollouts while they are generated, and may end them."""

    every: int
    """Decode steps between two looks."""

    def watch(self, response_ids: Tensor, student: TopK, spans: Sequence[Span]) -> Mapping[int, int]:
        """Take the new tokens, each exactly once; returns {rollout: tokens to keep} for those that stop here.

        response_ids (B, T) and student hold everything sampled so far. A stop may lie before a span's end: what was
        sampled past it is thrown away, so that the result does not depend on how often the watcher looks.
        """
        ...


class Sampler(Protocol):
    """Draws one response for each prompt from the student as it is now."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: Tensor,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        watcher: Watcher | None = None,
    ) -> Rollouts:
        """Sample responses of at most T = `uniforms.shape[1]` tokens.

        prompts: B token-id lists. uniforms (B, T) float64 in [0, 1): token t of rollout b is the inverse-CDF draw at
        uniforms[b, t], so a rollout depends on nothing but its prompt, its row of numbers, and the weights. top_k: how
        many of the student's most likely tokens are kept for each position; it truncates nothing.
        """
        ...


def rollout_uniforms(seed: int, step: int, rollouts: Sequence[int], length: int, *, stream: int = 0) -> Tensor:
    """Random numbers for sampling that depend on (seed, stream, step, rollout, position) alone: (B, length) float64.

    Philox is counter-based: each rollout owns a block of the counter, so neither batch composition nor the length
    asked for changes a number. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    rows = [
        np.random.Generator(np.random.Philox(key=seed, counter=[0, rollout, step, stream])).random(length)
        for rollout in rollouts
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, length, dtype=torch.float64)
