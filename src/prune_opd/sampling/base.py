"""What a sampler must do, whatever engine is behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from prune_opd.types import Rollouts


class Sampler(Protocol):
    """Draws one response for each prompt from the student as it is now."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: Tensor,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Rollouts:
        """Sample responses of at most T = `uniforms.shape[1]` tokens.

        prompts: B token-id lists. uniforms (B, T) float64 in [0, 1): token t of rollout b is the inverse-CDF draw at
        uniforms[b, t], so a rollout depends on nothing but its prompt, its row of numbers, and the weights.
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
