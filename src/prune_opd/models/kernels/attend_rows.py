"""Attention of packed rows on a CPU, with gradient: most of a compiled update beside the products with its weights.

An operator of our own (attend_rows.cpp), built once for each head size by the compiler that torch.compile needs anyway.
torch's kernel for a CPU multiplies with all keys and then masks; here the work is that of what each token sees, however
long the row.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_opd.models.kernels.attend_one import has_code_for


def attends_rows(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend_rows` is the way for query (R, heads, L, size): whole rows, and `has_code_for` them."""
    return query.shape[2] == key.shape[2] and has_code_for(query, key, value)


def attend_rows(query: Tensor, key: Tensor, value: Tensor, key_ranges: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v over the columns that each query sees: (R, L, heads, size) float32, with gradient.

    query (R, heads, L, size) float32 · key, value (R, shared heads, L, size) float32 · key_ranges (R, L, 3) int32 as in
    `Packed`.
    """
    return torch.ops.prune_opd.attend_rows(query, key, value, key_ranges, scale)[0]


torch.library.define(
    "prune_opd::attend_rows",
    "(Tensor query, Tensor key, Tensor value, Tensor key_ranges, float scale) -> (Tensor, Tensor)",
)
torch.library.define(
    "prune_opd::attend_rows_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor key_ranges, Tensor out, Tensor log_z, float scale)"
    " -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("prune_opd::attend_rows", "CPU")
def _forward(query: Tensor, key: Tensor, value: Tensor, key_ranges: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    query, key, value, key_ranges = _dense(query), _dense(key), _dense(value), key_ranges.contiguous()
    out, log_z = _empty_like(query).transpose(1, 2), query.new_empty(query.shape[:3])
    assert key_ranges.dtype == torch.int32
    in_order = _kernels(query.shape[3]).attend_rows(
        *_pointers(query, key, value),
        key_ranges.data_ptr(),
        out.data_ptr(),
        log_z.data_ptr(),
        *_sizes(query, key),
        scale,
    )
    assert in_order, "a column sees what lies behind it, or a prompt behind its own rollout"
    return out, log_z


@torch.library.impl("prune_opd::attend_rows_backward", "CPU")
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_ranges: Tensor,
    out: Tensor,
    log_z: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, grad = _dense(query), _dense(key), _dense(value), _dense(grad).transpose(1, 2)
    key_ranges, out, log_z = key_ranges.contiguous(), out.contiguous(), log_z.contiguous()
    gradients = _empty_like(query), _empty_like(key), _empty_like(value)
    _kernels(query.shape[3]).attend_rows_backward(
        *_pointers(query, key, value),
        *(tensor.data_ptr() for tensor in (key_ranges, out, log_z)),
        *_pointers(grad),
        *(gradient.data_ptr() for gradient in gradients),
        *_sizes(query, key),
        scale,
    )
    return gradients


@torch.library.register_fake("prune_opd::attend_rows")
def _(query: Tensor, key: Tensor, value: Tensor, key_ranges: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _empty_like(query).transpose(1, 2), query.new_empty(query.shape[:3])


@torch.library.register_fake("prune_opd::attend_rows_backward")
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(query), _empty_like(key), _empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _log_z: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.prune_opd.attend_rows_backward(grad, *ctx.saved_tensors, ctx.scale)
    return *gradients, None, None


torch.library.register_autograd("prune_opd::attend_rows", _differentiate, setup_context=_save)


def _dense(tensor: Tensor) -> Tensor:
    """Without gaps within a position; strides of rows, heads and positions may be any."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty_like(tensor: Tensor) -> Tensor:
    """(R, heads, L, size), where positions lie behind one another with all of their heads."""
    rows, heads, length, size = tensor.shape
    return tensor.new_empty(rows, length, heads, size).transpose(1, 2)


def _pointers(*tensors: Tensor) -> list[Any]:
    """Of each tensor (R, heads, L, size) its address and three strides."""
    strides = ctypes.c_int64 * 3
    return [x for tensor in tensors for x in (tensor.data_ptr(), strides(*tensor.stride()[:3]))]


def _sizes(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
    rows, heads, length, _ = query.shape
    return rows, key.shape[1], heads // key.shape[1], length


@cache
def _kernels(head_size: int) -> Any:
    """The library: attend_rows.cpp for heads of this size."""
    from torch._inductor.codecache import CppCodeCache  # 1.5 s that few runs need

    code = Path(__file__).with_suffix(".cpp").read_text(encoding="utf-8")
    library = CppCodeCache.load(f"#define HEAD_SIZE {head_size}\n{code}")
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    strided = [pointer, ctypes.POINTER(number)]
    sizes = [*[number] * 4, ctypes.c_float]
    library.attend_rows.argtypes = [*strided * 3, *[pointer] * 3, *sizes]
    library.attend_rows.restype = ctypes.c_bool
    library.attend_rows_backward.argtypes = [*strided * 3, *[pointer] * 3, *strided, *[pointer] * 3, *sizes]
    library.attend_rows_backward.restype = None
    return library
