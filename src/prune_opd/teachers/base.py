"""What a teacher must do, whatever engine is behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from prune_opd.core.head import OutputHead
from prune_opd.models.packing import Packed
from prune_opd.types import Rollouts, Span, TeacherPrompt, TeacherScores, TopK


class TeacherStream(Protocol):
    """Scores rollouts while they are generated; each token is scored once."""

    growth: float
    """A rollout is scored again once it is this many times as long as before: 1, at every look, where the prefix is
    kept; more where each request reads the rollout from its start, so that the total stays linear in its length."""

    scores: TeacherScores | None
    """Of everything so far, filled in place; whoever has room for them already sets it before the first look."""

    def score(self, response_ids: Tensor, student: TopK, spans: Sequence[Span]) -> TeacherScores:
        """Score the new tokens; returns the scores of everything so far, (B, T) like `response_ids` (B, T)."""
        ...

    def drop(self, rollout: int) -> None:
        """No more of this rollout will be asked for."""
        ...


class Teacher(Protocol):
    """Scores the student's rollouts; frozen, never trained."""

    def score(self, rollouts: Rollouts, *, top_k: int) -> TeacherScores:
        """The teacher's top-k, and its log-probabilities at the student's candidates and at the sampled tokens."""
        ...

    def before_head(self, part: Packed) -> tuple[Tensor, OutputHead]:
        """Hidden states (N, H) at the kept tokens of a micro-batch, and the head that makes logits of them.

        For the losses over the whole vocabulary.
        """
        ...

    def stream(self, prompts: Sequence[TeacherPrompt], length: int, *, top_k: int, slots: int) -> TeacherStream:
        """Start scoring rollouts of at most `length` tokens, of which at most `slots` are unfinished at a time."""
        ...
