"""A run of two ranks of which a part dies is resumed to the bits: see kill_ranks.py, and `make kill-ranks`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from prune_opd.config import load_config
from prune_opd.distributed.world import World, from_another_rank
from prune_opd.errors import ServerError
from prune_opd.training import checkpoint
from prune_opd.training.checkpoint import Totals, save_checkpoint
from tests.families import tiny_model

from .kills import RECIPE

ROOT = Path(__file__).parents[2]


def strike(*arguments: str) -> list[dict]:
    """The rows of kill_ranks.py."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.kill_ranks", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=1500,  # real servers start in minutes on a busy machine
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_the_launcher_is_killed_then_the_disk_of_one_rank_is_full_and_the_run_is_the_same():
    """No rank trains on without its launcher; both ranks name the disk, and the checkpoint before stays."""
    more = ("--in-a-row", "--moments=1", "--seed=7", "--settings=training.parallel=fsdp2")  # 7: within step 1
    (row,) = strike("--victims", "launcher", "disk", *more)
    orphaned, full = row["struck"]
    assert row["difference"] is None and not orphaned["late"] and orphaned["exit"] == -9
    assert full["exit"] == 1 and full["errors"] == {"StorageError": 2} and len(full["checkpoints"]) == 1


def in_two_ranks(folder: Path, work) -> list[int]:
    """Fork two gloo ranks that do `work(world)`; how each of them ended: 0 when all that it asserts holds."""
    pids = []
    for rank in range(2):
        pids.append(os.fork())
        if pids[-1] == 0:
            code = 1
            try:
                dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
                work(World(rank, 2))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def test_a_rank_that_dies_within_a_checkpoint_is_not_called_a_full_disk(tmp_path):
    take = checkpoint._save_shares

    def work(world: World) -> None:
        if world.rank == 1:
            checkpoint._save_shares = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        else:
            checkpoint._save_shares = take
        student = tiny_model("llama")
        optimizer = torch.optim.AdamW(student.parameters())
        settings = {
            "window": None,
            "budget": None,
            "teacher": None,
            "totals": Totals(),
            "config": load_config(RECIPE, []),
        }
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        settings |= {"schedule": schedule, "tokenizer": None, "config": load_config(RECIPE, [])}
        with pytest.raises(RuntimeError) as caught:
            save_checkpoint(tmp_path / "of", step=1, model=student, optimizer=optimizer, world=world, **settings)
        assert from_another_rank(caught.value), caught.value

    assert in_two_ranks(tmp_path, work) == [0, -signal.SIGKILL]
    assert not list((tmp_path / "of").iterdir()), "half of a checkpoint takes room"


def test_what_one_rank_raises_all_raise(tmp_path):
    def work(world: World) -> None:
        for guilty in (0, 1):
            with pytest.raises(ServerError, match=f"rank {guilty}"), world.raising_together(ServerError):
                if world.rank == guilty:
                    raise ServerError(f"rank {guilty} cannot reach it")
        with pytest.raises(KeyError), world.raising_together(ServerError):
            raise KeyError("of each rank its own")
        with world.raising_together(ServerError):
            pass

    assert in_two_ranks(tmp_path, work) == [0, 0]
