"""The output head in chunks: log-probabilities from hidden states without ever holding the (N, V) logits.

Prune-OPD needs K + 1 log-probabilities a position, and those need the logits of that position only. So the head goes
over the positions in chunks whose logits fit `chunk_bytes`, keeps K numbers a position, and drops the logits.

The gradient, for log p(v) = z_v - log Z, z = h Wᵀ, and g_c the gradient that arrives at candidate c:

    ∂/∂h = Σ_c g_c W_c - (Σ_c g_c) · Σ_v p_v W_v              ∂/∂W = (scatter(g) - (Σ_c g_c) · p)ᵀ h

Σ_v p_v W_v, one (H,) vector a position, does not depend on g: the forward computes it while the logits are there. The
backward then makes the logits once more for ∂/∂W, and not at all when the head is frozen (LoRA, tied or not). Either
way a matrix product with the vocabulary is done four times (head trained) or twice (frozen); plain autograd on full
logits needs three or two.

A divergence over the whole vocabulary needs every logit of both models, and leaves one number a position:
`over_vocabulary` goes in chunks too, and makes their logits again in the backward.

`ends` are ids that count as one action, as core/ends.py has it; the first stands for all of them.

Letters: N positions, H hidden size, V vocabulary, K top-k, C ids that are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prune_opd.core.ends import merge_asked, merge_ends, merge_ends_, with_ends

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jaxtyping import Float, Int

CHUNK_BYTES = 256 * 2**20
"""Default bound on the (rows, V) buffers that are alive at one time; a single row is taken in any case."""

LOGIT_COPIES = 13
"""(n, V) tensors that a divergence of two models holds in forward and backward together, at most: that of `jsd`."""

_BLOCK = 64  # logits that share a maximum in _topk


@dataclass(frozen=True)
class OutputHead:
    """From hidden states to logits: z = cap(scale · (h Wᵀ + b)), cap(z) = softcap · tanh(z / softcap).

    weight (V, H) · bias (V,) or None · scale: Granite 1 / logits_scaling, Cohere logit_scale · softcap: Gemma
    final_logit_softcapping.
    """

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        """(N, V) logits, all of them at once and differentiable; float32, or float64 from float64."""
        weight, bias = self._rows(None, hidden.dtype)
        logits = (hidden @ weight.t()).to(_wide(hidden.dtype))
        if bias is not None:
            logits = logits + bias
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def _rows(self, vocab_size: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the ids that exist. In bf16 the matrix product runs in bf16, as the model's own does."""
        bias = None if self.bias is None else self.bias[:vocab_size].to(_wide(dtype))
        return self.weight[:vocab_size].to(dtype), bias

    def _logits_into(self, out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """The same without a copy and without gradient. A buffer that is used again costs no page faults."""
        if out.dtype == hidden.dtype:
            torch.mm(hidden, weight.t(), out=out)
        else:
            out.copy_(hidden @ weight.t())
        if bias is not None:
            out.add_(bias)
        if self.scale != 1:
            out.mul_(self.scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)

    def _slope_(self, logits: Tensor) -> Tensor:
        """∂z/∂(h Wᵀ + b) from the logits z, in place: scale · (1 - (z / softcap)²)."""
        assert self.softcap is not None
        return logits.div_(self.softcap).square_().neg_().add_(1).mul_(self.scale)


@dataclass(frozen=True)
class HeadStatistics:
    """What the head says at N positions, in nats over the ids below vocab_size; float32 (float64 from float64).

    topk_ids (N, K) int64, most likely first, and topk_logprobs (N, K) · logprobs (N, C) at the ids that were asked
    for (C = 0 when none were) · log_z (N,): log Σ_v exp z_v · entropy (N,).
    """

    topk_ids: Int[Tensor, "N K"]
    topk_logprobs: Float[Tensor, "N K"]
    logprobs: Float[Tensor, "N C"]
    log_z: Float[Tensor, " N"]
    entropy: Float[Tensor, " N"]


@torch.no_grad()
def head_statistics(
    hidden: Float[Tensor, "N H"],
    head: OutputHead,
    *,
    top_k: int,
    ids: Int[Tensor, "N C"] | None = None,
    vocab_size: int | None = None,
    ends: Sequence[int] = (),
    chunk_bytes: int = CHUNK_BYTES,
) -> HeadStatistics:
    """Statistics without gradient, for the teacher: its own top-k, and log-probs at the student's candidates `ids`.

    Ids from `vocab_size` on (padding rows of the embedding) exist neither for the normaliser nor for the top-k, and
    must not be asked for. The product h Wᵀ runs in the dtype of `hidden` (under autocast, in autocast's), everything
    after it in float32. Raises ValueError for top_k outside 0..vocab_size, shapes that do not fit, or chunk_bytes < 1.
    """
    hidden, ids = _checked(hidden, head, ids, top_k, vocab_size, chunk_bytes)
    with torch.autocast(hidden.device.type, enabled=False):
        found = _scan(hidden, head, ids, top_k, vocab_size, chunk_bytes, want_mean_row=False, ends=ends)
    return _statistics(found.ids, found.logits - found.log_z[:, None], found.log_z, found.entropy, top_k)


def differentiable_head_statistics(
    hidden: Float[Tensor, "N H"],
    head: OutputHead,
    *,
    top_k: int,
    ids: Int[Tensor, "N C"] | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> HeadStatistics:
    """The same for the student: its top-k and log-probs at further `ids` (the sampled token), one pass for both.

    topk_logprobs, logprobs and log_z carry gradient to `hidden` and to the head's weight and bias; topk_ids and
    entropy do not. No logits are kept for the backward: it makes them again, chunk by chunk, and only if the weight
    or the bias requires a gradient. Gradients of a bf16 weight are summed over chunks in float32. Errors as above.
    """
    hidden, ids = _checked(hidden, head, ids, top_k, vocab_size, chunk_bytes)
    all_ids, logprobs, log_z, entropy = _Head.apply(
        hidden, head.weight, head.bias, ids, top_k, head, vocab_size, chunk_bytes
    )
    return _statistics(all_ids, logprobs, log_z, entropy, top_k)


def candidate_logprobs(
    hidden: Float[Tensor, "N H"],
    head: OutputHead,
    ids: Int[Tensor, "N C"],
    *,
    vocab_size: int | None = None,
    ends: Sequence[int] = (),
    chunk_bytes: int = CHUNK_BYTES,
) -> Float[Tensor, "N C"]:
    """Log-probs at the given ids, with gradient: all that most objectives need of the student."""
    asked = with_ends(ids, ends)
    found = differentiable_head_statistics(
        hidden, head, top_k=0, ids=asked, vocab_size=vocab_size, chunk_bytes=chunk_bytes
    )
    return merge_asked(found.logprobs, ids, ends)


def over_vocabulary(
    function: Callable[[Tensor, Tensor], Tensor],
    student: tuple[Float[Tensor, "N H"], OutputHead],
    teacher: tuple[Float[Tensor, "N D"], OutputHead],
    ids: Int[Tensor, "N C"],
    *,
    vocab_size: int,
    ends: Sequence[int] = (),
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N C"]]:
    """`function` of the logits (n, V) of student and teacher, a number (n,) for each position by itself; and the
    student's log-probs at `ids`, of the same logits.

    With gradient to the student's hidden states and head. Where all positions need more than `chunk_bytes`, they go in
    chunks whose logits are dropped and made again in the backward: one chunk of them is alive at a time.
    """
    (hidden, head), (teacher_hidden, teacher_head) = student, teacher

    def of(hidden: Tensor, teacher_hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher_logits = merge_ends(teacher_head.logits(teacher_hidden)[:, :vocab_size], ends)
        logits = merge_ends(head.logits(hidden)[:, :vocab_size], ends)
        return function(logits, teacher_logits), logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)

    copies = LOGIT_COPIES + (2 if len(ends) > 1 else 0)
    rows = max(1, chunk_bytes // (copies * vocab_size * _wide(hidden.dtype).itemsize))
    if len(hidden) <= rows:
        return of(hidden, teacher_hidden, ids)
    chunks = zip(hidden.split(rows), teacher_hidden.split(rows), ids.split(rows), strict=True)
    parts = [checkpoint(of, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    values, logprobs = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(logprobs)


@dataclass
class _Scan:
    """Of one pass: ids (N, K+C), the logits there, log_z and entropy (N,), mean_row (N, H) = Σ_v p_v ∂z_v/∂h."""

    ids: Tensor
    logits: Tensor
    log_z: Tensor
    entropy: Tensor
    mean_row: Tensor | None


def _scan(
    hidden: Tensor,
    head: OutputHead,
    ids: Tensor,
    top_k: int,
    vocab_size: int | None,
    chunk_bytes: int,
    *,
    want_mean_row: bool,
    ends: Sequence[int] = (),
) -> _Scan:
    assert not (want_mean_row and ends), "mean_row is that of the ids apart"
    count, wide = len(hidden), _wide(hidden.dtype)
    weight, bias = head._rows(vocab_size, hidden.dtype)
    found = _Scan(
        ids=torch.cat([ids.new_empty(count, top_k), ids], dim=-1),
        logits=hidden.new_empty(count, top_k + ids.shape[-1], dtype=wide),
        log_z=hidden.new_empty(count, dtype=wide),
        entropy=hidden.new_empty(count, dtype=wide),
        mean_row=torch.empty_like(hidden) if want_mean_row else None,
    )
    capped = head.softcap is not None and want_mean_row
    for rows, (z, e, *spare) in _chunks(hidden, len(weight), 3 if capped else 2, chunk_bytes):
        head._logits_into(z, hidden[rows], weight, bias)
        if capped:
            slope = head._slope_(spare[0].copy_(z))
        merge_ends_(z, ends)
        top = z.amax(-1, keepdim=True)
        if top_k:
            found.ids[rows, :top_k] = _topk(z, top_k)
        torch.gather(z, -1, found.ids[rows], out=found.logits[rows])
        torch.exp(z.sub_(top), out=e)
        total = e.sum(-1, keepdim=True)
        if bias is not None or ends:
            z.clamp_(min=torch.finfo(wide).min)  # a token that a bias of -inf forbids: 0 · -inf would be NaN below
        found.log_z[rows] = (top + total.log()).squeeze(-1)
        found.entropy[rows] = (total.log() - z.mul_(e).sum(-1, keepdim=True) / total).squeeze(-1)
        if found.mean_row is not None:
            shares = e.mul_(slope) if capped else e
            found.mean_row[rows] = shares.to(hidden.dtype) @ weight * ((1 if capped else head.scale) / total)
    return found


class _Head(torch.autograd.Function):
    """Log-probs at the top-k and at given ids. `head` comes whole for its settings; its tensors come as inputs too."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        top_k: int,
        head: OutputHead,
        vocab_size: int | None,
        chunk_bytes: int,
    ) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            found = _scan(hidden, head, ids, top_k, vocab_size, chunk_bytes, want_mean_row=ctx.needs_input_grad[0])
        ctx.save_for_backward(hidden, weight, bias, found.ids, found.logits, found.log_z, found.mean_row)
        ctx.head, ctx.vocab_size, ctx.chunk_bytes = head, vocab_size, chunk_bytes
        ctx.mark_non_differentiable(found.ids, found.entropy)
        return found.ids, found.logits - found.log_z[:, None], found.log_z, found.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _ids: None, g: Tensor, g_log_z: Tensor, _entropy: None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, logits, log_z, mean_row = ctx.saved_tensors
        head: OutputHead = ctx.head
        through_z = g_log_z - g.sum(-1)  # ∂loss/∂log Z, of which p_v reaches logit v
        grad_hidden = grad_weight = grad_bias = None

        if ctx.needs_input_grad[0]:
            at_ids = g * (head.scale if head.softcap is None else head._slope_(logits.clone()))
            # embedding_bag is Σ_c g_c W_c without the (N, C, H) tensor of gathered rows.
            grad_hidden = torch.nn.functional.embedding_bag(
                ids, weight, per_sample_weights=at_ids.to(weight.dtype), mode="sum"
            ).to(hidden.dtype)
            grad_hidden.addcmul_(mean_row, through_z[:, None].to(mean_row.dtype))

        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            rows_weight, rows_bias = head._rows(ctx.vocab_size, hidden.dtype)
            size = len(rows_weight)
            grad_weight = torch.zeros_like(weight, dtype=log_z.dtype) if ctx.needs_input_grad[1] else None
            grad_bias = torch.zeros_like(bias, dtype=log_z.dtype) if ctx.needs_input_grad[2] else None
            capped = head.softcap is not None
            for rows, (dz, *spare) in _chunks(hidden, size, 2 if capped else 1, ctx.chunk_bytes):
                head._logits_into(dz, hidden[rows], rows_weight, rows_bias)
                if capped:
                    slope = head._slope_(spare[0].copy_(dz))
                dz.sub_(log_z[rows, None]).exp_().mul_(through_z[rows, None]).scatter_add_(-1, ids[rows], g[rows])
                if capped:
                    dz.mul_(slope)
                elif head.scale != 1:
                    dz.mul_(head.scale)
                if grad_weight is not None and dz.dtype == hidden.dtype:
                    grad_weight[:size].addmm_(dz.t(), hidden[rows])
                elif grad_weight is not None:
                    grad_weight[:size].add_(dz.t().to(hidden.dtype) @ hidden[rows])
                if grad_bias is not None:
                    grad_bias[:size].add_(dz.sum(0))
            grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
            grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _chunks(hidden: Tensor, vocab_size: int, buffers: int, chunk_bytes: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of positions, of one size but for the last, and `buffers` (rows, V) tensors that all chunks share."""
    count, wide = len(hidden), _wide(hidden.dtype)
    narrow = 0 if hidden.dtype == wide else hidden.dtype.itemsize  # what a product in bf16 takes before it is widened
    rows = max(1, min(count, chunk_bytes // (vocab_size * (buffers * wide.itemsize + narrow))))
    memory = [hidden.new_empty(rows, vocab_size, dtype=wide) for _ in range(buffers)]
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        yield slice(start, stop), [buffer[: stop - start] for buffer in memory]


def _topk(logits: Tensor, k: int) -> Tensor:
    """Ids (N, k) of the k greatest, greatest first: exact, by way of the k blocks with the greatest maxima.

    torch.topk over 151,936 columns takes as long as a good part of the matrix product; this is one cheap pass.
    """
    blocks = logits.shape[-1] // _BLOCK
    if blocks <= 4 * k:
        return logits.topk(k, dim=-1).indices
    end = blocks * _BLOCK
    best = logits[:, :end].unflatten(-1, (blocks, _BLOCK)).amax(-1).topk(k, dim=-1, sorted=False).indices
    inside = torch.arange(_BLOCK, device=logits.device)
    rest = torch.arange(end, logits.shape[-1], device=logits.device).expand(len(logits), -1)
    members = torch.cat([(best.unsqueeze(-1) * _BLOCK + inside).flatten(1), rest], dim=-1)
    return members.gather(-1, logits.gather(-1, members).topk(k, dim=-1).indices)


def _checked(
    hidden: Tensor, head: OutputHead, ids: Tensor | None, top_k: int, vocab_size: int | None, chunk_bytes: int
) -> tuple[Tensor, Tensor]:
    """`hidden` in the dtype that the matrix product runs in, and ids (N, C)."""
    size = len(head.weight) if vocab_size is None else vocab_size
    if not 1 <= size <= len(head.weight):
        raise ValueError(f"vocab_size = {size} does not fit a head of {len(head.weight)} rows")
    if not 0 <= top_k <= size:
        raise ValueError(f"top_k = {top_k} does not fit a head of {size} ids; it must lie in 0..{size}")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes = {chunk_bytes}; give the bytes that a chunk of logits may take, at least 1")
    if hidden.dim() != 2 or hidden.shape[-1] != head.weight.shape[-1]:
        raise ValueError(
            f"hidden states have shape {tuple(hidden.shape)}; a head of shape {tuple(head.weight.shape)} needs "
            f"(N, {head.weight.shape[-1]}): flatten the positions first"
        )
    if ids is None:
        ids = torch.empty(len(hidden), 0, dtype=torch.long, device=hidden.device)
    if ids.dim() != 2 or len(ids) != len(hidden):
        raise ValueError(f"ids have shape {tuple(ids.shape)}; {len(hidden)} hidden states need ({len(hidden)}, C)")
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden, ids


def _statistics(ids: Tensor, logprobs: Tensor, log_z: Tensor, entropy: Tensor, top_k: int) -> HeadStatistics:
    return HeadStatistics(ids[:, :top_k], logprobs[:, :top_k], logprobs[:, top_k:], log_z, entropy)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of everything after the matrix product."""
    return torch.promote_types(dtype, torch.float32)
