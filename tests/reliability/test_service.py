"""A served teacher that goes away for good during a run: everything is saved, and the run goes on when it is back."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_opd.config import load_config
from prune_opd.errors import ServerError
from prune_opd.models.loading import resolve_model
from prune_opd.training.trainer import Trainer
from tests.openai_server import serving

from .kills import RECIPE, SMALL, difference, outcome

FEW = [*SMALL, "evaluation.every=9", "evaluation.num_problems=1", "training.save_every=9", "rollout.prompts_per_step=1"]


def reset(handler, body) -> bool:
    """Close the connection in the middle of a step's scores."""
    handler.close_connection = True
    handler.connection.close()
    return True


def broken(handler, body) -> bool:
    """An overloaded server."""
    handler.reply(503, {"error": "too many requests"})
    return True


@pytest.mark.parametrize("fault", [reset, broken], ids=lambda f: f.__name__)
def test_a_teacher_that_stays_away_stops_the_run_with_everything_saved(tmp_path, fault):
    folder = resolve_model("embedded:teacher")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with serving(model, tokenizer, name="embedded:teacher") as server:
        served = [*FEW, f"model.teacher_model_server_url={server.url}", "model.teacher_server.deadline=1.0"]

        def trainer_in(name, resume="never"):
            return Trainer(load_config(RECIPE, served), tmp_path / name, resume=resume, console=Console(quiet=True))

        trainer_in("whole").train()
        trainer = trainer_in("run")
        step = trainer._step

        def away_at_the_third(number):
            if number == 2:
                server.before = fault
            return step(number)

        trainer._step = away_at_the_third
        with pytest.raises(ServerError, match="stopped after step 2, saved; continue with --resume auto"):
            trainer.train()
        steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        assert steps == [0, 1, 2] and (tmp_path / "run/checkpoints/step_2").is_dir()
        server.before = lambda handler, body: False
        trainer_in("run", "auto").train()
    assert difference(outcome(tmp_path / "whole"), outcome(tmp_path / "run")) is None
