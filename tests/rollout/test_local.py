"""The slot engine against one rollout at a time, without any cache, slot or batch."""

from __future__ import annotations

import pytest
import torch

from prune_opd.models.causal_lm import output_head
from prune_opd.rollout.base import rollout_uniforms
from prune_opd.rollout.local import LocalSampler, draw
from prune_opd.types import Span
from tests.families import EOS, FAMILIES, PAD, VOCAB, tiny_model, tiny_prompts

T = 16


def sampler_of(model, **settings) -> LocalSampler:
    return LocalSampler(model, pad_id=PAD, eos_ids=[EOS], **settings)


def responses(rollouts) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(rollouts.response_ids, rollouts.lengths.tolist(), strict=True)]


@torch.no_grad()
def one_by_one(model, prompts, uniforms, top_k):
    """Whole prefix through the model for every token; inverse CDF in float64."""
    said, topk = [], []
    for prompt, row in zip(prompts, uniforms, strict=True):
        ids, seen = list(prompt), []
        for u in row:
            logits = model(torch.tensor([ids])).logits[0, -1]
            cdf = logits.double().softmax(-1).cumsum(-1)
            ids.append(int(torch.searchsorted(cdf, u * cdf[-1], right=True)))
            seen.append(logits.log_softmax(-1).topk(top_k))
            if ids[-1] == EOS:
                break
        said.append(ids[len(prompt) :])
        topk.append(seen)
    return said, topk


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_sample_what_one_rollout_at_a_time_samples(family):
    model, prompts = tiny_model(family, seed=3), tiny_prompts()
    uniforms = rollout_uniforms(0, 0, range(len(prompts)), T)
    want, topk = one_by_one(model, prompts, uniforms, top_k=5)
    assert len({len(said) for said in want}) > 1 or family.startswith("gemma"), "no ragged ends: tests nothing"
    for slots, stride in ((8, 1), (3, 1), (1, 1), (3, 4), (16, 5)):
        rollouts = sampler_of(model, slots=slots, stride=stride).sample(prompts, uniforms, top_k=5)
        assert responses(rollouts) == want, (slots, stride)
        assert rollouts.finished.tolist() == [said[-1] == EOS for said in want]
        for b, seen in enumerate(topk):
            for t, (logprobs, ids) in enumerate(seen):
                assert rollouts.student.ids[b, t].tolist() == ids.tolist()
                torch.testing.assert_close(rollouts.student.logprobs[b, t], logprobs, atol=5e-5, rtol=0)


def test_no_decode_step_is_spent_on_a_finished_row():
    """Counted work: rows that went through the model one token at a time are exactly the sampled tokens."""
    model, prompts = tiny_model("llama", seed=3), tiny_prompts()
    rows: list[int] = []
    output_head(model)  # held against the model's own logits once
    model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    rollouts = sampler_of(model, slots=3).sample(prompts, rollout_uniforms(0, 0, range(len(prompts)), T))
    decoded = int(rollouts.lengths.sum())
    assert rollouts.generated == rollouts.slot_steps == decoded
    heads = {tuple(p[:-1]) for p in prompts if len(p) > 1}
    prefills = sum(rows) - decoded
    assert 0 < prefills < 2 * len(heads) * max(map(len, heads)), "prompts were prefilled again and again"


def test_an_empty_cap_and_one_prompt_and_more_prompts_than_slots():
    model, prompts = tiny_model("qwen3"), tiny_prompts()
    none = sampler_of(model).sample(prompts, torch.zeros(len(prompts), 0, dtype=torch.float64))
    assert none.lengths.tolist() == [0] * len(prompts)
    uniforms = rollout_uniforms(5, 2, range(len(prompts)), T)
    together = responses(sampler_of(model, slots=2).sample(prompts, uniforms))
    alone = [responses(sampler_of(model).sample([p], uniforms[b : b + 1]))[0] for b, p in enumerate(prompts)]
    assert together == alone


def test_a_rollout_that_fills_the_whole_context():
    model = tiny_model("llama")
    prompt = tiny_prompts((250,))
    rollouts = sampler_of(model, slots=1).sample(prompt, torch.full((1, 6), 0.5, dtype=torch.float64))
    assert len(prompt[0]) + int(rollouts.lengths[0]) <= model.config.max_position_embeddings
    assert rollouts.lengths[0] == 6 or rollouts.finished[0]


class StopsAt:
    """A watcher that stops every rollout at a length of its own, and checks that each token is shown once."""

    def __init__(self, every, lengths):
        self.every, self.lengths, self.seen = every, lengths, {}

    def watch(self, response_ids, student, spans):
        stops = {}
        for span in spans:
            assert isinstance(span, Span) and span.start == self.seen.get(span.rollout, 0) < span.end
            self.seen[span.rollout] = span.end
            if span.end >= self.lengths[span.rollout]:
                stops[span.rollout] = self.lengths[span.rollout]
        return stops


@pytest.mark.parametrize("slots, stride", [(8, 1), (3, 1), (3, 4), (1, 1)])
def test_a_stop_does_not_depend_on_how_often_the_watcher_looks(slots, stride):
    model, prompts = tiny_model("qwen2", seed=3), tiny_prompts()
    uniforms = rollout_uniforms(0, 0, range(len(prompts)), T)
    free = responses(sampler_of(model).sample(prompts, uniforms))
    stop_at = [3, 7, 1, 16, 11, 5, 30, 2]
    for every in (1, 4, 7, 100):
        rollouts = sampler_of(model, slots=slots, stride=stride).sample(
            prompts, uniforms, top_k=2, watcher=StopsAt(every, stop_at)
        )
        assert responses(rollouts) == [said[:n] for said, n in zip(free, stop_at, strict=True)]
        for said, n, finished, stopped in zip(free, stop_at, rollouts.finished, rollouts.stopped, strict=True):
            ended_itself = said[-1] == EOS and len(said) <= n
            assert (bool(finished), bool(stopped)) == (ended_itself, n <= len(said) and not ended_itself)
        if every == 1 and stride == 1:
            assert rollouts.generated == rollouts.lengths.sum()
        assert (rollouts.response_ids[~rollouts.response_mask] == PAD).all()


def test_drawing_follows_the_distribution_and_truncates_nothing_by_default():
    logits = torch.tensor([0.0, 1.0, -2.0, 0.5])
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for temperature in (1.0, 0.5):
        tokens = draw(logits.expand(len(uniforms), -1), uniforms, temperature=temperature, top_p=1.0)
        share = torch.bincount(tokens, minlength=4).double() / len(uniforms)
        torch.testing.assert_close(share, (logits.double() / temperature).softmax(-1), atol=1e-4, rtol=0)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens = draw(probs.log().expand(1000, -1), uniforms, temperature=1.0, top_p=0.75)
    share = torch.bincount(tokens, minlength=4).double() / 1000
    torch.testing.assert_close(share, torch.tensor([0.625, 0.375, 0, 0], dtype=torch.float64), atol=2e-3, rtol=0)


def test_greedy_at_temperature_zero():
    logits = torch.randn(5, 9)
    tokens = draw(logits, torch.rand(5, dtype=torch.float64), temperature=0.0, top_p=1.0)
    assert tokens.tolist() == logits.argmax(-1).tolist()


def test_ids_past_the_vocabulary_are_never_sampled():
    model, prompts = tiny_model("qwen3"), tiny_prompts()
    rollouts = sampler_of(model, vocab_size=20).sample(prompts, rollout_uniforms(0, 0, range(len(prompts)), T), top_k=3)
    assert rollouts.response_ids.max() < 20 <= VOCAB and rollouts.student.ids.max() < 20


def test_random_numbers_depend_on_seed_step_rollout_and_position_alone():
    one = rollout_uniforms(1, 2, [0, 1, 2], 10)
    assert torch.equal(rollout_uniforms(1, 2, [2, 0], 20)[:, :10], one[[2, 0]])
    for other in (rollout_uniforms(2, 2, [0], 10), rollout_uniforms(1, 3, [0], 10), rollout_uniforms(1, 2, [1], 10)):
        assert not torch.equal(other[0], one[0])
    assert not torch.equal(rollout_uniforms(1, 2, [0], 10, stream=1)[0], one[0])


def test_the_models_mode_is_given_back():
    model = tiny_model("llama").train()
    sampler_of(model).sample(tiny_prompts(), rollout_uniforms(0, 0, range(8), 3))
    assert model.training
