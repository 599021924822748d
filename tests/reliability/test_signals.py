"""SIGTERM and SIGINT against the real program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
from rich.console import Console

from prune_opd.config import load_config
from prune_opd.errors import RunInterrupted
from prune_opd.training import held_out, run_directory
from prune_opd.training.checkpoint import latest_checkpoint, step_of
from prune_opd.training.trainer import Trainer

from .kills import RECIPE, SMALL, difference, outcome


def trainer_in(folder, *settings, resume="never"):
    warnings.simplefilter("ignore")
    return Trainer(load_config(RECIPE, [*SMALL, *settings]), folder, resume=resume, console=Console(quiet=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    trainer_in(folder).train()
    return outcome(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_finishes_the_step_saves_and_exits_with_75(tmp_path, number, whole):
    settings = [part for setting in SMALL for part in ("--set", setting)]
    command = [sys.executable, "-c", PROGRAM, "train", str(RECIPE), "--output-dir", str(tmp_path / "run")]
    command += [*settings, "--set", "training.save_every=9"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not (log.exists() and '"step": 1' in log.read_text()):
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == RunInterrupted.exit_code == 75, err
    assert f"{number.name}: finishing this step and saving" in err
    assert "continue with --resume auto" in err and "Traceback" not in err
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    saved, _ = latest_checkpoint(tmp_path / "run/checkpoints")
    # One step more when the signal met the evaluation of a step: its record is in the checkpoint, not yet in the log.
    assert saved is not None and step_of(saved) - steps[-1] in (0, 1)
    trainer_in(tmp_path / "run", resume="auto").train()
    assert difference(whole, outcome(tmp_path / "run")) is None


PROGRAM = "from prune_opd.cli import main; main()"


def test_a_signal_cuts_an_evaluation_off_and_the_resume_does_it_again(tmp_path, monkeypatch, whole):
    take = held_out.evaluate
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:  # the one after step 2
            os.kill(os.getpid(), signal.SIGTERM)
        return take(*args, **kwargs)

    monkeypatch.setattr(held_out, "evaluate", interrupted)
    with pytest.raises(RunInterrupted, match="stopped after step 2 of 3, saved"):
        trainer_in(tmp_path / "run").train()
    assert '"step": 2' not in (tmp_path / "run/metrics.jsonl").read_text()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "the handler is put back"
    monkeypatch.setattr(held_out, "evaluate", take)
    trainer_in(tmp_path / "run", resume="auto").train()
    assert difference(whole, outcome(tmp_path / "run")) is None


def test_an_evaluation_that_was_made_up_for_is_logged_once(tmp_path, monkeypatch, whole):
    """Killed right after it was logged, before the next checkpoint."""
    take, save = held_out.evaluate, run_directory.save_checkpoint
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(*args, **kwargs)

    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(held_out, "evaluate", interrupted)
    with pytest.raises(RunInterrupted):
        trainer_in(tmp_path / "run").train()
    monkeypatch.setattr(held_out, "evaluate", take)
    monkeypatch.setattr(run_directory, "save_checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        trainer_in(tmp_path / "run", resume="auto").train()
    monkeypatch.setattr(run_directory, "save_checkpoint", save)
    trainer_in(tmp_path / "run", resume="auto").train()
    assert difference(whole, outcome(tmp_path / "run")) is None


def test_a_second_signal_ends_at_once_and_what_is_there_can_be_resumed(tmp_path, whole):
    code = f"""
import os, signal, sys
from prune_opd.training import run_directory
take = run_directory.save_checkpoint
def twice(*args, **kwargs):
    if kwargs["step"] == 2:
        replace = os.replace
        def stop(*a):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            return replace(*a)
        os.replace = stop
    return take(*args, **kwargs)
run_directory.save_checkpoint = twice
{PROGRAM}
"""
    settings = [part for setting in SMALL for part in ("--set", setting)]
    command = [sys.executable, "-c", code, "train", str(RECIPE), "--output-dir", str(tmp_path / "run"), *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert "once more ends it at once" in done.stderr and "Traceback" not in done.stderr
    trainer_in(tmp_path / "run", resume="auto").train()
    assert difference(whole, outcome(tmp_path / "run")) is None
