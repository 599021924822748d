"""What packed rows (models/packing.py) attend by: four ways to the same numbers.

- A dense mask of a bit for each pair of columns (`sdpa`, `eager`). Its memory grows with the square of a row. On a CPU
  `packed_attention` multiplies less, and compiled code reads `Packed.key_ranges` and needs no mask.
- `flex_attention` with a mask of blocks: prompts are shared, and what no token of a block sees is skipped.
- Flash attention (`flash_attention_2` to 4 through transformers, `varlen` from torch itself) over the segments of one
  row: each rollout has its prompt to itself, and there is no mask.

A model keeps what it was loaded with (`sdpa` or `eager`) for its plain forwards and slots; `choose_attention` says what
its packed rows attend by.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from prune_opd.errors import ModelError
from prune_opd.models.causal_lm import as_mask, causal_lm_of, for_layers, hidden_states, use_attention
from prune_opd.models.kernels.attend_one import HEAD_SIZES
from prune_opd.models.kernels.attend_rows import attend_rows, attends_rows
from prune_opd.models.packing import Packed

PACKED_ATTENTION = "prune_opd_packed"
VARLEN = "varlen"
FLEX = "flex_attention"
QUERY_BLOCKS = 4  # of a row, on a CPU
SHORT_ROW = 64  # tokens; one block
MASK_BLOCK = 128  # columns: the block of flex_attention's mask

log = logging.getLogger(__name__)


def packed_states(model: torch.nn.Module, part: Packed) -> Tensor:
    """`hidden_states` (R, L, H) of packed rows: causal attention inside each rollout and to its prompt, none across.

    Inside `use_packed_attention`, else the model attends as it was loaded.
    """
    causal_lm = causal_lm_of(model)
    attention = causal_lm.config.get_text_config()._attn_implementation
    inputs: dict[str, Any] = {"input_ids": part.input_ids, "position_ids": part.position_ids}
    if _by_segments(attention):
        assert len(part.input_ids) == 1, "pack as `packing_of` says"
        return hidden_states(model, inputs | {"attention_mask": for_layers(model, lambda _: None)} | _segments(part))

    by_kernel = attends_packed_rows(model, compile=torch.compiler.is_compiling())

    def mask(window: int | None) -> Tensor | BlockMask:
        key_ranges = part.key_ranges if window is None else in_window(part.key_ranges, part.position_ids, window)
        if attention == FLEX:
            return block_mask(key_ranges)
        return key_ranges[:, None] if by_kernel else as_mask(causal_lm, seen_columns(key_ranges))

    return hidden_states(model, inputs | {"attention_mask": for_layers(model, mask)})


@contextmanager
def use_packed_attention(model: torch.nn.Module) -> Iterator[None]:
    """Inside, `packed_states` of this model attend by what was chosen for them. The backward belongs inside too."""
    attention = packed_attention_of(model)
    with use_attention(model, PACKED_ATTENTION if attention == "sdpa" else attention):
        yield


def packed_attention_of(model: torch.nn.Module) -> str:
    """What `choose_attention` chose for packed rows of this model; without it, what the model was loaded with."""
    causal_lm = causal_lm_of(model)
    return getattr(causal_lm, "packed_attention", causal_lm.config.get_text_config()._attn_implementation)


def packing_of(model: torch.nn.Module, *, compile: bool = False) -> dict[str, bool]:
    """Keyword arguments with which `pack` makes the rows that this model's packed attention is good at.

    compile: as in `attends_packed_rows`.
    """
    attention = packed_attention_of(model)
    return {
        "long_rows": attention == FLEX or _by_segments(attention) or attends_packed_rows(model, compile=compile),
        "share_prompts": not _by_segments(attention),
    }


def attends_packed_rows(model: torch.nn.Module, *, compile: bool) -> bool:
    """Whether `attend_rows` serves for this model: then its time is that of what each token sees, however long a row.

    compile: whether its forward runs compiled, in float32.
    """
    config = causal_lm_of(model).config.get_text_config()
    parameter = next(model.parameters())
    return (
        compile
        and config._attn_implementation in ("sdpa", PACKED_ATTENTION)
        and parameter.device.type == "cpu"
        and parameter.dtype == torch.float32
        and (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) in HEAD_SIZES
    )


# ---- which of them ----


def choose_attention(model: PreTrainedModel, requested: str, *, device: torch.device, half: bool, compile: bool) -> str:
    """Have packed rows of `model` attend by `attention_for` the same arguments, which is returned.

    Slots and plain forwards keep what the model was loaded with, unless that would leave out the caps of its scores.
    """
    attention = attention_for(model, requested, device=device, half=half, compile=compile)
    if attention == "eager":
        model.set_attn_implementation(attention)
    model.packed_attention = _loaded_kernel(model, attention) if attention.startswith("flash") else attention
    return attention


def attention_for(model: PreTrainedModel, requested: str, *, device: torch.device, half: bool, compile: bool) -> str:
    """What packed rows of `model` can attend by on `device`, which need not be here.

    requested: `model.attn_implementation`; on a CUDA device `auto` is the first that can serve of flash_attention_3 (on
    Hopper), varlen, flash_attention_2 and flex_attention, and elsewhere what the model was loaded with; `eager` where
    it caps its scores. half: whether its forwards compute in bfloat16. compile: whether they run compiled. Raises
    ModelError for one that cannot serve.
    """
    config = model.config.get_text_config()
    if requested == "auto":
        fast = ("flash_attention_3", VARLEN, "flash_attention_2", FLEX) if device.type == "cuda" else ()
        serve = [name for name in fast if _here(name) and not _objection(model, name, device, half, compile)]
        caps = getattr(config, "attn_logit_softcapping", None) is not None
        requested = serve[0] if serve else "eager" if caps else config._attn_implementation
    if objection := _objection(model, requested, device, half, compile):
        raise ModelError(f"model.attn_implementation = {requested!r}: {objection}")
    return requested


def has_dense_mask(attention: str) -> bool:
    """Whether packed rows that attend by this have a mask of (L, L) on a GPU."""
    return attention in ("sdpa", "eager")


def _here(name: str) -> bool:
    """Whether `auto` may take it: it is installed, and made for this GPU."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    match name:
        case "flash_attention_2":
            return is_flash_attn_2_available()
        case "flash_attention_3":
            return hopper and is_flash_attn_3_available()
    return True


def _objection(model: PreTrainedModel, name: str, device: torch.device, half: bool, compile: bool) -> str | None:
    """Why packed rows of this model cannot attend by it, and what to do; None if they can."""
    config = model.config.get_text_config()
    family, on_cpu = type(model).__name__, device.type == "cpu"
    if name == "eager":
        return None
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{family} caps its attention scores, which was built for eager alone; write that, or auto"
    if config._attn_implementation == "eager":
        return f"transformers has no sdpa for {family}, which slots and plain forwards need beside it; write eager"
    if name == "sdpa":
        return None
    if compile:
        return "with model.compile = true only sdpa and eager were built; leave one of the two out"
    if getattr(config, "attention_dropout", 0.0) and name in (FLEX, VARLEN):
        return f"it has no dropout, and {family} has attention_dropout = {config.attention_dropout}; write sdpa"
    if name == FLEX:
        if on_cpu:
            return "it has no backward on a CPU; write auto, which takes sdpa there"
        return None if model._supports_flex_attn else f"transformers has no flex_attention for {family}; write auto"
    if not (half or on_cpu):
        return (
            "flash attention computes in half precision; set training.bf16 = true for the student and "
            "model.teacher_dtype = 'bfloat16' for the teacher, or write auto"
        )
    if name == VARLEN:
        if on_cpu:
            return None
        if find_spec("torch.nn.attention.varlen") is None:
            return f"torch {torch.__version__} has no torch.nn.attention.varlen; take 2.10 or later, or write auto"
        if torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] < 8:
            return "torch's flash attention needs a GPU of compute capability 8.0 (Ampere) or later; write auto"
        return None
    if on_cpu:
        return "there is no such kernel for a CPU; write auto, which takes sdpa there"
    return None if model._supports_flash_attn else f"transformers has no flash attention for {family}; write auto"


def _loaded_kernel(model: PreTrainedModel, name: str) -> str:
    """transformers' name of this flash attention, perhaps a kernel that it fetched. ModelError where there is none."""
    config = model.config.get_text_config()
    loaded = config._attn_implementation
    try:
        model.set_attn_implementation(name)
        return str(config._attn_implementation)
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        raise ModelError(
            f"model.attn_implementation = {name!r} cannot be used: {error}\nInstall what it names, or write auto"
        ) from error
    finally:
        model.set_attn_implementation(loaded)


# ---- dense masks ----


def in_window(key_ranges: Tensor, position_ids: Tensor, window: int) -> Tensor:
    """`Packed.key_ranges` (R, L, 3) where no token sees further back than `window` tokens, itself included."""
    begin, prompt_begin, prompt_end = key_ranges.unbind(-1)
    column = torch.arange(key_ranges.shape[1], dtype=torch.int32, device=key_ranges.device)
    first = (position_ids - window + 1).clamp(min=0).int()  # position that is seen
    prompt_begin = torch.minimum(prompt_begin + first, prompt_end)
    return torch.stack([torch.maximum(begin, column - window + 1), prompt_begin, prompt_end], dim=-1)


def seen_columns(key_ranges: Tensor) -> Tensor:
    """`Packed.key_ranges` (R, L, 3) as a mask (R, L, L) bool: whether a query, second axis, sees a key, third axis."""
    column = torch.arange(key_ranges.shape[1], dtype=torch.int32, device=key_ranges.device)
    begin, prompt_begin, prompt_end = key_ranges.unsqueeze(2).unbind(-1)
    response = (column >= begin) & (column <= column[:, None])
    return response | ((column >= prompt_begin) & (column < prompt_end))


def packed_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    """What transformers' `sdpa` computes over the rows of `packed_states`: (R, L, heads, head size), with gradient.

    query (R, heads, L, head size) · key, value (R, shared heads, L, head size) · attention_mask (R, 1, L, L) bool, or
    `Packed.key_ranges` (R, 1, L, 3) int32, or None. torch's kernel on a CPU multiplies with all keys, whatever the mask
    says. So queries go in blocks, and each block reads the keys up to its own end: 5/8 of the products. Compiled code
    uses `attend_rows`, which reads the visible keys alone.
    """
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        key_ranges = attention_mask[:, 0]
        if not others.get("dropout") and others.get("position_bias") is None and attends_rows(query, key, value):
            scale = query.shape[3] ** -0.5 if others.get("scaling") is None else others["scaling"]
            return attend_rows(query, key, value, key_ranges, scale), None
        attention_mask = seen_columns(key_ranges)[:, None]
    if attention_mask is None or others.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    length = query.shape[2]
    short = 2 * QUERY_BLOCKS if torch.compiler.is_compiling() else SHORT_ROW  # one block is compiled code of its own
    if query.device.type != "cpu" or key.shape[2] != length or length < short:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    bounds = [length * block // QUERY_BLOCKS for block in range(QUERY_BLOCKS + 1)]
    outputs = [
        sdpa_attention_forward(
            module,
            query[:, :, begin:end],
            key[:, :, :end],
            value[:, :, :end],
            attention_mask[:, :, begin:end, :end],
            **others,
        )[0]
        for begin, end in pairwise(bounds)
    ]
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)

# ---- masks of blocks ----


def block_mask(key_ranges: Tensor) -> BlockMask:
    """`Packed.key_ranges` (R, L, 3) for flex_attention: blocks that nobody sees, and those that need no mask, by name.

    It is made from the ranges alone; no (L, L) tensor exists.
    """
    rows, length, _ = key_ranges.shape
    blocks = -(-length // MASK_BLOCK)
    first = torch.arange(blocks, device=key_ranges.device) * MASK_BLOCK  # of the keys in a block
    begin, prompt_begin, prompt_end = key_ranges.unsqueeze(2).unbind(-1)
    end = torch.arange(1, length + 1, device=key_ranges.device)[:, None]
    some, every = (
        torch.zeros(rows, blocks * MASK_BLOCK, blocks, dtype=torch.bool, device=key_ranges.device) for _ in range(2)
    )
    every[:, length:] = True  # queries behind the end: what they would see is nobody's
    for range_begin, range_end in ((begin, end), (prompt_begin, prompt_end)):
        some[:, :length] |= (range_begin < first + MASK_BLOCK) & (range_end > first) & (range_end > range_begin)
        every[:, :length] |= (range_begin <= first) & (range_end >= first + MASK_BLOCK)
    some = some.view(rows, blocks, MASK_BLOCK, blocks).any(2)
    every = every.view(rows, blocks, MASK_BLOCK, blocks).all(2)

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        begin, prompt_begin, prompt_end = (key_ranges[row, query, i] for i in range(3))
        return ((key >= begin) & (key <= query)) | ((key >= prompt_begin) & (key < prompt_end))

    return BlockMask.from_kv_blocks(
        *_counted(some & ~every), *_counted(every), BLOCK_SIZE=MASK_BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def _counted(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(R, q, k) bool in flex_attention's form: how many keys' blocks (R, 1, q), and their numbers (R, 1, q, k)."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


# ---- segments ----


def _by_segments(attention: str) -> bool:
    """Whether it wants the rollouts of a row one after another, each with its own prompt, and no mask."""
    return attention == VARLEN or "flash" in attention  # transformers' own test, which its fetched kernels pass too


def _segments(part: Packed) -> dict[str, Any]:
    """Where the rollouts of a row begin and end, as transformers hands it to flash attention."""
    (begins, _), (longest, _) = prepare_fa_kwargs_from_position_ids(part.position_ids)
    most = int(longest)
    return {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": most, "max_length_k": most}


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """torch's flash attention inside each segment of a row: (1, L, heads, head size), with gradient.

    query (1, heads, L, head size) · key, value (1, shared heads, L, head size) · cu_seq_lens_q (segments + 1,) int32.
    Under autocast it computes in autocast's type. torch has no such kernel for a CPU: there segments go one by one.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if device == "cpu":
        return _segment_by_segment(query, key, value, cu_seq_lens_q.tolist(), scaling, sliding_window), None
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10

    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    found = varlen_attn(
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(found, Tensor)  # without return_aux
    return found.unsqueeze(0), None


def _segment_by_segment(
    query: Tensor, key: Tensor, value: Tensor, bounds: list[int], scale: float | None, window: int | None
) -> Tensor:
    outputs = []
    for begin, end in pairwise(bounds):
        column = torch.arange(end - begin)
        distance = column[:, None] - column
        mask = None if window is None else (distance >= 0) & (distance < window)
        of = slice(begin, end)
        outputs.append(
            functional.scaled_dot_product_attention(
                query[:, :, of],
                key[:, :, of],
                value[:, :, of],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


AttentionInterface.register(VARLEN, varlen_attention)
