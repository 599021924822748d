"""One step from its bare parts, for tests that build no trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prune_opd.config import Config
from prune_opd.step import Reward, StepResult, prune_opd_step
from prune_opd.training.build import build_run


def step_of(
    *, step: int, prompts: Sequence[Sequence[int]], config: Config, reward: Reward | None = None, **parts: Any
) -> StepResult:
    return prune_opd_step(build_run(config, **parts), step, prompts, reward)
