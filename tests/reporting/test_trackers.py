"""Trackers as they are: real runs tell TensorBoard, W&B (offline) and trackio (local) their numbers and pictures."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from prune_opd.config import load_config
from prune_opd.errors import ConfigError
from prune_opd.experiments.compare import compare
from prune_opd.reporting.pictures import OVERLAP, REACHED, overlap_map, run_picture
from prune_opd.reporting.records import THIS_WINDOW
from prune_opd.reporting.trackers import PICTURE
from prune_opd.training.trainer import Trainer

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
SMALL = ["rollout.prompts_per_step=1", "rollout.num_generations=2", "evaluation.data=", "tracking.report_every=2"]


def settings(*more: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an evaluation that is off
        return load_config(RECIPE, [*SMALL, *more])


def record(step: int, window: int, overlap: dict[tuple[int, int], float]) -> dict[str, float]:
    buckets = {f"{OVERLAP}/pos_{start}_{end}": value for (start, end), value in overlap.items()}
    return {"step": step, THIS_WINDOW: window, REACHED: window / 2, OVERLAP: 0.5, **buckets}


def test_the_map_has_a_row_a_bucket_and_a_column_a_step():
    edges, overlap = overlap_map([record(1, 16, {(0, 16): 0.5}), record(2, 32, {(0, 16): 0.75, (16, 32): 0.25})])
    assert edges == [0, 16, 32]
    assert np.array_equal(overlap, [[0.5, 0.75], [np.nan, 0.25]], equal_nan=True)


def test_the_picture_shows_what_the_records_say():
    """Agreement is blue, drift red; nothing is drawn where no rollout reached."""
    agree, drift = ({(0, 16): value, (16, 32): value} for value in (0.95, 0.05))
    shares = []
    for overlap in (agree, drift):
        pixels = run_picture([record(step, 32, overlap) for step in (1, 2, 3)]).astype(int)
        assert pixels.shape == (600, 800, 3)
        inside = pixels[60:260, 100:560]  # of the map
        shares.append((inside[..., 2] - inside[..., 0]).mean())
    assert shares[0] > 50 and shares[1] < -50


def test_a_tracker_that_is_not_installed_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"names wandb, which is not installed .* prune-opd\[trackers\]"):
        Trainer(settings('tracking.report_to=["wandb"]'), tmp_path / "run", console=Console(quiet=True)).train()


def test_tensorboard_gets_numbers_and_pictures_and_goes_on_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: make setup-trackers")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, quiet = tmp_path / "run", Console(quiet=True)
    Trainer(settings("tracking.report_to=tensorboard", "training.steps=3"), run, console=quiet).train()
    identity = json.loads((run / "tracking.json").read_text())
    Trainer(settings("tracking.report_to=tensorboard", "training.steps=4"), run, resume="auto", console=quiet).train()
    assert json.loads((run / "tracking.json").read_text()) == identity
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars(OVERLAP)] == [1, 2, 3, 4]
    assert [event.step for event in events.Images(PICTURE)] == [2, 3, 4]  # every second step, and the last one
    logged = [json.loads(line)[OVERLAP] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [event.value for event in events.Scalars(OVERLAP)] == pytest.approx(logged)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed: make setup-trackers")
def test_each_run_of_a_comparison_is_a_run_of_its_own_in_wandb(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    started = []
    init, log = wandb.init, wandb.Run.log

    def remember(**arguments):
        started.append((arguments, {}))
        return init(**arguments)

    def see(run, numbers, step):
        started[-1][1].update(numbers)
        assert run.id == started[-1][0]["id"]
        log(run, numbers, step=step)

    monkeypatch.setattr(wandb, "init", remember)
    monkeypatch.setattr(wandb.Run, "log", see)
    config = load_config(
        RECIPE, [*SMALL[:2], "tracking.report_to=wandb", "training.steps=1", "evaluation.num_problems=1"]
    )
    compare(config, arms=["opd", "prune"], seeds=[0], output_dir=tmp_path / "sweep", console=Console(quiet=True))
    (opd, first), (prune, second) = started
    assert opd["id"] != prune["id"] and opd["resume"] == "allow"
    assert (opd["group"], opd["name"], prune["name"]) == ("sweep", "sweep-opd-seed0", "sweep-prune-seed0")
    assert first[OVERLAP] > 0.3 and isinstance(first[PICTURE], wandb.Image) and isinstance(second[PICTURE], wandb.Image)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("trackio"), reason="trackio is not installed: make setup-trackers")
def test_trackio_keeps_numbers_and_pictures_on_this_machine(tmp_path, monkeypatch):
    from trackio.sqlite_storage import SQLiteStorage

    run = tmp_path / "run"
    Trainer(
        settings("tracking.report_to=trackio", "training.steps=2", "tracking.run_name=mine"),
        run,
        console=Console(quiet=True),
    ).train()
    name = f"mine-{json.loads((run / 'tracking.json').read_text())['identity']}"
    assert name in SQLiteStorage.get_runs("prune-opd")
    logs = SQLiteStorage.get_logs("prune-opd", name)
    assert any(OVERLAP in entry for entry in logs) and any(PICTURE in entry for entry in logs)
