"""The optimiser's state as safetensors: each rank writes the rows that it has, any number of ranks reads them back.

Nothing here is a pickle, and nothing has to be trusted to be read. A file holds tensors named `parameter/quantity`, as
in `model.norm.weight/exp_avg`; its header says from which row of the whole tensor each of them begins.
"""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prune_opd.distributed.world import World

FIRST_ROWS = "first_rows"  # entry of a file's header: JSON, by tensor name

Part = tuple[int, Any, str]  # first row, open file, name in it


def save_optimizer(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Write this rank's rows into `folder`, which exists. What all ranks have alike is written by rank 0 alone."""
    tensors: dict[str, Tensor] = {}
    first_rows: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        for quantity, value in optimizer.state.get(parameter, {}).items():
            key = f"{name}/{quantity}"
            if _is_sharded(value):
                first, rows = _rows_of(value)
                if rows:
                    tensors[key], first_rows[key] = value.to_local().detach().cpu().contiguous(), first
            elif world.rank == 0:
                tensors[key], first_rows[key] = value.detach().cpu().contiguous(), 0
    if tensors or world.rank == 0:
        header = {FIRST_ROWS: json.dumps(first_rows)}
        save_file(tensors, folder / f"optimizer-{world.rank:05d}.safetensors", metadata=header)


def load_optimizer(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put back what `save_optimizer` wrote, however many ranks wrote it and however this model is sharded.

    Raises ValueError or SafetensorError when the files are not the state of this optimiser.
    """
    parts: dict[str, dict[str, list[Part]]] = defaultdict(lambda: defaultdict(list))
    with ExitStack() as files:
        for path in sorted(folder.glob("optimizer-*.safetensors")):
            file = files.enter_context(safe_open(path, framework="pt"))
            for key, first in json.loads(file.metadata()[FIRST_ROWS]).items():
                name, _, quantity = key.rpartition("/")
                parts[name][quantity].append((int(first), file, key))
        parameters = dict(model.named_parameters())
        if unknown := parts.keys() - parameters.keys():
            raise ValueError(f"the optimiser's state has {min(unknown)!r}, and the model has no such parameter")
        number = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
        state = {
            number[id(parameters[name])]: {
                quantity: _assembled(parameters[name], rows) for quantity, rows in of_parameter.items()
            }
            for name, of_parameter in parts.items()
        }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _is_sharded(value: Tensor) -> bool:
    return hasattr(value, "to_local")


def _rows_of(value: Any) -> tuple[int, int]:
    """First row and number of rows that this rank has of a DTensor sharded by rows."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    return offset[0], shape[0]


def _assembled(parameter: Any, parts: list[Part]) -> Tensor:
    """A quantity of this rank's share of a parameter, put together from the rows that the files have."""
    _, file, key = parts[0]
    if not file.get_slice(key).get_shape():  # a number for the whole parameter, as the count of its steps
        return file.get_tensor(key).clone()  # else it keeps the file open
    sharded = _is_sharded(parameter)
    begin, rows = _rows_of(parameter) if sharded else (0, len(parameter))
    pieces, filled = [], begin
    for first, file, key in sorted(parts, key=lambda part: part[0]):
        piece = file.get_slice(key)
        low, high = max(begin, first), min(begin + rows, first + piece.get_shape()[0])
        if low < high and low == filled:
            pieces.append(piece[low - first : high - first])
            filled = high
    if filled != begin + rows:
        raise ValueError(f"the optimiser's state has no row {filled} of {key!r}")
    local = parameter.to_local() if sharded else parameter
    found = torch.cat(pieces).to(local.device) if pieces else torch.zeros_like(local)
    if found.shape != local.shape:
        raise ValueError(f"the optimiser's {key!r} has shape {tuple(found.shape)} instead of {tuple(local.shape)}")
    if not sharded:
        return found
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        found, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
