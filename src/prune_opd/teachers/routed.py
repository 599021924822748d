"""Several teachers, each of which scores the rollouts of its own prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prune_opd.core.head import OutputHead
from prune_opd.models.packing import Packed
from prune_opd.teachers.base import Teacher, TeacherStream
from prune_opd.teachers.local import empty_scores
from prune_opd.types import Rollouts, Span, TeacherPrompt, TeacherScores, TopK


class RoutedTeacher:
    """Implements `Teacher`: a rollout goes to the teacher whose number its prompt has (`TeacherPrompt.teacher`)."""

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self.teachers = teachers

    def score(self, rollouts: Rollouts, *, top_k: int) -> TeacherScores:
        """See `Teacher.score`. Each teacher is asked, also where no rollout is its own: ranks may share it."""
        assert rollouts.student is not None and rollouts.teacher_prompts is not None
        scores = empty_scores(rollouts.response_ids, rollouts.student, top_k)
        asked = torch.tensor(
            [prompt.teacher for prompt in rollouts.teacher_prompts], device=rollouts.response_ids.device
        )
        scored = 0
        for number, teacher in enumerate(self.teachers):
            own = asked == number
            found = teacher.score(replace(rollouts, response_mask=rollouts.response_mask & own[:, None]), top_k=top_k)
            scores.topk.ids[own], scores.topk.logprobs[own] = found.topk.ids[own], found.topk.logprobs[own]
            scores.topk.entropy[own] = found.topk.entropy[own]
            scores.candidate_logprobs[own] = found.candidate_logprobs[own]
            scores.sampled_logprobs[own] = found.sampled_logprobs[own]
            scored += found.scored
        return replace(scores, scored=scored)

    def before_head(self, part: Packed) -> tuple[Tensor, OutputHead]:
        """A micro-batch may hold rollouts of several teachers; the configuration refuses the losses that need it."""
        raise AssertionError("full-vocabulary losses are refused with several teachers")

    def stream(self, prompts: Sequence[TeacherPrompt], length: int, *, top_k: int, slots: int) -> RoutedStream:
        """See `Teacher.stream`."""
        return RoutedStream(self, prompts, length, top_k=top_k, slots=slots)


class RoutedStream:
    """Implements `TeacherStream`: a stream of each teacher, all of which write into the same scores."""

    def __init__(
        self, routed: RoutedTeacher, prompts: Sequence[TeacherPrompt], length: int, *, top_k: int, slots: int
    ) -> None:
        self.asked = [prompt.teacher for prompt in prompts]
        self.streams: dict[int, TeacherStream] = {
            number: routed.teachers[number].stream(
                prompts, length, top_k=top_k, slots=min(slots, self.asked.count(number))
            )
            for number in sorted(set(self.asked))
        }
        self.growth, self.top_k = max(stream.growth for stream in self.streams.values()), top_k
        self.scores: TeacherScores | None = None

    def score(self, response_ids: Tensor, student: TopK, spans: Sequence[Span]) -> TeacherScores:
        """See `TeacherStream.score`."""
        if self.scores is None:
            self.scores = empty_scores(response_ids, student, self.top_k)
            for stream in self.streams.values():
                stream.scores = self.scores
        of_teacher = defaultdict(list)
        for span in spans:
            of_teacher[self.asked[span.rollout]].append(span)
        for number, theirs in of_teacher.items():
            self.streams[number].score(response_ids, student, theirs)
        scored = sum(stream.scores.scored for stream in self.streams.values() if stream.scores)
        self.scores = replace(self.scores, scored=scored)
        return self.scores

    def drop(self, rollout: int) -> None:
        """No more of this rollout will be asked for."""
        self.streams[self.asked[rollout]].drop(rollout)
