"""Full, read-only and slow disks, a limit on the size of files, and two processes in one run directory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from prune_opd.config import load_config
from prune_opd.errors import CheckpointError, ConfigError, RunDirectoryError, StorageError
from prune_opd.training import checkpoint as checkpoint_module
from prune_opd.training.checkpoint import checkpoint_bytes, damage_of, remove_old_checkpoints
from prune_opd.training.files import only_writer, write_json
from prune_opd.training.trainer import Trainer

from .kills import RECIPE, SMALL, difference, outcome

FEW = [*SMALL, "evaluation.num_problems=1", "evaluation.every=9"]


def trainer_in(folder, *settings, resume="never"):
    warnings.simplefilter("ignore")
    return Trainer(load_config(RECIPE, [*FEW, *settings]), folder, resume=resume, console=Console(quiet=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    trainer_in(folder).train()
    return folder


def can_mount() -> bool:
    command = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_mount(), reason="needs user namespaces to mount a small file system")
def test_full_and_read_only_file_systems(tmp_path):
    program = Path(__file__).parent / "small_disk.py"
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, str(program), str(tmp_path / "x")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "GB free, but the 2 checkpoints to come take" in found["foreseen"]
    assert found["foreseen wrote"] == []
    assert "step_3 could not be written" in found["full"] and "--resume auto" in found["full"]
    assert found["full left"] == ["step_2"] and found["full damage"] is None
    assert found["full difference"] is None
    assert "could not be written (No space left on device)" in found["log"] and ".jsonl" in found["log"]
    assert found["log left"] == ["step_1"]
    assert found["log difference"] is None
    assert "is not writable" in found["read-only"] and "is not writable" in found["read-only, resumed"]


@pytest.mark.parametrize("share", [0.01, 0.5, 1.5], ids=["first file", "weights", "optimiser"])
def test_a_limit_on_file_size_keeps_the_checkpoint_before(tmp_path, share):
    """RLIMIT_FSIZE fails a write halfway, as a full disk does. In a forked process, since limits only go down."""
    trainer = trainer_in(tmp_path / "run")
    weights = sum(p.nbytes for p in trainer.parts.student.parameters())
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            save = trainer._save

            def limited():
                if trainer.steps_done == 2:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * weights),) * 2)
                save()

            trainer._save = limited
            trainer.train()
        except StorageError as error:
            code = 0 if "step_2 could not be written" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_1"]
    assert damage_of(tmp_path / "run/checkpoints/step_1") is None


def test_a_slow_disk_changes_nothing(tmp_path, whole, monkeypatch):
    sync, waited = os.fsync, []

    def slow(descriptor):
        time.sleep(0.02)
        waited.append(descriptor)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    trainer_in(tmp_path / "run").train()
    assert len(waited) > 20
    assert difference(outcome(whole), outcome(tmp_path / "run")) is None


def test_every_file_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """fsync of each file, then of its folder, then the rename, then fsync of the folder around it."""
    happened = []
    sync, replace = os.fsync, os.replace

    def watched_sync(descriptor):
        happened.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def watched_replace(source, target):
        happened.append(("rename", str(source)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "replace", watched_replace)
    trainer_in(tmp_path / "run", "training.steps=1").train()
    aside, final = tmp_path / "run/checkpoints/.step_1.partial", tmp_path / "run/checkpoints/step_1"
    at = happened.index(("rename", str(aside)))
    for path in final.iterdir():
        names = {str(aside / path.name), str(aside / f".{path.name}.partial")}
        assert any(kind == "sync" and name in names for kind, name in happened[:at]), path.name
    assert ("sync", str(aside)) in happened[:at]
    assert ("sync", str(aside.parent)) in happened[at:]
    assert ("sync", str(tmp_path / "run/metrics.jsonl")) in happened[:at], "the log is there before its checkpoint"


def test_an_old_checkpoint_goes_only_after_the_new_one_was_read_back(tmp_path, monkeypatch):
    """A disk that gives back other bytes than were written: the run stops, and the good checkpoint is still there."""
    take = checkpoint_module.damage_of
    monkeypatch.setattr(
        checkpoint_module,
        "damage_of",
        lambda path, **how: "model.safetensors has changed" if path.name == "step_2" else take(path, **how),
    )
    with pytest.raises(StorageError, match="reads back damaged"):
        trainer_in(tmp_path / "run").train()
    assert damage_of(tmp_path / "run/checkpoints/step_1") is None


def test_keep_last_and_keep_every(tmp_path):
    names = [f"step_{n}" for n in (2, 4, 6, 8, 10, 12)]
    for name in [*names, "superseded_step_14"]:
        (tmp_path / name).mkdir()
    remove_old_checkpoints(tmp_path, keep_last=2, keep_every=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step_10",
        "step_12",
        "step_4",
        "step_8",
        "superseded_step_14",
    ]
    remove_old_checkpoints(tmp_path, keep_last=1, keep_every=None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_12", "superseded_step_14"]


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_run_is_the_same(tmp_path, whole):
    run = tmp_path / "run"
    trainer_in(run, "training.keep_last=3").train()
    (run / "checkpoints/step_3/optimizer-00000.safetensors").write_bytes(b"half")
    said = Console(record=True, width=300, file=(tmp_path / "out").open("w"))
    config = load_config(RECIPE, [*FEW, "training.keep_last=1"])
    Trainer(config, run, resume="auto", console=said).train()
    text = said.export_text()
    assert "step_3 is damaged or incomplete (optimizer-00000.safetensors has 4 bytes instead of" in text
    assert "resumed from" in text and "superseded_step_3" in text
    shutil.rmtree(run / "checkpoints/superseded_step_3")
    expected, found = outcome(whole), outcome(run)
    for state in (expected["step_3"], found["step_3"]):
        del state["config"]  # keep_last differs
    assert difference(expected, found) is None


def test_going_back_to_an_earlier_checkpoint_sets_the_later_ones_aside(tmp_path):
    run = tmp_path / "run"
    trainer_in(run, "training.keep_last=3").train()
    trainer = trainer_in(run, "training.keep_last=3", resume=str(run / "checkpoints/step_1"))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_1", "step_2", "step_3"]
    trainer.train()
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["step_1", "step_2", "step_3", "superseded_step_2", "superseded_step_3"]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]


def test_a_run_that_died_before_its_first_checkpoint_begins_anew_under_its_recipe_only(tmp_path, whole):
    run = tmp_path / "run"
    trainer = trainer_in(run)
    trainer._save = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(CheckpointError, match=r"config.json was written under another recipe: training.seed was 0"):
        trainer_in(run, "training.seed=1", resume="auto")
    trainer_in(run, resume="auto").train()
    assert difference(outcome(whole), outcome(run)) is None


def test_one_run_directory_has_one_writer(tmp_path):
    run = tmp_path / "run"
    trainer = trainer_in(run)
    run.mkdir()
    with only_writer(run):
        with pytest.raises(RunDirectoryError, match="is being written by another process"):
            trainer.train()
        for resume in ("auto", "never"):  # refused before it loads a model
            with pytest.raises(RunDirectoryError, match="is being written by another process"):
                trainer_in(run, "model.model_name_or_path=there-is-none", resume=resume)
    assert not any(run.iterdir())
    trainer_in(run, resume="auto")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match=r"config.json could not be written \(No space left on device\)"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_the_estimate_is_the_size_of_a_checkpoint(whole):
    trainer = trainer_in(whole, "training.steps=3", resume="auto")
    real = sum(p.stat().st_size for p in (whole / "checkpoints/step_3").iterdir())
    assert checkpoint_bytes(trainer.parts.student) == pytest.approx(real, rel=0.1)


def test_keep_every_must_be_saved_at_all():
    with pytest.raises(ConfigError, match="keep_every = 3 is no multiple of training.save_every = 2"):
        load_config(RECIPE, ["training.save_every=2", "training.keep_every=3"])
