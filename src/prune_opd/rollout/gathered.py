"""Rollouts of a sharded student, whose weights are gathered for the time of a call."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from prune_opd.distributed.world import full_tensor
from prune_opd.rollout.base import Sampler, SamplingParams, Watcher
from prune_opd.rollout.local import LocalSampler
from prune_opd.types import Rollouts


class WholeWeightsSampler(Sampler):
    """Samples with a copy of a sharded student that holds the whole weights during a call, and nothing between calls.

    A sharded model would gather all its weights for each token, and ranks whose rollouts end earlier would have to go
    on. So the weights are gathered once a call; then each rank samples by itself, without collectives. All
    ranks must call `sample` equally often, with prompts or without.
    """

    def __init__(self, sampler: LocalSampler, student: torch.nn.Module) -> None:
        """Make a copy of `student`, which is not sharded yet, the model of `sampler`; its parameters have no memory."""
        hollow = {id(p): torch.nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in student.parameters()}
        self.sampler, self.student = sampler, student
        self.model = sampler.model = copy.deepcopy(student, hollow)

    def generate(
        self, prompts: Sequence[Sequence[int]], uniforms: Tensor, params: SamplingParams, watcher: Watcher | None
    ) -> Rollouts:
        """See `Sampler.sample`."""
        with torch.no_grad():
            gathered = {id(p): full_tensor(p.detach()) for p in self.student.parameters()}
        self._assign(gathered)
        try:
            return self.sampler.sample(prompts, uniforms, **vars(params), watcher=watcher)
        finally:
            self._assign({key: value.to("meta") for key, value in gathered.items()})

    def _assign(self, values: dict[int, Tensor]) -> None:
        named = self.student.named_parameters(remove_duplicate=False)  # tied weights have several names and one value
        self.model.load_state_dict({name: values[id(p)] for name, p in named}, assign=True, strict=False)
