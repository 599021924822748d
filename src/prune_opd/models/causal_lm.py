"""A Hugging Face causal LM taken apart in two: the body that makes hidden states, and the output head.

The chunked head (core/head.py) needs them apart. Families differ in what they do to the logits after the matrix
product, so the head is read from the configuration and then held against the model's own logits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from prune_opd.core.head import OutputHead
from prune_opd.distributed.world import full_tensor
from prune_opd.errors import ModelError

COMPILED_VARIANTS = 64  # of one function: student and teacher, with and without gradient, one row or more
PROBE_TOKENS = 4
PROBE_LOGIT = 50.0  # as large as logits get: a soft-cap of 30 or 100 shows, which it would not at 0.1

M = TypeVar("M")

_verified: WeakSet[torch.nn.Module] = WeakSet()  # models whose head passed its probe


def hidden_states(model: torch.nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """(B, S, H): what the output head of `model` is applied to, for keyword inputs with (B, S) token ids.

    With gradient if the caller's mode says so. A LoRA student works as it is: its adapters live inside the body.
    """
    return _body(causal_lm_of(model))(**inputs, use_cache=False).last_hidden_state


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function`, of models and tensors, once for all batch sizes and lengths.

    The first call of each kind takes 10 to 60 s. Student and teacher share the function, so all of dynamo's guards are
    kept: two models of the same shapes may differ in nothing but a field of their configuration.
    """
    run = torch.compile(function, dynamic=True)

    @wraps(function)
    def call(*args: Any, **settings: Any) -> Any:
        dynamo, shapes = _compiler_settings(function, threading.get_ident())
        with dynamo, shapes:  # at each call, since any call may compile
            return run(*args, **settings)

    return call


@cache
def _compiler_settings(function: Callable[..., Any], thread: int) -> tuple[Any, Any]:
    """The compiler's settings for calls of `function`; nobody else's code sees them.

    A patch keeps what it replaced, so two threads must not share one. It is made once: making one at each call took a
    tenth of a compiled step.
    """
    dynamo = torch._dynamo.config.patch(
        recompile_limit=COMPILED_VARIANTS,
        specialize_float=True,  # settings of a run and a model: as inputs they would be tensors at each call
    )
    # Sizes that agree by chance would be compiled as one, and again when they no longer agree.
    return dynamo, torch.fx.experimental._config.patch(use_duck_shape=False)  # type: ignore[attr-defined]


def check_compiler(device: torch.device) -> None:
    """ModelError where torch.compile would find no C++ compiler, which it needs on a CPU."""
    if device.type == "cpu":
        from torch._inductor import cpp_builder, exc  # 1.5 s that few runs need

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler as error:
            raise ModelError(
                "model.compile = true needs a C++ compiler on a CPU, and there is none: install g++ (or set CXX to "
                "another), or take model.compile out"
            ) from error


def check_liger(model: torch.nn.Module) -> None:
    """ModelError where Liger cannot serve this model. Triton's interpreter runs it on a CPU, for tests."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as _  # noqa: F401
        from triton import knobs
    except ImportError as error:
        raise ModelError(
            f"model.liger_head = true needs Liger's kernels, and they cannot be imported: {error}\n"
            "Install them with pip install 'prune-opd[liger]', or take model.liger_head out"
        ) from error
    head = output_head(model)
    device = head.weight.device
    if device.type != "cuda" and not knobs.runtime.interpret:
        raise ModelError(
            f"model.liger_head = true runs on a CUDA device, and this is {device.type}: take it out, the chunked head "
            "of torch computes the same"
        )
    if head.softcap is not None:
        raise ModelError(
            f"model.liger_head = true was not verified for heads that cap their logits, as that of "
            f"{type(causal_lm_of(model)).__name__} does: take it out"
        )


def output_head(model: torch.nn.Module) -> OutputHead:
    """The head of a causal LM, verified: on a probe it gave the same logits as the model itself.

    It holds the model's own parameters, so it stays right while they train. The probe, a forward of four tokens, runs
    at a model's first call; later calls cost nothing. Soft-caps (Gemma), divided logits (Granite) and multiplied ones
    (Cohere) are known; a model that does anything else behind its body, or whose head is no plain linear layer,
    raises ModelError.
    """
    causal_lm = causal_lm_of(model)
    name = type(causal_lm).__name__
    linear = causal_lm.get_output_embeddings()
    if not isinstance(linear, torch.nn.Linear) or not linear.weight.is_floating_point():
        raise ModelError(
            f"the output head of {name} is a {type(linear).__name__}; a torch.nn.Linear with floating-point weights is "
            "needed. Take the output head out of model.lora.target_modules, or load the model unquantised"
        )
    config = causal_lm.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    bias = None if linear.bias is None else full_tensor(linear.bias)
    head = OutputHead(full_tensor(linear.weight), bias, scale=scale, softcap=softcap)
    if causal_lm not in _verified:
        _verify(causal_lm, head, name)
        _verified.add(causal_lm)
    return head


@contextmanager
def use_attention(model: torch.nn.Module, attention: str) -> Iterator[None]:
    """Forwards of `model` attend by what is registered with transformers under this name; one that is `eager` stays so.

    With gradient checkpointing the backward is a forward too and belongs inside.
    """
    config = causal_lm_of(model).config.get_text_config()
    before = config._attn_implementation
    if before != "eager":
        config._attn_implementation = attention
    try:
        yield
    finally:
        config._attn_implementation = before


def attention_mask(model: torch.nn.Module, visible: Tensor, distance: Tensor) -> Tensor | dict[str, Tensor]:
    """The mask that a Hugging Face model takes as it is: visible (R, q, keys) bool, with sliding windows applied.

    distance (R or 1, q, keys): query position minus key position, in tokens. Raises as `for_layers`.
    """
    causal_lm = causal_lm_of(model)
    return for_layers(
        model,
        lambda window: as_mask(causal_lm, visible if window is None else visible & (distance < window)),
    )


def for_layers(model: torch.nn.Module, mask: Callable[[int | None], M]) -> M | dict[str, M]:
    """What `mask` makes of no window, or of the sliding one, as a Hugging Face model takes it for its kinds of layers.

    Raises ModelError for layers that are neither full nor sliding attention.
    """
    causal_lm = causal_lm_of(model)
    config = causal_lm.config.get_text_config()
    types = set(getattr(config, "layer_types", None) or ())
    if unknown := types - {"full_attention", "sliding_attention"}:
        raise ModelError(
            f"{type(causal_lm).__name__} has layers of type {', '.join(sorted(unknown))}; the local sampler and the "
            "packed update know full_attention and sliding_attention. Use a student and teacher of plain attention"
        )
    window = getattr(config, "sliding_window", None)
    if window is None or types == {"full_attention"}:
        return mask(None)
    sliding = mask(window)
    return {"full_attention": mask(None), "sliding_attention": sliding} if types else sliding


def as_mask(model: Any, visible: Tensor) -> Tensor:
    """(R, q, keys) bool as a mask (R, 1, q, keys) in the form that the model's attention takes."""
    if model.config._attn_implementation == "eager":  # which adds the mask to the scores
        least = torch.finfo(model.dtype).min
        return torch.zeros(visible.shape, dtype=model.dtype, device=visible.device).masked_fill(~visible, least)[
            :, None
        ]
    return visible[:, None]


def _verify(causal_lm: Any, head: OutputHead, name: str) -> None:
    """Put hidden states of our own choice behind the body; the model and the head must make the same logits of them."""
    weight = head.weight
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(PROBE_TOKENS, weight.shape[-1], generator=generator).to(weight.device, weight.dtype)
    device = weight.device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        largest = OutputHead(weight, scale=head.scale).logits(probe).abs().max()
        probe = (probe * (PROBE_LOGIT / largest)).to(weight.dtype)

    def replace(_module: torch.nn.Module, _args: Any, output: Any) -> Any:
        output["last_hidden_state"] = probe.unsqueeze(0)
        return output

    handle = _body(causal_lm).register_forward_hook(replace)
    was_training = causal_lm.training
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False), use_attention(causal_lm, "sdpa"):
            input_ids = torch.arange(PROBE_TOKENS, device=weight.device).unsqueeze(0)
            theirs = causal_lm.eval()(input_ids=input_ids, use_cache=False).logits[0].double()
            ours = head.logits(probe).double()
    finally:
        causal_lm.train(was_training)
        handle.remove()
    # In bf16 the model rounds after each operation, the head only after the matrix product.
    tolerance = PROBE_LOGIT * max(1e-3, 4 * torch.finfo(weight.dtype).eps)
    difference = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")
    if not difference <= tolerance:
        raise ModelError(
            f"{name} does something to its logits that prune-opd does not know: its own differ by up to "
            f"{difference:.3g} from (h Wᵀ + b) with scale {head.scale:g} and soft-cap {head.softcap}, on logits of up "
            f"to {PROBE_LOGIT:g}. Known are final_logit_softcapping (Gemma), logits_scaling as a divisor (Granite) and "
            "logit_scale as a factor (Cohere); use a model of another family"
        )


def causal_lm_of(model: Any) -> Any:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _body(causal_lm: Any) -> torch.nn.Module:
    body = causal_lm.base_model
    if body is causal_lm:
        raise ModelError(
            f"{type(causal_lm).__name__} has no body apart from its output head (base_model_prefix is "
            f"{causal_lm.base_model_prefix!r}); a transformers causal LM such as LlamaForCausalLM is needed"
        )
    return body
