"""When another policy sampled the rollouts than the one that is trained: weights that make up for the gap.

An engine has the same weights and other kernels; rollouts that were sampled ahead have weights of one update before,
those in another `rollout.dtype` rounded ones. `rollout.importance_sampling_cap` corrects for it; what the gap is, is
logged in any case.
"""

from __future__ import annotations

from torch import Tensor

from prune_opd.config import Config
from prune_opd.core.importance import truncated_importance
from prune_opd.types import Rollouts


def corrected(
    weight: Tensor, advantage: Tensor | None, rollouts: Rollouts, trainer_logprobs: Tensor, config: Config
) -> tuple[Tensor, Tensor | None]:
    """Weight and advantage (B, T) times the truncated importance of the trained policy over the engine that sampled."""
    cap = config.rollout.importance_sampling_cap
    if cap is None or rollouts.sampled_logprobs is None:
        return weight, advantage
    both, mask = (trainer_logprobs, rollouts.sampled_logprobs), rollouts.response_mask
    of_token = truncated_importance(*both, mask, cap=cap, at_sampled_token=True)
    of_prefix = truncated_importance(*both, mask, cap=cap, at_sampled_token=False)
    weight = weight * (of_token if config.objective.loss == "sampled_token" else of_prefix)
    return weight, None if advantage is None else advantage * of_token
