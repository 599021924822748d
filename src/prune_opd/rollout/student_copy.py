"""Rollouts from a copy of the student's weights: while the student itself is updated, or in a type of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from prune_opd.rollout.base import Sampler, SamplingParams, Watcher
from prune_opd.rollout.local import LocalSampler
from prune_opd.types import Rollouts


class StudentCopy(Sampler):
    """Decodes with a copy of another sampler's model, and keeps the log-probs of the sampled tokens.

    dtype: that of the copy's parameters; None, that of each of the student's. Buffers stay as they are, as they do when
    transformers loads a model in bfloat16: rotary frequencies in bfloat16 would be off by radians far into a response.
    """

    def __init__(self, sampler: LocalSampler, dtype: torch.dtype | None = None) -> None:
        self.student = sampler.model
        own = {  # by identity: tied weights have several names and one value
            id(p): torch.nn.Parameter(p.detach().to(dtype or p.dtype, copy=True), requires_grad=False)
            for p in self.student.parameters()
        }
        self.sampler = copy.copy(sampler)
        self.sampler.model = copy.deepcopy(self.student, own).eval()
        self.sampler.keep_sampled_logprobs = True

    @torch.no_grad()
    def refreshed(self) -> LocalSampler:
        """The sampler of the copy, which has the student's weights of this moment."""
        for mine, theirs in zip(self.sampler.model.parameters(), self.student.parameters(), strict=True):
            mine.copy_(theirs)
        return self.sampler

    def generate(
        self, prompts: Sequence[Sequence[int]], uniforms: Tensor, params: SamplingParams, watcher: Watcher | None
    ) -> Rollouts:
        """See `Sampler.sample`; by the student as it is now."""
        return self.refreshed().sample(prompts, uniforms, **vars(params), watcher=watcher)
