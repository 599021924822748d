"""Kill parts of a run of two ranks at random moments, resume it, and compare it with the run that nothing happened to.

    python -m tests.reliability.kill_ranks --victims 0 1 launcher --moments 20 --seed 0 [--settings KEY=VALUE ...]

Victims: rank 0, rank 1, the launcher; `disk`: the disk of rank 1 is full from the first checkpoint on (with
training.parallel=fsdp2 it has something to write); `replica`, `servers`: one of two servers that sample, or both;
`engine`: the process behind one of them (--vllm).

Prints one JSON line a moment and exits with 1 when something is not as docs/reliability.md says. The launcher is
torchrun's own agent and the ranks run the command line; but all are forked from this process, which has imported what
they need, so that a run takes seconds. `--exec` starts the real programs instead. Bit for bit the same are weights,
optimiser, window, logs and the names of all files (`kills.outcome`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import TimeoutExpired

import torch
import torch.distributed.fsdp
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from transformers import AutoModelForCausalLM

import prune_opd.cli
import prune_opd.reporting.report
import prune_opd.training.hub
from prune_opd.models.loading import resolve_model
from tests import vllm_server
from tests.openai_server import OpenAIServer
from tests.reliability.kills import RECIPE, SMALL, difference, outcome

BIN = Path(sys.executable).parent
PATIENCE = 120.0  # seconds after which somebody counts as hanging; torchrun gives a rank 30 to obey SIGTERM
LITTLE = 100_000  # bytes that a file of rank 1 may have when its disk is "full"; its rows of the optimiser have more
STEP = 1.5  # seconds, about what a step with its checkpoint takes on one core
OF_SERVERS = ["replica", "engine", "servers"]
VICTIMS = ["0", "1", "launcher", "disk", *OF_SERVERS]
ERRORS = ("RankError", "StorageError", "ServerError", "EngineError", "CheckpointError", "RuntimeError")


class Board:
    """The process ids of the two ranks, 0 before they are started; all processes see it."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 16)

    def __getitem__(self, place: int) -> int:
        return int.from_bytes(self.memory[8 * place : 8 * place + 8], "little")

    def __setitem__(self, place: int, pid: int) -> None:
        self.memory[8 * place : 8 * place + 8] = pid.to_bytes(8, "little")


BOARD = Board()


class Forked:
    """What torchrun asks of a `subprocess.Popen`, for a rank that is forked instead."""

    def __init__(self, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            close_as_exec_does()
            os.environ.update(environment)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            run_and_leave(prune_opd.cli.main, list(arguments))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (PATIENCE if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > until:
                raise TimeoutExpired("rank", timeout or PATIENCE)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode


def close_as_exec_does() -> None:
    """Else a rank holds the launcher's listening socket, which then answers after the launcher's death."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # that of the listing itself
            if not os.get_inheritable(descriptor):
                os.close(descriptor)


def run_and_leave(main, arguments: list[str]) -> None:
    """End this process by what `main` makes of these arguments."""
    sys.argv, code = arguments, 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(run_dir: Path, settings: list[str], said: Path, *, real: bool = False, resume: str = "auto") -> int:
    """Start a run of two ranks; returns the launcher's process id. What all of them say goes to `said`."""
    for place in range(2):
        BOARD[place] = 0
    command = [str(BIN / "prune-opd"), "train", str(RECIPE), "--output-dir", str(run_dir), "--resume", resume]
    command += [word for setting in [*SMALL, *settings] for word in ("--set", setting)]
    arguments = ["torchrun", "--standalone", "--nproc-per-node=2", "--no-python", *command]
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if real:
            os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *arguments[1:]])

        def fork_rank(handler, words, environment):
            rank = Forked(words, environment)
            BOARD[int(environment["LOCAL_RANK"])] = rank.pid
            return rank

        SubprocessHandler._popen = fork_rank  # type: ignore[method-assign]
        run_and_leave(torch.distributed.run.main, arguments)
    return pid


def ranks_of(launcher: int) -> list[int]:
    """The ranks by number: as the board has them, else (`--exec`) the launcher's children."""
    if BOARD[0] or BOARD[1]:
        return [BOARD[0], BOARD[1]]
    found = {}
    for child in children_of(launcher):
        with contextlib.suppress(OSError):  # it has ended
            words = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found |= {int(word[5:]): child for word in words if word.startswith(b"RANK=")}
    return [found.get(0, 0), found.get(1, 0)]


def children_of(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [
            int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()
        ]
    return []


def is_there(pid: int) -> bool:
    """Whether a process runs; one that has ended may stay as a zombie where nobody reaps it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(holds: Callable[[], object], patience: float = PATIENCE) -> None:
    """Wait for it, at most so many seconds."""
    began = time.monotonic()
    while not holds() and time.monotonic() - began < patience:
        time.sleep(0.01)


def wait(pid: int) -> tuple[int | None, float]:
    """The exit status of the launcher, None when it hangs; and the seconds that it took."""
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.monotonic() - began
        time.sleep(0.02)
    return None, PATIENCE


def end(pids: list[int]) -> float:
    """Seconds until none of them runs; after PATIENCE they are killed."""
    began = time.monotonic()
    while any(map(is_there, pids)) and time.monotonic() - began < PATIENCE:
        time.sleep(0.005)
    took = time.monotonic() - began
    for pid in filter(is_there, pids):
        os.kill(pid, signal.SIGKILL)
    return took


def strike(victim: str, launcher: int, run_dir: Path, moment: float, servers: Servers | None) -> int | None:
    """Do to a run in progress what `victim` says; how many steps it had logged, None where it came too late."""
    ranks = ranks_of(launcher)
    if victim == "disk":  # as soon as there is a checkpoint; rank 1 may then write no file as large as its share
        until(lambda: saved(run_dir) or not is_there(launcher))
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(ranks[1], resource.RLIMIT_FSIZE, (LITTLE, LITTLE))
        return logged(run_dir)
    # After so many lines of metrics.jsonl, and a share of a step: a clock alone would strike a busy machine early.
    lines, share = divmod(moment, 1)
    until(lambda: logged(run_dir) >= lines or not is_there(launcher))
    time.sleep(share * STEP)
    targets = {"launcher": [launcher], "0": ranks[:1], "1": ranks[1:]}.get(victim)
    if targets is None:
        assert servers is not None
        targets = {"servers": servers.pids, "replica": servers.pids[1:], "engine": servers.engine(1)}[victim]
    if not is_there(launcher) or not all(map(is_there, targets)):
        return None
    at = logged(run_dir)
    for target in targets:
        os.kill(target, signal.SIGKILL)
    return at


def logged(run_dir: Path) -> int:
    """Lines of metrics.jsonl."""
    log = run_dir / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def saved(run_dir: Path) -> list[str]:
    """The names of its checkpoints."""
    return sorted(path.name for path in run_dir.glob("checkpoints/step_*"))


def kill(
    run_dir: Path, settings: list[str], victim: str, moment: float, said: Path, real: bool, servers: Servers | None
) -> dict:
    """Start a run, strike it at `moment` (see `strike`), and see that all of it ends."""
    launcher = start(run_dir, settings, said, real=real)
    until(lambda: all(ranks_of(launcher)) or not is_there(launcher))
    ranks = ranks_of(launcher)
    at = strike(victim, launcher, run_dir, moment, servers)
    code, seconds = wait(launcher)
    orphans = end([pid for pid in ranks if pid])
    if code is None:
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)
    words = said.read_text()
    return {
        "victim": victim,
        "moment": round(moment, 2),
        "late": at is None,
        "at": at,
        "exit": code,
        "seconds": round(seconds, 2),
        "orphans": round(orphans, 3),
        "logged": logged(run_dir),
        "checkpoints": saved(run_dir),
        "half_written": bool(list(run_dir.glob("checkpoints/.step_*"))),
        "errors": {name: words.count(f"{name}: ") for name in ERRORS if f"{name}: " in words},
        "saved": re.findall(r"stopped after step \d+, saved", words)[:1],
    }


def problem(row: dict) -> str | None:
    """What is not as it should be after a strike."""
    if row["late"]:
        return None
    if row["exit"] is None or row["orphans"] >= PATIENCE:
        return "somebody hangs"
    named = row["errors"]
    if row["victim"] == "launcher" and row["logged"] > row["at"] + 1:
        return "ranks trained on without their launcher"
    if row["victim"] == "disk" and (named.get("StorageError") != 2 or len(row["checkpoints"]) != 1):
        return "not both ranks name the disk, or the last good checkpoint is gone"
    if row["victim"] in OF_SERVERS:  # which may not have been needed any more
        return None if row["exit"] == 0 or named.get("ServerError") else "no named error"
    return "the exit status is 0" if row["exit"] == 0 else None


def second_run(folder: Path, settings: list[str], real: bool) -> dict:
    """A run is told to use the directory of another one that is in progress. How both end."""
    run_dir = folder / "shared"
    first = start(run_dir, [*settings, "training.steps=8"], folder / "first.txt", real=real)
    until(lambda: logged(run_dir) > 0)
    found: dict = {}
    for resume in ("auto", "never"):
        said = folder / f"{resume}.txt"
        code, seconds = wait(start(run_dir, settings, said, real=real, resume=resume))
        named = said.read_text().count("is being written by another process")
        found[resume] = {"exit": code, "seconds": round(seconds, 2), "named": named}
    found["running"] = is_there(first)
    return found | {"first": wait(first)[0]}


class Servers:
    """Two HTTP servers that sample for the student, each in a session of its own: vLLM's, or tests/openai_server.py."""

    def __init__(self, vllm: bool) -> None:
        self.vllm, self.ports, self.pids = vllm, [free_port(), free_port()], [0, 0]
        self.settings = [
            "rollout.use_vllm=true",
            f"rollout.vllm_server_url={json.dumps([f'http://127.0.0.1:{port}' for port in self.ports])}",
            "rollout.vllm_server.model=student",
            f"rollout.vllm_server.deadline={40 if vllm else 10}",  # the first request of a vLLM takes long
            "training.save_every=9",  # so that what is saved is saved because of the servers
        ]

    def begin(self) -> None:
        """Start those that do not answer, or of which a part is gone."""
        for place, port in enumerate(self.ports):
            if self.pids[place] and answers(port) and bool(self.engine(place)) == self.vllm:
                continue
            self.end(place)
            self.pids[place] = self.spawn(port) if self.vllm else os.fork()
            if self.pids[place] == 0:
                try:
                    os.setsid()
                    model = AutoModelForCausalLM.from_pretrained(resolve_model("embedded:low-student"))
                    OpenAIServer(model, None, name="student", port=port).serve_forever()
                finally:
                    os._exit(1)
        for port in self.ports:
            until(lambda port=port: answers(port), 400)

    def spawn(self, port: int) -> int:
        words = vllm_server.command(port, *vllm_server.student_arguments())
        quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
        return os.posix_spawn(words[0], words, vllm_server.environment(), file_actions=quiet, setsid=True)

    def engine(self, place: int) -> list[int]:
        """vLLM's EngineCore behind a server."""
        return [
            child
            for child in children_of(self.pids[place])
            if is_there(child) and b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()
        ]

    def end(self, place: int) -> None:
        if pid := self.pids[place]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def close(self) -> None:
        for place in range(2):
            self.end(place)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def struck(folder: Path, options: argparse.Namespace, group: list[tuple[str, float]], reference: dict, servers) -> dict:
    """Strike one run by each of a group in turn, resume it, compare it."""
    run_dir, again, rows = folder / "killed", folder / "again.txt", []
    shutil.rmtree(run_dir, ignore_errors=True)
    wrong = None
    for victim, moment in group:
        said = folder / f"{victim}.txt"
        said.write_text("")
        rows.append(kill(run_dir, options.settings, victim, moment, said, options.exec, servers))
        wrong = wrong or problem(rows[-1])
        if servers:
            servers.begin()
        if wrong:
            print(said.read_text()[-6000:], file=sys.stderr)
    if wrong is None and not (servers and rows[-1]["exit"] == 0):
        again.write_text("")
        code, _ = wait(start(run_dir, options.settings, again, real=options.exec))
        if code != 0:
            wrong = f"the resume ended with {code}"
            print(again.read_text()[-6000:], file=sys.stderr)
    wrong = wrong or difference(reference, outcome(run_dir))
    return (rows[0] if len(rows) == 1 else {"struck": rows}) | {"difference": wrong}


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=["0", "1", "launcher"])
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="*", default=[])
    parser.add_argument("--vllm", action="store_true", help="servers are vLLM's, which has to be installed")
    parser.add_argument("--in-a-row", action="store_true", help="the victims strike one run, one after the other")
    parser.add_argument("--two-runs", action="store_true", help="also start a second run in a directory in use")
    parser.add_argument("--exec", action="store_true", help="the real programs, which take half a minute to start")
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended too
    draw, bad = random.Random(options.seed), 0
    servers = Servers(options.vllm) if set(OF_SERVERS) & set(options.victims) else None
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        if servers:
            stack.callback(servers.close)
            servers.begin()
            options.settings += servers.settings
        whole = folder / "whole"
        code, _ = wait(start(whole, options.settings, folder / "whole.txt", real=options.exec))
        assert code == 0, (folder / "whole.txt").read_text()
        reference, lines = outcome(whole), logged(whole)
        for _ in range(options.moments):
            group = [(victim, draw.random() * lines) for victim in options.victims]
            for part in [group] if options.in_a_row else [[one] for one in group]:
                row = struck(folder, options, part, reference, servers)
                bad += row["difference"] is not None
                print(json.dumps(row), flush=True)
        if options.two_runs:
            two = second_run(folder, options.settings, options.exec)
            refused = all(two[how]["exit"] == 1 and two[how]["named"] == 2 for how in ("auto", "never"))
            bad += not (refused and two["running"] and two["first"] == 0)
            print(json.dumps({"two runs": two}), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
