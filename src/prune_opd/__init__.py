"""Prune-OPD: on-policy distillation that stops learning from rollouts once they drift from the teacher.

Names are imported on first use, so that `import prune_opd.config` does not pay for torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "topk_overlap": "core.overlap",
    "overlap_mass": "core.overlap",
    "nucleus_accept": "core.overlap",
    "drift_report": "core.drift",
    "DriftReport": "core.drift",
    "DriftMonitor": "core.drift",
    "TrainingWindow": "core.window",
    "topk_reverse_kl": "core.objective",
    "Config": "config",
    "load_config": "config",
    "Trainer": "training.trainer",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prune_opd' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"prune_opd.{_HOMES[name]}"), name)
