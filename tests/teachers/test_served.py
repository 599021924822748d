"""The served teacher against the in-process one, over HTTP; and what it refuses to believe."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from prune_opd.config import PruningSection
from prune_opd.core.ends import as_one_end
from prune_opd.errors import ModelError, ServerError, TokenizerError
from prune_opd.rollout.base import rollout_uniforms
from prune_opd.rollout.in_flight import InFlightStop
from prune_opd.rollout.local import LocalSampler
from prune_opd.serving.client import Servers
from prune_opd.serving.exchange import BadAnswer
from prune_opd.teachers.local import LocalTeacher
from prune_opd.teachers.served import GROWTH, ServedTeacher, parse_scores
from prune_opd.timing import Stopwatch
from prune_opd.types import TeacherPrompt
from tests.families import EOS, PAD, VOCAB, tiny_model, tiny_prompts
from tests.openai_server import serving
from tests.teachers.test_local import K, check, sample


class Letters:
    """A tokenizer as far as the comparison of token maps needs one."""

    def __init__(self, shift: int = 0) -> None:
        self.words = [f"w{(i + shift) % VOCAB} " for i in range(VOCAB)]

    def __len__(self) -> int:
        return len(self.words)

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


def server_of(model=None, shift=0, **settings):
    return serving(model or tiny_model("qwen3", seed=4), Letters(shift), max_logprobs=VOCAB, **settings)


def teacher_of(*servers, top_logprobs=VOCAB, ends=(), **settings) -> ServedTeacher:
    client = Servers([server.url for server in servers], **{"deadline": 60.0, "timeout": 60.0, **settings})
    return ServedTeacher(client, model="teacher", vocab_size=VOCAB, top_logprobs=top_logprobs, ends=ends)


def test_scores_over_http_are_those_of_the_model_behind_it():
    model = tiny_model("qwen3", seed=4)
    rollouts, _ = sample("qwen3")
    with server_of(model) as one, server_of(model) as two:
        scores = teacher_of(one, two, concurrency=2).score(rollouts, top_k=K)
        check(scores, rollouts, model)
        assert all(any(path == "/v1/completions" for path, *_ in server.seen[1:]) for server in (one, two))
    lengths = rollouts.lengths.tolist()
    assert scores.scored == sum(lengths)


def test_several_ends_count_as_one_action_as_in_the_local_teacher():
    model, ends = tiny_model("qwen3", seed=4), (EOS, 5, 12, 30, 44)
    rollouts, _ = sample("qwen3")
    rollouts = replace(rollouts, response_ids=as_one_end(rollouts.response_ids, ends))
    assert rollouts.finished.any()
    want = LocalTeacher(model, vocab_size=VOCAB, ends=ends).score(rollouts, top_k=K)
    plain = LocalTeacher(model, vocab_size=VOCAB).score(rollouts, top_k=K)
    with server_of(model) as server:
        got = teacher_of(server, ends=ends).score(rollouts, top_k=K)
    kept = rollouts.response_mask
    assert torch.equal(got.topk.ids[kept], want.topk.ids[kept])
    for values, expected in (
        (got.topk.logprobs, want.topk.logprobs),
        (got.topk.entropy, want.topk.entropy),
        (got.sampled_logprobs, want.sampled_logprobs),
    ):
        torch.testing.assert_close(values[kept], expected[kept], atol=1e-4, rtol=0)
    merged = torch.isin(rollouts.student.ids, torch.tensor(ends[1:]))  # of which nothing is left to look up
    here = kept.unsqueeze(-1) & ~merged
    torch.testing.assert_close(got.candidate_logprobs[here], want.candidate_logprobs[here], atol=1e-4, rtol=0)
    assert not torch.equal(want.sampled_logprobs[kept], plain.sampled_logprobs[kept])


def test_candidates_that_are_not_listed_share_the_mass_that_is_left():
    """At N = K + 1 overlap, drift and the sampled token are exact; a missing candidate is bounded and estimated."""
    model = tiny_model("qwen3", seed=4)
    rollouts, _ = sample("qwen3")
    exact = LocalTeacher(model, vocab_size=VOCAB).score(rollouts, top_k=K)
    with server_of(model) as server:
        scores = teacher_of(server, top_logprobs=K + 1).score(rollouts, top_k=K)
    kept, missing = rollouts.response_mask, 0
    assert torch.equal(scores.topk.ids[kept], exact.topk.ids[kept])
    torch.testing.assert_close(scores.topk.logprobs[kept], exact.topk.logprobs[kept], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.sampled_logprobs[kept], exact.sampled_logprobs[kept], atol=1e-5, rtol=0)
    assert (scores.topk.entropy[kept] > exact.topk.entropy[kept] - 1e-4).all()
    with torch.no_grad():
        for b, n in enumerate(rollouts.lengths.tolist()):
            prompt = rollouts.prompts[b]
            ids = [*prompt, *rollouts.response_ids[b, :n].tolist()]
            rows = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)[len(prompt) - 1 : -1]
            for t, row in enumerate(rows):
                listed = {*row.topk(K + 1).indices.tolist(), ids[len(prompt) + t]}
                share = math.log((1 - sum(math.exp(row[v]) for v in listed)) / (VOCAB - len(listed)))
                for v, found in zip(rollouts.student.ids[b, t].tolist(), scores.candidate_logprobs[b, t], strict=True):
                    assert float(found) == pytest.approx(float(row[v]) if v in listed else share, abs=1e-4)
                    missing += v not in listed
    assert missing > 20, "every candidate was listed: tests nothing"


ENDS = (EOS, 5, 12, 30, 44)


@pytest.mark.parametrize("ends", [(), ENDS], ids=["one end", "several ends"])
def test_a_server_that_scores_named_ids_is_asked_for_them_and_nothing_is_estimated(ends):
    model = tiny_model("qwen3", seed=4)
    rollouts, _ = sample("qwen3")
    merged = torch.isin(rollouts.student.ids, torch.tensor(ends[1:]))  # as the student's own would be, merged
    student = replace(rollouts.student, ids=rollouts.student.ids.masked_fill(merged, EOS))
    rollouts = replace(rollouts, response_ids=as_one_end(rollouts.response_ids, ends), student=student)
    exact = LocalTeacher(model, vocab_size=VOCAB, ends=ends).score(rollouts, top_k=K)
    with server_of(model, scale_out=True) as server:
        teacher = teacher_of(server, top_logprobs=K + len(ends))
        teacher.ends = ends
        teacher.check(Letters(), longest=20)
        assert teacher.exact and "exactly" in teacher.way
        began = len(server.seen)
        scores = teacher.score(rollouts, top_k=K)
        assert {path for path, *_ in server.seen[began:]} == {"/inference/v1/generate", "/v1/completions"}
        probes = [body for path, _, body in server.seen[began:] if path == "/v1/completions"]
        assert len({tuple(body["prompt"]) for body in probes}) == 1, "of the probe alone"
    kept = rollouts.response_mask
    pairs = [(scores.candidate_logprobs, exact.candidate_logprobs), (scores.sampled_logprobs, exact.sampled_logprobs)]
    for got, want in pairs:
        torch.testing.assert_close(got[kept], want[kept], atol=1e-5, rtol=0)
    if not ends:  # an end that is not listed adds nothing there, and may change a rank
        assert torch.equal(scores.topk.ids[kept], exact.topk.ids[kept])


def test_one_replica_that_cannot_score_named_ids_means_none_is_asked():
    model = tiny_model("qwen3", seed=4)
    with server_of(model, scale_out=True) as one, server_of(model) as two:
        teacher = teacher_of(one, two)
        teacher.check(Letters(), longest=20)
        assert not teacher.exact and "--enable-scale-out" in teacher.way


def test_scores_of_named_ids_that_are_not_those_of_the_likeliest_are_not_believed():
    model = tiny_model("qwen3", seed=4)
    with server_of(model, scale_out=True) as server:
        honest = server.generate

        def shifted(body):
            body["sampling_params"]["prompt_logprob_token_ids"] = [
                [(token + 1) % VOCAB for token in row] for row in body["sampling_params"]["prompt_logprob_token_ids"]
            ]
            return honest(body)

        server.generate = shifted
        teacher = teacher_of(server)
        teacher.check(Letters(), longest=20)
        assert not teacher.exact, "a server that answers for other ids"
        teacher.exact = True
        rollouts, _ = sample("qwen3")
        with pytest.raises(ServerError, match="are not those of the likeliest"):
            teacher.score(rollouts, top_k=K)


@pytest.mark.parametrize(("events", "exact"), [(2, False), (4, False), (4, True)])
def test_rollouts_stop_where_the_local_teacher_stops_them_at_a_linear_cost(events, exact):
    """Looked at less and less often, rollouts end at the same token as when each chunk was scored at once."""
    student, model = tiny_model("qwen3", seed=3), tiny_model("qwen3", seed=4)
    prompts, length = tiny_prompts(), 60
    pruning = PruningSection(
        threshold=0.25,
        in_flight={"enable": True, "chunk": 3, "stop_after_events": events, "audit_share": 0},
        repetition={"enable": True, "min_run": 4, "max_period": 3},
    )

    def run(teacher):
        stream = teacher.stream([TeacherPrompt(ids) for ids in prompts], length, top_k=K, slots=3)
        watcher = InFlightStop(stream, pruning, torch.zeros(8, dtype=torch.bool), Stopwatch(torch.device("cpu")))
        sampler = LocalSampler(student, pad_id=PAD, eos_ids=[EOS], slots=3)
        rollouts = sampler.sample(prompts, rollout_uniforms(0, 0, range(8), length), top_k=K, watcher=watcher)
        return rollouts, watcher.scores_of(rollouts.response_ids.shape[1])

    want, local = run(LocalTeacher(model, vocab_size=VOCAB))
    with server_of(model, scale_out=exact) as server:
        teacher = teacher_of(server)
        teacher.check(Letters(), longest=20)
        assert teacher.exact == exact
        got, served = run(teacher)
    assert want.stopped.sum() > 1, "nothing stops: tests nothing"
    assert torch.equal(got.response_ids, want.response_ids)
    assert torch.equal(got.stopped, want.stopped)
    kept = want.response_mask
    assert torch.equal(served.topk.ids[kept], local.topk.ids[kept])
    torch.testing.assert_close(served.candidate_logprobs[kept], local.candidate_logprobs[kept], atol=1e-4, rtol=0)
    assert local.scored <= served.scored <= (1 + GROWTH / (GROWTH - 1)) * got.generated


@pytest.mark.parametrize("length", [40, 120])
def test_the_geometric_schedule_keeps_the_total_linear(length):
    """Without a stop, counted: every chunk at once would read length² / (2 · chunk) tokens."""
    student, model, chunk = tiny_model("llama", seed=3), tiny_model("llama", seed=4), 4
    pruning = PruningSection(threshold=0, in_flight={"enable": True, "chunk": chunk, "stop_after_events": 1})
    with server_of(model) as server:
        stream = teacher_of(server).stream([TeacherPrompt([5, 6])], length, top_k=K, slots=1)
        watcher = InFlightStop(stream, pruning, torch.zeros(1, dtype=torch.bool), Stopwatch(torch.device("cpu")))
        sampler = LocalSampler(student, pad_id=PAD, eos_ids=[])
        sampler.sample([[5, 6]], rollout_uniforms(0, 0, range(1), length), top_k=K, watcher=watcher)
        asked = [body["prompt"] for path, _, body in server.seen if path == "/v1/completions"]
        read = [len(prompt) - 2 for prompt in asked if prompt[:2] == [5, 6]]  # and not a probe
    assert len(read) >= 4 and read[-1] == length
    assert sum(read) == watcher.scores.scored <= (1 + GROWTH / (GROWTH - 1)) * length


# ---- what is refused before the first step ----


def refused(error, match, *, longest=20, fingerprint=None, **settings):
    with server_of(**settings) as server, pytest.raises(error, match=match):
        teacher_of(server).check(Letters(), longest, fingerprint)


def test_a_fitting_server_passes_and_leaves_its_fingerprint():
    with server_of() as server:
        teacher = teacher_of(server)
        teacher.check(Letters(), longest=20)
        again = teacher_of(server)
        again.check(Letters(), longest=20, fingerprint=teacher.fingerprint)
    assert len(teacher.fingerprint) == 63


def test_another_token_map_is_named_by_the_first_token_that_differs():
    tokenizer = Letters()
    tokenizer.words[41] = "other"
    with server_of() as server, pytest.raises(TokenizerError, match="id 41 is 'other' for the student and 'w41 '"):
        teacher_of(server).check(tokenizer, longest=20)


def test_another_model_name_is_refused():
    refused(ModelError, "serves 'else', but the teacher of this recipe is 'teacher'", name="else")


def test_a_context_that_is_too_short_is_refused():
    refused(
        ModelError,
        "has 40 positions.*response that the recipe allows need 41.*--max-model-len 41",
        max_model_len=40,
        longest=40,
    )


def test_more_logprobs_than_the_server_gives_are_refused_with_its_own_words():
    with (
        serving(tiny_model("qwen3"), Letters(), max_logprobs=20) as server,
        pytest.raises(ServerError, match="HTTP 400.*greater than max allowed: 20"),
    ):
        teacher_of(server).check(Letters(), longest=20)


def test_replicas_with_different_weights_are_refused():
    with server_of() as one, server_of(tiny_model("qwen3", seed=5)) as two:
        teacher = teacher_of(one, two)
        with pytest.raises(ModelError, match=f"{two.url} serves another model than before"):
            teacher.check(Letters(), longest=20)


def test_a_server_that_came_back_with_other_weights_is_found_before_it_scores_again():
    rollouts, _ = sample("qwen3")
    with server_of() as server:
        teacher = teacher_of(server)
        teacher.score(rollouts, top_k=K)
        server.model = tiny_model("qwen3", seed=5)
        with pytest.raises(ModelError, match="serves another model than before"):
            teacher.score(rollouts, top_k=K)


@pytest.mark.parametrize("breaks", [True, False])
def test_a_server_that_is_replaced_in_the_middle_of_a_step_is_found(breaks):
    """The new server answers properly, but with other numbers; whether a connection was open when the old one went."""
    rollouts, _ = sample("qwen3")
    with server_of() as server:
        teacher = teacher_of(server, concurrency=1)

        def restart(handler, body):
            if len(server.seen) != 4:
                return False
            server.model = tiny_model("qwen3", seed=5)
            handler.close_connection = breaks
            return breaks

        server.before = restart
        with pytest.raises(ModelError, match="serves another model than before"):
            teacher.score(rollouts, top_k=K)


# ---- answers that must not be believed ----

IDS = [5, 6, 7]


def answer_of(ids):
    with server_of() as server:
        return server.completion({"model": "teacher", "prompt": ids, "prompt_logprobs": 3, "return_token_ids": True})[1]


def without_position(choice):
    choice["prompt_logprobs"].pop()


def without_scores(choice):
    choice["prompt_logprobs"] = None


def of_other_tokens(choice):
    choice["prompt_token_ids"] = [5, 6, 8]


def without_the_token(choice):
    del choice["prompt_logprobs"][1]["6"]


def with_nan(choice):
    next(iter(choice["prompt_logprobs"][2].values()))["logprob"] = math.nan


def with_infinity(choice):
    next(iter(choice["prompt_logprobs"][2].values()))["logprob"] = -math.inf


def with_too_much_mass(choice):
    for entry in choice["prompt_logprobs"][2].values():
        entry["logprob"] = -0.1


def with_too_few(choice):
    entry = choice["prompt_logprobs"][2]
    for key in [key for key in entry if key != "7"][:2]:
        del entry[key]


def with_text(choice):
    choice["prompt_logprobs"][1]["6"]["logprob"] = "high"


def with_null(choice):
    choice["prompt_logprobs"][1] = None


DAMAGE = [
    without_position,
    without_scores,
    of_other_tokens,
    without_the_token,
    with_nan,
    with_infinity,
    with_too_much_mass,
    with_too_few,
    with_text,
    with_null,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_answer_is_not_believed(damage):
    choice = answer_of(IDS)["choices"][0]
    parse_scores(copy.deepcopy(choice), IDS, 3, VOCAB)
    damage(choice)
    with pytest.raises(BadAnswer):
        parse_scores(choice, IDS, 3, VOCAB)


def test_a_damaged_answer_is_asked_for_again_and_at_last_an_error():
    rollouts, _ = sample("qwen3")
    with server_of() as server:
        damaged = []

        def damage(handler, body):
            if handler.path != "/v1/completions" or len(body["prompt"]) == 64 or len(damaged) >= allowed:
                return False
            damaged.append(body)
            status, answer = server.answer(handler.path, body)
            answer["choices"][0]["prompt_logprobs"].pop()
            handler.reply(status, answer)
            return True

        server.before, allowed = damage, 2
        scores = teacher_of(server).score(rollouts, top_k=K)
        check(scores, rollouts, server.model)
        assert len(damaged) == 2
        allowed = 10**6
        with pytest.raises(ServerError, match="gave 3 unusable answers in a row: expected scores of"):
            teacher_of(server, concurrency=1).score(rollouts, top_k=K)


def test_an_answer_of_another_model_ends_it():
    with server_of() as server:

        def other(handler, body):
            handler.reply(200, {**server.answer(handler.path, body)[1], "model": "else"})
            return True

        server.before = other
        with pytest.raises(ServerError, match="of the model 'else', asked was 'teacher'"):
            teacher_of(server).score(sample("qwen3")[0], top_k=K)
