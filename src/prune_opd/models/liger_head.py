"""The output head by Liger's kernel: log-probabilities at given ids, on a GPU (arXiv 2410.10989, liger-kernel).

Liger's fused linear cross-entropy goes over the positions in chunks too. Where core/head.py has torch pass over a
chunk's logits ten times, one Triton kernel reads them twice. It knows one id a position, -log p(s) = log Z - z_s;
another id v needs no more than its own logit, a product with one row of the embedding:

    log p(v) = z_v - z_s + log p(s)

So the gradient at every v goes through the products, and the sum of them all through Liger's kernel, which makes a
chunk's logits again for it. There is neither a top-k nor an entropy in it: the teacher's head stays in core/head.py.

Letters: N positions, H hidden size, V vocabulary, C ids that are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prune_opd.core.head import CHUNK_BYTES, OutputHead

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def liger_logprobs(
    hidden: Float[Tensor, "N H"],
    head: OutputHead,
    ids: Int[Tensor, "N C"],
    *,
    vocab_size: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Float[Tensor, "N C"]:
    """What `candidate_logprobs` of core/head.py computes, C at least 1; float32, with gradient to hidden and head.

    The last id of a position is the one that Liger is given, and must have a finite logit. In bf16 logits are rounded
    to bf16, as there, and so is their gradient, which there is not before it is summed. Chunks of logits are Liger's
    choice, about as large as `hidden`; `chunk_bytes` bounds the gathered rows. Raises ValueError for a head that caps
    its logits: nothing without a GPU can run that branch of the kernel, so nobody has seen it agree.
    """
    if head.softcap is not None:
        raise ValueError(f"a head with soft-cap {head.softcap} was not verified with Liger's kernel; use core/head.py")
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as CrossEntropy

    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    weight = head.weight[:vocab_size].to(hidden.dtype)
    bias = None if head.bias is None else head.bias[:vocab_size].to(hidden.dtype)
    if head.scale != 1:  # which Liger does not know: scale · (h Wᵀ + b) = (scale · h) Wᵀ + scale · b
        hidden = hidden * head.scale
        bias = None if bias is None else bias * head.scale
    with torch.autocast(hidden.device.type, enabled=False):
        nll, *_ = CrossEntropy.apply(
            hidden,
            weight,
            ids[:, -1].contiguous(),
            bias,
            None,  # no weights of the classes
            -100,  # an id that does not occur
            0.0,  # no z-loss
            0.0,  # no label smoothing
            "none",
            None,  # no soft-cap
            False,  # no z-loss returned
            torch.float32,  # gradients of the embedding are summed over chunks in it
        )
        logits = _Products.apply(hidden, weight, ids, chunk_bytes).float()
    if bias is not None:
        logits = logits + bias[ids]
    return logits - logits[:, -1:] - nll[:, None]


class _Products(torch.autograd.Function):
    """h · W_v (N, C) for the ids v of each position, without the (N, C, H) tensor of gathered rows."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, chunk_bytes: int) -> Tensor:
        ctx.save_for_backward(hidden, weight, ids)
        ctx.rows = max(1, chunk_bytes // (ids.shape[-1] * hidden.shape[-1] * hidden.dtype.itemsize))
        products = [
            torch.bmm(weight[of], h[:, :, None]).squeeze(-1)
            for h, of in zip(hidden.split(ctx.rows), ids.split(ctx.rows), strict=True)
        ]
        return torch.cat(products)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.nn.functional.embedding_bag(ids, weight, per_sample_weights=g, mode="sum")
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
            for h, of, at in zip(hidden.split(ctx.rows), ids.split(ctx.rows), g.split(ctx.rows), strict=True):
                grad_weight.index_add_(0, of.flatten(), (at[:, :, None].float() * h[:, None]).flatten(0, 1))
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None
