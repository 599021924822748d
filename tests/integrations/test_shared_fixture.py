"""The same rollouts through our step and through each engine's adapter: equal to float64 numpy, so to one another."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from prune_opd.config import with_settings
from prune_opd.core.window import TrainingWindow
from prune_opd.training.build import build_optimizer, build_window
from tests import engines_fixture as fixture
from tests.families import VOCAB
from tests.steps import step_of
from tests.test_step import config_of


class Given:
    """A sampler and a teacher that say what the fixture says."""

    def __init__(self, step):
        self.rollouts, self.scores = step.rollouts, step.scores

    def sample(self, prompts, uniforms, **settings):
        assert uniforms.shape[1] >= self.rollouts.response_ids.shape[1]
        return self.rollouts

    def score(self, rollouts, *, top_k):
        return self.scores


def check(step, *, weight, effective, window, loss):
    np.testing.assert_allclose(weight, step.weight, atol=1e-6)
    assert effective == step.effective_length
    assert window == step.window_after
    assert loss == pytest.approx(step.loss, rel=1e-6, abs=1e-6)


def test_the_fixture_shows_something():
    steps = fixture.engine_steps()
    windows = [step.window_after - step.window_before for step in steps]
    assert max(windows) > 0 > min(windows), "the window must grow and shrink"
    weights = np.concatenate([step.weight[step.rollouts.response_mask.numpy()] for step in steps])
    assert {0.5, 1.5} < set(weights.round(6)), "spent, whole, and between"
    assert all(abs(step.loss) > 1e-3 for step in steps)


def test_our_step():
    student = copy.deepcopy(fixture.models()[0]).train()
    config = config_of().model_copy(update={"pruning": fixture.PRUNING, "objective": fixture.OBJECTIVE})
    config = with_settings(config, **{"training.learning_rate": 1e-12})
    optimizer, window = build_optimizer(student, config)[0], build_window(config)
    for number, step in enumerate(fixture.engine_steps()):
        assert window.length == step.window_before
        result = step_of(
            step=number,
            prompts=step.rollouts.prompts,
            student=student,
            sampler=Given(step),
            teacher=Given(step),
            optimizer=optimizer,
            window=window,
            vocab_size=VOCAB,
            config=config,
        )
        check(
            step,
            weight=result.weight.numpy(),
            effective=result.drift.effective_length.tolist(),
            window=result.window.length,
            loss=result.loss,
        )


def test_trl(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed: make setup-trl")
    import torch

    from tests.integrations.test_trl import prune_trainer

    student = copy.deepcopy(fixture.models()[0])
    trainer = prune_trainer(
        tmp_path, student, fixture.models()[1], objective=fixture.OBJECTIVE, pruning=fixture.PRUNING, length=16
    )
    assert isinstance(trainer.window, TrainingWindow)
    trainer.model.train()
    for step in fixture.engine_steps():
        assert trainer.window.length == step.window_before
        trainer.batch = batch = trainer.prune(step.rollouts, step.scores)
        rows = torch.arange(len(step.rollouts.prompts))
        loss = sum(
            trainer._compute_loss(student, {"rollout": some}, trainer.denominator(batch))[0].item()
            for some in rows.split(3)  # micro-batches
        )
        check(
            step,
            weight=batch.weight.numpy(),
            effective=batch.drift.effective_length.tolist(),
            window=trainer.window.length,
            loss=loss,
        )
