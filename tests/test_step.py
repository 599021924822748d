"""The step as a whole, against the method computed once more from each rollout alone."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch

from prune_opd.config import parse_config
from prune_opd.errors import NonFiniteError
from prune_opd.reporting.metrics import metrics_of
from prune_opd.rollout.local import LocalSampler
from prune_opd.teachers.local import LocalStream, LocalTeacher
from prune_opd.training.build import build_optimizer, build_window
from tests.core import reference
from tests.families import EOS, PAD, VOCAB, tiny_model, tiny_prompts
from tests.steps import step_of

M = 16
BASE = {
    "model.model_name_or_path": "none",
    "model.teacher_model_name_or_path": "none",
    "data.train": "none",
    "rollout.max_completion_length": M,
    "rollout.slots": 3,
    "objective.top_k": 4,
    "pruning.threshold": 0.5,
    "pruning.w_drop": 0.2,
    "pruning.dynamic_response_length.init_len": 12,
    "pruning.dynamic_response_length.min_len": 4,
    "pruning.dynamic_response_length.max_len": M,
    "pruning.dynamic_response_length.step": 2,
    "pruning.dynamic_response_length.margin": 2,
    "training.learning_rate": 1e-3,
    "training.max_grad_norm": 1e9,
}
IN_FLIGHT = {"pruning.in_flight.enable": True, "pruning.in_flight.chunk": 3, "pruning.in_flight.audit_share": 0.0}

SEVERAL_ENDS = (EOS, 5, 12, 30, 44)

NOTHING_WEIGHS = {"pruning.threshold": 1.0, "pruning.w_drop": 1.0, "pruning.w_base": 0.0}


def config_of(**settings):
    nested: dict = {}
    for name, value in (BASE | settings).items():
        *parents, last = name.split(".")
        section = nested
        for key in parents:
            section = section.setdefault(key, {})
        section[last] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return parse_config(nested, where="test")


def run_step(
    student=None,
    teacher=None,
    *,
    prompts=None,
    vocab_size=VOCAB,
    step=0,
    reward=None,
    sampler=None,
    ends=(),
    **settings,
):
    """(result, student before, student after with its gradients)"""
    config = config_of(**settings)
    before = student or tiny_model("qwen3", seed=3)
    student = copy.deepcopy(before).train()
    result = step_of(
        step=step,
        prompts=tiny_prompts() if prompts is None else prompts,
        student=student,
        sampler=sampler
        or LocalSampler(
            student,
            pad_id=PAD,
            eos_ids=ends or [EOS],
            vocab_size=vocab_size,
            slots=config.rollout.slots,
            ends=ends,
        ),
        teacher=LocalTeacher(teacher or related(tiny_model("qwen3", seed=3)), vocab_size=vocab_size, ends=ends),
        ends=ends,
        optimizer=build_optimizer(student, config)[0],
        window=build_window(config),
        vocab_size=vocab_size,
        config=config,
        reward=reward,
    )
    return result, before, student


def related(model, seed=0):
    """A teacher that agrees with the student here and not there: its weights with noise."""
    torch.manual_seed(seed)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return teacher


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def added_up(logits, ends):
    """Log-probs (N, V) of the distribution in which ends[0] has the probability of all ends, and the others none."""
    p = logits.softmax(-1)
    columns = dict.fromkeys(ends, torch.full_like(p[:, 0], 1e-30))
    if ends:
        columns[ends[0]] = sum(p[:, end] for end in ends)
    return torch.stack([columns.get(v, p[:, v]) for v in range(p.shape[-1])], dim=-1).log()


def by_hand(student, teacher, rollouts, config, ends=()):
    """Each rollout through float64 models alone: overlaps, drift, loss, and the gradient of the loss."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    B, T, K = len(rollouts.prompts), rollouts.response_ids.shape[1], config.objective.top_k
    logits, teacher_logits = [], []
    for prompt, row, n in zip(rollouts.prompts, rollouts.response_ids, rollouts.lengths.tolist(), strict=True):
        ids = torch.tensor([[*prompt, *row[:n].tolist()]])
        logits.append(added_up(student(ids).logits[0, len(prompt) - 1 : -1], ends))
        teacher_logits.append(added_up(teacher(ids).logits[0, len(prompt) - 1 : -1].detach(), ends))
    events = np.zeros((B, T), dtype=bool)
    for b, (own, other) in enumerate(zip(logits, teacher_logits, strict=True)):
        overlap = reference.topk_overlap(own.topk(K).indices[None], other.topk(K).indices[None])[0]
        events[b, : len(overlap)] = overlap < config.pruning.threshold
    mask = rollouts.response_mask.numpy()
    pruning = config.pruning
    _, weight, effective, _ = reference.drift(events, mask, pruning.w_drop, pruning.w_base)
    loss = torch.zeros((), dtype=torch.float64)
    for b, (own, other) in enumerate(zip(logits, teacher_logits, strict=True)):
        ids = own.topk(K).indices
        log_p = own.log_softmax(-1).gather(-1, ids)
        log_q = other.log_softmax(-1).gather(-1, ids)
        share = log_p.detach().softmax(-1)
        advantage = torch.from_numpy(weight[b, : len(ids), None]) * share * (log_q - log_p.detach())
        loss = loss - (advantage * (log_p - log_p.detach()).exp()).sum()
    loss = loss / mask.sum()
    loss.backward()
    return events, weight, effective, loss.item(), gradients(student)


@pytest.mark.parametrize("ends", [(), SEVERAL_ENDS], ids=["one end", "several ends"])
@pytest.mark.parametrize("settings", [{}, IN_FLIGHT], ids=["window", "in-flight"])
def test_a_step_is_the_method(settings, ends):
    result, before, after = run_step(**settings, ends=ends)
    want = by_hand(before, related(before), result.rollouts, config_of(), ends)
    events, weight, effective, loss, gradient = want
    assert 0 < events.sum() < result.rollouts.response_mask.sum(), "no drift, or nothing else: tests nothing"
    assert np.array_equal(result.events.numpy(), events)
    np.testing.assert_allclose(result.weight.numpy(), weight, atol=1e-6)
    assert result.drift.effective_length.tolist() == effective.tolist()
    assert result.loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(gradients(after).double(), gradient, rtol=1e-4, atol=1e-6)
    hits = np.mean(effective >= 10)
    assert result.window.previous_length == 12 and result.window.hit_ratio == pytest.approx(hits)


@pytest.mark.parametrize("settings", [{}, IN_FLIGHT], ids=["window", "in-flight"])
def test_micro_batches_slots_and_chunks_change_nothing(settings):
    one, _, student = run_step(**settings)
    for other in (
        {"training.micro_batch_tokens": 1},
        {"training.micro_batch_tokens": 50},
        {"rollout.slots": 8},
        {"rollout.slots": 1},
        *([{"pruning.in_flight.chunk": 1}, {"pruning.in_flight.chunk": 100}] if settings else []),
    ):
        again, _, twin = run_step(**(settings | other))
        assert torch.equal(again.rollouts.response_ids, one.rollouts.response_ids), other
        assert again.loss == pytest.approx(one.loss, rel=1e-5)
        torch.testing.assert_close(gradients(twin), gradients(student), rtol=1e-4, atol=1e-6)


def test_several_ends_are_drawn_apart_and_kept_as_one():
    """The same numbers draw the same tokens, whatever they count as; the last becomes the first of the ends."""
    student = tiny_model("qwen3", seed=3)
    ending = LocalSampler(student, pad_id=PAD, eos_ids=SEVERAL_ENDS, vocab_size=VOCAB, slots=3)
    apart, _, _ = run_step(sampler=ending, **{"pruning.enable": False})
    one, _, _ = run_step(ends=SEVERAL_ENDS, **{"pruning.enable": False})
    assert torch.equal(one.rollouts.response_mask, apart.rollouts.response_mask)
    said = {row[n - 1] for row, n in zip(apart.rollouts.response_ids.tolist(), apart.rollouts.lengths, strict=True)}
    assert len(said & set(SEVERAL_ENDS)) > 1, "only one of the ends was drawn: tests nothing"
    want = apart.rollouts.response_ids.clone()
    want[torch.isin(want, torch.tensor(SEVERAL_ENDS))] = EOS
    assert torch.equal(one.rollouts.response_ids, want)


def test_a_rollout_ends_at_the_event_that_spends_its_reliability():
    """The same rollouts, uncut, say where each must end: w_drop 0.2 allows four events, the fifth is the last token."""
    uncut, _, _ = run_step()
    cut, _, _ = run_step(**IN_FLIGHT)
    stopped = 0
    for b, n in enumerate(uncut.rollouts.lengths.tolist()):
        events = uncut.events[b, :n].tolist()
        spent = next((t + 1 for t in range(n) if sum(events[: t + 1]) == 5), None)
        assert int(cut.rollouts.lengths[b]) == (n if spent is None else spent)
        ended_itself = bool(uncut.rollouts.finished[b]) and spent in (None, n)
        assert bool(cut.rollouts.stopped[b]) == (spent is not None and not ended_itself)
        stopped += spent is not None and spent < n
    assert stopped > 0 and int(cut.rollouts.lengths.sum()) < int(uncut.rollouts.lengths.sum())
    assert cut.drift.effective_length.tolist() == uncut.drift.effective_length.tolist(), "the window must not notice"


def test_stop_after_a_stated_number_of_events_and_a_minimum_of_tokens():
    uncut, _, _ = run_step()
    by_count, _, _ = run_step(**IN_FLIGHT, **{"pruning.in_flight.stop_after_events": 2})
    late, _, _ = run_step(**IN_FLIGHT, **{"pruning.in_flight.min_tokens": 9})
    for b, n in enumerate(uncut.rollouts.lengths.tolist()):
        count = uncut.events[b, :n].cumsum(-1)
        second, fifth = ((count >= c).nonzero().flatten().tolist() for c in (2, 5))
        assert by_count.rollouts.lengths[b] == (second[0] + 1 if second else n)
        assert late.rollouts.lengths[b] == (min(n, max(fifth[0] + 1, 9)) if fifth else n)


def test_the_teacher_looks_when_a_rollout_can_be_spent_and_not_before(monkeypatch):
    """With a chunk of 1 it could look at every token; five events take five tokens at least."""
    looks: dict[int, list[int]] = {}
    score = LocalStream.score

    def counted(self, response_ids, student, spans):
        for span in spans:
            looks.setdefault(span.rollout, []).append(span.end)
        return score(self, response_ids, student, spans)

    monkeypatch.setattr(LocalStream, "score", counted)
    uncut, _, _ = run_step()
    looks.clear()
    cut, _, _ = run_step(**IN_FLIGHT | {"pruning.in_flight.chunk": 1})
    for b, seen in looks.items():
        n, events = int(cut.rollouts.lengths[b]), uncut.events[b].cumsum(-1)
        due, expected = 5, []
        while due < n:
            expected.append(due)
            due += 5 - int(events[due - 1])
        assert seen == [*expected, n], b
    assert any(len(seen) > 2 for seen in looks.values()), "no rollout was looked at again: tests nothing"


def test_audit_rollouts_run_on_uncut_and_are_reported():
    uncut, _, _ = run_step()
    audited, _, _ = run_step(**IN_FLIGHT | {"pruning.in_flight.audit_share": 1.0})
    assert torch.equal(audited.rollouts.response_ids, uncut.rollouts.response_ids)
    assert not audited.rollouts.stopped.any()
    found = metrics_of(audited, config_of(**IN_FLIGHT))
    spent = (uncut.events.cumsum(-1) >= 5) & uncut.rollouts.response_mask
    first = torch.where(spent.any(-1), spent.long().argmax(-1) + 1, 10**6)
    would_stop = first < uncut.rollouts.lengths
    came_back = sum(
        bool(would_stop[b]) and uncut.events[b, first[b] : n].double().mean().item() < 0.5
        for b, n in enumerate(uncut.rollouts.lengths.tolist())
    )
    assert (found["audit/rollouts"], found["audit/would_stop"], found["audit/came_back"]) == (
        8,
        int(would_stop.sum()),
        came_back,
    )
    assert would_stop.any()
    some, _, _ = run_step(**IN_FLIGHT | {"pruning.in_flight.audit_share": 0.5})
    assert 0 < some.audit.sum() < 8 and not some.rollouts.stopped[some.audit].any()


def test_all_stopped_in_their_first_chunk_none_stopped_one_prompt():
    everyone, _, _ = run_step(**IN_FLIGHT | {"pruning.threshold": 1.0, "pruning.w_drop": 1.0})
    assert everyone.rollouts.lengths.max() <= M and everyone.rollouts.stopped.any() and np.isfinite(everyone.loss)
    nobody, _, _ = run_step(**IN_FLIGHT | {"pruning.threshold": 0.0})
    assert not nobody.rollouts.stopped.any() and not nobody.events.any()
    harmless, _, _ = run_step(**IN_FLIGHT | {"pruning.threshold": 1.0, "pruning.w_drop": 0.0})
    assert not harmless.rollouts.stopped.any() and harmless.events.any()
    alone, _, _ = run_step(prompts=tiny_prompts()[:1], **IN_FLIGHT)
    assert len(alone.rollouts.lengths) == 1 and np.isfinite(alone.loss)


@pytest.mark.parametrize("settings", [{}, IN_FLIGHT], ids=["window", "in-flight"])
@pytest.mark.parametrize("normalization", ["token_mean", "weight_mean"])
def test_a_batch_in_which_nothing_weighs_anything_is_a_skipped_update_with_a_warning(settings, normalization):
    """Adam's momentum would move the weights by a gradient of zero; the mean over no weight would be NaN."""
    student = tiny_model("qwen3", seed=3).train()
    config = config_of(**settings, **NOTHING_WEIGHS, **{"objective.weight_normalization": normalization})
    optimizer, window = build_optimizer(student, config)[0], build_window(config)
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # so that there is a momentum
    before = copy.deepcopy(student.state_dict())
    with pytest.warns(UserWarning, match="step 1: no token carries weight; the update was skipped"):
        result = step_of(
            step=0,
            prompts=tiny_prompts(),
            student=student,
            sampler=LocalSampler(student, pad_id=PAD, eos_ids=[EOS], vocab_size=VOCAB, slots=3),
            teacher=LocalTeacher(tiny_model("qwen3", seed=9), vocab_size=VOCAB),
            optimizer=optimizer,
            window=window,
            vocab_size=VOCAB,
            config=config,
        )
    assert (result.weight == 0).all() and result.drift.effective_length.tolist() == [0] * len(tiny_prompts())
    assert result.loss == 0 and result.grad_norm == 0 and result.window.misses == 1
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(math.isfinite(v) for v in metrics_of(result, config).values() if isinstance(v, float))


@pytest.mark.parametrize("settings", [{}, IN_FLIGHT], ids=["window", "in-flight"])
def test_a_prompt_that_fills_the_context_leaves_room_for_its_response(settings):
    """Prompt and cap together are all positions the model has."""
    student = tiny_model("qwen3", seed=3)
    positions = student.config.max_position_embeddings
    full = [2 + i % (VOCAB - 2) for i in range(positions - 12)]
    result, before, after = run_step(student, prompts=[full, [5, 6]], **settings)
    _, weight, _, loss, gradient = by_hand(before, related(before), result.rollouts, config_of())
    assert result.rollouts.lengths[0] == 12 or result.rollouts.finished[0] or result.rollouts.stopped[0]
    np.testing.assert_allclose(result.weight.numpy(), weight, atol=1e-6)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(gradients(after).double(), gradient, rtol=1e-4, atol=1e-6)


def test_nothing_moves_when_the_student_is_the_teacher():
    for loss in ("topk_reverse_kl", "sampled_token", "forward_kl", "reverse_kl", "jsd"):
        result, before, after = run_step(tiny_model("qwen3"), tiny_model("qwen3"), **{"objective.loss": loss})
        assert abs(result.loss) < 1e-6 and result.grad_norm < 1e-4, loss
        assert result.drift.effective_length.tolist() == result.rollouts.lengths.tolist()


@pytest.mark.parametrize("loss", ["topk_reverse_kl", "sampled_token", "forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("strategy", ["only_stu", "only_tch", "intersection", "union"])
def test_every_objective_brings_the_student_closer(loss, strategy):
    if loss != "topk_reverse_kl" and strategy != "only_stu":
        pytest.skip("the strategy is the top-k loss's")
    settings = {"objective.loss": loss, "objective.top_k_strategy": strategy, "pruning.enable": False}
    student = tiny_model("qwen3", seed=3)
    first = None
    for step in range(6):
        result, _, student = run_step(student, step=step, **settings, **{"training.learning_rate": 3e-3})
        kl = metrics_of(result, config_of(**settings))["distillation/reverse_kl"]
        first = kl if first is None else first
    assert kl < first


def test_without_pruning_every_token_weighs_one_and_the_budget_is_the_cap():
    result, _, _ = run_step(**{"pruning.enable": False})
    assert result.window is None and result.rollouts.lengths.max() == M
    assert torch.equal(result.weight, result.rollouts.response_mask.float())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_broken_teacher_stops_the_step_before_the_weights_move(family):
    teacher = tiny_model(family, seed=4)
    with torch.no_grad():
        teacher.model.norm.weight.fill_(float("nan"))
    student = tiny_model(family, seed=3)
    config = config_of()
    optimizer = build_optimizer(student, config)[0]
    kept = copy.deepcopy(student.state_dict())
    with pytest.raises(NonFiniteError, match="step 8: the teacher's logits are NaN"):
        step_of(
            step=7,
            prompts=tiny_prompts(),
            student=student,
            sampler=LocalSampler(student, pad_id=PAD, eos_ids=[EOS]),
            teacher=LocalTeacher(teacher, vocab_size=VOCAB),
            optimizer=optimizer,
            window=None,
            vocab_size=VOCAB,
            config=config,
        )
    assert all(torch.equal(value, kept[name]) for name, value in student.state_dict().items())


def test_packing_leaves_little_padding():
    """Counted work: columns fed to the update against tokens it needs."""
    prompts = tiny_prompts((5, 1, 9, 5, 3, 7, 2, 4) * 4)
    result, _, _ = run_step(prompts=prompts, **{"pruning.enable": False})
    assert metrics_of(result, config_of())["tokens/update_padding"] <= 0.05
