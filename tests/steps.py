"""One step from its bare parts, for tests that build no trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prune_opd.config import Config
from prune_opd.step import Reward, StepResult, prune_opd_step
from prune_opd.training.build import build_run
from prune_opd.types import Prompt


def step_of(
    *, step: int, prompts: Sequence[Sequence[int] | Prompt], config: Config, reward: Reward | None = None, **parts: Any
) -> StepResult:
    asked = [one if isinstance(one, Prompt) else Prompt("", tuple(one), None, "here") for one in prompts]
    return prune_opd_step(build_run(config, **parts), step, asked, reward)
