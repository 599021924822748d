"""What travels between the parts. Letters: B rollouts, P prompt positions, T response positions, K top-k, V vocabulary.

Prompts are left-padded and responses right-padded, so that position P is the first response token of every rollout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollouts:
    """Sampled responses.

    prompt_ids (B, P) int64 · prompt_mask (B, P) bool · response_ids (B, T) int64 · response_mask (B, T) bool, true on
    sampled tokens including the end-of-sequence token · finished (B,) bool, the rollout ended by itself.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    finished: Tensor

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: sampled tokens of each rollout."""
        return self.response_mask.sum(-1)

    def select(self, rows: Tensor) -> Rollouts:
        """The given rows, with padding columns that none of them uses cut off."""
        prompt_mask, response_mask = self.prompt_mask[rows], self.response_mask[rows]
        prompt_width = max(int(prompt_mask.sum(-1).max()), 1)
        response_width = max(int(response_mask.sum(-1).max()), 1)
        return Rollouts(
            self.prompt_ids[rows][:, -prompt_width:],
            prompt_mask[:, -prompt_width:],
            self.response_ids[rows][:, :response_width],
            response_mask[:, :response_width],
            self.finished[rows],
        )

    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments for a causal LM over prompt + response; positions count real tokens only.

        The logits that predict response token t stand at output index t: `logits_to_keep` drops the prompt's, and
        the caller drops the last column, which predicts past the end.
        """
        attention_mask = torch.cat([self.prompt_mask, self.response_mask], dim=-1)
        return {
            "input_ids": torch.cat([self.prompt_ids, self.response_ids], dim=-1),
            "attention_mask": attention_mask.long(),
            "position_ids": (attention_mask.long().cumsum(-1) - 1).clamp(min=0),
        }


@dataclass(frozen=True)
class TeacherScores:
    """What the teacher says of a batch of rollouts; log-probabilities are over the full vocabulary, in nats.

    topk_ids (B, T, K) int64 · topk_logprobs (B, T, K) · candidate_logprobs (B, T, K), at the ids that were asked for ·
    entropy (B, T) · logits (B, T, V), only when asked for (the full-vocabulary objectives need them).
    """

    topk_ids: Tensor
    topk_logprobs: Tensor
    candidate_logprobs: Tensor
    entropy: Tensor
    logits: Tensor | None = None
