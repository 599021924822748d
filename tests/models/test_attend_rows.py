"""The kernel for packed rows against the definition of attention and its derivative, and what it leaves out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd.models import packed_attention as modeling
from prune_opd.models.causal_lm import use_attention
from prune_opd.models.kernels.attend_one import HEAD_SIZES
from prune_opd.models.kernels.attend_rows import _kernels, attend_rows
from prune_opd.models.packed_attention import PACKED_ATTENTION, in_window, seen_columns
from tests.families import tiny_model
from tests.models.test_compile import needs_compiler
from tests.models.test_packed_attention import packed, states_and_gradients
from tests.models.test_slot_cache import defined_attention

pytestmark = needs_compiler
SCALE = 0.3


def problem(rows=2, shared=2, group=2, size=32, prompts=((3, 12, 5), (9, 8)), window=10**6, seed=0):
    """Query, key and value in the layout of a model, what each column sees (twice), and a gradient; float64.

    prompts: how long each is, and the responses to it.
    """
    generator = torch.Generator().manual_seed(seed)
    columns, length = [], sum(map(sum, prompts))
    for number, (prompt, *responses) in enumerate(prompts):
        start = len(columns)
        columns += [(number, None, position, (start, start, start)) for position in range(prompt)]
        for rollout, response in enumerate(responses):
            key_ranges = len(columns), start, start + prompt
            columns += [(number, rollout, prompt + position, key_ranges) for position in range(response)]
    seen = torch.tensor(
        [
            [
                whose == number and of in (None, rollout) and position - window < place <= position
                for whose, of, place, _ in columns
            ]
            for number, rollout, position, _ in columns
        ]
    )
    key_ranges = torch.tensor([key_ranges for *_, key_ranges in columns], dtype=torch.int32)
    key_ranges = in_window(key_ranges[None], torch.tensor([[position for _, _, position, _ in columns]]), window)
    states = [
        torch.randn(rows, length, heads, size, generator=generator, dtype=torch.float64).transpose(1, 2)
        for heads in (shared * group, shared, shared)
    ]
    gradient = torch.randn(rows, length, shared * group, size, generator=generator, dtype=torch.float64)
    return states, key_ranges.expand(rows, -1, -1), seen.expand(rows, -1, -1), gradient


def by_kernel(states, key_ranges, _seen, gradient):
    """(output, gradients of query, key and value)"""
    states = [state.float().requires_grad_() for state in states]
    out = attend_rows(*states, key_ranges, SCALE)
    return out.detach(), *torch.autograd.grad(out, states, gradient.float())


def by_definition(states, _sees, seen, gradient):
    states = [state.clone().requires_grad_() for state in states]
    out = defined_attention(*states, seen[:, None], SCALE)
    return out.detach(), *torch.autograd.grad(out, states, gradient)


def assert_agree(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-4)  # of numbers around 1


@settings(max_examples=80)
@given(
    rows=st.integers(1, 3),
    shared=st.integers(1, 3),
    group=st.integers(1, 3),
    size=st.sampled_from(HEAD_SIZES),
    prompts=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=3),
    window=st.sampled_from([1, 7, 10**6]),
    seed=st.integers(0, 2**16),
)
def test_it_is_attention_with_its_gradient(rows, shared, group, size, prompts, window, seed):
    """Any head size that it has code for, heads that share keys, any rollouts in a row, sliding windows."""
    given = problem(rows, shared, group, size, prompts, window, seed)
    assert torch.equal(seen_columns(given[1]), given[2])
    assert_agree(by_kernel(*given), by_definition(*given))


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_it_builds_for_every_kind_of_processor(capability, monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    _kernels.cache_clear()
    try:
        given = problem()
        assert_agree(by_kernel(*given), by_definition(*given))
    finally:
        _kernels.cache_clear()


@pytest.mark.parametrize("threads", [2, 5, 16])
def test_the_number_of_threads_changes_nothing(threads):
    """More of them than rows and heads share the queries of a head, and add up their gradients of its keys."""
    given = problem(rows=1, shared=2, group=2, prompts=((20, 70), (11, 30)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_agree(by_kernel(*given), by_definition(*given))
        once, again = by_kernel(*given), by_kernel(*given)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    finally:
        torch.set_num_threads(before)


def test_states_may_lie_in_any_order():
    states, *seen, gradient = problem(size=16)
    wanted = by_definition(states, *seen, gradient)
    states = [states[0].contiguous(), states[1].mT.contiguous().mT, torch.cat([states[2]] * 2, dim=1)[:, :2]]
    gradient = gradient.transpose(0, 2).contiguous().transpose(0, 2)
    assert_agree(by_kernel(states, *seen, gradient), wanted)


def test_other_rollouts_of_a_row_are_not_read():
    """NaN in one shows nowhere else, though a weight of zero would pass it on."""
    states, *seen, gradient = problem(prompts=((4, 20), (4, 20)))  # the first one fills whole tiles of queries
    for state in states:
        state[:, :, 24:] = torch.nan
    out, *gradients = by_kernel(states, *seen, gradient)
    assert out[:, :24].isfinite().all() and out[:, 24:].isnan().all()
    assert all(g[:, :, :24].isfinite().all() and g[:, :, 24:].isnan().any() for g in gradients)


@pytest.mark.parametrize("wrong", [(21, 0, 3), (-1, -1, -1), (15, 0, 16), (15, 3, 0)], ids=str)
def test_a_column_that_sees_what_it_must_not_stops_the_program(wrong):
    """Or memory that is not the row's would be read."""
    states, key_ranges, seen, gradient = problem()
    key_ranges = key_ranges.clone()
    key_ranges[1, 20] = torch.tensor(wrong, dtype=torch.int32)
    with pytest.raises(AssertionError, match="sees what lies behind it"):
        by_kernel(states, key_ranges, seen, gradient)


def test_it_is_an_operator_that_the_compiler_can_trust():
    """Schema, shapes of its outputs, no hidden aliasing, a gradient that can be traced."""
    states, key_ranges, *_ = problem(rows=1, shared=1, group=1, size=16, prompts=((2, 3),))
    states = [state.float().requires_grad_() for state in states]
    torch.library.opcheck(torch.ops.prune_opd.attend_rows.default, (*states, key_ranges, SCALE))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_models_attend_by_it_in_compiled_code(family, checkpointing, monkeypatch):
    """States and gradients as by `sdpa`: full and sliding layers, shared heads of keys, shared prompts."""
    model, parts = tiny_model(family, head_dim=16).train(), packed([70, 30, 30, 5], long_rows=True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    used = []
    monkeypatch.setattr(modeling, "attend_rows", lambda *inputs: used.append(1) or attend_rows(*inputs))

    def loss(states):
        return (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum()

    want_all = states_and_gradients(model, parts, "sdpa", loss)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        got_all = states_and_gradients(model, parts, PACKED_ATTENTION, loss)
    assert len(used) == 2 * len(parts) * (2 if checkpointing else 1), "layers, and again in the backward"
    for got, want in zip(got_all, want_all, strict=True):
        assert ((got - want).norm() / want.norm()).item() < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_states_of_several_types_attend_otherwise(family, monkeypatch):
    """Under autocast values are bfloat16 beside queries and keys that rotation made float32."""
    model, (part, *_) = tiny_model(family, head_dim=16), packed([70, 30, 30, 5], long_rows=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), use_attention(model, PACKED_ATTENTION):
        want = modeling.packed_states(model, part)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        got = modeling.packed_states(model, part)
    assert ((got - want).norm() / want.norm()).item() < 1e-2


@pytest.mark.parametrize("change", ["eager", "dropout", "bias", "double", "size"])
def test_where_it_has_no_code_rows_attend_otherwise(change, monkeypatch):
    used = []
    monkeypatch.setattr(modeling, "attend_rows", lambda *inputs: used.append(1) or attend_rows(*inputs))
    module = torch.nn.Module()
    for changed in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda changed=changed: not (changed and change == "eager"))
        states, key_ranges, seen, _ = problem(group=1, size=24 if changed and change == "size" else 32)
        dtype = torch.float64 if changed and change == "double" else torch.float32
        settings = {"dropout": 1e-9 if changed and change == "dropout" else 0.0, "scaling": SCALE}
        if changed and change == "bias":
            settings["position_bias"] = torch.zeros(1, 1, *seen.shape[1:])
        got, _ = modeling.packed_attention(
            module, *(state.to(dtype) for state in states), key_ranges[:, None], **settings
        )
        want = defined_attention(*states, seen[:, None], SCALE)
        torch.testing.assert_close(got, want.to(dtype), rtol=1e-4, atol=1e-5)
        assert len(used) == 1, "used in the first round alone"
