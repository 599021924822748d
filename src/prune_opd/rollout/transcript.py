"""The tokens of rollouts so far, for engines that answer in lists and not in tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prune_opd.core.ends import as_one_end, merge_listed
from prune_opd.rollout.base import Progress, Watcher
from prune_opd.types import Rollouts, TopK


class Tokens(NamedTuple):
    """New tokens of one rollout. ids, logprobs: for each token, itself and then its likeliest, flat; [] for K = 0."""

    tokens: list[int]
    ids: list[int]
    logprobs: list[float]


class Transcript(Progress):
    """One call of `sample`: B rollouts of at most T = `cap` tokens, with K = `top_k` candidates at each.

    `eos_ids` end a rollout, `ends` of them count as one action · listed: candidates that the engine gives, enough for
    the K likeliest once ends are merged · vocab_size: ids of the student, over which the entropy is completed ·
    device: where the watcher and the caller want their tensors.
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
        ends: Sequence[int] = (),
    ) -> None:
        self.ends, self.listed = tuple(ends), listed_for(top_k, ends)
        self.prompts, self.cap, self.top_k = prompts, cap, top_k
        self.pad_id, self.eos_ids, self.vocab_size, self.device = pad_id, eos_ids, vocab_size, device
        batch = len(prompts)
        super().__init__(batch)
        self.response_ids = torch.full((batch, cap), pad_id)
        self.sampled_logprobs = torch.zeros(batch, cap)
        self.student = TopK.empty(batch, cap, top_k)
        self.new = [Tokens([], [], []) for _ in range(batch)]

    def take(self, b: int, tokens: Sequence[int], ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Keep the new tokens of rollout b, as lists: one tensor for each token would cost more than the token.

        ids, logprobs: for each token, itself and then the `listed` likeliest, flat; not looked at where K = 0.
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

    def look(self, watcher: Watcher, ended: Collection[int], running: Iterable[int]) -> Mapping[int, int]:
        """Show the watcher what is new of these rollouts; returns {rollout: tokens kept} of what it stopped."""
        shown = [*ended, *sorted(running)]
        for b in shown:
            self._write_down(b)
        return self.show(watcher, self.response_ids.to(self.device), self.student.to(self.device), shown, ended)

    def finish(self, *, slot_steps: int) -> Rollouts:
        """Everything on `device`, cut to the longest kept response."""
        for b in range(len(self.prompts)):
            self._write_down(b)
        return self.rollouts(
            self.prompts,
            self.response_ids.to(self.device),
            self.student.to(self.device) if self.top_k else None,
            self.sampled_logprobs.to(self.device) if self.top_k else None,
            pad_id=self.pad_id,
            slot_steps=slot_steps,
        )

    def _write_down(self, b: int) -> None:
        """Move what is new of a rollout into the tensors."""
        new, end = self.new[b], self.lengths[b]
        start = end - len(new.tokens)
        if start == end:
            return
        where = b, slice(start, end)
        self.response_ids[where] = as_one_end(torch.tensor(new.tokens), self.ends)
        if self.top_k:
            ids = torch.tensor(new.ids).view(end - start, -1)[:, : self.listed + 1]
            logprobs = torch.tensor(new.logprobs).view(end - start, -1)[:, : self.listed + 1]
            best, at_best = merge_listed(ids[:, 1:], logprobs[:, 1:], self.ends, self.top_k)
            self.sampled_logprobs[where] = sampled_logprobs(ids, logprobs, self.ends)
            self.student.ids[where], self.student.logprobs[where] = best, at_best
            self.student.entropy[where] = completed_entropy(at_best, self.vocab_size)
        self.new[b] = Tokens([], [], [])


def listed_for(top_k: int, ends: Sequence[int]) -> int:
    """Candidates to ask an engine for, so that `top_k` are left when `ends` are merged."""
    return top_k + max(0, len(ends) - 1) if top_k else 0


def sampled_logprobs(ids: Tensor, logprobs: Tensor, ends: Sequence[int]) -> Tensor:
    """(N,) log-prob of the sampled token, the first of each row (N, 1 + L); of an end, that of all that are listed."""
    sampled, others = ids[:, :1], ids[:, 1:]
    counted = (as_one_end(others, ends) == as_one_end(sampled, ends)) & (others != sampled)
    return torch.cat([logprobs[:, :1], logprobs[:, 1:].masked_fill(~counted, -torch.inf)], dim=-1).logsumexp(-1)


def completed_entropy(logprobs: Tensor, vocab_size: int) -> Tensor:
    """(N,) nats: entropy of top-k log-probs (N, K) with the mass that is left spread evenly over the rest."""
    left, rest = (1 - logprobs.exp().sum(-1)).clamp(min=1e-7), vocab_size - logprobs.shape[-1]
    return torch.special.entr(logprobs.exp()).sum(-1) + (left * (rest / left).log() if rest > 0 else 0)
