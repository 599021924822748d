"""What a sampler must do, whatever engine is behind it, and what all of them keep of their rollouts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
        """Take the new tokens, each exactly once; returns {rollout: tokens to keep} for the rollouts that stop here.

        response_ids (B, T) and student hold everything sampled so far. A stop may lie before a span's end: later
        tokens are thrown away, so that the result does not depend on how often the watcher looks.
        """
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn; the fields are explained at `Sampler.sample`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


class Sampler(ABC):
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
        return self.generate(prompts, uniforms, SamplingParams(temperature, top_p, top_k), watcher)

    @abstractmethod
    def generate(
        self, prompts: Sequence[Sequence[int]], uniforms: Tensor, params: SamplingParams, watcher: Watcher | None
    ) -> Rollouts:
        """What `sample` does, by the engine of a subclass."""

    def close(self) -> None:  # noqa: B027  # most engines hold nothing
        """Let go of an engine that lives in this process."""


class Progress:
    """For each of B rollouts: its `lengths` in tokens, and whether it `finished` by itself or was `stopped`.

    generated: tokens of all rollouts, those past a stop included.
    """

    def __init__(self, batch: int) -> None:
        self.lengths = [0] * batch
        self.finished, self.stopped = [False] * batch, [False] * batch
        self.seen_by_watcher = [0] * batch
        self.generated = 0

    def show(
        self, watcher: Watcher, response_ids: Tensor, student: TopK, rollouts: Iterable[int], ended: Collection[int]
    ) -> Mapping[int, int]:
        """Show `watcher` the new tokens of these rollouts; returns {rollout: tokens kept} for those that it stopped.

        ended: the rollouts of which no more tokens will follow.
        """
        spans = [
            Span(b, self.seen_by_watcher[b], self.lengths[b], ended=b in ended)
            for b in rollouts
            if self.lengths[b] > self.seen_by_watcher[b]
        ]
        for span in spans:
            self.seen_by_watcher[span.rollout] = span.end
        stops = watcher.watch(response_ids, student, spans)
        for b, kept in stops.items():
            self.finished[b] &= kept == self.lengths[b]
            self.stopped[b], self.lengths[b] = not self.finished[b], kept
        return stops

    def rollouts(
        self,
        prompts: Sequence[Sequence[int]],
        response_ids: Tensor,
        student: TopK | None,
        sampled_logprobs: Tensor | None = None,
        *,
        pad_id: int,
        slot_steps: int = 0,
    ) -> Rollouts:
        """The rollouts as tensors (B, T), cut to the longest response, on the device of `response_ids`."""
        longest, device = max([1, *self.lengths]), response_ids.device
        lengths = torch.tensor(self.lengths, dtype=torch.long, device=device)
        mask = torch.arange(longest, device=device) < lengths[:, None]
        return Rollouts(
            prompts=prompts,
            response_ids=response_ids[:, :longest].masked_fill(~mask, pad_id),
            response_mask=mask,
            finished=torch.tensor(self.finished, device=device),
            stopped=torch.tensor(self.stopped, device=device),
            student=student.at((slice(None), slice(longest))) if student else None,
            generated=self.generated,
            slot_steps=slot_steps,
            sampled_logprobs=None if sampled_logprobs is None else sampled_logprobs[:, :longest] * mask,
        )


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
