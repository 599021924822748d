"""What the process that writes needs of a step of all ranks: numbers of rollouts and sums, not the rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.distributed.world import World


@dataclass(frozen=True)
class Share:
    """What one rank has to tell of its rollouts; `merged` makes one of all.

    numbers: which of the step's rollouts these are · rows: of each of them, tensors (B,) or lists · sums: tensors () or
    (T,) that add up over the ranks, the shorter padded with zeros · peaks: numbers of which the largest counts.
    """

    numbers: Sequence[int]
    rows: dict[str, Tensor | list[Any]]
    sums: dict[str, Tensor] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)


def merged(share: Share, world: World) -> Share | None:
    """On rank 0 the shares of all ranks as one process would have them; None on the other ranks."""
    if world.size == 1:
        return share
    found: list[Any] | None = [share] * world.size if world.rank == 0 else None
    dist.gather_object(_on_cpu(share), found)
    if found is None:
        return None
    full: list[Share] = [one for one in found if one.numbers]  # a rank without a rollout has its counts to tell
    numbers = [number for one in full for number in one.numbers]
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    rows: dict[str, Tensor | list[Any]] = {}
    for name, first in full[0].rows.items():
        parts: list[Any] = [one.rows[name] for one in full]
        everyone = torch.cat(parts) if isinstance(first, Tensor) else [item for part in parts for item in part]
        rows[name] = everyone[order] if isinstance(everyone, Tensor) else [everyone[i] for i in order]
    sums = {name: _total([one.sums[name] for one in found if name in one.sums]) for name in full[0].sums}
    peaks = {name: max(one.peaks[name] for one in full) for name in full[0].peaks}
    return Share([numbers[i] for i in order], rows, sums, peaks)


def _total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors () or (T,), in the order of ranks."""
    if parts[0].dim() == 0:
        return torch.stack(list(parts)).sum()
    total = parts[0].new_zeros(max(len(part) for part in parts))
    for part in parts:
        total[: len(part)] += part
    return total


def _on_cpu(share: Share) -> Share:
    rows = {name: row.cpu() if isinstance(row, Tensor) else row for name, row in share.rows.items()}
    return Share(share.numbers, rows, {name: value.cpu() for name, value in share.sums.items()}, share.peaks)
