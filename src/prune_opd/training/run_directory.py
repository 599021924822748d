"""The folder of one run: where it may begin or go on, and what is written into it before, during and after."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from prune_opd.config import Config
from prune_opd.distributed.world import World
from prune_opd.errors import CheckpointError, RunDirectoryError
from prune_opd.reporting.model_card import model_card
from prune_opd.reporting.records import Settings, read_object
from prune_opd.teachers.base import Teacher
from prune_opd.training.build import Parts
from prune_opd.training.build_teachers import remember_teacher
from prune_opd.training.calibration import CALIBRATION
from prune_opd.training.checkpoint import (
    Totals,
    check_same_recipe,
    checkpoint_bytes,
    checkpoints,
    damage_of,
    latest_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
    tidy,
)
from prune_opd.training.environment import environment
from prune_opd.training.files import check_room, log_end, storage_errors, sync, write_json

FIRST_FILES = {CALIBRATION, f".{CALIBRATION}.partial", ".config.json.partial"}  # that come before config.json
LOGS = ("metrics.jsonl", "drift.jsonl", "rollouts.jsonl", "skipped.jsonl")


@dataclass
class RunDirectory:
    """`path` holds config.json, env.json, the logs and `checkpoints/`. Rank 0 alone writes. note: says a warning."""

    path: Path
    world: World
    console: Console
    note: Callable[[str], None]
    log_ends: dict[str, int] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint_to_resume(self, resume: str, config: Config) -> Path | None:
        """The checkpoint to continue from, every byte of it verified; None to begin. Nothing is ever overwritten.

        Raises RunDirectoryError, CheckpointError or StorageError where the run can neither begin nor go on here.
        """
        if resume not in ("never", "auto"):
            return self._named_checkpoint(Path(resume))
        if not self.path.exists() or not any(self.path.iterdir()):
            return None
        if resume == "never":
            raise RunDirectoryError(
                f"{self.path} exists and is not empty; runs are never overwritten. Choose another --output-dir, "
                "or continue it with --resume auto"
            )
        found, passed_over = latest_checkpoint(self.checkpoints)
        for reason in passed_over:
            self.note(f"not resuming from a checkpoint: {reason}")
        if found is not None:
            return found
        if checkpoints(self.checkpoints):
            raise CheckpointError(
                f"{self.checkpoints} holds checkpoints, but none is whole ({passed_over[-1]}); bring one back from a "
                "copy, or start a new run directory"
            )
        # The run died before its first checkpoint: it begins anew, if the directory is that of such a run.
        config_file = self.path / "config.json"
        if config_file.is_file():
            check_same_recipe(read_object(config_file, Settings, CheckpointError), config, str(config_file))
        elif {path.name for path in self.path.iterdir()} - FIRST_FILES:
            raise RunDirectoryError(
                f"{self.path} exists and is not empty, and is no run directory: it has no config.json. "
                "Choose another --output-dir"
            )
        self.note(f"{self.path} holds no checkpoint; beginning at step 0")
        return None

    def _named_checkpoint(self, checkpoint: Path) -> Path:
        if not os.path.isfile(checkpoint / "trainer_state.json"):  # which takes names that no file can have
            raise CheckpointError(f"{checkpoint} is no checkpoint; give a folder checkpoints/step_N of a run")
        if checkpoint.resolve().parents[1] != self.path.resolve():
            raise CheckpointError(
                f"{checkpoint} belongs to the run {checkpoint.resolve().parents[1]}, not to {self.path}; "
                "give that run's directory as --output-dir, or leave it out"
            )
        if damage := damage_of(checkpoint):
            raise CheckpointError(f"{checkpoint} is damaged or incomplete ({damage}); resume from an earlier one")
        return checkpoint

    def check(self, parts: Parts, last_logged: Mapping[str, int], steps_done: int) -> None:
        """Find what would stop the run later: a log that is damaged, or no room for the checkpoints to come.

        last_logged: the last step of each log that stays; what a dead run wrote after it goes in `begin`.
        """
        found = {name: log_end(self.path / name, step) for name, step in last_logged.items()}
        self.log_ends = {name: end for name, (end, _) in found.items()}
        for name in ("metrics.jsonl", "drift.jsonl") if steps_done else ():
            wanted, last = last_logged[name], found[name][1]
            if last is None or (last < wanted and name == "metrics.jsonl"):  # a skipped step has no drift
                what = "is gone or empty" if last is None else f"ends with step {last}"
                self.note(
                    f"{self.path / name} {what}, though the checkpoint is of step {steps_done}: the run goes on, and "
                    "what is shown of it later lacks those steps. Put the file back first if you have a copy"
                )
        training, there = parts.config.training, len(checkpoints(self.checkpoints))

        def multiples(period: int) -> int:
            return training.steps // period - steps_done // period

        saves = multiples(training.save_every) + (training.steps % training.save_every != 0)
        # One more than is kept, since the new one is written and read back before an old one goes.
        count = max(0, min(training.keep_last + 1, there + saves) - there)
        if training.keep_every:
            count += multiples(training.keep_every)
        check_room(
            self.path,
            count * (checkpoint_bytes(parts.student) + parts.teacher_bytes),
            f"the {count} checkpoints to come",
        )

    def begin(self, parts: Parts, teacher: Teacher, steps_done: int) -> None:
        """What changes the directory before the first step. A run that dies within it can be resumed like any."""
        for moved in tidy(self.checkpoints, steps_done):
            self.note(f"set aside as {moved}: it is not whole, or lies after the step that this run goes on from")
        self._remove_old_checkpoints(parts.config)
        for name, end in self.log_ends.items():
            path = self.path / name
            if path.exists() and path.stat().st_size > end:
                with storage_errors(path):
                    os.truncate(path, end)
        if parts.calibration is not None:  # before config.json, whose threshold is from there
            write_json(self.path / CALIBRATION, parts.calibration)
        write_json(self.path / "config.json", parts.config.model_dump())
        write_json(self.path / "env.json", environment(parts.student.device) | {"processes": self.world.size})
        remember_teacher(teacher, self.path)

    def save(self, parts: Parts, step: int, totals: Totals, unlogged: dict[str, Any] | None) -> None:
        """Write the checkpoint of this step and its model card, then remove what `keep_last` no longer keeps."""
        began, writes = time.perf_counter(), self.world.rank == 0
        for name in LOGS if writes else ():  # so that a checkpoint on the disk has its log on the disk
            if (self.path / name).exists():
                with storage_errors(self.path / name):
                    sync(self.path / name)
        card = model_card(self.path) if writes else None
        saved = save_checkpoint(
            self.checkpoints,
            step=step,
            model=parts.student,
            tokenizer=parts.tokenizer,
            optimizer=parts.optimizer,
            schedule=parts.schedule,
            window=parts.run.window,
            budget=parts.run.budget,
            teacher=parts.moving_teacher,
            totals=totals,
            config=parts.config,
            unlogged=unlogged,
            card=str(card),
            world=self.world,
        )
        if card is None:
            return
        with storage_errors(self.path / "README.md"):
            card.save(self.path / "README.md")
        self._remove_old_checkpoints(parts.config)
        size = sum(path.stat().st_size for path in saved.rglob("*"))
        self.console.print(
            f"  saved {saved}, {size / 1e6:,.1f} MB in {time.perf_counter() - began:.1f} s", style="dim", soft_wrap=True
        )

    def _remove_old_checkpoints(self, config: Config) -> None:
        training = config.training
        remove_old_checkpoints(self.checkpoints, keep_last=training.keep_last, keep_every=training.keep_every)
