"""A teacher that follows the student: after each step, teacher = decay · teacher + (1 - decay) · student."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prune_opd.rollout.weights import served_weights


class MovingTeacher:
    """The running average of the student's weights, in the model that the teacher scores with.

    decay: in [0, 1); with 0 the teacher is the student as the last step left it. Adapters of the student are merged on
    the way. With a sharded student, all ranks call `follow`.
    """

    def __init__(self, model: PreTrainedModel, decay: float) -> None:
        self.weights, self.decay = dict(model.named_parameters()), decay

    @torch.no_grad()
    def follow(self, student: Any) -> None:
        """Move towards the student as it is now."""
        followed = set()
        for name, weight in served_weights(student):
            mine = self.weights[name]
            mine.lerp_(weight.to(mine), 1 - self.decay)
            followed.add(name)
        assert followed == self.weights.keys(), "both models have the same weights"

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {name: weight.detach() for name, weight in self.weights.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave. ValueError where it is of another model."""
        if state.keys() != self.weights.keys():
            raise ValueError("the teacher's weights are not those of this model")
        for name, weight in state.items():
            self.weights[name].copy_(weight)
