"""What a number depends on besides the recipe: machine, versions, the random state of libraries."""

from __future__ import annotations

import os
import platform
import random
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the generators that libraries draw from; sampling has its own numbers (`rollout_uniforms`)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def environment(device: torch.device) -> dict[str, Any]:
    """What a number depends on besides the recipe."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        **{name: version(name) for name in ("prune-opd", "torch", "transformers", "tokenizers", "safetensors")},
    }
