"""Sampling from a Hugging Face causal LM in this process: a decode loop over slots.

A fixed number of slots decode one token each at every step. A rollout that ends for any reason gives its slot to the
next waiting prompt at once; when none waits, the last slot moves into the gap. So no decode step is spent on a finished
row, and none on padding. Prompts are prefilled a batch at a time, each distinct prompt once for all its rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prune_opd.core.ends import as_one_end, merge_ends_
from prune_opd.core.head import OutputHead
from prune_opd.models.causal_lm import compiled, hidden_states, output_head, use_attention
from prune_opd.models.slot_cache import SLOT_ATTENTION, SlotCache
from prune_opd.rollout.base import Progress, Sampler, SamplingParams, Watcher
from prune_opd.types import Rollouts, TopK

SHORTER = 0.75  # of the longest context: below this the second half of the slots is read by itself


def draw(logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Inverse-CDF draw: logits (B, V), uniforms (B,) float64 in [0, 1) -> token ids (B,) int64.

    Probabilities are summed in float64, so that the draw is exact for any vocabulary. temperature 0 is greedy.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        probs = probs.scatter(-1, order, ordered.masked_fill(outside, 0))
    cdf = probs.cumsum(-1)
    target = (uniforms * cdf[:, -1]).unsqueeze(-1)
    return torch.searchsorted(cdf, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


@dataclass(frozen=True)
class Generation:
    """Responses of a batch while they are generated, and the uniforms (B, T) float64 in [0, 1) that they are drawn by.

    response_ids (B, T) int64 · student: the top-k at each token, None for k = 0 · sampled_logprobs (B, T) float32 of
    the ids, None unless they are kept.
    """

    uniforms: Tensor
    response_ids: Tensor
    student: TopK | None
    sampled_logprobs: Tensor | None


def decode(
    model: PreTrainedModel,
    head: OutputHead,
    cache: SlotCache,
    last_token: Tensor,
    context: Tensor,
    length: int,
    rest: int | None,
    generation: Generation,
    where: tuple[Tensor, Tensor],
    *,
    vocab_size: int | None,
    ends: Sequence[int],
    temperature: float,
    top_p: float,
    top_k: int,
) -> Tensor:
    """The next token (R,) of the first R slots, written into `generation` together with the student's top-k there.

    It never synchronises with the host, so it compiles. last_token (R,) int64 stands at position context (R,) int64 of
    its slot; length and rest as in `SlotCache.inputs`; where: rollout and position (R,) int64 of the new token. `ends`
    are drawn as the ids that they are, and kept as one (core/ends.py).
    Log-probs and entropies are of temperature 1, float32, over the first `vocab_size` ids.
    """
    inputs = cache.inputs(last_token[:, None], context[:, None], length=length, rest=rest)
    hidden = hidden_states(model, inputs)
    logits = head.logits(hidden[:, -1])[:, :vocab_size]
    ids = as_one_end(draw(logits, generation.uniforms[where], temperature=temperature, top_p=top_p), ends)
    generation.response_ids[where] = ids
    if generation.student is not None:
        logprobs = merge_ends_(logits.float().log_softmax(-1), ends)
        best = logprobs.topk(top_k, dim=-1)
        generation.student.ids[where], generation.student.logprobs[where] = best.indices, best.values
        generation.student.entropy[where] = torch.special.entr(logprobs.exp()).sum(-1)
        if generation.sampled_logprobs is not None:
            generation.sampled_logprobs[where] = logprobs.gather(-1, ids[:, None]).squeeze(-1)
    return ids


class LocalSampler(Sampler):
    """Samples from a Hugging Face causal LM in this process.

    `eos_ids` end a rollout, and `ends` of them count as one action; ids from `vocab_size` on (padding rows of the
    embedding) are never sampled; `slots` rows decode at once. `stride` decode steps run between two looks at what was
    sampled: a look makes an accelerator wait for the host, and what a row decodes past its end before the look is
    thrown away. compile: the decode step runs compiled (`causal_lm.compiled`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_id: int,
        eos_ids: Sequence[int],
        vocab_size: int | None = None,
        ends: Sequence[int] = (),
        slots: int = 64,
        stride: int | None = None,
        compile: bool = False,
    ) -> None:
        self.model, self.pad_id, self.vocab_size, self.slots = model, pad_id, vocab_size, slots
        self.eos_ids, self.ends = frozenset(eos_ids), tuple(ends)
        self.stride = stride or (1 if model.device.type == "cpu" else 8)
        self.decode = compiled(decode) if compile else decode
        self.reads_halves = not (compile and model.device.type == "cpu")  # there each row is read by itself
        self.keep_sampled_logprobs = False  # needed where `model` is not the one that is trained

    def generate(
        self, prompts: Sequence[Sequence[int]], uniforms: Tensor, params: SamplingParams, watcher: Watcher | None
    ) -> Rollouts:
        """See `Sampler.sample`."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), use_attention(self.model, SLOT_ATTENTION):
                return _Decode(self, prompts, uniforms, params, watcher).run()
        finally:
            self.model.train(was_training)


class _Decode(Progress):
    """One call of `sample`: which rollout is in which slot, and what it consists of so far."""

    def __init__(
        self,
        sampler: LocalSampler,
        prompts: Sequence[Sequence[int]],
        uniforms: Tensor,
        params: SamplingParams,
        watcher: Watcher | None,
    ) -> None:
        super().__init__(len(prompts))
        self.sampler, self.prompts, self.params, self.watcher = sampler, prompts, params, watcher
        model = sampler.model
        self.head, self.device = output_head(model), model.device
        batch, self.cap = uniforms.shape
        self.generation = Generation(
            uniforms.to(self.device),
            response_ids=torch.full(uniforms.shape, sampler.pad_id, device=self.device),
            student=TopK.empty(batch, self.cap, params.top_k, self.device) if params.top_k else None,
            sampled_logprobs=torch.zeros(uniforms.shape, device=self.device)
            if params.top_k and sampler.keep_sampled_logprobs
            else None,
        )
        self.slot_steps = 0

        slots = min(sampler.slots, batch)
        # Without a queue all rollouts are about as long, and compiled code needs no second case.
        self.halves = batch > slots and sampler.reads_halves
        capacity = max(map(len, prompts), default=0) + self.cap
        self.cache = SlotCache(model, slots=slots, capacity=capacity)
        self.waiting = list(range(batch))[::-1]
        self.seats: list[int] = []  # rollout in slot i, for the slots in use, which are always the first ones
        self.prefilled: dict[tuple[int, ...], int] = {}  # prompt -> its row in the prompt cache
        self.prompt_cache: SlotCache | None = None

    def run(self) -> Rollouts:
        """Decode until every rollout has ended."""
        ended: list[int] = []  # since the watcher looked last
        steps_since_look = 0
        while self.cap and (self.waiting or self.seats):
            self._fill_slots()
            stride = min(self.sampler.stride, self.cap - max(self.lengths[b] for b in self.seats))
            self._decode(stride)
            leaving = self._take_ends(stride)
            ended += [self.seats[slot] for slot in leaving]
            self._free(leaving)
            steps_since_look += stride
            last = not (self.waiting or self.seats)
            if self.watcher is not None and (steps_since_look >= self.watcher.every or last):
                student = self.generation.student
                assert student is not None, "a watcher needs top_k > 0"
                self.show(self.watcher, self.generation.response_ids, student, [*ended, *self.seats], ended)
                self._free([slot for slot, b in enumerate(self.seats) if self.stopped[b]])
                ended, steps_since_look = [], 0
        return self.rollouts(
            self.prompts,
            self.generation.response_ids,
            self.generation.student,
            self.generation.sampled_logprobs,
            pad_id=self.sampler.pad_id,
            slot_steps=self.slot_steps,
        )

    # ---- slots ----

    def _fill_slots(self) -> None:
        """Give every free slot to a waiting prompt. The prompt's last token is what the slot decodes from first."""
        free = self.cache.slots - len(self.seats)
        newcomers = [self.waiting.pop() for _ in range(min(free, len(self.waiting)))]
        if newcomers:
            heads = [tuple(self.prompts[b][:-1]) for b in newcomers]
            if any(head and head not in self.prefilled for head in heads):
                self._prefill([tuple(self.prompts[b][:-1]) for b in newcomers + self.waiting[::-1]])
            taken = [(len(self.seats) + i, self.prefilled[head]) for i, head in enumerate(heads) if head]
            if taken:
                assert self.prompt_cache is not None
                slots, rows = torch.tensor(taken, device=self.device).unbind(-1)
                self.cache.copy_rows(self.prompt_cache, rows, slots, max(map(len, heads)))
            self.seats += newcomers
            self.last_token: Tensor | None = None  # the seats changed
        if self.last_token is None:
            self._seat_tensors()

    def _prefill(self, heads: Sequence[tuple[int, ...]]) -> None:
        """One forward over the next distinct prompts, at most as many as there are slots."""
        distinct = [head for head in dict.fromkeys(heads) if head][: self.cache.slots]
        width = max(map(len, distinct))
        self.prefilled = {head: row for row, head in enumerate(distinct)}
        self.prompt_cache = SlotCache(self.sampler.model, slots=len(distinct), capacity=width)
        ids = torch.tensor([[*head, *[self.sampler.pad_id] * (width - len(head))] for head in distinct])
        positions = torch.tensor([[*range(len(head)), *[-1] * (width - len(head))] for head in distinct])
        inputs = self.prompt_cache.inputs(ids.to(self.device), positions.to(self.device), length=width)
        hidden_states(self.sampler.model, inputs)

    def _seat_tensors(self) -> None:
        """Tensors of the slots: rollout, next response position, context position, last token."""
        contexts = [self._context(b) for b in self.seats]
        self.longest, self.rest = max(contexts), None
        shorter = contexts[self.cache.half :]
        if self.halves and len(shorter) > 1 and max(shorter) < SHORTER * self.longest:
            self.rest = max(shorter)
        self.seated = torch.tensor(self.seats, device=self.device)
        self.position = torch.tensor([self.lengths[b] for b in self.seats], device=self.device)
        starts = torch.tensor([len(self.prompts[b]) - 1 for b in self.seats], device=self.device)
        self.context = starts + self.position
        prompt_ends = torch.tensor([self.prompts[b][-1] for b in self.seats], device=self.device)
        last_sampled = self.generation.response_ids[self.seated, (self.position - 1).clamp(min=0)]
        self.last_token = torch.where(self.position > 0, last_sampled, prompt_ends)

    def _free(self, leaving: Sequence[int]) -> None:
        """Empty these slots. The last slot in use moves into a gap, and into one of the first half the longest rollout.

        So the slots in use remain the first ones, and the longest rollouts among themselves.
        """
        if not leaving:
            return
        self.last_token = None
        half = self.cache.half
        came_from = list(range(len(self.seats)))
        for gap in sorted(leaving, reverse=True):
            if gap < half < len(self.seats):
                longest = max(range(half, len(self.seats)), key=lambda slot: self._context(self.seats[slot]))
                self.seats[gap], came_from[gap] = self.seats[longest], came_from[longest]
                gap = longest
            end = self.seats.pop(), came_from.pop()
            if gap < len(self.seats):
                self.seats[gap], came_from[gap] = end
        moved = [(slot, before) for slot, before in enumerate(came_from) if slot != before]
        if moved:
            slots, before = torch.tensor(moved, device=self.device).unbind(-1)
            self.cache.copy_rows(self.cache, before, slots, max(self._context(self.seats[slot]) for slot, _ in moved))

    def _context(self, rollout: int) -> int:
        """Tokens of the prompt and of the response so far."""
        return len(self.prompts[rollout]) + self.lengths[rollout]

    # ---- tokens ----

    def _decode(self, stride: int) -> None:
        """`stride` tokens for every slot in use, without asking the device for anything."""
        for _ in range(stride):
            assert self.last_token is not None
            step = decode if self.cache.empty else self.sampler.decode
            self.last_token = step(
                self.sampler.model,
                self.head,
                self.cache,
                self.last_token,
                self.context,
                self.longest,
                self.rest,
                self.generation,
                (self.seated, self.position),
                vocab_size=self.sampler.vocab_size,
                ends=self.sampler.ends,
                **vars(self.params),
            )
            self.position, self.context = self.position + 1, self.context + 1
            self.longest, self.rest = self.longest + 1, None if self.rest is None else self.rest + 1
        self.slot_steps += stride * len(self.seats)

    def _take_ends(self, stride: int) -> list[int]:
        """Read the last `stride` tokens of every slot; returns the slots whose rollouts have ended."""
        columns = self.position[:, None] + torch.arange(-stride, 0, device=self.device)
        leaving = []
        eos_ids, sampled = self.sampler.eos_ids, self.generation.response_ids[self.seated[:, None], columns].tolist()
        for slot, (b, tokens) in enumerate(zip(self.seats, sampled, strict=True)):
            count = stride
            if not eos_ids.isdisjoint(tokens):
                count = next(i for i, token in enumerate(tokens, 1) if token in eos_ids)
                self.finished[b] = True
            self.lengths[b] += count
            self.generated += count
            if self.finished[b] or self.lengths[b] == self.cap:
                leaving.append(slot)
        return leaving
