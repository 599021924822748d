"""The ratio between the policy that is trained and the engine that sampled: the same weights, other kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def truncated_importance(
    trainer_logprobs: Float[torch.Tensor, "B T"],
    engine_logprobs: Float[torch.Tensor, "B T"],
    mask: Bool[torch.Tensor, "B T"],
    *,
    cap: float,
    at_sampled_token: bool,
) -> Float[torch.Tensor, "B T"]:
    """Factor of each position's loss: min(cap, p_trainer / p_engine) of one token, 1 where there is none. Detached.

    at_sampled_token: the loss at t is one of the sampled token y_t, whose ratio counts. Else the loss at t is an
    expectation over candidates that the trainer computes itself, and only how its prefix came about is the engine's:
    then the ratio is that of y_{t-1}, the last token of the prefix, and 1 at t = 0. One token and not the product of
    all: the product is unbiased, but its variance grows exponentially with the length. Truncated from above alone.
    Source: truncated importance sampling, Ionides (2008); between engines, Yao et al. (2025).
    """
    ratio = (trainer_logprobs - engine_logprobs).detach().masked_fill(~mask, 0).exp().clamp(max=cap)
    if at_sampled_token:
        return ratio
    return torch.cat([torch.ones_like(ratio[:, :1]), ratio[:, :-1]], dim=1)
