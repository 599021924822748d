"""What each token counts in the loss: its reliability; or, for a control of `compare`, a draw at random."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from prune_opd.config import Config
from prune_opd.core.drift import DriftReport
from prune_opd.distributed.world import ALONE, World
from prune_opd.rollout.base import rollout_uniforms

RANDOM_TOKENS_STREAM = 3  # of random numbers; training samples from 0, evaluation from 1, audits from 2


class TokenWeights(Protocol):
    """The weights (B, T) float32 of a step, 0 on padding; numbers: which of the step's rollouts these are."""

    def __call__(self, step: int, numbers: Sequence[int], mask: Tensor, drift: DriftReport) -> Tensor: ...


def token_weights(config: Config, world: World = ALONE) -> TokenWeights:
    """The weights that a recipe asks for: reliability, unless `control.kept_tokens` has tokens drawn at random."""
    if config.control.kept_tokens:
        return partial(_random, config.control.kept_tokens, config.training.seed, world)
    return partial(_reliability, config)


def _reliability(config: Config, step: int, numbers: Sequence[int], mask: Tensor, drift: DriftReport) -> Tensor:
    weight = drift.weight if config.weighs_tokens else mask.float()
    if config.teacher_ends_with_reliability:
        weight = weight.masked_fill(drift.reliability <= config.pruning.positive_eps, 0)
    return weight


def _random(
    kept: Sequence[int], seed: int, world: World, step: int, numbers: Sequence[int], mask: Tensor, drift: DriftReport
) -> Tensor:
    return random_tokens(mask, kept[step], seed=seed, step=step, numbers=numbers, world=world)


def random_tokens(
    mask: Tensor, count: int, *, seed: int, step: int, numbers: Sequence[int], world: World = ALONE
) -> Tensor:
    """(B, T) float32: 1 on `count` valid tokens drawn without replacement, 0 elsewhere; on all if there are fewer.

    mask (B, T) bool; numbers: which of the step's rollouts these are, while `world` has the others. The draw depends on
    (seed, step) and on each token's place alone, whatever the number of ranks.
    """
    ticket = rollout_uniforms(seed, step, numbers, mask.shape[1], stream=RANDOM_TOKENS_STREAM).to(mask.device)
    everyone = torch.cat(world.gather(ticket[mask].cpu()))
    if count >= len(everyone):
        return mask.float()
    return (mask & (ticket <= everyone.kthvalue(count).values.to(mask.device))).float()
