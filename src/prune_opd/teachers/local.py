"""A Hugging Face causal LM in this process as the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prune_opd.core.head import OutputHead, head_statistics
from prune_opd.distributed.world import ALONE, World
from prune_opd.models.causal_lm import compiled, hidden_states, output_head, use_attention
from prune_opd.models.packed_attention import packed_states, packing_of, use_packed_attention
from prune_opd.models.packing import Packed, pack
from prune_opd.models.slot_cache import SLOT_ATTENTION, SlotCache
from prune_opd.types import Rollouts, Span, TeacherPrompt, TeacherScores, TopK


class LocalTeacher:
    """Implements `Teacher`; the model is put into eval mode and never receives a gradient.

    Ids from `vocab_size` on are padding rows of one of the two embeddings: neither candidates nor part of a normaliser.
    `ends` count as one action (core/ends.py). `token_budget` is the most tokens of one forward, as in `pack`. compile:
    they run compiled (`causal_lm.compiled`). world: the ranks of which each holds a shard of the model, where `shard`
    is applied to it behind this; then all of them call `score` and `before_head` equally often, and none `stream`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        vocab_size: int,
        ends: Sequence[int] = (),
        token_budget: int | None = None,
        compile: bool = False,
        world: World = ALONE,
    ) -> None:
        self.hidden_states = compiled(hidden_states) if compile else hidden_states
        self.packed_states = compiled(packed_states) if compile else packed_states
        self.packing = packing_of(model, compile=compile)
        self.model, self.token_budget = model.eval().requires_grad_(False), token_budget
        self.vocab_size, self.ends, self.world = vocab_size, tuple(ends), world
        output_head(self.model)  # compared with the model's own logits while it can still run by itself

    @torch.no_grad()
    def score(self, rollouts: Rollouts, *, top_k: int) -> TeacherScores:
        """See `Teacher.score`."""
        assert rollouts.student is not None, "the teacher scores the student's candidates: sample with top_k > 0"
        scores = empty_scores(rollouts.response_ids, rollouts.student, top_k)
        self.read(scores, rollouts)
        return replace(scores, scored=int(rollouts.lengths.sum()))

    def stream(self, prompts: Sequence[TeacherPrompt], length: int, *, top_k: int, slots: int) -> LocalStream:
        """See `Teacher.stream`."""
        return LocalStream(self, [prompt.token_ids for prompt in prompts], length, top_k=top_k, slots=slots)

    @torch.no_grad()
    def before_head(self, part: Packed) -> tuple[Tensor, OutputHead]:
        """See `Teacher.before_head`."""
        return self._packed_states(part), output_head(self.model)

    def read(self, scores: TeacherScores, rollouts: Rollouts) -> None:
        """Fill in the scores of all kept tokens, in packed forwards of whole rollouts."""
        assert rollouts.student is not None
        parts, head = pack(rollouts.for_teacher, self.token_budget, **self.packing), output_head(self.model)
        for part in self.world.equal_count(parts, Packed.empty(rollouts.response_ids.device)):
            hidden = self._packed_states(part)
            if len(hidden):
                self.write(scores, hidden, head, part.rollout, part.position, rollouts.response_ids, rollouts.student)

    def _packed_states(self, part: Packed) -> Tensor:
        with use_packed_attention(self.model):
            return self.packed_states(self.model, part)[part.row, part.column]

    def write(
        self,
        scores: TeacherScores,
        hidden: Tensor,
        head: OutputHead,
        rollout: Tensor,
        position: Tensor,
        response_ids: Tensor,
        student: TopK,
    ) -> None:
        """Fill in the scores of tokens (rollout (N,), position (N,)), predicted by the hidden states (N, H)."""
        where = rollout, position
        asked = torch.cat([student.ids[where], response_ids[where].unsqueeze(-1)], dim=-1)
        found = head_statistics(
            hidden,
            head,
            top_k=scores.topk.ids.shape[-1],
            ids=asked,
            vocab_size=self.vocab_size,
            ends=self.ends,
        )
        scores.topk.ids[where] = found.topk_ids
        scores.topk.logprobs[where] = found.topk_logprobs
        scores.topk.entropy[where] = found.entropy
        scores.candidate_logprobs[where] = found.logprobs[:, :-1]
        scores.sampled_logprobs[where] = found.logprobs[:, -1]


class LocalStream:
    """Implements `TeacherStream`: a slot for each unfinished rollout, so that no prefix is ever scored again."""

    growth = 1.0

    def __init__(
        self, teacher: LocalTeacher, prompts: Sequence[Sequence[int]], length: int, *, top_k: int, slots: int
    ) -> None:
        self.teacher, self.prompts, self.top_k = teacher, prompts, top_k
        self.cache = SlotCache(teacher.model, slots=slots, capacity=max(map(len, prompts), default=0) + length)
        self.slot: dict[int, int] = {}  # of each rollout that has been seen and has not ended
        self.free = list(range(slots))[::-1]
        self.scores: TeacherScores | None = None

    @torch.no_grad()
    def score(self, response_ids: Tensor, student: TopK, spans: Sequence[Span]) -> TeacherScores:
        """See `TeacherStream.score`."""
        scores = self.scores or empty_scores(response_ids, student, self.top_k)
        whole = [span for span in spans if span.ended and span.start == 0]
        seated = [span for span in spans if span.rollout in self.slot]
        newcomers = [span for span in spans if not (span in whole or span in seated)]
        if whole:  # read at once, as rollouts that nobody watches: they need no cache, and packed no padding
            self._read_whole(scores, whole, response_ids, student)
        if seated:
            self._read_on(scores, seated, response_ids, student)
            for span in seated:
                if span.ended:
                    self.drop(span.rollout)
        if newcomers:
            assert len(newcomers) <= len(self.free), "more unfinished rollouts than slots"
            self.slot |= {span.rollout: self.free.pop() for span in newcomers}
            self._read_on(scores, newcomers, response_ids, student)
        self.scores = replace(scores, scored=scores.scored + sum(span.end - span.start for span in spans))
        return self.scores

    def drop(self, rollout: int) -> None:
        """No more of this rollout will be asked for."""
        if rollout in self.slot:
            self.free.append(self.slot.pop(rollout))

    def _read_whole(self, scores: TeacherScores, spans: Sequence[Span], response_ids: Tensor, student: TopK) -> None:
        lengths = torch.zeros(len(self.prompts), dtype=torch.long, device=response_ids.device)
        for span in spans:
            lengths[span.rollout] = span.end
        mask = torch.arange(response_ids.shape[1], device=response_ids.device) < lengths[:, None]
        finished = stopped = torch.zeros_like(lengths, dtype=torch.bool)  # why they ended is nothing to the teacher
        self.teacher.read(scores, Rollouts(self.prompts, response_ids, mask, finished, stopped, student))

    def _read_on(self, scores: TeacherScores, group: Sequence[Span], response_ids: Tensor, student: TopK) -> None:
        """Feed what the teacher has not seen, less each rollout's last token, from which nothing is predicted yet."""
        device = response_ids.device
        said = response_ids.cpu()
        fed = []
        for span in group:
            prompt = self.prompts[span.rollout]
            before = list(prompt) if span.start == 0 else [int(said[span.rollout, span.start - 1])]
            fed.append(before + said[span.rollout, span.start : span.end - 1].tolist())
        width = max(map(len, fed))
        starts = [len(self.prompts[s.rollout]) + s.end - 1 - len(ids) for s, ids in zip(group, fed, strict=True)]
        inputs = self.cache.inputs(
            torch.tensor([ids + [0] * (width - len(ids)) for ids in fed], device=device),
            torch.tensor(
                [[*range(a, a + len(i)), *[-1] * (width - len(i))] for a, i in zip(starts, fed, strict=True)],
                device=device,
            ),
            length=max(a + len(ids) for a, ids in zip(starts, fed, strict=True)),
            rows=torch.tensor([self.slot[span.rollout] for span in group], device=device),
        )
        new = [
            (r, len(fed[r]) - (span.end - t), span.rollout, t)
            for r, span in enumerate(group)
            for t in range(span.start, span.end)
        ]
        row, column, rollout, position = torch.tensor(new, device=device).unbind(-1)
        forward = hidden_states if self.cache.empty else self.teacher.hidden_states
        with use_attention(self.teacher.model, SLOT_ATTENTION):
            hidden = forward(self.teacher.model, inputs)[row, column]
        head = output_head(self.teacher.model)
        self.teacher.write(scores, hidden, head, rollout, position, response_ids, student)


def empty_scores(response_ids: Tensor, student: TopK, top_k: int) -> TeacherScores:
    """Scores of nothing yet, to be filled in: (B, T) like `response_ids`."""
    batch, length = response_ids.shape
    return TeacherScores(
        TopK.empty(batch, length, top_k, response_ids.device),
        torch.zeros(batch, length, student.ids.shape[-1], device=response_ids.device),
        torch.zeros(batch, length, device=response_ids.device),
    )
