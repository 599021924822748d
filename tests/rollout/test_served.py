"""Rollouts from a server over HTTP: the student's own numbers, and none from a server that is not what it should be."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForCausalLM

from prune_opd.config import load_config
from prune_opd.errors import ConfigError, EngineError, ModelError, ServerError
from prune_opd.models.loading import load_tokenizer, resolve_model
from prune_opd.rollout.base import rollout_uniforms
from prune_opd.rollout.served import ServedSampler, parse_tokens
from prune_opd.serving.client import Servers
from prune_opd.serving.exchange import BadAnswer
from prune_opd.training.trainer import Trainer
from tests.families import EOS, PAD, VOCAB, tiny_model, tiny_prompts
from tests.openai_server import serving
from tests.reliability.kills import RECIPE, SMALL, difference, outcome

K, LENGTH = 4, 12
PROMPTS = tiny_prompts()
UNIFORMS = rollout_uniforms(0, 0, range(len(PROMPTS)), LENGTH)


@contextmanager
def served(count=1, *, student=None, deadline=20.0, slots=64, ends=(), **settings):
    """A sampler of a tiny student, and its servers, which begin with other weights."""
    student = student or tiny_model("qwen3", seed=3)
    with (
        serving(tiny_model("qwen3", seed=9), None, name="student", **settings) as one,
        serving(tiny_model("qwen3", seed=10), None, name="student", **settings) as two,
    ):
        servers = [one, two][:count]
        asked = Servers([server.url for server in servers], deadline=deadline, concurrency=3)
        yield (
            ServedSampler(
                student,
                asked,
                model="student",
                dtype="float32",
                pad_id=PAD,
                eos_ids=ends or [EOS],
                slots=slots,
                ends=ends,
            ),
            servers,
        )
        asked.close()


def responses(rollouts):
    return [row[:n].tolist() for row, n in zip(rollouts.response_ids, rollouts.lengths.tolist(), strict=True)]


def logprobs_of(model, prompt, response):
    with torch.no_grad():
        return model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)


def assert_of(student, rollouts):
    """Every candidate and every sampled token has the student's own log-probability."""
    for b, said in enumerate(responses(rollouts)):
        want = logprobs_of(student, rollouts.prompts[b], said)
        n = len(said)
        torch.testing.assert_close(rollouts.sampled_logprobs[b, :n], want[range(n), said], atol=1e-5, rtol=0)
        best = want.topk(K)
        assert torch.equal(rollouts.student.ids[b, :n], best.indices)
        torch.testing.assert_close(rollouts.student.logprobs[b, :n], best.values, atol=1e-5, rtol=0)
        assert (EOS in said[:-1]) is False and (said[-1] == EOS) == bool(rollouts.finished[b])


@pytest.mark.parametrize("count", [1, 2])
def test_rollouts_have_the_students_numbers_and_follow_its_weights(count):
    with served(count) as (sampler, servers):
        sampler.check(longest=30)
        first = sampler.sample(PROMPTS, UNIFORMS, top_k=K)
        assert_of(sampler.student, first)
        again = sampler.sample(PROMPTS, UNIFORMS, top_k=K)
        assert responses(again) == responses(first)
        assert len({tuple(said) for said in responses(first)}) > 3 and first.finished.any()
        sampler.student.load_state_dict(tiny_model("qwen3", seed=5).state_dict())
        other = sampler.sample(PROMPTS, UNIFORMS, top_k=K)
        assert_of(sampler.student, other)
        assert responses(other) != responses(first)
        for server in servers:
            salts = [body["cache_salt"] for path, _, body in server.seen if "seed" in (body or {})]
            assert len(set(salts)) == 3, "a prefix cache outlives its weights"


def test_the_check_leaves_the_student_as_it_was():
    student = tiny_model("gemma3", seed=3)  # tied
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    with serving(tiny_model("gemma3", seed=9), None, name="student") as server:
        sampler = ServedSampler(
            student, Servers([server.url]), model="student", dtype="float32", pad_id=PAD, eos_ids=[EOS], slots=8
        )
        sampler.check(longest=30)
        assert_of(student, sampler.sample(PROMPTS, UNIFORMS, top_k=K))
    assert all(torch.equal(weight, before[name]) for name, weight in student.state_dict().items())


class Every:
    """A watcher that looks every 3 tokens and ends rollout 1 after its fifth token."""

    every = 3

    def __init__(self, slots):
        self.seen, self.slots = {}, slots

    def watch(self, response_ids, student, spans):
        assert len(spans) <= self.slots
        for span in spans:
            assert span.start == len(self.seen.get(span.rollout, []))
            self.seen.setdefault(span.rollout, []).extend(response_ids[span.rollout, span.start : span.end].tolist())
        return {s.rollout: 5 for s in spans if s.rollout == 1 and s.end >= 5}


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_a_watcher_sees_every_token_once_and_what_it_ends_is_not_asked_for_again(slots):
    with served(slots=slots) as (sampler, (server,)):
        watcher = Every(slots)
        got = sampler.sample(PROMPTS, UNIFORMS, top_k=K, watcher=watcher)
        asked = [body for path, _, body in server.seen if "seed" in (body or {})]
    assert_of(sampler.student, got)
    assert got.stopped.tolist() == [b == 1 for b in range(len(PROMPTS))] and got.lengths[1] == 5
    assert watcher.seen[1][:5] == responses(got)[1]
    assert len(watcher.seen[1]) == 6 and got.generated == 1 + sum(map(len, responses(got)))
    for b in {*range(len(PROMPTS))} - {1}:
        assert watcher.seen[b] == responses(got)[b]
    assert {body["max_tokens"] for body in asked} == {3}
    assert len(asked) == sum(math.ceil(len(watcher.seen[b]) / 3) for b in range(len(PROMPTS)))


@pytest.mark.parametrize("watched", [False, True], ids=["whole", "in chunks"])
def test_several_ends_count_as_one_action(watched):
    """Candidates and sampled tokens have log-probabilities of the student's distribution with its ends added up."""
    ends = (EOS, 5, 12, 30, 44)
    others, top_k = list(ends[1:]), VOCAB - len(ends) + 1  # every id is listed
    with served(ends=ends) as (sampler, [server]):
        rollouts = sampler.sample(PROMPTS, UNIFORMS, top_k=top_k, watcher=Every(64) if watched else None)
        asked = {body["logprobs"] for path, _, body in server.seen if "seed" in (body or {})}
        drawn = {token for said in rollouts.response_ids.tolist() for token in said}
    assert asked == {VOCAB}, "as many more as are merged into one"
    assert rollouts.finished.any() and EOS in drawn and not drawn & set(others)
    for b, said in enumerate(responses(rollouts)):
        want = logprobs_of(sampler.student, rollouts.prompts[b], said)
        want[:, EOS] = want[:, list(ends)].logsumexp(-1)
        want[:, others] = -torch.inf
        best, n = want.topk(top_k), len(said)
        torch.testing.assert_close(rollouts.student.logprobs[b, :n], best.values, atol=1e-5, rtol=0)
        assert torch.equal(rollouts.student.ids[b, :n], best.indices)
        torch.testing.assert_close(rollouts.sampled_logprobs[b, :n], want[range(n), said], atol=1e-5, rtol=0)


def test_nothing_to_sample_and_no_candidates():
    with served() as (sampler, _):
        none = sampler.sample(PROMPTS, UNIFORMS[:, :0], top_k=K)
        assert none.generated == 0 and not none.finished.any()
        plain = sampler.sample(PROMPTS, UNIFORMS)
        assert plain.student is None and plain.sampled_logprobs is None
        assert responses(plain) == responses(sampler.sample(PROMPTS, UNIFORMS, top_k=K))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("settings", "longest", "error", "words"),
    [
        ({}, 513, ModelError, "has 512 positions.*need 513"),
        ({"dev_mode": False}, 30, EngineError, "takes no weights.*HTTP 404.*VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(settings, longest, error, words):
    with served(**settings) as (sampler, _), pytest.raises(error, match=words):
        sampler.check(longest)


def test_another_name_is_refused():
    with served() as (sampler, _):
        sampler.model = "other"
        with pytest.raises(ModelError, match=r"serves 'student', but the student.*'other'.*rollout.vllm_server.model"):
            sampler.check(30)


def test_a_server_that_says_it_took_the_weights_and_did_not_is_found():
    def ignore(handler, body):
        if handler.path == "/collective_rpc":
            handler.reply(200, {"results": [None]})
        return handler.path == "/collective_rpc"

    with served(2) as (sampler, (one, two)):
        two.before = ignore
        with pytest.raises(EngineError, match=f"{two.url} does not serve the weights that were handed over"):
            sampler.check(30)
        two.before = lambda handler, body: False
        sampler.check(30)
        two.before = ignore  # later on: the weights of the check are those of the student, until it changes
        sampler.sample(PROMPTS, UNIFORMS, top_k=K)
        sampler.student.load_state_dict(tiny_model("qwen3", seed=5).state_dict())
        with pytest.raises(EngineError, match="does not serve the weights"):
            sampler.sample(PROMPTS, UNIFORMS, top_k=K)


def test_a_check_that_sees_nothing_is_an_error():
    student = tiny_model("qwen3", seed=3)
    with torch.no_grad():
        student.get_output_embeddings().weight.fill_(0.01)  # every token is as likely as any other, halved or not
    with served(student=student) as (sampler, _), pytest.raises(EngineError, match="cannot tell halved weights"):
        sampler.check(30)


# ---- servers that misbehave ----


def reset(handler, body):
    handler.close_connection = True
    handler.connection.close()


def overloaded(handler, body):
    handler.reply(503, {"error": "too many requests"})


def half(handler, body):
    whole = json.dumps(handler.server.answer(handler.path, body)[1]).encode()
    handler.reply(200, whole[: len(whole) // 2])


def altered(change):
    def fault(handler, body):
        status, answer = handler.server.answer(handler.path, body)
        change(answer["choices"][0])
        handler.reply(status, answer)

    return fault


def keep_one_candidate(choice):
    for token, top in zip(choice["token_ids"], choice["logprobs"]["top_logprobs"], strict=True):
        for key in [key for key in top if key != f"token_id:{token}"]:
            del top[key]


FAULTS = {
    "reset": reset,
    "overloaded": overloaded,
    "half": half,
    "fewer tokens": altered(lambda choice: choice["token_ids"].pop()),
    "another prompt": altered(lambda choice: choice["prompt_token_ids"].append(2)),
    "an unknown token": altered(lambda choice: choice["token_ids"].__setitem__(0, VOCAB)),
    "nan": altered(lambda choice: choice["logprobs"]["top_logprobs"][0].update({"token_id:3": math.nan})),
    "no scores": altered(lambda choice: choice.update(logprobs=None)),
    "too few candidates": altered(keep_one_candidate),
}


def few_times(fault, times, *, of_all=False):
    """The fault, at the first requests for tokens, or of all kinds."""
    left = [times]

    def before(handler, body):
        if not (of_all or "seed" in (body or {})) or not left[0]:
            return False
        left[0] -= 1
        fault(handler, body)
        return True

    return before


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes_changes_nothing_and_one_that_stays_is_an_error(name, monkeypatch):
    monkeypatch.setattr("prune_opd.serving.client.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("prune_opd.serving.client.LONGEST_PAUSE", 0.02)
    with served(deadline=3.0) as (sampler, (server,)):
        want = sampler.sample(PROMPTS, UNIFORMS, top_k=K)
        server.before = few_times(FAULTS[name], 2)
        got = sampler.sample(PROMPTS, UNIFORMS, top_k=K)
        assert responses(got) == responses(want)
        assert torch.equal(got.student.logprobs, want.student.logprobs)
        server.before = few_times(FAULTS[name], 10**6)
        with pytest.raises(ServerError):
            sampler.sample(PROMPTS, UNIFORMS, top_k=K)


def restarted(server):
    """With its first weights, and no memory of ours."""
    server.model, server.weight_version = tiny_model("qwen3", seed=11), "default"


@pytest.mark.parametrize("silent", [False, True])
def test_what_a_restarted_replica_said_is_sampled_anew(monkeypatch, silent):
    """Whether a connection broke, or none was open when it went."""
    monkeypatch.setattr("prune_opd.serving.client.FIRST_PAUSE", 0.01)
    with served(2) as (sampler, (one, two)):
        want = sampler.sample(PROMPTS, UNIFORMS, top_k=K)

        def restart(handler, body):
            restarted(handler.server)
            if silent:
                handler.reply(*handler.server.answer(handler.path, body))
            else:
                reset(handler, body)

        for server in (one, two):
            server.before = few_times(restart, 1)
        got = sampler.sample(PROMPTS, UNIFORMS, top_k=K)
        assert responses(got) == responses(want)
        assert_of(sampler.student, got)


def test_a_replica_that_goes_away_for_good_is_done_without(monkeypatch):
    monkeypatch.setattr("prune_opd.serving.client.FIRST_PAUSE", 0.01)

    def away(handler, body):
        handler.server.before = few_times(reset, 10**6, of_all=True)
        handler.reply(*handler.server.answer(handler.path, body))

    with served(2) as (sampler, (one, _)):
        want = sampler.sample(PROMPTS, UNIFORMS, top_k=K)
        one.before = few_times(away, 1)
        assert responses(sampler.sample(PROMPTS, UNIFORMS, top_k=K)) == responses(want)


def test_a_replica_that_is_restarted_again_and_again_is_an_error():
    def restart(handler, body):
        restarted(handler.server)
        handler.reply(*handler.server.answer(handler.path, body))

    with served() as (sampler, (server,)):
        server.before = few_times(restart, 10**6)
        with pytest.raises(ServerError, match="was restarted, or went away, while it answered, 3 times in a row"):
            sampler.sample(PROMPTS, UNIFORMS, top_k=K)


@given(
    tokens=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    change=st.sampled_from(["none", "longer", "shorter", "prompt", "inside"]),
)
def test_only_whole_answers_are_taken(tokens, change):
    """Token 0 ends a response."""
    count = len(tokens) if 0 not in tokens else 6
    tokens = tokens[: tokens.index(0) + 1] if 0 in tokens else tokens
    scores = [{f"token_id:{v}": -0.5 - v for v in {t, 1, 2}} for t in tokens]
    choice = {"token_ids": list(tokens), "prompt_token_ids": [7], "logprobs": {"top_logprobs": scores}}
    match change:
        case "longer":
            choice["token_ids"].append(1)
            scores.append({"token_id:1": -0.5, "token_id:2": -1.5})
        case "shorter":
            choice["token_ids"].pop()
            scores.pop()
        case "prompt":
            choice["prompt_token_ids"] = [8]
        case "inside":
            choice["token_ids"].insert(0, 0)
            scores.insert(0, {"token_id:0": -1.0, "token_id:2": -2.0})
    if change == "none":
        found = parse_tokens({"choices": [choice]}, [7], count, [0], top_k=2, vocab_size=9)
        assert found.tokens == tokens and len(found.ids) == len(found.logprobs) == 3 * len(tokens)
        for i, token in enumerate(tokens):
            assert found.ids[3 * i] == token and found.logprobs[3 * i] == -0.5 - token
            assert found.logprobs[3 * i + 1 : 3 * i + 3] == sorted(scores[i].values(), reverse=True)[:2]
    else:
        with pytest.raises(BadAnswer):
            parse_tokens({"choices": [choice]}, [7], count, [0], top_k=2, vocab_size=9)


# ---- in a run ----


def settings_of(server, *more):
    return [
        *SMALL,
        "rollout.use_vllm=true",
        f"rollout.vllm_server_url={server.url}",
        "rollout.vllm_server.model=student",
        "rollout.vllm_server.deadline=2.0",
        *more,
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "within"),
    [([], "evaluation"), (["pruning.in_flight.enable=true", "pruning.in_flight.chunk=4"], "step")],
    ids=["window, in the evaluation after step 2", "in flight, in step 3"],
)
def test_a_run_that_lost_its_server_and_was_resumed_is_the_run_that_was_not(tmp_path, more, within):
    def fresh():
        return AutoModelForCausalLM.from_pretrained(
            resolve_model("embedded:low-student"), tie_word_embeddings=False
        ).eval()

    tokenizer = load_tokenizer("embedded:low-student", load_config(RECIPE, []).model)
    with serving(fresh(), tokenizer, name="student") as server:
        settings = settings_of(server, *more)

        def trainer_in(name, resume="never"):
            return Trainer(load_config(RECIPE, settings), tmp_path / name, resume=resume, console=Console(quiet=True))

        trainer_in("whole").train()
        trainer = trainer_in("run")
        owner, name = (trainer, "_step") if within == "step" else (trainer.held_out, "record")
        action = getattr(owner, name)

        def away_at_the_third(number):  # steps are counted from 0; the evaluation after step 2 has its number
            if number == 2:
                server.before = few_times(overloaded, 10**6)
            return action(number)

        setattr(owner, name, away_at_the_third)
        with pytest.raises(ServerError, match="stopped after step 2, saved; continue with --resume auto"):
            trainer.train()
        server.before = lambda handler, body: False
        trainer_in("run", "auto").train()
    assert difference(outcome(tmp_path / "whole"), outcome(tmp_path / "run")) is None
    records = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    for record in records[1:]:
        assert 0 < record["rollout/logprob_gap_max"] < 1e-3


def test_settings_without_effect_and_in_conflict():
    with pytest.warns(UserWarning, match=r"rollout.vllm_server.deadline has no effect: rollout.vllm_server_url is not"):
        load_config(RECIPE, ["rollout.vllm_server.deadline=3.0"])
    with pytest.warns(UserWarning, match=r"rollout.vllm_server_url has no effect: rollout.use_vllm is false"):
        load_config(RECIPE, ["rollout.vllm_server_url=http://localhost:1"])
    with pytest.raises(ConfigError, match="vllm_server_url lists no server"):
        load_config(RECIPE, ["rollout.use_vllm=true", "rollout.vllm_server_url=[]"])
