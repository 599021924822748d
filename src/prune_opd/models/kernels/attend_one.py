"""Attention of one query a row on a CPU: what a compiled decode step spends most of its time on.

An operator of our own (attend_one.cpp), built once by the compiler that torch.compile needs anyway and kept in its
cache. torch's kernels reach half of the speed at which memory delivers keys and values, or less (docs/benchmarks.md).
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HEAD_SIZES = (16, 32, 64, 80, 96, 128, 256)  # those of attend_one.cpp


def attends_one(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend_one` is the way for query (R, heads, q, size): one a row, and `has_code_for` it."""
    return query.shape[2] == 1 and has_code_for(query, key, value)


def has_code_for(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether our kernels may read these states: (R, heads, q, size) in float32 on a CPU, in code that is compiled.

    All three are looked at: under autocast a value may be bfloat16 beside a float32 query and key.
    """
    return (
        torch.compiler.is_compiling()
        and value.shape == key.shape
        and query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.float32
        and query.shape[3] in HEAD_SIZES
    )


def attend_one(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v over the columns that `seen` allows: (R, heads, size) float32, no gradient.

    query (R, heads, size) float32 · key, value (R, shared heads, length, size) float32, each column without gaps and of
    the same strides · seen (R, length) bool, or uint8 of 0 and 1; one column of each row at least. Columns before the
    first and after the last that a row sees are not read.
    """
    return torch.ops.prune_opd.attend_one(query, key, value, seen, scale)


# Not by `torch.library.custom_op`, whose wrappers around a call take longer than small calls.
torch.library.define(
    "prune_opd::attend_one", "(Tensor query, Tensor key, Tensor value, Tensor seen, float scale) -> Tensor"
)


@torch.library.impl("prune_opd::attend_one", "CPU")
def _attend_one(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    rows, heads, size = query.shape
    shared, length = key.shape[1:3]
    assert key.stride() == value.stride() and key.stride()[2:] == (size, 1), "keys and values lie otherwise"
    query, seen = query.contiguous(), seen.contiguous()
    out = torch.empty_like(query)
    pointers = (tensor.data_ptr() for tensor in (query, key, value, seen, out))
    sizes = rows, shared, heads // shared, length, size, key.stride(0), key.stride(1)
    known = _kernel()(*pointers, *sizes, scale)
    assert known, f"no code for heads of {size}"
    return out


@torch.library.register_fake("prune_opd::attend_one")
def _(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@cache
def _kernel() -> ctypes._NamedFuncPointer:
    from torch._inductor.codecache import CppCodeCache  # 1.5 s that few runs need

    kernel = CppCodeCache.load(Path(__file__).with_suffix(".cpp").read_text(encoding="utf-8")).attend_one
    kernel.argtypes = [*[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 7, ctypes.c_float]
    kernel.restype = ctypes.c_bool
    return kernel
