"""Sampling from a Hugging Face causal LM in this process.

A bare decode loop: one prefill of the left-padded prompts, then one token for every live row. Rows leave the batch
when they end, so no compute is spent on finished rollouts, and keys and values are written into buffers that grow
geometrically instead of being re-copied at every token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer, PreTrainedModel

from prune_opd.types import Rollouts


class BufferedLayer(DynamicLayer):
    """A DynamicLayer that writes into a buffer with spare room; `keys` and `values` are views of what is filled."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [key_states.new_empty(0)] * 2
        filled = self.get_seq_length()
        length = filled + key_states.shape[-2]
        if self.buffers[0].numel() == 0 or length > self.buffers[0].shape[-2]:
            # Never empty memory: masked positions are multiplied by zero, and 0 * garbage may be NaN.
            grown = [new.new_zeros(*new.shape[:2], 2 * length, new.shape[-1]) for new in (key_states, value_states)]
            if filled:
                grown[0][:, :, :filled], grown[1][:, :, :filled] = self.keys, self.values
            self.buffers = grown
        self.buffers[0][:, :, filled:length] = key_states
        self.buffers[1][:, :, filled:length] = value_states
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        length = self.get_seq_length()
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)


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
    target = (uniforms.to(cdf.device) * cdf[:, -1]).unsqueeze(-1)
    return torch.searchsorted(cdf, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


class LocalSampler:
    """Implements `Sampler` on a Hugging Face causal LM.

    `eos_ids` end a rollout; ids from `vocab_size` on (padding rows of the embedding) are never sampled; at most
    `max_batch` rows decode at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_id: int,
        eos_ids: Sequence[int],
        vocab_size: int | None = None,
        max_batch: int = 64,
    ) -> None:
        self.model, self.pad_id, self.vocab_size, self.max_batch = model, pad_id, vocab_size, max_batch
        self.eos_ids = torch.tensor(list(eos_ids), device=model.device)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: Tensor,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Rollouts:
        """See `Sampler.sample`."""
        device, pad_id = self.model.device, self.pad_id
        width = max(len(prompt) for prompt in prompts)
        prompt_ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
        prompt_mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)
        response_ids = torch.full(uniforms.shape, pad_id, device=device)
        lengths = torch.zeros(len(prompts), dtype=torch.long, device=device)
        finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)

        was_training = self.model.training
        self.model.eval()
        with torch.inference_mode():
            for start in range(0, len(prompts), self.max_batch):
                rows = torch.arange(start, min(start + self.max_batch, len(prompts)), device=device)
                self._decode(
                    rows, prompt_ids, prompt_mask, uniforms, response_ids, lengths, finished, temperature, top_p
                )
        self.model.train(was_training)
        response_mask = torch.arange(uniforms.shape[1], device=device) < lengths[:, None]
        return Rollouts(prompt_ids, prompt_mask, response_ids, response_mask, finished).select(
            torch.arange(len(prompts), device=device)
        )

    def _decode(
        self,
        rows: Tensor,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        uniforms: Tensor,
        response_ids: Tensor,
        lengths: Tensor,
        finished: Tensor,
        temperature: float,
        top_p: float,
    ) -> None:
        """Fill `response_ids`, `lengths` and `finished` for `rows`, all of which start together."""
        cache = Cache(layer_class_to_replicate=BufferedLayer)
        mask = prompt_mask.new_ones(len(rows), prompt_mask.shape[1] + uniforms.shape[1])
        mask[:, : prompt_mask.shape[1]] = prompt_mask[rows]
        input_ids, positions = prompt_ids[rows], (prompt_mask[rows].long().cumsum(-1) - 1).clamp(min=0)
        seen = input_ids.shape[1]
        for t in range(uniforms.shape[1]):
            logits = self.model(
                input_ids=input_ids,
                attention_mask=mask[:, :seen],
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=1,
            ).logits[:, -1, : self.vocab_size]
            tokens = draw(logits, uniforms[rows.cpu(), t], temperature=temperature, top_p=top_p)
            response_ids[rows, t] = tokens
            lengths[rows] = t + 1
            ended = torch.isin(tokens, self.eos_ids)
            if ended.any():
                finished[rows[ended]] = True
                live = (~ended).nonzero().squeeze(-1)
                if len(live) == 0:
                    return
                cache.batch_select_indices(live)
                rows, mask, tokens, positions = rows[live], mask[live], tokens[live], positions[live]
            input_ids, positions, seen = tokens[:, None], positions[:, -1:] + 1, seen + 1
