"""Rollouts from a copy of the student in another type: whose they are, what they say of it, and that they follow it."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from prune_opd.config import LoraSection, load_config
from prune_opd.models.causal_lm import hidden_states, output_head
from prune_opd.models.loading import add_adapters
from prune_opd.rollout.base import rollout_uniforms
from prune_opd.rollout.local import LocalSampler
from prune_opd.rollout.student_copy import StudentCopy
from prune_opd.training.trainer import Trainer
from tests.families import EOS, FAMILIES, PAD, VOCAB, tiny_model, tiny_prompts
from tests.rollout.test_ahead import run, trainer_in
from tests.training.test_trainer import RECIPE, SMALL, records

BF16 = "rollout.dtype=bfloat16"


def rounded(model):
    """The model with its parameters in bfloat16, by a way of its own."""
    other = copy.deepcopy(model)
    for module in other.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(parameter.detach().bfloat16()))
    return other.eval()


def at_sampled(model, rollouts, b, vocab_size):
    """(n,) float32 log-probs of one rollout's tokens, from a forward over the whole of it."""
    prompt, n = rollouts.prompts[b], int(rollouts.lengths[b])
    ids = torch.tensor([[*prompt, *rollouts.response_ids[b, :n].tolist()]])
    with torch.no_grad():
        hidden = hidden_states(model, {"input_ids": ids})[0, len(prompt) - 1 : -1]
        # Soft-caps are in float32, as they are while it samples, and not in bfloat16 as in transformers.
        logprobs = output_head(model).logits(hidden)[:, :vocab_size].log_softmax(-1)
    return logprobs.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)


def gaps(model, rollouts, vocab_size):
    """|log p of the model less that of whoever sampled| at every kept token. Their median says who sampled: sums over
    a whole rollout and over one token at a time round apart now and then, even in the same model.
    """
    rows = range(len(rollouts.prompts))
    said = [rollouts.sampled_logprobs[b, : int(rollouts.lengths[b])] for b in rows]
    return torch.cat([(at_sampled(model, rollouts, b, vocab_size) - said[b]).abs() for b in rows])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_the_copy_is_the_rounded_student_and_follows_it(family, lora):
    student = tiny_model(family, seed=3)
    if lora:
        student = add_adapters(student, LoraSection(r=4))
    local = LocalSampler(student, pad_id=PAD, eos_ids=[EOS], vocab_size=VOCAB, slots=3)
    sampler, uniforms = StudentCopy(local, torch.bfloat16), rollout_uniforms(0, 0, range(8), 12)
    seen = []
    for _ in range(2):
        rollouts = sampler.sample(tiny_prompts(), uniforms, top_k=4)
        reference = rounded(student)
        of_reference = LocalSampler(reference, pad_id=PAD, eos_ids=[EOS], vocab_size=VOCAB, slots=3)
        of_reference.keep_sampled_logprobs = True
        want = of_reference.sample(tiny_prompts(), uniforms, top_k=4)
        assert torch.equal(rollouts.response_ids, want.response_ids)
        assert torch.equal(rollouts.sampled_logprobs, want.sampled_logprobs)
        assert gaps(reference, rollouts, VOCAB).median() < 0.5 * gaps(student, rollouts, VOCAB).median()
        seen.append(rollouts.response_ids)
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    assert not torch.equal(*(ids[:, :4] for ids in seen)), "the weights moved and the rollouts did not"
    mine = sampler.sampler.model
    assert {(p.dtype, p.requires_grad) for p in mine.parameters()} == {(torch.bfloat16, False)}
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    for (name, ours), (_, theirs) in zip(mine.named_buffers(), student.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name  # rotary frequencies among them
    assert local.model is student and not local.keep_sampled_logprobs


@pytest.mark.parametrize("ahead", [[], ["rollout.ahead=true"]], ids=["in turn", "ahead"])
def test_rollouts_are_those_of_the_rounded_weights_and_training_goes_on_in_float32(tmp_path, monkeypatch, ahead):
    evaluated = []
    sample = LocalSampler.sample
    monkeypatch.setattr(
        LocalSampler, "sample", lambda self, *a, **k: evaluated.append(self.model.dtype) or sample(self, *a, **k)
    )
    trainer, weights, results = run(tmp_path / "run", monkeypatch, BF16, *ahead)
    assert evaluated.count(torch.bfloat16) == len(results) and torch.float32 in evaluated, "evaluation rounds nothing"
    for step, result in enumerate(results):
        policy = copy.deepcopy(trainer.parts.student)
        policy.load_state_dict(weights[max(step - 1, 0) if ahead else step])
        own = gaps(policy, result.rollouts, trainer.run.update.vocab_size).median()
        assert gaps(rounded(policy), result.rollouts, trainer.run.update.vocab_size).median() < 0.5 * own, step
    assert {p.dtype for p in trainer.parts.student.parameters()} == {torch.float32}
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0]), "nothing was learnt"
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"]]
    assert len(steps) == 3 and all(torch.tensor(row["loss"]).isfinite() and row["grad_norm"] > 0 for row in steps)
    kl = [row["rollout/engine_kl"] for row in steps]
    assert all(gap > 0 for gap in kl) and max(kl[:1] if ahead else kl) < 1e-2, "only rounding where nothing is stale"


def test_the_students_own_type_is_no_copy_and_changes_nothing(tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match=r"rollout.dtype has no effect: the student's weights are float32 already"):
        load_config(RECIPE, ["rollout.dtype=float32"])
    same, _, with_it = run(tmp_path / "same", monkeypatch, "rollout.dtype=float32")
    _, _, without = run(tmp_path / "without", monkeypatch)
    assert same.run.sampler is same.parts.sampler
    for one, other in zip(with_it, without, strict=True):
        assert torch.equal(one.rollouts.response_ids, other.rollouts.response_ids) and one.loss == other.loss


def test_with_ahead_there_is_one_copy(tmp_path):
    trainer = trainer_in(tmp_path / "run", BF16, "rollout.ahead=true")
    assert trainer.run.ahead is not None and trainer.run.ahead.student is trainer.run.sampler


def test_a_resumed_run_is_the_run_that_was_not_cut_off(tmp_path):
    def train(folder, *settings, resume="never"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = load_config(RECIPE, [*SMALL, BF16, "rollout.importance_sampling_cap=2.0", *settings])
        Trainer(config, folder, resume=resume, console=Console(quiet=True)).train()

    train(tmp_path / "whole")
    train(tmp_path / "cut", "training.steps=2")
    train(tmp_path / "cut", resume="auto")
    for name in ("drift.jsonl", "rollouts.jsonl"):
        assert records(tmp_path / "whole", name) == records(tmp_path / "cut", name)
    whole, cut = (load_file(tmp_path / x / "checkpoints/step_4/model.safetensors") for x in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
