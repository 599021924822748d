"""What a teacher must do, whatever engine is behind it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from prune_opd.types import Rollouts, TeacherScores


class Teacher(Protocol):
    """Scores the student's rollouts; frozen, never trained."""

    def score(
        self, rollouts: Rollouts, candidate_ids: Tensor, *, top_k: int, full_logits: bool = False
    ) -> TeacherScores:
        """The teacher's top-k and its log-probabilities at `candidate_ids` (B, T, C), at every response position.

        `full_logits` asks for the whole (B, T, V), which only the full-vocabulary objectives need.
        """
        ...
