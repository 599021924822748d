"""What rollouts have said so far, for engines that answer in lists and not in tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prune_opd.rollout.base import Watcher
from prune_opd.types import Rollouts, Span, TopK


class _New(NamedTuple):
    """Of one rollout, what is not in the tensors yet: its tokens, and for each 1 + K candidates, flat."""

    tokens: list[int]
    ids: list[int]
    logprobs: list[float]


class Transcript:
    """One call of `sample`: B rollouts of at most T = `cap` tokens, with K = `top_k` candidates at each.

    `eos_ids` end a rollout · vocab_size: ids of the student, over which the entropy is completed · device: where the
    watcher and the caller want their tensors.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        cap: int,
        *,
        top_k: int,
        pad_id: int,
        eos_ids: Collection[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.prompts, self.cap, self.top_k = prompts, cap, top_k
        self.pad_id, self.eos_ids, self.vocab_size, self.device = pad_id, eos_ids, vocab_size, device
        batch = len(prompts)
        self.response_ids = torch.full((batch, cap), pad_id)
        self.sampled_logprobs = torch.zeros(batch, cap)
        self.student = TopK.empty(batch, cap, top_k)
        self.new = [_New([], [], []) for _ in range(batch)]
        self.lengths, self.seen = [0] * batch, [0] * batch
        self.finished, self.stopped = [False] * batch, [False] * batch
        self.generated = 0

    def take(self, b: int, tokens: Sequence[int], ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Keep what rollout b said since the last time, as lists: one tensor a token would cost more than the token.

        ids, logprobs: for each token, itself and then the K likeliest, flat; not looked at where K = 0.
        """
        new = self.new[b]
        new.tokens.extend(tokens)
        if self.top_k:
            new.ids.extend(ids)
            new.logprobs.extend(logprobs)
        self.lengths[b] += len(tokens)
        self.generated += len(tokens)
        if tokens:
            self.finished[b] = tokens[-1] in self.eos_ids

    def look(self, watcher: Watcher, ended: Collection[int], running: Collection[int]) -> Mapping[int, int]:
        """Show the watcher what is new of these rollouts; returns {rollout: tokens kept} of what it stopped."""
        spans = [
            Span(b, self.seen[b], self.lengths[b], ended=b in ended)
            for b in [*ended, *sorted(running)]
            if self.lengths[b] > self.seen[b]
        ]
        for span in spans:
            self._write_down(span.rollout)
            self.seen[span.rollout] = span.end
        seen = TopK(*(values.to(self.device) for values in vars(self.student).values()))
        stops = watcher.watch(self.response_ids.to(self.device), seen, spans)
        for b, kept in stops.items():
            self.finished[b] &= kept == self.lengths[b]
            self.stopped[b], self.lengths[b] = not self.finished[b], kept
        return stops

    def rollouts(self, *, slot_steps: int) -> Rollouts:
        """Everything on `device`, cut to the longest kept response."""
        for b in range(len(self.prompts)):
            self._write_down(b)
        longest, device = max([1, *self.lengths]), self.device
        mask = torch.arange(longest) < torch.tensor(self.lengths, dtype=torch.long)[:, None]
        student = self.student.at((slice(None), slice(longest)))
        return Rollouts(
            prompts=self.prompts,
            response_ids=self.response_ids[:, :longest].masked_fill(~mask, self.pad_id).to(device),
            response_mask=mask.to(device),
            finished=torch.tensor(self.finished, device=device),
            stopped=torch.tensor(self.stopped, device=device),
            student=TopK(*(values.to(device) for values in vars(student).values())) if self.top_k else None,
            sampled_logprobs=self.sampled_logprobs[:, :longest].to(device) if self.top_k else None,
            generated=self.generated,
            slot_steps=slot_steps,
        )

    def _write_down(self, b: int) -> None:
        """Move what is new of a rollout into the tensors."""
        new, end = self.new[b], self.lengths[b]
        start = end - len(new.tokens)
        if start == end:
            return
        where = b, slice(start, end)
        self.response_ids[where] = torch.tensor(new.tokens)
        if self.top_k:
            ids = torch.tensor(new.ids).view(end - start, -1)[:, : self.top_k + 1]
            logprobs = torch.tensor(new.logprobs).view(end - start, -1)[:, : self.top_k + 1]
            self.sampled_logprobs[where] = logprobs[:, 0]
            self.student.ids[where], self.student.logprobs[where] = ids[:, 1:], logprobs[:, 1:]
            self.student.entropy[where] = completed_entropy(logprobs[:, 1:], self.vocab_size)
        self.new[b] = _New([], [], [])


def completed_entropy(logprobs: Tensor, vocab_size: int) -> Tensor:
    """(N,) nats: entropy of top-k log-probs (N, K) with the mass that is left spread evenly over the rest."""
    left, rest = (1 - logprobs.exp().sum(-1)).clamp(min=1e-7), vocab_size - logprobs.shape[-1]
    return torch.special.entr(logprobs.exp()).sum(-1) + (left * (rest / left).log() if rest > 0 else 0)
