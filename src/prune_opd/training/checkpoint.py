"""Checkpoints that continue exactly: weights, optimiser, schedule, window, random state, step.

A checkpoint is a folder `checkpoints/step_N` that Hugging Face loads as a model, plus what training needs. It is
written aside, flushed to the disk and renamed, and its manifest has the size and SHA-256 of every file: what a crash
or a bad disk left of one is recognised and never resumed from. The data position needs no entry: prompts and sampling
numbers are functions of (seed, step).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, StringConstraints, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from prune_opd.config import Config
from prune_opd.core.budget import TokenBudget
from prune_opd.core.window import LengthSchedule, TrainingWindow
from prune_opd.distributed import sharding as distributed
from prune_opd.distributed.world import ALONE, World, from_another_rank
from prune_opd.errors import CheckpointError, NonFiniteError, StorageError
from prune_opd.training.files import not_written, storage_errors, sync, write_json
from prune_opd.training.moving_teacher import MovingTeacher
from prune_opd.training.optimizer_state import load_optimizer, save_optimizer

# What may differ between the run that saved and the run that resumes; anything else would be another experiment.
FREE_TO_CHANGE = {
    *(("model", name) for name in ("teacher_model_server_url", "teacher_placement", "compile", "attn_implementation")),
    *(("rollout", name) for name in ("vllm_server_url", "vllm_server")),
    *(("training", name) for name in ("steps", "save_every", "keep_last", "keep_every", "max_skipped_steps")),
    *(("training", name) for name in ("threads", "device", "parallel", "micro_batch_tokens", "gradient_checkpointing")),
}
FREE_SECTIONS = {"tracking", "evaluation"}

MANIFEST, STATE, RANDOM = "manifest.json", "trainer_state.json", "random_state.safetensors"
TEACHER = "teacher.safetensors"  # where it moves


Content = TypeVar("Content", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_Strict):
    """Size in bytes and SHA-256 (hexadecimal) of one file."""

    size: NonNegativeInt
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class Manifest(_Strict):
    """Every other file of a checkpoint, by its path within it."""

    step: NonNegativeInt
    files: dict[str, FileEntry]

    @field_validator("files")
    @classmethod
    def _stays_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
                raise ValueError(f"{name!r} is no path within the checkpoint")
        if STATE not in files:
            raise ValueError(f"{STATE} is missing")
        return files


@dataclass
class Totals:
    """Running sums of a run; part of its checkpoints, so that a resumed run reports the whole.

    updates: optimiser steps that usual_grad_norm, a running geometric mean, was made of.
    """

    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    student_tokens: int = 0
    teacher_tokens: int = 0
    saved_tokens: int = 0
    skipped_steps: int = 0
    updates: int = 0
    usual_grad_norm: float | None = None


class TrainerState(_Strict):
    """What `trainer_state.json` holds.

    unlogged: the metrics record of a last step whose evaluation was cut off by a signal and is still to be done.
    """

    step: NonNegativeInt
    schedule: dict[str, Any]
    window: dict[str, int] | None
    budget: dict[str, int] | None = None
    totals: Totals
    config: dict[str, Any]
    unlogged: dict[str, Any] | None


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: Any,
    tokenizer: Any,
    optimizer: Optimizer,
    schedule: LRScheduler,
    window: TrainingWindow | LengthSchedule | None,
    budget: TokenBudget | None,
    teacher: MovingTeacher | None,
    totals: Totals,
    config: Config,
    unlogged: dict[str, Any] | None = None,
    card: str = "",
    world: World = ALONE,
) -> Path:
    """Write `folder/step_N`, read it back from the disk against its manifest, and return it.

    card: what its README.md says to whoever loads the model. All ranks call it and rank 0 writes, except that of a
    sharded student each rank writes its share of the optimiser.

    Raises NonFiniteError when a weight is NaN or infinite, and StorageError when it cannot be written whole; earlier
    checkpoints stay as they were.
    """
    _check_weights(step, model, world)
    final, aside = folder / f"step_{step}", folder / f".step_{step}.partial"
    state = TrainerState(
        step=step,
        schedule=schedule.state_dict(),
        window=window.state_dict() if window else None,
        budget=budget.state_dict() if budget else None,
        totals=totals,
        config=config.model_dump(),
        unlogged=unlogged,
    )
    random_state = {"cpu": torch.get_rng_state()}
    if torch.accelerator.is_available():
        random_state["accelerator"] = torch.get_device_module().get_rng_state()
    sharded = distributed.is_sharded(model)
    try:
        with storage_errors(final):
            if world.rank == 0:
                aside.mkdir(parents=True)
            world.gather(None)  # the folder is there
            weights = distributed.whole_weights(model, world) if sharded else None
            _save_shares(final, aside, model, optimizer, world)
            if world.rank > 0:
                world.gather(None)  # the folder has its name
                return final
            # One file whatever the size, so that reading it back needs no index.
            model.save_pretrained(aside, max_shard_size="1TB", state_dict=weights)
            tokenizer.save_pretrained(aside)
            (aside / "README.md").write_text(card, encoding="utf-8")
            save_file(random_state, aside / RANDOM)
            if teacher:
                save_file(teacher.state_dict(), aside / TEACHER)
            write_json(aside / STATE, state.model_dump(mode="json"))
            _write_manifest(aside, step)
            if final.exists():  # a damaged one of the same step, or a copy of this one
                os.replace(final, folder / f".step_{step}.removed")
            os.replace(aside, final)
            sync(folder)
        damage = damage_of(final, from_disk=True)
    except (StorageError, RuntimeError, SafetensorError) as error:  # safetensors has errors of its own
        shutil.rmtree(aside, ignore_errors=True)  # its room may be what the logs need now
        if isinstance(error, StorageError) or from_another_rank(error):
            raise
        raise not_written(final, error) from error
    world.gather(None)
    if damage:
        raise StorageError(f"{final} was written but reads back damaged ({damage}); check the disk")
    return final


def _check_weights(step: int, model: torch.nn.Module, world: World) -> None:
    held = ((name, getattr(p, "to_local", lambda p=p: p)()) for name, p in model.named_parameters() if p.requires_grad)
    mine = next((name for name, values in held if not values.isfinite().all()), None)
    broken = world.first(mine)
    if broken:
        raise NonFiniteError(f"step {step}: the weight {broken} is not finite, so no checkpoint of it was written")


def _save_shares(final: Path, aside: Path, model: torch.nn.Module, optimizer: Optimizer, world: World) -> None:
    """Every rank writes its share of the optimiser; StorageError on all ranks when one of them cannot."""
    try:
        save_optimizer(aside, model, optimizer, world)
        failed = None
    except (OSError, SafetensorError) as error:
        failed = f"rank {world.rank}: {error}"
    if failed := world.first(failed):
        raise not_written(final, failed)


def _write_manifest(folder: Path, step: int) -> None:
    """Flush every file of a checkpoint to the disk, and write down what each of them is."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    entries = {p.relative_to(folder).as_posix(): FileEntry(size=p.stat().st_size, sha256=sha256(p)) for p in files}
    write_json(folder / MANIFEST, Manifest(step=step, files=entries).model_dump())
    for path in [p for p in folder.rglob("*") if p.is_dir()]:
        sync(path)


def load_weights(checkpoint: Path, model: torch.nn.Module, config: Config) -> None:
    """Put the student's weights back, before it is sharded, from a checkpoint that was found whole (`damage_of`).

    Raises CheckpointError when it is of another recipe, or does not fit.
    """
    try:
        state = _read(checkpoint / STATE, TrainerState)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint} is damaged or incomplete ({error}); resume from an earlier one") from None
    check_same_recipe(state.config, config, str(checkpoint))
    with _misfit(checkpoint):
        if hasattr(model, "peft_config"):
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
        else:
            load_model(model, checkpoint / "model.safetensors")  # knows tied weights; strict


def load_training_state(
    checkpoint: Path,
    *,
    model: torch.nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    window: TrainingWindow | LengthSchedule | None,
    budget: TokenBudget | None,
    teacher: MovingTeacher | None,
) -> TrainerState:
    """Put back everything else, after `load_weights`; returns what was saved. CheckpointError when it does not fit.

    The run may have had another number of ranks, and may have been sharded or not.
    """
    state = _read(checkpoint / STATE, TrainerState)
    with _misfit(checkpoint):
        random_state = load_file(checkpoint / RANDOM)
        load_optimizer(checkpoint, model, optimizer)
        if state.totals.updates and not optimizer.state:
            raise ValueError("the optimiser's state is missing")
        schedule.load_state_dict(state.schedule)
        for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        if window is not None and state.window is not None:
            window.load_state_dict(state.window)
        if budget is not None:  # without a state, it was set after the steps so far
            budget.load_state_dict(state.budget or {"prompts": budget.prompts, "first": state.step * budget.prompts})
        if teacher:
            teacher.load_state_dict(load_file(checkpoint / TEACHER))
        torch.set_rng_state(random_state["cpu"])
        if "accelerator" in random_state and torch.accelerator.is_available():
            torch.get_device_module().set_rng_state(random_state["accelerator"])
    return state


@contextmanager
def _misfit(checkpoint: Path) -> Iterator[None]:
    """What safetensors and load_state_dict raise on files that are not what they should be."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"{checkpoint} does not fit this model or is damaged ({error}); resume from an earlier one"
        ) from error


def latest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The whole checkpoint with the highest step, or None; and why each one that was passed over is not whole."""
    passed_over = [f"{path} was never finished" for path in leftovers(folder)]
    for checkpoint in reversed(checkpoints(folder)):
        damage = damage_of(checkpoint)
        if damage is None:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint} is damaged or incomplete ({damage})")
    return None, passed_over


def checkpoints(folder: Path) -> list[Path]:
    """The folders step_N, whole or not, by step."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """N of a folder step_N."""
    return int(checkpoint.name.removeprefix("step_"))


def leftovers(folder: Path) -> list[Path]:
    """Half-written and half-removed checkpoints of a run that was killed."""
    return sorted(path for path in folder.glob(".step_*") if path.suffix in (".partial", ".removed"))


def remove_old_checkpoints(folder: Path, *, keep_last: int, keep_every: int | None) -> None:
    """Delete all but the `keep_last` newest checkpoints and those of steps that `keep_every` divides.

    Call it after `save_checkpoint`, which has read the newest one back.
    """
    for checkpoint in checkpoints(folder)[:-keep_last]:
        if keep_every is None or step_of(checkpoint) % keep_every:
            with storage_errors(checkpoint):
                gone = checkpoint.with_name(f".{checkpoint.name}.removed")
                os.replace(checkpoint, gone)  # first, since half of a folder must not look like a checkpoint
                shutil.rmtree(gone)


def tidy(folder: Path, step: int) -> list[Path]:
    """Make the folder of a dead run that goes on from `step` what it would be in a run that had not died.

    Half of a checkpoint goes. A later checkpoint, damaged or another future of the run, is renamed to
    superseded_step_N; those are returned.
    """
    moved = []
    with storage_errors(folder):
        for half in leftovers(folder):
            shutil.rmtree(half)
        for checkpoint in checkpoints(folder):
            if step_of(checkpoint) > step:
                aside = checkpoint.with_name(f"superseded_{checkpoint.name}")
                if aside.exists():
                    shutil.rmtree(aside)
                os.replace(checkpoint, aside)
                moved.append(aside)
    return moved


def checkpoint_bytes(model: torch.nn.Module) -> int:
    """What one checkpoint takes on disk: weights (with adapters, those alone) and AdamW's two moments."""
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    saved = trained if hasattr(model, "peft_config") else sum(p.nbytes for p in model.parameters())
    return saved + 2 * trained


def damage_of(checkpoint: Path, *, from_disk: bool = False) -> str | None:
    """Why a checkpoint is not whole, or None. Reads every file; `from_disk`: past the page cache, where that works."""
    try:
        manifest = _read(checkpoint / MANIFEST, Manifest)
        for name, entry in manifest.files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry.size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {entry.size:,}"
            if sha256(path, from_disk=from_disk) != entry.sha256:
                return f"{name} has changed since it was written: another SHA-256"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return str(error)
    return None


def sha256(path: Path, *, from_disk: bool = False) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_same_recipe(saved: dict[str, Any], config: Config, where: str) -> None:
    """CheckpointError when a saved config differs from `config` in a setting that shapes the run."""
    try:
        old = Config.model_validate(saved).model_dump()  # settings that are newer than the run get their defaults
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{where} holds settings that this version does not take ({'.'.join(map(str, first['loc']))}: "
            f"{first['msg']}); resume with the version that wrote it"
        ) from None
    differing = [
        (f"{section}.{name}", old[section].get(name), value)
        for section, values in config.model_dump().items()
        if section not in FREE_SECTIONS
        for name, value in values.items()
        if (section, name) not in FREE_TO_CHANGE and old[section].get(name) != value
    ]
    if differing:
        name, was, now = differing[0]
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise CheckpointError(
            f"{where} was written under another recipe: {name} was {was!r}, is now {now!r}{more}; "
            "resume with the recipe of that run, or start a new run directory"
        )


def _read(path: Path, kind: type[Content]) -> Content:
    """A JSON file of a checkpoint, checked; CheckpointError says what is wrong with it."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path.name} is not valid: {'.'.join(map(str, first['loc']))} {first['msg']}") from None
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from None
