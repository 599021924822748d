"""Checkpoints that continue exactly: weights, optimiser, schedule, window, random state, step.

A checkpoint is a folder `checkpoints/step_N` that Hugging Face loads as a model, plus what training needs. It is
written aside and renamed, so a folder with that name is always whole. The data position needs no entry: prompts and
sampling numbers are functions of (seed, step).
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from prune_opd.config import Config
from prune_opd.core.window import TrainingWindow
from prune_opd.errors import CheckpointError

# What may differ between the run that saved and the run that resumes; anything else would be another experiment.
FREE_TO_CHANGE = {
    ("model", "teacher_model_server_url"),
    ("training", "steps"),
    ("training", "save_every"),
    ("training", "keep_last"),
} | {("training", name) for name in ("threads", "device", "micro_batch_tokens", "gradient_checkpointing")}
FREE_SECTIONS = {"tracking", "evaluation"}


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: Any,
    tokenizer: Any,
    optimizer: Optimizer,
    schedule: LRScheduler,
    window: TrainingWindow | None,
    totals: dict[str, float],
    config: Config,
) -> Path:
    """Write `folder/step_N` and return it. `totals` are running sums of the run (tokens, seconds)."""
    final, aside = folder / f"step_{step}", folder / f".step_{step}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    # One file whatever the size, so that reading it back needs no index.
    model.save_pretrained(aside, max_shard_size="1TB")
    tokenizer.save_pretrained(aside)
    random_state = {"cpu": torch.get_rng_state()}
    if torch.accelerator.is_available():
        random_state["accelerator"] = torch.get_device_module().get_rng_state()
    torch.save({"optimizer": optimizer.state_dict(), "random": random_state}, aside / "optimizer.pt")
    state = {
        "step": step,
        "schedule": schedule.state_dict(),
        "window": window.state_dict() if window else None,
        "totals": totals,
        "config": config.model_dump(),
    }
    (aside / "trainer_state.json").write_text(json.dumps(state, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)
    return final


def load_checkpoint(
    checkpoint: Path,
    *,
    model: torch.nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    window: TrainingWindow | None,
    config: Config,
) -> tuple[int, dict[str, Any]]:
    """Put everything back; returns (steps done, totals). Raises CheckpointError when it cannot or must not be used."""
    state_file = checkpoint / "trainer_state.json"
    try:
        state = json.loads(state_file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint} is no usable checkpoint ({error}); give a folder checkpoints/step_N of a run"
        ) from None
    differing = _differences(state["config"], config.model_dump())
    if differing:
        name, old, new = differing[0]
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise CheckpointError(
            f"{checkpoint} was written under another recipe: {name} was {old!r}, is now {new!r}{more}; "
            "resume with the recipe of that run, or start a new run directory"
        )
    try:
        if hasattr(model, "peft_config"):
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
        else:
            load_model(model, checkpoint / "model.safetensors")  # knows tied weights; strict
        bulk = torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu")
        optimizer.load_state_dict(bulk["optimizer"])
    except (OSError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{checkpoint} is damaged or incomplete ({error}); resume from an earlier one") from error
    schedule.load_state_dict(state["schedule"])
    if window is not None and state["window"] is not None:
        window.load_state_dict(state["window"])
    torch.set_rng_state(bulk["random"]["cpu"])
    if "accelerator" in bulk["random"] and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(bulk["random"]["accelerator"])
    return state["step"], state["totals"]


def latest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint with the highest step, or None."""
    found = [p for p in folder.glob("step_*") if (p / "trainer_state.json").is_file()]
    return max(found, key=lambda p: int(p.name.removeprefix("step_")), default=None)


def remove_old_checkpoints(folder: Path, keep_last: int) -> None:
    """Delete all but the `keep_last` newest checkpoints."""
    found = sorted(folder.glob("step_*"), key=lambda p: int(p.name.removeprefix("step_")))
    for checkpoint in found[:-keep_last]:
        shutil.rmtree(checkpoint)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [
        (f"{section}.{name}", old.get(section, {}).get(name), value)
        for section, values in new.items()
        if section not in FREE_SECTIONS
        for name, value in values.items()
        if (section, name) not in FREE_TO_CHANGE and old.get(section, {}).get(name) != value
    ]
