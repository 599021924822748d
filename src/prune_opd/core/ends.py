"""The ids that end a response as one action, where student and teacher end with different ones.

A base model ends with `<|endoftext|>`, the chat model that teaches it with `<|im_end|>`. Compared id by id, the teacher
calls the student's end a mistake, and the student unlearns to end. What both mean is one action, so it gets one id,
`ends[0]`, with the probability of all of them:

    z'(ends[0]) = log Σ_{e ∈ ends} exp z(e),    z'(e) = -∞ for the other ends,    z'(v) = z(v) for every other id

The normaliser stays what it is, so log p'(ends[0]) = log Σ_e p(e), and everything that is computed from logits (top-k,
entropy, candidates, divergences) is computed from z'. The gradient that arrives at z'(ends[0]) reaches each end by its
share, p(e) / Σ p. With fewer than two ends nothing changes. Ours; the paper compares ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int


def merge_ends(logits: Float[Tensor, "*N V"], ends: Sequence[int]) -> Float[Tensor, "*N V"]:
    """The logits z' of the module's head, differentiable."""
    return merge_ends_(logits.clone(), ends) if len(ends) > 1 else logits


def merge_ends_(logits: Float[Tensor, "*N V"], ends: Sequence[int]) -> Float[Tensor, "*N V"]:
    """The same in place; logits may be log-probabilities."""
    if len(ends) > 1:
        merged = torch.stack([logits[..., end] for end in ends], dim=-1).logsumexp(-1)
        logits[..., ends[0]] = merged
        for end in ends[1:]:  # numbers, not a tensor of them: an accelerator would wait for the host
            logits[..., end] = -torch.inf
    return logits


def as_one_end(ids: Int[Tensor, "*N"], ends: Sequence[int]) -> Int[Tensor, "*N"]:
    """Token ids with `ends[0]` in place of every end."""
    for end in ends[1:]:
        ids = ids.masked_fill(ids == end, ends[0])
    return ids


def with_ends(ids: Int[Tensor, "N C"], ends: Sequence[int]) -> Int[Tensor, "N CE"]:
    """The ids to ask a head for, so that `merge_asked` has what it needs: (N, E + C), the ends first."""
    if len(ends) < 2:
        return ids
    columns = [torch.full_like(ids[:, :1], end) for end in ends]
    return torch.cat([*columns, ids], dim=-1)


def merge_asked(logprobs: Float[Tensor, "N CE"], ids: Int[Tensor, "N C"], ends: Sequence[int]) -> Float[Tensor, "N C"]:
    """Log-probs at `ids` (N, C), of which ends[0] is the only end, from those at `with_ends(ids, ends)`.

    Differentiable.
    """
    if len(ends) < 2:
        return logprobs
    # Floored: of ends that are all forbidden the log-sum would have a NaN gradient.
    at_ends = logprobs[:, : len(ends)].clamp(min=torch.finfo(logprobs.dtype).min / 2)
    return torch.where(ids == ends[0], at_ends.logsumexp(-1, keepdim=True), logprobs[:, len(ends) :])


def merge_listed(
    ids: Int[Tensor, "N L"], logprobs: Float[Tensor, "N L"], ends: Sequence[int], top_k: int
) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"]]:
    """The `top_k` likeliest after merging, of lists of an engine's likeliest ids; most likely first.

    L is at least top_k, and E - 1 more where nothing may be missed. An end that is not listed counts as nothing.
    """
    if len(ends) > 1:
        is_end = as_one_end(ids, ends) == ends[0]
        merged = logprobs.masked_fill(~is_end, -torch.inf).logsumexp(-1, keepdim=True)
        first = is_end & (is_end.cumsum(-1) == 1)
        ids = ids.masked_fill(first, ends[0])
        logprobs = torch.where(first, merged, logprobs.masked_fill(is_end, -torch.inf))
        logprobs, order = logprobs.sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(-1, order)
    return ids[:, :top_k], logprobs[:, :top_k]
