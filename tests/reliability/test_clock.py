"""The clock jumps by a day and back in the middle of a run: no duration, deadline or choice goes by it."""

from __future__ import annotations

import json
import os
import time

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_opd.config import load_config
from prune_opd.models.loading import resolve_model
from prune_opd.training.checkpoint import latest_checkpoint, remove_old_checkpoints
from prune_opd.training.trainer import Trainer
from tests.openai_server import serving

from .kills import RECIPE, SMALL, difference, outcome

JUMPS = {4: 86_400.0, 8: -3_600.0}  # seconds, from the request of this number on
FEW = [*SMALL, "training.keep_last=2", "model.teacher_server.deadline=20"]


@pytest.fixture(scope="module")
def teacher():
    folder = resolve_model("embedded:teacher")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with serving(model, tokenizer, name="embedded:teacher") as server:
        yield server


def test_a_clock_that_jumps_changes_nothing(tmp_path, teacher, monkeypatch):
    """It jumps while the teacher is asked, which then says 503: the deadline of the request runs across the jump."""
    settings = [*FEW, f"model.teacher_model_server_url={teacher.url}"]
    Trainer(load_config(RECIPE, settings), tmp_path / "whole", console=Console(quiet=True)).train()
    real, off, asked, retried = time.time, [0.0], [0], []

    def jump(handler, body) -> bool:
        asked[0] += handler.path == "/v1/completions"
        if asked[0] not in JUMPS or off[0] == JUMPS[asked[0]]:
            return False
        off[0] = JUMPS[asked[0]]
        retried.append(asked[0])
        handler.reply(503, {"error": "busy"})
        return True

    monkeypatch.setattr(time, "time", lambda: real() + off[0])
    monkeypatch.setattr(time, "time_ns", lambda: int((real() + off[0]) * 1e9))
    trainer = Trainer(load_config(RECIPE, settings), tmp_path / "run", console=Console(quiet=True))
    asked[0], teacher.before = 0, jump
    began = time.monotonic()
    try:
        totals = trainer.train()
    finally:
        teacher.before = lambda handler, body: False
    assert retried == list(JUMPS), "the clock did not jump within the run: nothing tested"
    assert difference(outcome(tmp_path / "whole"), outcome(tmp_path / "run")) is None
    took, found = time.monotonic() - began, 0
    for row in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()):
        for name, value in row.items():
            if name.startswith("time/") or name.endswith("_seconds"):
                assert 0 <= value <= 3 * took, name  # eta: two steps more, by the first one
                found += 1
    assert found > 20 and 0 < totals.train_seconds <= took and 0 < totals.eval_seconds <= took

    # And it goes on from the checkpoint of the highest step, whatever the dates of files.
    checkpoints = tmp_path / "run/checkpoints"
    for step, date in ((2, real() + 86_400), (3, real() - 86_400)):
        for path in (checkpoints / f"step_{step}", *(checkpoints / f"step_{step}").iterdir()):
            os.utime(path, (date, date))
    assert latest_checkpoint(checkpoints) == (checkpoints / "step_3", [])
    remove_old_checkpoints(checkpoints, keep_last=1, keep_every=None)
    assert [path.name for path in checkpoints.iterdir()] == ["step_3"]
