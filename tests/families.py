"""Tiny random models of the families that the engine promises to run, and prompts for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB, PAD, EOS = 67, 0, 1
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, SLIDING | {"attn_implementation": "eager"}),  # soft-capped scores
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, SLIDING),
}
MORE_FAMILIES = {  # whose configuration has fields that the others lack
    "granite": (GraniteConfig, GraniteForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 8}),
}


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Two layers, grouped keys, logits spread widely enough that sampling is no coin toss."""
    config, model, extra = (FAMILIES | MORE_FAMILIES)[family]
    torch.manual_seed(seed)
    return model(config(**(TINY | extra | changes))).eval()


def tiny_prompts(lengths=(5, 1, 9, 5, 3, 7, 2, 4)) -> list[list[int]]:
    """Ragged prompts; the fourth is the first again, as when several rollouts share a prompt."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    if len(prompts) > 3 and lengths[3] == lengths[0]:
        prompts[3] = prompts[0]
    return prompts
