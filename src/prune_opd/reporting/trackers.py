"""Optional trackers, each only when the recipe asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prune_opd.errors import ConfigError

Log = Callable[[dict[str, float], int], None]


def start_trackers(names: Sequence[str], run_dir: Path, settings: dict[str, Any]) -> list[Log]:
    """One `log(metrics, step)` for each name; raises ConfigError when its package is not installed."""
    starters = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
    logs = []
    for name in names:
        try:
            logs.append(starters[name](run_dir, settings))
        except ImportError as error:
            raise ConfigError(
                f"tracking.report_to names {name}, which is not installed ({error}); "
                "run `pip install prune-opd[trackers]` or take it out"
            ) from None
    return logs


def _tensorboard(run_dir: Path, settings: dict[str, Any]) -> Log:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def _wandb(run_dir: Path, settings: dict[str, Any]) -> Log:
    import wandb

    run = wandb.init(project="prune-opd", name=run_dir.name, dir=str(run_dir), config=settings)
    return lambda metrics, step: run.log(metrics, step=step)


def _trackio(run_dir: Path, settings: dict[str, Any]) -> Log:
    import trackio

    trackio.init(project="prune-opd", name=run_dir.name, config=settings)
    return lambda metrics, step: trackio.log(metrics, step=step)
