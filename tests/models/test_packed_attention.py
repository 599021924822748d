"""The attention of packed rows: four ways to the numbers of each rollout alone, and which of them is taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import create_mask
from transformers.integrations.flex_attention import WrappedFlexAttention

from prune_opd.errors import ModelError
from prune_opd.models import packed_attention as modeling
from prune_opd.models.causal_lm import hidden_states, use_attention
from prune_opd.models.packed_attention import (
    MASK_BLOCK,
    PACKED_ATTENTION,
    block_mask,
    choose_attention,
    packed_states,
    packing_of,
    seen_columns,
    use_packed_attention,
)
from prune_opd.models.packing import Packed, pack
from tests.families import FAMILIES, MORE_FAMILIES, tiny_model
from tests.models.test_compile import needs_compiler
from tests.models.test_packing import PROMPTS, rollouts_of
from tests.test_step import gradients, run_step

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # the choice needs no device to be there


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


# ---- segments, as flash attention takes them ----


def of_tokens(model, parts: list[Packed], states_of) -> torch.Tensor:
    """Hidden states of the response tokens in the order (rollout, position), whatever row they stood in."""
    found = torch.cat([states_of(model, part)[part.row, part.column] for part in parts])
    places = torch.cat([part.rollout * 1000 + part.position for part in parts])
    return found[places.argsort()]


def by_transformers(model, part: Packed) -> torch.Tensor:
    """transformers' own packed rows: positions that begin again, and no mask from us."""
    return hidden_states(model, {"input_ids": part.input_ids, "position_ids": part.position_ids})


ROLLOUTS = rollouts_of([[2, 7, 3]] * 3 + [[4, 5]] * 2 + [[9] * 12], [30, 1, 14, 25, 3, 19])


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES, "mistral-window"])
@pytest.mark.parametrize("way", ["transformers", "varlen"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rollouts_that_share_nothing_have_the_states_and_gradients_of_those_that_share_a_prompt(
    family, way, checkpointing
):
    """Flash attention's rows against today's dense mask: full and sliding layers, shared heads, soft-capped scores."""
    name, _, window = family.partition("-")
    model = tiny_model(name, **({"sliding_window": 8} if window else {})).double().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if way == "varlen" and family == "gemma2":
        with pytest.raises(ModelError, match="caps its attention scores"):
            choose_attention(model, "varlen", device=CPU, half=False, compile=False)
        return
    shared, apart = (list(pack(ROLLOUTS, 10**6, long_rows=True, share_prompts=share)) for share in (True, False))
    assert [part.input_ids.shape for part in shared] == [(1, 103)], "2 + 1 prompts fewer"
    assert [part.input_ids.shape for part in apart] == [(1, 111)]
    found = []
    for parts, states_of in ((shared, packed_states), (apart, by_transformers if way == "transformers" else None)):
        model.zero_grad()
        if states_of is None:
            choose_attention(model, "varlen", device=CPU, half=False, compile=False)
            assert packing_of(model) == {"long_rows": True, "share_prompts": False}
        with use_packed_attention(model) if states_of is not by_transformers else use_attention(model, "sdpa"):
            states = of_tokens(model, parts, states_of or packed_states)
            (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        found.append([states.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)  # norms and rotations are float32 ones


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_a_step_by_segments_is_the_same_step(family):
    """Teacher's scores, weights, loss and gradient; the model's own attention still decodes."""
    want, _, dense = run_step(tiny_model(family, seed=3), tiny_model(family, seed=4))
    student, teacher = tiny_model(family, seed=3), tiny_model(family, seed=4)
    for model in (student, teacher):
        choose_attention(model, "varlen", device=CPU, half=False, compile=False)
    got, _, trained = run_step(student, teacher)
    assert student.config._attn_implementation == "sdpa"
    assert torch.equal(got.rollouts.response_ids, want.rollouts.response_ids) and torch.equal(got.weight, want.weight)
    assert got.weight.unique().numel() > 2, "nothing drifted: nothing tested"
    torch.testing.assert_close(got.scores.candidate_logprobs, want.scores.candidate_logprobs, rtol=1e-4, atol=1e-4)
    assert got.loss == pytest.approx(want.loss, rel=1e-5)
    torch.testing.assert_close(gradients(trained), gradients(dense), rtol=1e-4, atol=1e-6)


def test_autocast_gives_segments_its_type():
    """Under autocast values are bfloat16 beside queries and keys that rotation made float32."""
    model = tiny_model("qwen3")
    (part,) = pack(ROLLOUTS, 10**6, long_rows=True, share_prompts=False)
    choose_attention(model, "varlen", device=CPU, half=True, compile=False)
    with torch.no_grad(), use_packed_attention(model):
        want = packed_states(model, part)
        with torch.autocast("cpu", torch.bfloat16):
            got = packed_states(model, part)
    assert 0 < ((got - want).norm() / want.norm()).item() < 2e-2


# ---- masks of blocks ----


@given(
    answers=st.lists(st.tuples(st.sampled_from(PROMPTS), st.integers(0, 150)), min_size=1, max_size=8),
    window=st.sampled_from([None, 1, 40, 200]),
)
def test_a_mask_of_blocks_is_what_each_token_sees(answers, window):
    """It names no block that somebody needs as unseen, none as whole that is not, and nothing between as either."""
    for part in pack(rollouts_of([p for p, _ in answers], [n for _, n in answers]), 600, long_rows=True):
        key_ranges = part.key_ranges
        if window is not None:
            key_ranges = modeling.in_window(key_ranges, part.position_ids, window)
        seen = seen_columns(key_ranges)
        rows, length, _ = key_ranges.shape
        mask = block_mask(key_ranges)
        assert torch.equal(create_mask(mask.mask_mod, rows, None, length, length, device="cpu")[:, 0], seen)
        blocks = -(-length // MASK_BLOCK)
        named = torch.zeros(2, rows, blocks, blocks, dtype=torch.bool)
        for kind, (counts, indices) in enumerate(
            [(mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)]
        ):
            for r, q in torch.cartesian_prod(torch.arange(rows), torch.arange(blocks)).tolist():
                named[kind, r, q, indices[r, 0, q, : counts[r, 0, q]].long()] = True
        padding = (0, blocks * MASK_BLOCK - length) * 2
        whole, some = (
            torch.nn.functional.pad(seen, padding, value=False)
            .view(rows, blocks, MASK_BLOCK, blocks, MASK_BLOCK)
            .transpose(2, 3)
            for _ in range(2)
        )
        assert torch.equal(named.any(0), some.flatten(3).any(-1)) and not named.all(0).any()
        assert not (named[1] & ~whole[..., : length % MASK_BLOCK or MASK_BLOCK, :].flatten(3).all(-1)).any()


@pytest.mark.parametrize(
    ("family", "compile"),
    [
        ("llama", False),
        ("qwen3", False),
        ("gemma3", False),
        pytest.param("gemma3", True, marks=[pytest.mark.slow, needs_compiler]),
    ],
)
def test_flex_attention_has_the_states_of_the_dense_mask(family, compile, monkeypatch):
    """No gradient: torch has none for a CPU. tests/gpu has it. transformers compiles it, which takes 10 s."""
    if not compile:
        as_it_is = staticmethod(flex_attention.flex_attention)
        monkeypatch.setattr(WrappedFlexAttention, "_compiled_flex_attention", as_it_is)
        monkeypatch.setattr(WrappedFlexAttention, "_is_flex_compiled", True)
        monkeypatch.setattr(WrappedFlexAttention, "training", False, raising=False)
    model = tiny_model(family, head_dim=16).eval()
    rollouts = rollouts_of([[2, 7, 3]] * 3 + [[4, 5]] * 2, [130, 1, 70, 25, 60])
    parts = list(pack(rollouts, 10**6, long_rows=True))
    with torch.no_grad():
        with use_packed_attention(model):
            want = of_tokens(model, parts, packed_states)
        model.packed_attention = "flex_attention"
        assert packing_of(model) == {"long_rows": True, "share_prompts": True}
        with use_packed_attention(model):
            got = of_tokens(model, parts, packed_states)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# ---- the choice ----


def chosen(family="qwen3", requested="auto", device=CUDA, half=True, compile=False, **changes) -> str:
    model = tiny_model(family, **changes)
    return choose_attention(model, requested, device=device, half=half, compile=compile)


def test_auto_is_the_fastest_that_can_serve():
    assert chosen() == "varlen", "no wheel beside torch is needed"
    assert chosen(half=False) == "flex_attention", "flash attention has no float32"
    assert chosen(compile=True) == "sdpa"
    assert chosen(attention_dropout=0.1) == "sdpa"
    assert chosen(device=CPU) == "sdpa"
    assert chosen("gemma2") == "eager", "as it was loaded"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"requested": "varlen", "half": False}, "half precision"),
        ({"requested": "varlen", "compile": True}, "model.compile"),
        ({"requested": "flex_attention", "device": CPU}, "no backward on a CPU"),
        ({"requested": "flash_attention_2", "device": CPU}, "no such kernel for a CPU"),
        ({"requested": "flash_attention_2"}, "cannot be used"),  # not installed here
        ({"requested": "flex_attention", "attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"requested": "sdpa", "family": "gemma2", "attn_implementation": "sdpa"}, "caps its attention scores"),
        ({"requested": "varlen", "attn_implementation": "eager"}, "no sdpa for Qwen3ForCausalLM"),
    ],
    ids=str,
)
def test_what_cannot_serve_is_refused_by_name(settings, says):
    with pytest.raises(ModelError, match=says) as raised:
        chosen(**settings)
    assert repr(settings["requested"]) in str(raised.value)


def test_layers_that_are_neither_full_nor_sliding_are_refused_by_every_way():
    model = tiny_model("qwen3")
    model.config.layer_types = ["linear_attention", "full_attention"]
    (part,) = pack(ROLLOUTS, 10**6, long_rows=True, share_prompts=False)
    for attention in ("sdpa", "varlen", "flex_attention"):
        model.packed_attention = attention
        with pytest.raises(ModelError, match="linear_attention"), use_packed_attention(model):
            packed_states(model, part)
