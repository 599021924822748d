"""Metrics as sums and counts, so that means are right over micro-batches of any size; and where the time went."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class PositionMeans:
    """Means over valid tokens of (B, T) quantities, overall and by response position.

    Position buckets are powers of two times 16 tokens wide (0-16, 16-32, 32-64, ...): drift is fastest early.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, mask: Tensor, **quantities: Tensor) -> None:
        """mask (B, T) bool; each quantity (B, T)."""
        count = mask.sum(0).double().cpu()
        for name, values in quantities.items():
            total = values.detach().masked_fill(~mask, 0).double().sum(0).cpu()
            self.sums[name] = _add_padded(self.sums.get(name), total)
            self.counts[name] = _add_padded(self.counts.get(name), count)

    def means(self, prefix: str) -> dict[str, float]:
        """``prefix/name`` and ``prefix/name/pos_<a>_<b>`` for every bucket that holds a token."""
        out = {}
        for name, sums in self.sums.items():
            counts = self.counts[name]
            out[f"{prefix}/{name}"] = (sums.sum() / counts.sum()).item()
            start, stop = 0, 16
            while start < len(sums):
                if counts[start:stop].sum() > 0:
                    mean = sums[start:stop].sum() / counts[start:stop].sum()
                    out[f"{prefix}/{name}/pos_{start}_{stop}"] = mean.item()
                start, stop = stop, 2 * stop
        return out


def _add_padded(total: Tensor | None, new: Tensor) -> Tensor:
    if total is None:
        return new
    longer, shorter = (total, new) if len(total) >= len(new) else (new, total)
    return longer + torch.nn.functional.pad(shorter, (0, len(longer) - len(shorter)))


class Stopwatch:
    """Seconds by phase. On an accelerator the phase's queued work is waited for, so that it is charged to its phase."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `name`."""
        began = time.perf_counter()
        yield
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - began


def repetition_rate(response_ids: Tensor, mask: Tensor, *, n: int = 8) -> float:
    """Share of n-grams that already stood earlier in the same rollout; response_ids and mask (B, T)."""
    repeated = total = 0
    for ids, valid in zip(response_ids.tolist(), mask.sum(-1).tolist(), strict=True):
        grams = [tuple(ids[i : i + n]) for i in range(valid - n + 1)]
        repeated, total = repeated + len(grams) - len(set(grams)), total + len(grams)
    return repeated / total if total else 0.0
