"""The teacher's scores, whole and streamed, against one unpadded forward of each rollout."""

from __future__ import annotations

import pytest
import torch

from prune_opd.rollout.base import rollout_uniforms
from prune_opd.rollout.local import LocalSampler
from prune_opd.teachers.local import LocalTeacher
from prune_opd.types import TeacherPrompt
from tests.families import EOS, FAMILIES, PAD, VOCAB, tiny_model, tiny_prompts

T, K = 14, 4


class Reads:
    """A watcher that only has the teacher read along."""

    def __init__(self, stream, every):
        self.stream, self.every = stream, every

    def watch(self, response_ids, student, spans):
        if spans:
            self.scores = self.stream.score(response_ids, student, spans)
        return {}


def sample(family, teacher=None, *, slots=3, every=5, seed=3):
    prompts = tiny_prompts()
    watcher = (
        Reads(teacher.stream([TeacherPrompt(ids) for ids in prompts], T, top_k=K, slots=slots), every)
        if teacher
        else None
    )
    sampler = LocalSampler(tiny_model(family, seed), pad_id=PAD, eos_ids=[EOS], slots=slots)
    rollouts = sampler.sample(prompts, rollout_uniforms(0, 0, range(8), T), top_k=K, watcher=watcher)
    return rollouts, watcher


@torch.no_grad()
def check(scores, rollouts, model, vocab_size=VOCAB):
    for b, n in enumerate(rollouts.lengths.tolist()):
        prompt = rollouts.prompts[b]
        ids = torch.tensor([[*prompt, *rollouts.response_ids[b, :n].tolist()]])
        logprobs = model(ids).logits[0, len(prompt) - 1 : -1, :vocab_size].double().log_softmax(-1)
        close = {"atol": 5e-5, "rtol": 0, "check_dtype": False}
        torch.testing.assert_close(scores.topk.logprobs[b, :n], logprobs.topk(K).values, **close)
        assert torch.equal(scores.topk.ids[b, :n], logprobs.topk(K).indices)
        asked = rollouts.student.ids[b, :n]
        torch.testing.assert_close(scores.candidate_logprobs[b, :n], logprobs.gather(-1, asked), **close)
        sampled = rollouts.response_ids[b, :n, None]
        torch.testing.assert_close(scores.sampled_logprobs[b, :n], logprobs.gather(-1, sampled)[:, 0], **close)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        torch.testing.assert_close(scores.topk.entropy[b, :n], entropy, **close)


@pytest.mark.parametrize("token_budget, long_rows", [(1, False), (70, False), (70, True), (1000, True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_scores_are_those_of_each_rollout_alone(family, token_budget, long_rows):
    """In long rows two of them share their prompt."""
    rollouts, _ = sample(family)
    model = tiny_model(family, seed=4)
    teacher = LocalTeacher(model, vocab_size=VOCAB, token_budget=token_budget)
    assert teacher.packing == {"long_rows": False, "share_prompts": True}, "not compiled"
    teacher.packing = {"long_rows": long_rows}
    scores = teacher.score(rollouts, top_k=K)
    check(scores, rollouts, model)
    assert scores.scored == rollouts.lengths.sum()


@pytest.mark.parametrize("slots, every", [(8, 5), (3, 1), (3, 100), (1, 7)])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_scores_are_those_of_each_rollout_alone(family, slots, every):
    model = tiny_model(family, seed=4)
    rollouts, watcher = sample(family, LocalTeacher(model, vocab_size=VOCAB), slots=slots, every=every)
    check(watcher.scores, rollouts, model)
    assert watcher.scores.scored == rollouts.lengths.sum()


@pytest.mark.parametrize("every", [1, 4, 9])
def test_streaming_feeds_each_token_once(every):
    """Counted work: all positions that reach the teacher, padding aside, are prompt and response without the last."""
    model = tiny_model("qwen3", seed=4)
    fed = 0

    def count(_module, _args, kwargs):
        nonlocal fed
        cache = kwargs.get("past_key_values")
        fed += int((cache.columns < cache.capacity).sum()) if cache is not None else 0

    teacher = LocalTeacher(model, vocab_size=VOCAB)
    handle = model.model.register_forward_pre_hook(count, with_kwargs=True)
    rollouts, _ = sample("qwen3", teacher, every=every)
    handle.remove()
    assert fed == sum(len(p) + n - 1 for p, n in zip(rollouts.prompts, rollouts.lengths.tolist(), strict=True))


def test_padding_rows_of_the_embedding_are_no_part_of_the_vocabulary():
    rollouts, _ = sample("llama")
    rollouts.student.ids.clamp_(max=19)
    rollouts.response_ids.clamp_(max=19)
    model = tiny_model("llama", seed=4)
    check(LocalTeacher(model, vocab_size=20).score(rollouts, top_k=K), rollouts, model, vocab_size=20)


def test_the_teacher_is_frozen():
    model = tiny_model("llama").train()
    LocalTeacher(model, vocab_size=VOCAB)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
