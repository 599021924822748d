"""The attention of packed rows: the same numbers as transformers' own, from fewer products."""

from __future__ import annotations

import pytest
import torch

from prune_opd.models import causal_lm as modeling
from prune_opd.models.causal_lm import PACKED_ATTENTION, packed_states, use_attention
from prune_opd.models.packing import Packed, pack
from tests.families import tiny_model
from tests.models.test_packing import rollouts_of


def packed(lengths: list[int], **settings) -> list[Packed]:
    """Packed rows of rollouts of these lengths, two to a prompt: rows that differ are micro-batches of their own."""
    prompts = [[2 + b // 2, 7, 3] for b in range(len(lengths))]
    return list(pack(rollouts_of(prompts, lengths), 10**6, **settings))


def states_and_gradients(model, parts: list[Packed], attention: str, loss) -> list[torch.Tensor]:
    """Hidden states of the response tokens, and the gradient of `loss` of them in each parameter."""
    model.zero_grad()
    with use_attention(model, attention):
        states = torch.cat([packed_states(model, part)[part.row, part.column] for part in parts])
        loss(states).backward()
    return [states.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("lengths", [[1], [61], [62], [90, 88, 41, 41], [70, 30, 30, 5]], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_and_gradients_are_those_of_sdpa(family, lengths, checkpointing):
    """Full and sliding layers, heads that share keys, rows in one block and in four."""
    model, parts = tiny_model(family).double().train(), packed(lengths)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    want_all, got_all = (
        states_and_gradients(model, parts, attention, lambda states: states.square().sum())
        for attention in ("sdpa", PACKED_ATTENTION)
    )
    for got, want in zip(got_all, want_all, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_queries_do_not_meet_the_keys_behind_them(monkeypatch):
    """5/8 of query-key products, counted, for both layers."""
    model, (part,) = tiny_model("llama"), packed([62])
    products = []
    attention = modeling.sdpa_attention_forward

    def count(module, query, key, *others, **settings):
        products.append(query.shape[2] * key.shape[2])
        return attention(module, query, key, *others, **settings)

    monkeypatch.setattr(modeling, "sdpa_attention_forward", count)
    with use_attention(model, PACKED_ATTENTION):
        packed_states(model, part)
    assert sum(products) == 2 * 64 * 64 * 5 / 8
