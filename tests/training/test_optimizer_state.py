"""The optimiser's state in files: rows that any ranks wrote are put together again, or the missing one is named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from prune_opd.distributed.world import ALONE
from prune_opd.training.optimizer_state import FIRST_ROWS, load_optimizer, save_optimizer
from tests.families import tiny_model


def trained():
    """A model and its optimiser after a step with gradients of chance."""
    model = tiny_model("qwen3", seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return model, optimizer


def split(folder, ranks: int) -> None:
    """The file of one process as so many ranks would have written it, each with its rows of every parameter."""
    path = folder / "optimizer-00000.safetensors"
    whole = {name: value.clone() for name, value in load_file(path).items()}  # the file is written again below
    for rank in range(ranks):
        rows, first = {}, {}
        for name, value in whole.items():
            if value.dim() == 0:  # the count of steps, which rank 0 alone writes
                parts, at = ([value] if rank == 0 else []), 0
            else:
                parts, at = list(value.chunk(ranks))[rank : rank + 1], rank * -(-len(value) // ranks)
            for part in parts:
                rows[name], first[name] = part.contiguous(), at
        save_file(rows, folder / f"optimizer-{rank:05d}.safetensors", {FIRST_ROWS: json.dumps(first)})


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 40])
def test_any_split_of_the_rows_is_the_same_state(tmp_path, ranks):
    model, optimizer = trained()
    save_optimizer(tmp_path, model, optimizer, ALONE)
    split(tmp_path, ranks)
    other = tiny_model("qwen3", seed=2)
    fresh = torch.optim.AdamW(other.parameters(), fused=True)
    load_optimizer(tmp_path, other, fresh)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        expected, found = optimizer.state[mine], fresh.state[theirs]
        assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)


@pytest.mark.parametrize("lost", [1, 2])
def test_rows_that_are_missing_are_named(tmp_path, lost):
    model, optimizer = trained()
    save_optimizer(tmp_path, model, optimizer, ALONE)
    split(tmp_path, 3)
    (tmp_path / f"optimizer-{lost:05d}.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the optimiser's state has no row \d+ of '"):
        load_optimizer(tmp_path, model, optimizer)
