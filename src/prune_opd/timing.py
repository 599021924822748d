"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds by phase; a phase inside another is not part of the outer one.

    On an accelerator the phase's queued work is waited for, so that it is charged to its phase.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `name`."""
        inside_before = sum(self.seconds.values())
        began = time.perf_counter()
        yield
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        inside = sum(self.seconds.values()) - inside_before
        self.seconds[name] += time.perf_counter() - began - inside
