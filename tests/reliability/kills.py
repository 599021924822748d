"""Kill a training run at chosen and random moments, resume it, and compare it with the run that nothing happened to.

Run as a program, so that its children can be forked before anything else of the test session is in their memory:

    python tests/reliability/kills.py --moments 20 --seed 0 [--settings KEY=VALUE ...]

Prints one JSON line a moment and exits with 1 when a resumed run differs. Children are real processes that end by
SIGKILL, or, halfway through the contents of a file, by the kernel's SIGXFSZ:

    file:I       before file operation I of the run (open for writing, rename, remove, truncate, mkdir)
    half:I:N     after file operation I no file may grow beyond N bytes: the first one that tries is left half-written
    time:X       the parent kills after the share X of the time that the whole run took
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

from prune_opd.config import load_config
from prune_opd.rollout.local import LocalSampler
from prune_opd.rollout.vllm import VLLMSampler
from prune_opd.training import held_out, run_directory
from prune_opd.training.trainer import Trainer

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
SMALL = [
    "training.steps=3",
    "training.save_every=1",
    "training.keep_last=1",
    "rollout.prompts_per_step=2",
    "rollout.num_generations=2",
    "rollout.max_completion_length=24",
    "pruning.dynamic_response_length.init_len=12",
    "pruning.dynamic_response_length.min_len=12",
    "pruning.dynamic_response_length.max_len=24",
    "evaluation.num_problems=2",
    "evaluation.every=2",
    "evaluation.k=1",
    "evaluation.max_tokens=20",
    "tracking.rollouts_per_step=4",
]
IN_FLIGHT = ["pruning.in_flight.enable=true", "pruning.in_flight.chunk=4", "pruning.w_drop=0.2"]
PHASES = ("begin", "rollout", "update", "evaluation", "checkpoint")
LOGS = ("metrics.jsonl", "drift.jsonl", "rollouts.jsonl")


class Board:
    """What a child was doing, and how many file operations it had begun: its parent reads them after its death."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 16)

    def set(self, phase: str) -> None:
        self.memory[0] = PHASES.index(phase)

    @property
    def phase(self) -> str:
        return PHASES[self.memory[0]]

    @property
    def operations(self) -> int:
        return int.from_bytes(self.memory[8:16], "little")

    def count(self) -> int:
        done = self.operations + 1
        self.memory[8:16] = done.to_bytes(8, "little")
        return done


def show_phases(board: Board) -> None:
    """Let this process tell the board what it is doing."""

    def wrap(owner, name, phase):
        inner = getattr(owner, name)

        def outer(*args, **kwargs):
            before = board.phase
            board.set(phase)
            try:
                return inner(*args, **kwargs)
            finally:
                board.set(before if phase == "evaluation" else "update" if phase == "rollout" else before)

        setattr(owner, name, outer)

    for sampler in (LocalSampler, VLLMSampler):
        wrap(sampler, "sample", "rollout")
    wrap(held_out, "evaluate", "evaluation")
    wrap(run_directory, "save_checkpoint", "checkpoint")
    wrap(run_directory, "remove_old_checkpoints", "checkpoint")


def watch_files(board: Board, run_dir: Path, moment: str) -> None:
    """Count this process's file operations in the run directory, and end it at the chosen one."""
    kind, *numbers = moment.split(":")
    at = int(numbers[0]) if kind in ("file", "half") else None
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    inside = str(run_dir)

    def hook(event, arguments):
        if event == "open":
            if not (isinstance(arguments[2], int) and arguments[2] & writes):
                return
        elif event not in ("os.rename", "os.remove", "os.truncate", "os.mkdir", "os.rmdir"):
            return
        # rmtree works within an open folder, by names alone.
        if not str(arguments[0]).startswith(inside) and event not in ("os.remove", "os.rmdir"):
            return
        if board.count() == at:
            if kind == "file":
                os.kill(os.getpid(), signal.SIGKILL)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(numbers[1]), int(numbers[1])))

    sys.addaudithook(hook)


def child(run_dir: Path, settings: list[str], board: Board, moment: str, seconds: float) -> int:
    """Run or resume in a forked process; returns the signal that ended it, 0 when it finished."""
    board.memory[:] = bytes(16)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars of transformers
            show_phases(board)
            watch_files(board, run_dir, moment)
            warnings.simplefilter("ignore")
            config = load_config(RECIPE, [*SMALL, *settings])
            Trainer(
                config, run_dir, resume="auto", console=Console(file=(run_dir.parent / "console.txt").open("a"))
            ).train()
            code = 0
        except BaseException as error:
            print(repr(error), flush=True)
        finally:
            os._exit(code)
    if moment.startswith("time:"):
        time.sleep(float(moment.partition(":")[2]) * seconds)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0, f"{moment}: the run ended with an error of its own"
    return 0


def without_time(record):
    """A record without what a clock says."""
    return {
        k: v for k, v in record.items() if not k.startswith(("time/", "eta_seconds")) and not k.endswith("_seconds")
    }


def outcome(run_dir: Path) -> dict:
    """Everything of a run that must be the same, tensors as they are."""
    found = {"files": sorted(str(p.relative_to(run_dir)) for p in run_dir.rglob("*"))}
    for name in LOGS:
        found[name] = [without_time(json.loads(line)) for line in (run_dir / name).read_text().splitlines()]
    for checkpoint in (run_dir / "checkpoints").iterdir():
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        state["totals"] = without_time(state["totals"])
        state.pop("unlogged")  # an evaluation of the last step that is made up for goes to the log alone
        found[checkpoint.name] = state | {
            "weights": load_file(checkpoint / "model.safetensors"),
            "optimizer": {path.name: load_file(path) for path in checkpoint.glob("optimizer-*")},
            "random": load_file(checkpoint / "random_state.safetensors"),
        }
    return found


def difference(a, b, place: str = "") -> str | None:
    """Where two outcomes first differ, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else place
    if isinstance(a, dict) and isinstance(b, dict):
        if list(map(str, a)) != list(map(str, b)) and sorted(map(str, a)) != sorted(map(str, b)):
            return f"{place}: {sorted(set(map(str, a)) ^ set(map(str, b)))}"
        return next((d for key in a if (d := difference(a[key], b[key], f"{place}/{key}"))), None)
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return f"{place}: {len(a)} and {len(b)} entries"
        return next((d for i in range(len(a)) if (d := difference(a[i], b[i], f"{place}[{i}]"))), None)
    return None if a == b else f"{place}: {a!r} and {b!r}"


def moments(count: int, operations: int, inside: list[int], size: int, draw: random.Random):
    """In turn: two kills inside a checkpoint's writing, a file left half-written, one by the clock, one at any file."""
    for i in range(count):
        match i % 5:
            case 0 | 1:
                yield f"file:{draw.choice(inside)}"
            case 2:
                yield f"half:{draw.choice(inside)}:{round(size ** draw.random())}"
            case 3:
                yield f"time:{draw.random():.3f}"
            case 4:
                yield f"file:{draw.randint(1, operations)}"


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw, board, bad = random.Random(options.seed), Board(), 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        for _ in range(2):  # the first one also warms the disk's cache, so that the second is timed
            shutil.rmtree(whole, ignore_errors=True)
            began = time.perf_counter()
            assert child(whole, options.settings, board, "none", 0) == 0
            seconds = time.perf_counter() - began
        reference, operations = outcome(whole), board.operations
        size = max(path.stat().st_size for path in whole.rglob("*"))
        inside = inside_checkpoints(Path(folder), options.settings, board)
        for moment in moments(options.moments, operations, inside, size, draw):
            run_dir = Path(folder) / "killed"
            shutil.rmtree(run_dir, ignore_errors=True)
            (Path(folder) / "console.txt").write_text("")
            signals, phases = [child(run_dir, options.settings, board, moment, seconds)], [board.phase]
            partial = bool(list(run_dir.glob("checkpoints/.step_*")))
            if draw.random() < 0.3:  # and once more, while it resumes
                again = f"file:{draw.randint(1, operations)}"
                signals.append(child(run_dir, options.settings, board, again, seconds))
                phases.append(board.phase)
            assert child(run_dir, options.settings, board, "none", 0) == 0
            wrong = difference(reference, outcome(run_dir))
            bad += wrong is not None
            said = (Path(folder) / "console.txt").read_text()
            row = {"moment": moment, "signals": signals, "phases": phases, "half_written": partial}
            print(json.dumps(row | {"said_so": "was never finished" in said, "difference": wrong}), flush=True)
    return 1 if bad else 0


def inside_checkpoints(folder: Path, settings: list[str], board: Board) -> list[int]:
    """The numbers of the file operations that write or remove checkpoints."""
    operations: list[int] = []
    pipe_out, pipe_in = os.pipe()
    if os.fork() == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            board.memory[:] = bytes(16)
            show_phases(board)
            inner = board.count

            def count():
                number = inner()
                if board.phase == "checkpoint":
                    os.write(pipe_in, f"{number} ".encode())
                return number

            board.count = count
            run_dir = folder / "counted"
            watch_files(board, run_dir, "none")
            warnings.simplefilter("ignore")
            Trainer(load_config(RECIPE, [*SMALL, *settings]), run_dir, console=Console(quiet=True)).train()
        finally:
            os._exit(0)
    os.close(pipe_in)
    with os.fdopen(pipe_out) as pipe:
        operations = [int(word) for word in pipe.read().split()]
    os.wait()
    return operations


if __name__ == "__main__":
    sys.exit(main())
