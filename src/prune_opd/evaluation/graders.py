"""Is the answer that a response states the gold one?

Only a stated answer counts. In this order: the last `\\boxed{...}`, the last `#### ...` (GSM8K), the last line
`Answer: ...` (what the DAPO prompts ask for). A response that states none is wrong. The last stray number of a rambling
text will not do: it is right by chance so often that it blurs a comparison of two models.

Words, quantities, choices and dates are compared in `forms.py`. Mathematics goes to math-verify, which parses LaTeX
into SymPy. Some answers (9^{9^{9^9}}) keep SymPy busy for ever or until memory is gone. So it runs in a process of
its own, with limited memory and processor time. The kernel counts the processor's seconds and ends that process, even
in the middle of a product of huge numbers; a limit in seconds of the clock would call right answers wrong on a busy
machine. The verifiers of reasoning-gym run in another such process.

This file is the program of those processes too, so importing it must not import torch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from prune_opd.errors import DataError
from prune_opd.evaluation.forms import equal

if TYPE_CHECKING:
    from prune_opd.types import Prompt

logger = logging.getLogger(__name__)

MAX_ANSWER_CHARS = 1000  # the longest gold of MATH-500 has 53
MAX_GYM_ANSWER_CHARS = 10_000  # lists of moves are long: 2,015 characters for a tower of Hanoi
VERIFY_SECONDS = 1.0  # of the processor: ordinary answers take 1-300 ms; a new worker after a hang is a fork of 10 ms
GYM_VERIFY_SECONDS = 10.0  # making a problem of knight_swap again takes 2 s
AT_ONCE = min(4, os.cpu_count() or 1)  # answers that are graded side by side, each by a process of 150 MB
TOO_LATE, DIED = "too late", "died"  # what a worker's end means
WALL_FACTOR = 20  # so much longer by the clock before a process that does nothing is killed, too
START_SECONDS = 600.0  # importing SymPy takes a second, or minutes from a cold network disk or on a crowded machine
VERIFIER_BYTES = 4 * 2**30
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FORBIDDEN_EVENTS = ("open", "os.", "time.sleep", "shutil.", "subprocess.", "socket.", "ctypes.", "pty.", "webbrowser.")

# Possessive, and only at a run's first backslash: else a megabyte of backslashes takes quadratic time.
_BRACES = re.compile(r"(?P<box>(?<!\\)\\++boxed\s*+\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*(\S.*)")
_ANSWER_LINE = re.compile(r"(?im)^[ \t*_]*+(?:final[ \t]+)?answer[ \t*_]*+:[ \t*_]*+(\S.*)$")
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf)|mbox)\s*\{([^{}]*)\}")


def is_right(prompt: Prompt, response: str) -> bool:
    """Whether `response` answers the prompt; DataError when there is nothing to grade it against."""
    if prompt.grader is not None:
        return prompt.grader(response)
    if prompt.answer is None:
        raise DataError(f"{prompt.source}: no gold answer to grade against; name its column with data.answer_column")
    return grade(response, prompt.answer)


def are_right(prompts: Sequence[Prompt], responses: Sequence[str]) -> Iterator[bool]:
    """`is_right` of each pair, in their order and as soon as it is known; several are graded side by side."""
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="prune-opd-grader") as pool:
        yield from pool.map(is_right, prompts, responses)


def check_gradable(prompts: Sequence[Prompt], needed_by: str, otherwise: str) -> None:
    """DataError where a prompt has nothing to grade against; names the first, what stands there, and how many."""
    lacking = [prompt for prompt in prompts if not prompt.is_gradable]
    if lacking:
        what = f" ({lacking[0].lack})" if lacking[0].lack else ""
        raise DataError(
            f"{lacking[0].source}: no gold answer, which {needed_by} needs{what}; {len(lacking)} of {len(prompts)} "
            "prompts have none. Name the column with data.answer_column (text or numbers, one answer a row), remove "
            f"these rows, or {otherwise}"
        )


def grade(response: str, gold: str) -> bool:
    """Whether `response` states an answer equal to `gold`: a number, LaTeX, words, a choice, bare or in \\boxed{}.

    Words are equal but for capitals, spaces, articles and a full stop, quantities by value (and by unit where both have
    one), choices by letter, mathematics to math-verify: forms (1/2, 0.5, \\frac12), percent signs, bases (52_8) and
    variable names in front (x = 5) do not matter. No text makes it raise. An answer is wrong that cannot be parsed, or
    on which math-verify dies or takes more than `VERIFY_SECONDS` of the processor; the first death and the first such
    delay are logged. RuntimeError if math-verify does not start at all.
    """
    answer = extract_answer(response)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return False
    return equal(answer, extract_answer(gold) or gold, functools.partial(_holds, "math_verify"))


def grade_gym(response: str, *, task: str, seed: int) -> bool:
    """Whether `response` solves the reasoning-gym problem (task, seed): its own verifier gives 1 or more.

    The answer is what stands in the last closed <answer> tag, else what `extract_answer` finds, else the last line that
    is not empty. So an answer of several lines needs the tags. A \\boxed{} and \\text{} around it are taken off. No
    text makes it raise: where the verifier raises, dies or takes more than `GYM_VERIFY_SECONDS`, the answer is wrong.

    Some of those verifiers run the answer as Python code. Their process may start no program, open no connection
    and change no file; that stops accidents, not an attacker.
    """
    answer = _last_tag(response)
    if answer is not None:
        answer = _last_box(answer) or answer
    else:
        answer = extract_answer(response) or (response.strip().splitlines() or [""])[-1]
    if len(answer) > MAX_GYM_ANSWER_CHARS:
        return False
    answer = _TEXT.sub(r"\1", answer).strip()
    return bool(answer) and _holds("reasoning_gym", task, seed, answer)


def extract_answer(response: str) -> str | None:
    """The answer that `response` states (see the module's text for where), or None.

    Empty boxes and boxes cut off before their closing brace state nothing; then the one before counts.
    """
    found = _last_box(response)
    if found is None:
        stated = _HASHES.findall(response) or _ANSWER_LINE.findall(response)
        found = stated[-1].strip(" \t*_\r") if stated else None
    return found or None


def _last_box(text: str) -> str | None:
    """What stands in the last closed, non-empty \\boxed{}; linear in the length of the text."""
    opened: list[tuple[int, bool]] = []  # for each open brace: where its contents begin; is it a box
    start, contents = -1, None
    for token in _BRACES.finditer(text):
        if token["box"] or token["open"]:
            opened.append((token.end(), token["box"] is not None))
        elif token["close"] and opened:
            begin, is_box = opened.pop()
            if is_box and begin > start and text[begin : token.start()].strip():
                start, contents = begin, text[begin : token.start()].strip()
    return contents


def _last_tag(text: str) -> str | None:
    """What stands between the last <answer> that is closed and its </answer>."""
    opened = re.split("<answer>", text, flags=re.IGNORECASE)[1:]
    closed = (re.split("</answer>", rest, maxsplit=1, flags=re.IGNORECASE) for rest in reversed(opened))
    return next((parts[0].strip() for parts in closed if len(parts) == 2), None)


class _Verifier:
    """math-verify or reasoning_gym in a process of its own, started when first needed and again after it was killed."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.process: subprocess.Popen[str] | None = None
        self.lock = threading.Lock()
        self.logged: set[str] = set()

    def holds(self, *question: str | int) -> bool:
        """What the process answers to [gold, answer] or [task, seed, answer]. The caller has the lock."""
        seconds = VERIFY_SECONDS if self.package == "math_verify" else GYM_VERIFY_SECONDS
        process, self.process = self.process, None
        if process is None or process.poll() is not None:
            process = _start(self.package)
        request = json.dumps([seconds, *question]) + "\n"
        line, timed_out = _exchange(process, request, WALL_FACTOR * seconds)
        reply = json.loads(line) if line.endswith("\n") and not timed_out else None
        if reply is not None:
            self.process = process  # only now: after Ctrl-C, its reply would be taken for the next one's
        else:
            _stop(process)
            timed_out |= process.returncode == -getattr(signal, "SIGPROF", 0)
        if not isinstance(reply, bool):
            late = timed_out or reply == TOO_LATE
            self._log(f"took over {seconds:g} s" if late else "died", question[-1])
        return reply is True

    def _log(self, failure: str, answer: str | int) -> None:
        if failure not in self.logged:
            self.logged.add(failure)
            logger.warning("grading %.80r %s: counted as wrong, as will others be, silently", answer, failure)


def _holds(package: str, *question: str | int) -> bool:
    """Ask the first verifier that is free, so that one process does where one answer is graded at a time."""
    verifiers = [_verifier(os.getpid(), package, number) for number in range(AT_ONCE)]
    free = next((verifier for verifier in verifiers if verifier.lock.acquire(blocking=False)), None)
    if free is None:
        free = verifiers[0]
        free.lock.acquire()
    try:
        return free.holds(*question)
    finally:
        free.lock.release()


@functools.cache
def _verifier(pid: int, package: str, number: int) -> _Verifier:
    """So many for each process: a forked child must not share its parent's pipes."""
    return _Verifier(package)


def _start(package: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(  # noqa: S603  # our own interpreter, on this file
        [sys.executable, "-P", "-W", "ignore", __file__, package],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # each of its threads takes address space, which is limited
        start_new_session=True,  # so that it can be killed with its worker
    )
    if _exchange(process, "", START_SECONDS)[0] != "ready\n":
        _stop(process)
        raise RuntimeError(
            f"the grader's process ({package}) did not start, so answers that need it cannot be graded; its own "
            f"message, if any, stands above. Try: {sys.executable} -c 'import {package}'"
        )
    return process


def _kill(process: subprocess.Popen[str]) -> None:
    """With its worker, which is of its session."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _stop(process: subprocess.Popen[str]) -> None:
    _kill(process)
    with contextlib.suppress(OSError):  # what it did not read is still to be flushed
        process.communicate()


def _exchange(process: subprocess.Popen[str], request: str, seconds: float) -> tuple[str, bool]:
    """(the line that the process answers, "" if it died; whether it was killed for taking over `seconds`)."""
    assert process.stdin is not None and process.stdout is not None
    late = threading.Event()

    def kill() -> None:
        late.set()
        _kill(process)

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        process.stdin.write(request)
        process.stdin.flush()
        return process.stdout.readline(), late.is_set()
    except OSError:
        return "", late.is_set()
    finally:
        timer.cancel()


def _serve(package: str) -> None:
    """The other process: [processor seconds, *question] as a JSON line in, true or false a line out, to the end.

    It imports the verifier, which takes seconds, and forks a worker that answers. Where a question ends the worker, it
    answers with the reason and forks the next.
    """
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a verifier prints is no reply
    verify: Callable[..., bool] = _math_verify() if package == "math_verify" else _reasoning_gym()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; our input ends with it
    logging.disable()
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows, or a lower limit is set already
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (VERIFIER_BYTES, VERIFIER_BYTES))
    print("ready", file=replies, flush=True)
    while hasattr(os, "fork"):  # not on Windows, where a hang costs a new process
        worker = os.fork()
        if not worker:
            break
        _, status = os.waitpid(worker, 0)
        if not os.WIFSIGNALED(status):
            return  # the end of its input
        late = os.WTERMSIG(status) == signal.SIGPROF
        print(json.dumps(TOO_LATE if late else DIED), file=replies, flush=True)
    while line := _line():
        seconds, *question = json.loads(line)
        _limit_processor(seconds)
        reply = json.dumps(verify(*question))
        _limit_processor(0)
        print(reply, file=replies, flush=True)


def _line() -> bytes:
    """The next line of the input, and no byte after it: the next worker must find what follows."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 65536)  # the parent sends a question only after an answer, so there is never half another
        if not part:
            return b""
        line += part
    return line


def _limit_processor(seconds: float) -> None:
    """End this process after so many more seconds of the processor; 0 takes the limit away.

    SIGPROF without a handler: with one, Python would wait for the end of the very operation that never ends.
    """
    if hasattr(signal, "setitimer"):  # not on Windows, where the clock has to do
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _math_verify() -> Callable[[str, str], bool]:
    import math_verify

    # No plain-expression extraction: it would take a number out of the middle of any text.
    latex = [math_verify.LatexExtractionConfig()]
    math_verify.verify(math_verify.parse(r"$\frac{1}{2}$", latex), math_verify.parse("$0.5$", latex))  # fills caches

    def verify(gold: str, answer: str) -> bool:
        texts = (f"${text}$" for text in (gold, answer))
        parsed = [math_verify.parse(text, latex, parsing_timeout=None) for text in texts]
        return bool(math_verify.verify(*parsed, timeout_seconds=None))

    return verify


def _reasoning_gym() -> Callable[[str, int, str], bool]:
    import reasoning_gym  # noqa: F401  # now, since it takes a second

    from prune_opd.evaluation.gym import gym_problem

    scoring = False

    def forbid(event: str, arguments: tuple[Any, ...]) -> None:
        reads = event in ("os.listdir", "os.scandir") or event == "open" and not arguments[2] & WRITE_FLAGS
        if scoring and not reads and event.startswith(FORBIDDEN_EVENTS):
            raise PermissionError(f"an answer tried {event}")

    sys.addaudithook(forbid)

    def verify(task: str, seed: int, answer: str) -> bool:
        nonlocal scoring
        data_set, entry = gym_problem(task, seed)
        scoring = True
        try:
            return float(data_set.score_answer(answer, entry)) >= 1
        except Exception:  # so do some verifiers say that they cannot parse an answer
            return False
        finally:
            scoring = False

    return verify


if __name__ == "__main__":
    _serve(sys.argv[1])
