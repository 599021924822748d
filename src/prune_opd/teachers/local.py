"""A Hugging Face causal LM in this process as the teacher."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prune_opd.types import Rollouts, TeacherScores


def response_logits(model: torch.nn.Module, rollouts: Rollouts, vocab_size: int) -> Tensor:
    """Logits that predict each response token: (B, T, V) float32. Prompt positions never reach the head.

    `vocab_size` is V, the ids that student and teacher share: rows that one of them added as padding are cut off, so
    that untrained logits can neither be candidates nor enter the normaliser.
    """
    width = rollouts.response_ids.shape[1]
    logits = model(**rollouts.model_inputs(), use_cache=False, logits_to_keep=width + 1).logits
    return logits[:, :-1, :vocab_size].float()


class LocalTeacher:
    """Implements `Teacher`; the model is put into eval mode and never receives a gradient."""

    def __init__(self, model: PreTrainedModel, *, vocab_size: int) -> None:
        self.model, self.vocab_size = model.eval().requires_grad_(False), vocab_size

    @torch.inference_mode()
    def score(
        self, rollouts: Rollouts, candidate_ids: Tensor, *, top_k: int, full_logits: bool = False
    ) -> TeacherScores:
        """See `Teacher.score`."""
        logits = response_logits(self.model, rollouts, self.vocab_size)
        logprobs = logits.log_softmax(-1)
        topk = logprobs.topk(top_k, dim=-1)
        return TeacherScores(
            topk_ids=topk.indices,
            topk_logprobs=topk.values,
            candidate_logprobs=logprobs.gather(-1, candidate_ids),
            entropy=torch.special.entr(logprobs.exp()).sum(-1),
            logits=logits if full_logits else None,
        )
