"""A key-value cache of slots: every row is at a position of its own and is taken over when its rollout ends.

Keys and values lie in buffers that are allocated once; column j of a row is the token at position j of its rollout. A
forward writes its tokens where `SlotCache.inputs` says, and sees of each row what lies at or before its own position,
so what an earlier rollout left behind in a slot is never seen. `slot_attention` reads no key twice, and of the second
half of the slots no more than it is told to.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicLayer, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prune_opd.models.causal_lm import attention_mask
from prune_opd.models.kernels.attend_one import attend_one, attends_one

SLOT_ATTENTION = "prune_opd_slots"


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    half: int | None = None,
    rest: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers' `sdpa` computes, with fewer keys and values read: (R, q, heads, head size), no gradient.

    query (R, heads, q, head size) · key, value (R, shared heads, length, head size) · attention_mask (R, 1, q, length)
    bool. Query heads that share a head of keys become further queries to it, where `sdpa` under a mask repeats keys and
    values for each of them. half, rest: of the rows from `half` on only the first `rest` columns are read; compiled for
    a CPU, each row is read as far as it goes instead.
    """
    if attention_mask is None:  # not through `SlotCache.inputs`
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **others)
    rows, heads, queries, size = query.shape
    if attends_one(query, key, value):
        scale = size**-0.5 if scaling is None else scaling
        seen = attention_mask[:, 0, 0].to(torch.uint8)  # inductor is slow to write bool
        return attend_one(query[:, :, 0], key, value, seen, scale).unsqueeze(1), None
    sharing = heads // key.shape[1]
    query = query.reshape(rows, key.shape[1], sharing * queries, -1)
    if queries > 1 and sharing > 1:
        attention_mask = attention_mask.repeat(1, 1, sharing, 1)
    parts = [(slice(rows), slice(key.shape[2]))]
    if rest is not None:
        parts = [(slice(half), slice(key.shape[2])), (slice(half, rows), slice(rest))]
    outputs = [
        functional.scaled_dot_product_attention(
            query[of], key[of, :, seen], value[of, :, seen], attn_mask=attention_mask[of, :, :, seen], scale=scaling
        )
        for of, seen in parts
    ]
    return torch.cat(outputs).view(rows, heads, queries, -1).transpose(1, 2), None


AttentionInterface.register(SLOT_ATTENTION, slot_attention)
AttentionMaskInterface.register(SLOT_ATTENTION, sdpa_mask)


class SlotLayer(DynamicLayer):
    """One layer's buffers (S, heads, capacity + 1, head size); the last column takes what padding writes."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new states (R, heads, q, head size); returns all that the rows may see."""
        cache = self.cache
        if not self.buffers:
            # Zeros, never empty memory: masked columns are multiplied by zero, and 0 * garbage may be NaN.
            self.buffers = [cache.zeros(new) for new in (key_states, value_states)]
        seen = []
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[cache.rows[:, None], :, cache.columns] = new.transpose(1, 2)
            columns = buffer[:, :, : cache.length]
            seen.append(columns[: len(cache.rows)] if cache.leading else columns[cache.rows])
        return seen[0], seen[1]


class SlotCache(Cache):
    """`slots` rows of `capacity` positions for one model."""

    def __init__(self, model: PreTrainedModel, *, slots: int, capacity: int) -> None:
        self.model, self.slots, self.capacity = model, slots, capacity
        self.half = -(-slots // 2)
        self.rows = self.columns = torch.empty(0, dtype=torch.long)
        self.leading, self.length = True, 0
        super().__init__(layers=[SlotLayer(self) for _ in range(model.config.get_text_config().num_hidden_layers)])

    @property
    def empty(self) -> bool:
        """Whether nothing was written yet. The first forward allocates the buffers: not for compiled code."""
        return not self.layers[0].buffers

    def inputs(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *,
        length: int,
        rest: int | None = None,
        rows: Tensor | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments for the model's next forward.

        input_ids, position_ids (R, q) int64; a negative position is padding. length: the largest position + 1. rest:
        that of the slots from `half` on, if less should be read of them. rows (R,): the slots of these inputs; the
        first R when None, which spares a copy of their keys and values.
        """
        self.leading, self.length = rows is None, length
        self.rows = torch.arange(len(input_ids), device=input_ids.device) if rows is None else rows
        self.columns = position_ids.where(position_ids >= 0, self.capacity)
        distance = self.columns[:, :, None] - torch.arange(length, device=input_ids.device)
        return {
            "input_ids": input_ids,
            "position_ids": position_ids.clamp(min=0),
            "attention_mask": attention_mask(self.model, distance >= 0, distance),
            "past_key_values": self,
            "half": self.half,
            "rest": rest,
        }

    def copy_rows(self, source: SlotCache, source_rows: Tensor, rows: Tensor, length: int) -> None:
        """Take the first `length` columns of `source_rows` over into `rows`, whatever cache they come from."""
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            if not mine.buffers:
                mine.buffers = [self.zeros(buffer) for buffer in theirs.buffers]
            for to, of in zip(mine.buffers, theirs.buffers, strict=True):
                to[rows, :, :length] = of[source_rows, :, :length]

    def zeros(self, like: Tensor) -> Tensor:
        """A buffer for states like these: (slots, heads, capacity + 1, head size).

        On the CPU through numpy, which asks the kernel for huge pages: decoding streams every key and value at each
        step, and with pages of 4 KiB the address translation took a third of that time.
        """
        shape = self.slots, like.shape[1], self.capacity + 1, like.shape[3]
        if like.device.type != "cpu" or like.dtype == torch.bfloat16:  # numpy knows no bfloat16
            return like.new_zeros(shape)
        return torch.from_numpy(np.zeros(shape, dtype=str(like.dtype).removeprefix("torch.")))
