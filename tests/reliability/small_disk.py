"""Runs on a file system of a few megabytes, in a mount namespace of its own; prints what happened as JSON.

unshare -rm python tests/reliability/small_disk.py FOLDER
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from kills import RECIPE, SMALL, difference, outcome
from rich.console import Console

from prune_opd.config import load_config
from prune_opd.errors import StorageError
from prune_opd.training.checkpoint import checkpoint_bytes, damage_of
from prune_opd.training.trainer import Trainer

SETTINGS = [*SMALL, "evaluation.num_problems=1", "evaluation.every=9"]


def mount(folder: Path, size: int) -> Path:
    """A tmpfs of `size` bytes."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    return folder


def trainer_in(run_dir: Path, resume: str = "never") -> Trainer:
    return Trainer(load_config(RECIPE, SETTINGS), run_dir, resume=resume, console=Console(quiet=True))


def error_of(action) -> str | None:
    try:
        action()
    except StorageError as error:
        return str(error)
    return None


def main() -> None:
    """See the module's text."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    whole = trainer_in(folder / "whole")
    whole.train()
    size = checkpoint_bytes(whole.parts.student)
    found = {}

    tiny = mount(folder / "tiny", size)
    found["foreseen"] = error_of(lambda: trainer_in(tiny / "run"))
    found["foreseen wrote"] = [path.name for path in tiny.rglob("*")]

    disk = mount(folder / "disk", 3 * size)
    trainer = trainer_in(disk / "run")
    save, ballast = trainer._save, disk / "ballast"

    def fill() -> None:
        """Before the third checkpoint somebody else fills the disk, but for a little less than one takes."""
        if trainer.steps_done == 3:
            ballast.write_bytes(bytes(shutil.disk_usage(disk).free - size // 2))
        save()

    trainer._save = fill  # type: ignore[method-assign]
    found["full"] = error_of(trainer.train)
    found["full left"] = sorted(path.name for path in (disk / "run/checkpoints").iterdir())
    found["full damage"] = damage_of(disk / "run/checkpoints/step_2")
    del trainer
    ballast.unlink()
    trainer_in(disk / "run", "auto").train()
    found["full difference"] = difference(outcome(folder / "whole"), outcome(disk / "run"))

    logs = mount(folder / "logs", 4 * size)
    trainer = trainer_in(logs / "run")
    step = trainer._step

    def fill_all(number: int) -> dict:
        if number == 1:
            with (logs / "ballast").open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
        return step(number)

    trainer._step = fill_all  # type: ignore[method-assign]
    found["log"] = error_of(trainer.train)
    found["log left"] = sorted(path.name for path in (logs / "run/checkpoints").iterdir())
    (logs / "ballast").unlink()
    trainer_in(logs / "run", "auto").train()
    found["log difference"] = difference(outcome(folder / "whole"), outcome(logs / "run"))

    subprocess.run(["mount", "-o", "remount,ro", str(logs)], check=True)
    found["read-only"] = error_of(lambda: trainer_in(logs / "other"))
    found["read-only, resumed"] = error_of(lambda: trainer_in(logs / "run", "auto"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
