"""NaN and infinity in logits, loss, gradient and weights: nothing is learnt from them, and their rollouts are kept."""

from __future__ import annotations

import json
import math

import pytest
import torch
from rich.console import Console

from prune_opd.config import load_config
from prune_opd.errors import NonFiniteError
from prune_opd.training.faults import running_norm
from prune_opd.training.trainer import Trainer

from .kills import RECIPE, SMALL


def trainer_in(folder, *settings, resume="never"):
    config = load_config(RECIPE, [*SMALL, "evaluation.every=9", *settings])
    return Trainer(config, folder, resume=resume, console=Console(file=(folder.parent / "said.txt").open("a")))


def at_call(number, function, spoil):
    """`function`, with `spoil` on what its call of that number returns (from 1 on)."""
    calls = []

    def wrapped(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(1)
        if len(calls) == number:
            spoil(result)
        return result

    return wrapped


def spoil_teacher(trainer, value, field="candidate_logprobs"):
    def spoil(scores):
        tensor = scores.topk.logprobs if field == "topk" else getattr(scores, field)
        tensor[1, 0] = value

    trainer.run.teacher.score = at_call(2, trainer.run.teacher.score, spoil)


def spoil_student(trainer, value):
    """While step 2 is sampled, one row of the student's output head is NaN or infinite, as weights that overflowed."""
    sample, weight = trainer.parts.sampler.sample, trainer.parts.student.get_output_embeddings().weight
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        row = weight.data[5].clone()
        if len(calls) == 3:  # the first one was the evaluation before step 1
            weight.data[5] = value
        try:
            return sample(*args, **kwargs)
        finally:
            weight.data[5] = row

    trainer.parts.sampler.sample = wrapped


def spoil_gradient(trainer, value):
    """One entry of one gradient is NaN or infinite after the backward of step 2."""
    parameter = next(iter(trainer.parts.student.parameters()))
    score, calls = trainer.run.teacher.score, []

    def counted(*args, **kwargs):
        calls.append(1)
        return score(*args, **kwargs)

    trainer.run.teacher.score = counted
    parameter.register_hook(lambda gradient: gradient * value if len(calls) == 2 else gradient)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


FAULTS = {
    "student": (spoil_student, "the student's logits are NaN or infinite"),
    "teacher": (spoil_teacher, "the teacher's logits are NaN or infinite at 1 tokens, first in rollout 1 at token 0"),
    "teacher-topk": (lambda t, v: spoil_teacher(t, v, "topk"), "the teacher's logits are NaN or infinite"),
    "gradient": (spoil_gradient, "the gradient norm is"),
}


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_with_nan_is_skipped_and_leaves_the_weights_alone(tmp_path, fault, value):
    spoil, words = FAULTS[fault]
    trainer = trainer_in(tmp_path / "run", "evaluation.num_problems=1", "evaluation.max_tokens=1")
    spoil(trainer, value)
    before = []
    take = trainer._skip
    trainer._skip = lambda *a: (
        before.append([p.detach().clone() for p in trainer.parts.student.parameters()]) or take(*a)
    )
    trainer.train()
    metrics = [r for r in rows(tmp_path / "run/metrics.jsonl") if r["step"] > 0]
    assert [("skipped" in r, r["skipped_steps"]) for r in metrics] == [(False, 0), (True, 1), (False, 1)]
    assert f"step 2: {words}" in metrics[1]["skipped"]
    after_step_1 = before[0]
    assert all(p.isfinite().all() for p in trainer.parts.student.parameters())
    assert all(a.isfinite().all() for a in after_step_1)
    kept = rows(tmp_path / "run/skipped.jsonl")
    assert {r["step"] for r in kept} == {2} and all(r["response_ids"] and r["prompt"] for r in kept)
    if fault == "teacher":
        assert [r["rollout"] for r in kept] == [1]
    if fault == "gradient":  # nobody knows whose it was: the whole batch
        assert [r["rollout"] for r in kept] == [0, 1, 2, 3]
    trainer.console.file.flush()
    assert "step skipped, 1 so far" in (tmp_path / "said.txt").read_text().replace("\n", " ")


def test_a_skipped_step_updates_nothing(tmp_path):
    """The weights, the optimiser and the window after a skipped last step are those of the step before."""
    two = trainer_in(tmp_path / "two", "training.steps=2")
    spoil_teacher(two, math.nan)
    two.train()
    one = trainer_in(tmp_path / "one", "training.steps=1")
    one.train()
    assert all(
        torch.equal(a, b) for a, b in zip(one.parts.student.parameters(), two.parts.student.parameters(), strict=True)
    )
    assert one.run.window.state_dict() == two.run.window.state_dict()
    states = (one.parts.optimizer.state_dict()["state"], two.parts.optimizer.state_dict()["state"])
    assert all(torch.equal(states[0][i]["exp_avg"], states[1][i]["exp_avg"]) for i in states[0])


def test_too_many_skipped_steps_stop_the_run_and_count_across_a_resume(tmp_path):
    first = trainer_in(tmp_path / "run", "training.max_skipped_steps=1", "training.steps=2")
    spoil_teacher(first, math.nan)
    first.train()
    second = trainer_in(tmp_path / "run", "training.max_skipped_steps=1", "training.steps=4", resume="auto")
    assert second.totals.skipped_steps == 1
    spoil_teacher(second, math.nan)
    with pytest.raises(
        NonFiniteError, match=r"(?s)skipped step 2, .*the last good checkpoint is .*step_3.*skipped\.jsonl"
    ):
        second.train()
    assert [r["step"] for r in rows(tmp_path / "run/metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert {r["step"] for r in rows(tmp_path / "run/skipped.jsonl")} == {2, 4}


def test_weights_that_are_nan_are_never_saved(tmp_path):
    trainer = trainer_in(tmp_path / "run", "training.steps=2", "training.save_every=1")
    step = trainer.parts.optimizer.step
    done = []

    def spoil(*args, **kwargs):
        result = step(*args, **kwargs)
        done.append(1)
        if len(done) == 2:
            next(iter(trainer.parts.student.parameters())).data[0, 0] = math.nan
        return result

    trainer.parts.optimizer.step = spoil
    with pytest.raises(NonFiniteError, match="no checkpoint of it was written"):
        trainer.train()
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_1"]


def test_forbidden_tokens_of_the_teacher_count_as_the_documented_floor(tmp_path):
    """-inf is no fault: it is clamped at -50 nats, so a step with -inf is the step with -50."""
    weights = []
    for name, value in (("inf", -math.inf), ("floor", -50.0)):
        trainer = trainer_in(tmp_path / name, "training.steps=2")
        spoil_teacher(trainer, value)
        trainer.train()
        assert trainer.totals.skipped_steps == 0
        weights.append(list(trainer.parts.student.parameters()))
    plain = trainer_in(tmp_path / "plain", "training.steps=2")
    plain.train()
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], plain.parts.student.parameters(), strict=True))


def test_a_spike_of_the_gradient_norm_is_said(tmp_path):
    trainer = trainer_in(tmp_path / "run", "training.steps=1")
    for norm in [1.0] * 20 + [9.0, 1.0, 30.0]:
        trainer.faults.watch_norm(7, norm)
    trainer.console.file.flush()
    said = (tmp_path / "said.txt").read_text()
    assert said.count("the gradient norm is") == 1 and "is 30, " in said


def test_the_usual_norm_is_a_geometric_mean():
    usual = None
    for i, norm in enumerate([1.0, 4.0, 16.0]):
        usual = running_norm(usual, norm, i)
    assert usual == pytest.approx(4.0)
    assert running_norm(usual, 0.0, 3) == usual
