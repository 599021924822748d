"""Optional trackers, each only when the recipe asks for it: numbers of each step, and now and then a picture."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from prune_opd.config import TrackingSection
from prune_opd.errors import ConfigError

PROJECT, PICTURE, IDENTITY = "prune-opd", "prune_opd/overlap_and_window", "tracking.json"


class Tracker(Protocol):
    """Somewhere that numbers and pictures go besides the run directory."""

    def numbers(self, metrics: Mapping[str, float], step: int) -> None:
        """The metrics of a step."""
        ...

    def picture(self, pixels: np.ndarray, step: int) -> None:
        """The run up to a step, (height, width, 3) uint8."""
        ...

    def close(self) -> None:
        """Nothing more follows."""
        ...


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run.

    identity: the same each time that the run goes on, and of no other run · next_step: the first that is still to come.
    """

    run_dir: Path
    name: str
    group: str | None
    identity: str
    next_step: int
    settings: Mapping[str, Any]


def start_trackers(
    tracking: TrackingSection, run_dir: Path, settings: Mapping[str, Any], next_step: int
) -> list[Tracker]:
    """One tracker for each name of `tracking.report_to`; ConfigError when its package is not installed.

    The identity of the run is kept in its directory, so that a run which goes on goes on in the tracker too.
    """
    if not tracking.report_to:
        return []
    path = run_dir / IDENTITY
    if not path.is_file():
        path.write_text(json.dumps({"identity": secrets.token_hex(8)}), encoding="utf-8")
    name = tracking.run_name or "-".join(filter(None, (tracking.group, run_dir.name)))
    identity = json.loads(path.read_text(encoding="utf-8"))["identity"]
    run = TrackedRun(run_dir, name, tracking.group, identity, next_step, settings)
    kinds: dict[str, Callable[[TrackedRun], Tracker]] = {
        "tensorboard": TensorBoard,
        "wandb": start_wandb,
        "trackio": start_trackio,
    }
    trackers = []
    for kind in tracking.report_to:
        try:
            trackers.append(kinds[kind](run))
        except ImportError as error:
            raise ConfigError(
                f"tracking.report_to names {kind}, which is not installed ({error}); "
                "run `pip install prune-opd[trackers]` or take it out"
            ) from None
    return trackers


class TensorBoard:
    """Event files in the run directory; those of steps that are done again are dropped."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.run_dir / "tensorboard"), purge_step=run.next_step)

    def numbers(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def picture(self, pixels: np.ndarray, step: int) -> None:
        """See `Tracker`."""
        self.writer.add_image(PICTURE, pixels, step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        """See `Tracker`."""
        self.writer.close()


@dataclass(frozen=True)
class LoggedRun:
    """A run of Weights & Biases, or of trackio, whose runs are used in the same way. image: makes one of pixels."""

    run: Any
    image: Callable[[np.ndarray], Any]

    def numbers(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self.run.log(dict(metrics), step=step)

    def picture(self, pixels: np.ndarray, step: int) -> None:
        """See `Tracker`."""
        self.run.log({PICTURE: self.image(pixels)}, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self.run.finish()


def start_wandb(run: TrackedRun) -> LoggedRun:
    """Weights & Biases; WANDB_MODE, WANDB_PROJECT and its other variables hold."""
    import wandb

    started = wandb.init(
        project=PROJECT,
        name=run.name,
        group=run.group,
        id=run.identity,
        resume="allow",
        dir=str(run.run_dir),
        config=dict(run.settings),
    )
    return LoggedRun(started, wandb.Image)


def start_trackio(run: TrackedRun) -> LoggedRun:
    """trackio, which knows runs by their names: the identity is part of it."""
    import trackio

    started = trackio.init(
        PROJECT, name=f"{run.name}-{run.identity}", group=run.group, resume="allow", config=dict(run.settings)
    )
    return LoggedRun(started, trackio.Image)
