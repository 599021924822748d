"""What travels between the parts. Letters: B rollouts, P prompt positions, T response positions, K top-k, N tokens.

Responses are right-padded: column t of every (B, T) tensor is response token t, whatever the length of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """One model's view of every response position, full-vocabulary log-probabilities in nats.

    ids (B, T, K) int64, logprobs (B, T, K) float32, most likely first · entropy (B, T) float32. Padding holds anything.
    """

    ids: Tensor
    logprobs: Tensor
    entropy: Tensor

    @staticmethod
    def empty(batch: int, length: int, top_k: int, device: torch.device | str = "cpu") -> TopK:
        """Zeros to be filled in; ids of padding are distinct, as every function of overlap expects."""
        ids = torch.arange(top_k, device=device).expand(batch, length, top_k).clone()
        return TopK(ids, torch.zeros(batch, length, top_k, device=device), torch.zeros(batch, length, device=device))

    def to(self, device: torch.device | str) -> TopK:
        """The same on another device."""
        return TopK(self.ids.to(device), self.logprobs.to(device), self.entropy.to(device))

    def at(self, where: Any) -> TopK:
        """The positions that an index of (B, T) picks."""
        return TopK(self.ids[where], self.logprobs[where], self.entropy[where])


class TeacherPrompt(NamedTuple):
    """What a teacher reads in front of a response, and which one: its place in `model.teachers`, 0 if it is alone."""

    token_ids: Sequence[int]
    teacher: int = 0


@dataclass(frozen=True)
class Rollouts:
    """Sampled responses, and what the student thought while it sampled them.

    prompts: B token-id sequences · response_ids (B, T) int64 · response_mask (B, T) bool, true on kept tokens including
    the end-of-sequence token · finished (B,) bool, the rollout ended by itself · stopped (B,) bool, it was ended for
    drift · student: its top-k at each position, None when top_k was 0 · generated: tokens that were decoded, including
    those past a stop that were thrown away · slot_steps: rows times decode steps that were computed · sampled_logprobs
    (B, T): of each token in the policy that sampled it, at temperature 1; None where that is the one that is trained ·
    teacher_prompts: B, what the teacher reads in place of `prompts`; None where it reads those.
    """

    prompts: Sequence[Sequence[int]]
    response_ids: Tensor
    response_mask: Tensor
    finished: Tensor
    stopped: Tensor
    student: TopK | None = None
    generated: int = 0
    slot_steps: int = 0
    sampled_logprobs: Tensor | None = None
    teacher_prompts: Sequence[TeacherPrompt] | None = None

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: kept tokens of each rollout."""
        return self.response_mask.sum(-1)

    @property
    def for_teacher(self) -> Rollouts:
        """The same responses behind the prompts that the teacher reads."""
        if self.teacher_prompts is None:
            return self
        return replace(self, prompts=[prompt.token_ids for prompt in self.teacher_prompts], teacher_prompts=None)


@dataclass(frozen=True)
class TeacherScores:
    """What the teacher says of a batch of rollouts; log-probabilities are over the full vocabulary, in nats.

    topk: its own candidates · candidate_logprobs (B, T, K) at the student's candidates · sampled_logprobs (B, T) at the
    sampled tokens · scored: tokens that went through the teacher, prompts not counted.
    """

    topk: TopK
    candidate_logprobs: Tensor
    sampled_logprobs: Tensor
    scored: int = 0


@dataclass(frozen=True)
class Span:
    """Response tokens [start, end) of one rollout that are new since its last span; `ended`: no more will follow."""

    rollout: int
    start: int
    end: int
    ended: bool


@dataclass(frozen=True)
class Prompt:
    """`text` is what the model sees, template and suffix included; `source` is file:line or dataset[row].

    grader: says whether a response is right, where that is not `graders.grade(response, answer)` · lack: where there is
    no answer, what stood in its place · teacher: what the teacher reads, where that is not the same.
    """

    text: str
    token_ids: tuple[int, ...]
    answer: str | None
    source: str
    grader: Callable[[str], bool] | None = field(default=None, compare=False, repr=False)
    lack: str = field(default="", compare=False)
    teacher: TeacherPrompt | None = field(default=None, compare=False)

    @property
    def is_gradable(self) -> bool:
        """Whether there is a gold answer or a grader."""
        return self.answer is not None or self.grader is not None

    @property
    def for_teacher(self) -> TeacherPrompt:
        """What the teacher reads."""
        return self.teacher or TeacherPrompt(self.token_ids)
