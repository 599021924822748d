"""The kernel for one query a row against the definition of attention, and what it leaves unread."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd.models import slot_cache as slots
from prune_opd.models.kernels.attend_one import HEAD_SIZES, _kernel, attend_one
from prune_opd.models.slot_cache import slot_attention
from tests.models.test_compile import needs_compiler
from tests.models.test_slot_cache import defined_attention

pytestmark = needs_compiler


def slots_of(rows: int, shared: int, columns: int, size: int, seed: int) -> list[torch.Tensor]:
    """Keys and values (rows, shared, columns, size) float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, shared, columns, size, generator=generator, dtype=torch.float64) for _ in range(2)]


@settings(max_examples=120)
@given(
    rows=st.integers(1, 5),
    shared=st.integers(1, 3),
    group=st.integers(1, 4),
    size=st.sampled_from(HEAD_SIZES),
    length=st.integers(1, 40),
    unused=st.integers(0, 3),
    seed=st.integers(0, 2**16),
)
def test_it_is_attention(rows, shared, group, size, length, unused, seed):
    """Any head size that it has code for, heads that share keys, any columns seen, buffers with columns to spare."""
    key, value = slots_of(rows, shared, length + unused, size, seed)
    query = slots_of(rows, shared * group, 1, size, seed + 1)[0]
    seen = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.5
    seen[torch.arange(rows), torch.randint(length, (rows,), generator=torch.Generator().manual_seed(seed))] = True
    want = defined_attention(query, key[:, :, :length], value[:, :, :length], seen[:, None, None], 0.3)
    key, value = key.float(), value.float()
    got = attend_one(query[:, :, 0].float(), key[:, :, :length], value[:, :, :length], seen, 0.3)
    torch.testing.assert_close(got, want[:, 0].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_it_builds_for_every_kind_of_processor(capability, monkeypatch):
    """torch's headers include one another in another way for each. One that this processor lacks is not built."""
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    _kernel.cache_clear()
    try:
        key, value = slots_of(3, 2, 37, 64, 0)
        query = slots_of(3, 4, 1, 64, 1)[0]
        seen = torch.ones(3, 37, dtype=torch.bool)
        want = defined_attention(query, key, value, seen[:, None, None], 0.3)
        got = attend_one(query[:, :, 0].float(), key.float(), value.float(), seen, 0.3)
        torch.testing.assert_close(got, want[:, 0].float(), rtol=1e-5, atol=1e-6)
    finally:
        _kernel.cache_clear()


@pytest.mark.parametrize("threads", [1, 2])
def test_columns_that_a_row_does_not_reach_are_not_read(threads):
    """NaN there would show even with a weight of zero. NaN where it reads must show, so that a broken model is seen."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        key, value = (states.float() for states in slots_of(8, 2, 33, 32, 0))
        query = slots_of(8, 4, 1, 32, 1)[0][:, :, 0].float()
        seen = torch.zeros(8, 33, dtype=torch.bool)
        seen[:, 5:20], seen[0, 9:12] = True, False
        for states in (key, value):
            states[:, :, :5] = states[:, :, 20:] = torch.nan
        assert attend_one(query, key, value, seen, 1.0).isfinite().all()
        for states in (key, value):
            states[3, 1, 7, 31] = torch.nan
            broken = attend_one(query, key, value, seen, 1.0).isnan().any(-1)
            assert broken.nonzero().tolist() == [[3, 2], [3, 3]]  # the heads of the second key head in row 3
            states[3, 1, 7, 31] = 0
    finally:
        torch.set_num_threads(before)


def test_it_is_an_operator_that_the_compiler_can_trust():
    """Schema, shapes of its outputs, no hidden aliasing."""
    key, value = (states.float() for states in slots_of(2, 1, 4, 16, 0))
    seen = torch.ones(2, 4, dtype=torch.bool)
    torch.library.opcheck(torch.ops.prune_opd.attend_one.default, (key.flatten(1, 2)[:, :2], key, value, seen, 0.5))


@pytest.mark.parametrize("change", ["eager", "queries", "double", "size", "values"])
def test_where_it_has_no_code_the_slots_attend_otherwise(monkeypatch, change):
    """It is used in compiled code, for one float32 query of a head size that it knows; the answer is the same."""
    used = []
    monkeypatch.setattr(slots, "attend_one", lambda *inputs: used.append(1) or attend_one(*inputs))
    for changed in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda changed=changed: not (changed and change == "eager"))
        size, queries = (24 if changed and change == "size" else 32), (2 if changed and change == "queries" else 1)
        dtype = torch.float64 if changed and change == "double" else torch.float32
        key, value = (states.to(dtype) for states in slots_of(3, 2, 6, size, 0))
        value = value[..., :16] if changed and change == "values" else value
        query, seen = slots_of(3, 4, queries, size, 1)[0].to(dtype), torch.ones(3, 1, queries, 6, dtype=torch.bool)
        got, _ = slot_attention(torch.nn.Module(), query, key, value, seen)
        want = defined_attention(query.double(), key.double(), value.double(), seen, size**-0.5)
        torch.testing.assert_close(got, want.to(dtype), rtol=1e-5, atol=1e-6)
        assert len(used) == 1, "used in the first round alone"
