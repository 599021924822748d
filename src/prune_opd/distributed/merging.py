"""One result of all ranks, for the process that writes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.distributed.world import World

T = TypeVar("T")


def merged(result: T, world: World, *, same: Collection[str]) -> T | None:
    """On rank 0 a dataclass of the rollouts of all ranks, in the order of one process; None on the others.

    result.numbers: which of the step's rollouts a rank has. Tensors (B, ...) and sequences go side by side, whole
    numbers add up; the fields `same`, of the step and not of a rollout, are rank 0's.
    """
    if world.size == 1:
        return result
    found: list[Any] | None = [result] * world.size if world.rank == 0 else None
    dist.gather_object(_to(result, "cpu"), found)
    if found is None:
        return None
    order = torch.tensor([number for one in found for number in one.numbers]).argsort()
    own: Any = result
    kept = {name: getattr(own, name) for name in same}
    # Counts of ranks without a rollout too.
    counts = {
        f.name: sum(getattr(one, f.name) for one in found) for f in fields(own) if isinstance(getattr(own, f.name), int)
    }
    parts = [replace(one, **dict.fromkeys(same)) for one in found if one.numbers]
    return _to(replace(_together(parts, order), **kept, **counts), own.rollouts.response_ids.device)


def _together(parts: Sequence[Any], order: Tensor) -> Any:
    """The same field of several results as one: rollouts side by side, right-padded to one length; counts added up."""
    first = parts[0]
    if is_dataclass(first) and not isinstance(first, type):
        return replace(first, **{f.name: _together([getattr(p, f.name) for p in parts], order) for f in fields(first)})
    if isinstance(first, Tensor):
        width = max(part.shape[1] for part in parts) if first.dim() > 1 else 0
        padded = [_widened(part, width) if part.dim() > 1 else part for part in parts]
        return torch.cat(padded)[order]
    if isinstance(first, int) and not isinstance(first, bool):
        return sum(parts)
    if isinstance(first, list | tuple):
        everyone = [item for part in parts for item in part]
        return [everyone[i] for i in order.tolist()]
    return first


def _widened(tensor: Tensor, width: int) -> Tensor:
    """(B, T, ...) to (B, width, ...): padding repeats nothing real and is masked everywhere."""
    padding = tensor.new_zeros(len(tensor), width - tensor.shape[1], *tensor.shape[2:])
    return torch.cat([tensor, padding], dim=1)


def _to(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _to(getattr(value, f.name), device) for f in fields(value)})
    return value
