"""Several teachers, and teachers that read another prompt than the student: held against one plain forward each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prune_opd.config import PruningSection
from prune_opd.rollout.base import rollout_uniforms
from prune_opd.rollout.in_flight import InFlightStop
from prune_opd.rollout.local import LocalSampler
from prune_opd.teachers.local import LocalTeacher
from prune_opd.teachers.routed import RoutedTeacher
from prune_opd.timing import Stopwatch
from prune_opd.types import TeacherPrompt
from tests.families import EOS, FAMILIES, PAD, VOCAB, tiny_model, tiny_prompts
from tests.teachers.test_local import Reads, check
from tests.teachers.test_served import server_of, teacher_of

T, K = 14, 4
ASKED = [TeacherPrompt([7, 3, *ids], teacher=b % 3 % 2) for b, ids in enumerate(tiny_prompts())]


def sample(watcher=None, *, slots=3, length=T):
    sampler = LocalSampler(tiny_model("qwen3", 3), pad_id=PAD, eos_ids=[EOS], slots=slots)
    rollouts = sampler.sample(tiny_prompts(), rollout_uniforms(0, 0, range(8), length), top_k=K, watcher=watcher)
    return replace(rollouts, teacher_prompts=ASKED)


def models():
    return [tiny_model("qwen3", seed=4), tiny_model("llama", seed=5)]


def check_each(scores, rollouts, both):
    """Each rollout's scores are its own teacher's, behind the teacher's prompt."""
    for number, model in enumerate(both):
        own = torch.tensor([prompt.teacher == number for prompt in rollouts.teacher_prompts])
        assert 0 < own.sum() < 8
        theirs = replace(rollouts.for_teacher, response_mask=rollouts.response_mask & own[:, None])
        check(scores, theirs, model)


def test_rollouts_are_scored_by_the_teacher_of_their_prompt():
    rollouts, both = sample(), models()
    routed = RoutedTeacher([LocalTeacher(model, vocab_size=VOCAB) for model in both])
    scores = routed.score(rollouts, top_k=K)
    check_each(scores, rollouts, both)
    assert scores.scored == rollouts.lengths.sum(), "each token by one teacher"


@pytest.mark.parametrize("slots, every", [(8, 5), (3, 1), (1, 7)])
def test_streamed_scores_are_the_same(slots, every):
    both = models()
    routed = RoutedTeacher([LocalTeacher(model, vocab_size=VOCAB) for model in both])
    watcher = Reads(routed.stream(ASKED, T, top_k=K, slots=slots), every)
    rollouts = sample(watcher, slots=slots)
    check_each(watcher.scores, rollouts, both)
    assert watcher.scores.scored == rollouts.lengths.sum()
    assert {id(stream.scores.topk.ids) for stream in watcher.stream.streams.values()} == {
        id(watcher.scores.topk.ids)
    }, "one set of tensors, however many teachers"


def test_one_teacher_is_served_and_one_is_here():
    both, pruning = models(), PruningSection(threshold=0.3, w_drop=0.25, in_flight={"enable": True, "chunk": 3})
    both[1] = tiny_model("qwen3", seed=6)

    def stopped(teachers):
        stream = RoutedTeacher(teachers).stream(ASKED, 40, top_k=K, slots=3)
        watcher = InFlightStop(stream, pruning, torch.zeros(8, dtype=torch.bool), Stopwatch(torch.device("cpu")))
        return sample(watcher, length=40), watcher

    want, _ = stopped([LocalTeacher(model, vocab_size=VOCAB) for model in both])
    with server_of(both[1]) as server:
        got, watcher = stopped([LocalTeacher(both[0], vocab_size=VOCAB), teacher_of(server)])
        behind = [body["prompt"][:2] for path, _, body in server.seen if path == "/v1/completions"]
    assert want.stopped.any() and torch.equal(got.response_ids, want.response_ids)
    assert [7, 3] in behind, "the server reads the teacher's prompt"
    assert watcher.stream.growth > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_reads_its_own_prompt(family):
    """Whole and streamed, in any packing; the student's prompts are as they were."""
    model, asked = tiny_model(family, seed=4), [TeacherPrompt(prompt.token_ids) for prompt in ASKED]
    teacher = LocalTeacher(model, vocab_size=VOCAB, token_budget=70)
    watcher = Reads(teacher.stream(asked, T, top_k=K, slots=3), 4)
    rollouts = replace(sample(watcher), teacher_prompts=asked)
    assert [list(ids) for ids in rollouts.prompts] == [list(ids) for ids in tiny_prompts()]
    for scores in (teacher.score(rollouts, top_k=K), watcher.scores):
        check(scores, rollouts.for_teacher, model)
    with pytest.raises(AssertionError):
        check(teacher.score(rollouts, top_k=K), replace(rollouts, teacher_prompts=None), model)
