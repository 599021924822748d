"""The attention of the slots against its definition, and how many keys it reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_opd.models import slot_cache as slots
from prune_opd.models.causal_lm import output_head, use_attention
from prune_opd.models.slot_cache import SLOT_ATTENTION, slot_attention
from prune_opd.rollout.base import rollout_uniforms
from prune_opd.rollout.local import LocalSampler
from tests.families import PAD, tiny_model, tiny_prompts


def defined_attention(query, key, value, visible, scale):
    """softmax over the visible columns: (R, q, heads, size); keys and values repeated for the heads that share them."""
    sharing = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(sharing, dim=1) for states in (key, value))
    scores = (scale * torch.einsum("bhqd,bhkd->bhqk", query, key)).masked_fill(~visible, -torch.inf)
    return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), value)


@given(
    rows=st.integers(1, 6),
    shared=st.integers(1, 3),
    sharing=st.integers(1, 4),
    queries=st.integers(1, 5),
    length=st.integers(1, 9),
    cut=st.one_of(st.none(), st.tuples(st.integers(1, 5), st.integers(1, 9))),
    seed=st.integers(0, 2**16),
)
def test_attention_is_its_definition(rows, shared, sharing, queries, length, cut, seed):
    """In float64, for any number of queries and heads, and with a second half that is read less far."""
    generator = torch.Generator().manual_seed(seed)

    def normal(heads, columns, size):
        return torch.randn(rows, heads, columns, size, generator=generator, dtype=torch.float64)

    query, key, value = normal(shared * sharing, queries, 4), normal(shared, length, 4), normal(shared, length, 3)
    visible = torch.rand(rows, 1, queries, length, generator=generator) < 0.6
    visible[..., 0] = True
    half = rest = None
    if cut is not None and cut[0] < rows:
        half, rest = cut[0], min(cut[1], length)
        visible[half:, ..., rest:] = False
    got, _ = slot_attention(torch.nn.Module(), query, key, value, visible, scaling=0.3, half=half, rest=rest)
    torch.testing.assert_close(got, defined_attention(query, key, value, visible, 0.3))


@pytest.fixture
def read(monkeypatch):
    """Keys, in rows and columns, that attention was given since; of all heads of one layer together."""
    counted = []
    attention = slots.functional.scaled_dot_product_attention

    def count(query, key, value, **settings):
        counted.append(key.shape[0] * key.shape[1] * key.shape[2])
        return attention(query, key, value, **settings)

    monkeypatch.setattr(slots.functional, "scaled_dot_product_attention", count)
    return counted


def test_short_rollouts_are_not_read_as_far_as_long_ones(read):
    """Counted: the keys read are far fewer than rows times the longest context, and none is read for each query head.

    Two prompts are long, and the last slots are theirs at first; the rollouts of the others end at their first look.
    """
    model = tiny_model("llama", seed=3)
    prompts = tiny_prompts((3,) * 6 + (40,) * 2 + (3,) * 24)
    cap = 24

    class EndsTheShort:
        every = 4

        def watch(self, response_ids, student, spans):
            return {span.rollout: span.end for span in spans if len(prompts[span.rollout]) == 3}

    uniforms = rollout_uniforms(0, 0, range(len(prompts)), cap)
    sampler = LocalSampler(model, pad_id=PAD, eos_ids=[], slots=8)
    output_head(model)  # its probe attends as the model does by itself
    read.clear()
    forwards: list[tuple[int, ...]] = []
    model.base_model.register_forward_pre_hook(
        lambda _module, _args, inputs: forwards.append(tuple(inputs["attention_mask"].shape[::3])), with_kwargs=True
    )
    sampler.sample(prompts, uniforms, top_k=2, watcher=EndsTheShort())
    heads = model.config.num_key_value_heads
    rectangle = sum(count * length for count, length in forwards) * heads * model.config.num_hidden_layers
    assert sum(read) < 0.75 * rectangle


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_forward_that_knows_nothing_of_slots_is_as_before(family):
    """A model may be asked something else meanwhile; and its attention is its own again afterwards."""
    model = tiny_model(family)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [0, 0, 3, 4, 5, 6, 7, 8, 9, 10]])
    mask = (ids != PAD).long()
    with torch.no_grad():
        want, padded = model(ids).logits, model(ids, attention_mask=mask).logits
        with use_attention(model, SLOT_ATTENTION):
            assert model.config._attn_implementation == SLOT_ATTENTION
            torch.testing.assert_close(model(ids).logits, want)
            torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask.bool()], padded[mask.bool()])
        assert model.config._attn_implementation == "sdpa"
        with pytest.raises(RuntimeError), use_attention(model, SLOT_ATTENTION):
            raise RuntimeError
    assert model.config._attn_implementation == "sdpa"
