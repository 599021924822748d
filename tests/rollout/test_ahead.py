"""Rollouts that are sampled while the step before updates: from the weights before that update, and from no others."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from rich.console import Console

from prune_opd.config import load_config
from prune_opd.errors import ConfigError
from prune_opd.rollout.base import rollout_uniforms
from prune_opd.rollout.local import LocalSampler
from prune_opd.training import trainer as trainer_module
from prune_opd.training.trainer import Trainer
from tests.training.test_trainer import RECIPE, SMALL

STEPS = 3
IN_FLIGHT = ["pruning.in_flight.enable=true", "pruning.in_flight.chunk=8", "pruning.in_flight.stop_after_events=4"]


def trainer_in(folder, *settings: str) -> Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = load_config(RECIPE, [*SMALL, f"training.steps={STEPS}", "training.learning_rate=1e-2", *settings])
    return Trainer(config, folder, console=Console(quiet=True))


def run(folder, monkeypatch, *settings: str):
    """(trainer, weights before each step, result of each step)"""
    trainer, weights, results = trainer_in(folder, *settings), [], []
    step = trainer_module.prune_opd_step

    def watched(*arguments):
        weights.append(copy.deepcopy(trainer.parts.student.state_dict()))
        results.append(step(*arguments))
        return results[-1]

    monkeypatch.setattr(trainer_module, "prune_opd_step", watched)
    trainer.train()
    monkeypatch.undo()
    return trainer, weights, results


@pytest.mark.parametrize("in_flight", [[], IN_FLIGHT], ids=["window", "in-flight"])
def test_rollouts_are_those_of_the_weights_one_update_ago(tmp_path, monkeypatch, in_flight):
    trainer, weights, results = run(tmp_path / "run", monkeypatch, "rollout.ahead=true", *in_flight)
    for step, result in enumerate(results):
        policy = copy.deepcopy(trainer.parts.student)
        policy.load_state_dict(weights[max(step - 1, 0)])
        sampler = LocalSampler(policy, **{name: getattr(trainer.parts.sampler, name) for name in ("pad_id", "eos_ids")})
        cap = trainer.config.pruning.dynamic_response_length.init_len if step == 0 else results[step - 1].window.length
        uniforms = rollout_uniforms(0, step, range(len(result.rollouts.prompts)), cap)
        want = sampler.sample(result.rollouts.prompts, uniforms, top_k=8).response_ids
        kept = result.rollouts.response_mask
        assert torch.equal(result.rollouts.response_ids[kept], want[:, : kept.shape[1]][kept]), step
        with torch.no_grad():
            for b, prompt in enumerate(result.rollouts.prompts):
                n = int(result.rollouts.lengths[b])
                ids = torch.tensor([[*prompt, *result.rollouts.response_ids[b, :n].tolist()]])
                logprobs = policy(ids).logits[0, len(prompt) - 1 : -1, : trainer.run.update.vocab_size].log_softmax(-1)
                said = logprobs.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)
                torch.testing.assert_close(result.rollouts.sampled_logprobs[b, :n], said, atol=1e-4, rtol=0)
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0]), "nothing was learnt"
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    gaps = [record["rollout/engine_kl"] for record in records if record["step"]]
    assert gaps[0] < 1e-6, "the first step's are of the policy that is trained"
    assert all(gap > 1e-4 for gap in gaps[1:])
    assert trainer.run.ahead is not None and trainer.run.ahead.coming is None, "the last step begins on nothing"


def test_without_an_update_nothing_differs(tmp_path, monkeypatch):
    """With a learning rate of next to nothing the stale policy is the current one."""
    _, _, usual = run(tmp_path / "usual", monkeypatch, "training.learning_rate=1e-12")
    _, _, ahead = run(tmp_path / "ahead", monkeypatch, "training.learning_rate=1e-12", "rollout.ahead=true")
    for one, other in zip(usual, ahead, strict=True):
        assert torch.equal(one.rollouts.response_ids, other.rollouts.response_ids)
        assert other.loss == pytest.approx(one.loss, rel=1e-5) and one.window == other.window


@pytest.mark.parametrize(
    ("setting", "other"),
    [
        ("rollout.ahead=true", "rollout.use_vllm=true"),
        ("rollout.ahead=true", 'training.parallel="fsdp2"'),
        ("rollout.dtype=bfloat16", 'training.parallel="fsdp2"'),  # of vLLM it is the engine's type
    ],
)
def test_what_has_no_whole_copy_to_sample_from_is_refused(tmp_path, setting, other):
    with pytest.raises(ConfigError, match=f"{setting.partition('=')[0]} needs a copy of the whole student"):
        trainer_in(tmp_path / "run", setting, other)
