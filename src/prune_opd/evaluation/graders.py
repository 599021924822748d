"""Is the answer that a response states the gold one?

Only a stated answer counts. In this order: the last `\\boxed{...}`, the last `#### ...` (GSM8K), the last
line `Answer: ...` (what the DAPO prompts ask for). A response that states none is wrong: the last stray
number of a rambling text is right often enough by chance to blur a comparison of two models.

Plain numbers and equal strings are compared here; the rest goes to math-verify. It parses LaTeX into SymPy,
which some answers (9^{9^{9^9}}) keep busy for ever or until memory is gone, so it runs in a process of its
own that has limited memory and is killed when it takes too long. Signals would limit no memory, and work in
the main thread alone.

This file is that process's program too, so it must not import the package (nor torch with it).
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
from decimal import Decimal

logger = logging.getLogger(__name__)

MAX_ANSWER_CHARS = 1000  # the longest gold of MATH-500 has 53
VERIFY_SECONDS = 5.0  # ordinary answers take 1-300 ms
START_SECONDS = 120.0  # importing SymPy takes a second, or a minute from a cold network disk
VERIFIER_BYTES = 4 * 2**30

# Possessive, and only at a run's first backslash: else a megabyte of backslashes takes quadratic time.
_BRACES = re.compile(r"(?P<box>(?<!\\)\\++boxed\s*+\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*(\S.*)")
_ANSWER_LINE = re.compile(r"(?im)^[ \t*_]*+(?:final[ \t]+)?answer[ \t*_]*+:[ \t*_]*+(\S.*)$")
_NUMBER = re.compile(r"[-+]?(?:(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]*)?|\.[0-9]+)")
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf)|mbox)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[a-z][a-z '-]*")


def grade(response: str, gold: str) -> bool:
    """Whether `response` states an answer equal to `gold`, a number or LaTeX, bare or in \\boxed{}.

    Mathematical equality, as math-verify sees it: forms (1/2, 0.5, \\frac12), units, percent signs, bases
    (52_8) and variable names in front (x = 5) do not matter. No text makes it raise: an answer that cannot be
    parsed, or on which math-verify dies or takes more than `VERIFY_SECONDS`, is wrong; the first of each of
    these last two is logged. RuntimeError if math-verify does not start at all.
    """
    answer = extract_answer(response)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return False
    answer, gold = _tidy(answer), _tidy(extract_answer(gold) or gold)
    if not answer or not gold:
        return False
    if _compact(answer) == _compact(gold):
        return True
    if _NUMBER.fullmatch(answer) and _NUMBER.fullmatch(gold):
        return Decimal(answer.replace(",", "")) == Decimal(gold.replace(",", ""))
    if _TEXT.search(gold) and _WORDS.fullmatch(_words(gold)):
        return _words(answer) == _words(gold)  # SymPy would read a word as a product of its letters
    return _verifier(os.getpid()).equivalent(gold, answer)


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


def _tidy(answer: str) -> str:
    """Without dollar signs, math delimiters, a final full stop, and spacing inside numbers."""
    answer = re.sub(r"\\!\s*|(?<!\\)\\[$()\[\]]|\$", "", answer).replace("{,}", ",").replace("−", "-")
    return " ".join(answer.split()).rstrip(". ")


def _compact(answer: str) -> str:
    """Without spaces, except between digits: 1 1/2 is not 11/2."""
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", answer)


def _words(answer: str) -> str:
    return _TEXT.sub(r"\1", answer).strip(" ().").casefold()


class _Verifier:
    """math-verify in a process of its own, started when first needed and again after it was killed."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lock = threading.Lock()
        self.logged: set[str] = set()

    def equivalent(self, gold: str, answer: str) -> bool:
        with self.lock:
            process, self.process = self.process, None
            if process is None or process.poll() is not None:
                process = _start()
            reply, timed_out = _exchange(process, json.dumps([gold, answer]) + "\n", VERIFY_SECONDS)
            if reply and not timed_out:
                self.process = process  # only now: after Ctrl-C, its reply would be taken for the next one's
            else:
                _stop(process)
                self._log(f"took over {VERIFY_SECONDS:g} s" if timed_out else "died", answer)
            return reply == "true\n"

    def _log(self, failure: str, answer: str) -> None:
        if failure not in self.logged:
            self.logged.add(failure)
            logger.warning("grading %.80r %s: counted as wrong, as will others be, silently", answer, failure)


@functools.cache
def _verifier(pid: int) -> _Verifier:
    """One for each process: a forked child must not share its parent's pipes."""
    return _Verifier()


def _start() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    if _exchange(process, "", START_SECONDS)[0] != "ready\n":
        _stop(process)
        raise RuntimeError(
            "the grader's process (math-verify) did not start, so no LaTeX answer can be graded; its own "
            f"message, if any, stands above. Try: {sys.executable} -c 'import math_verify'"
        )
    return process


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    with contextlib.suppress(OSError):  # what it did not read is still to be flushed
        process.communicate()


def _exchange(process: subprocess.Popen[str], request: str, seconds: float) -> tuple[str, bool]:
    """(the line that the process answers, "" if it died; whether it was killed for taking over `seconds`)."""
    assert process.stdin is not None and process.stdout is not None
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

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


def _serve() -> None:
    """The other process: [gold, answer] a line in, true or false a line out, until the input ends."""
    import math_verify

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; our input ends with it
    logging.disable()
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows, or a lower limit is set already
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (VERIFIER_BYTES, VERIFIER_BYTES))
    # No plain-expression extraction: it would take a number out of the middle of any text.
    latex = [math_verify.LatexExtractionConfig()]
    print("ready", flush=True)
    for line in sys.stdin:
        gold, answer = (math_verify.parse(f"${text}$", latex, parsing_timeout=None) for text in json.loads(line))
        print(json.dumps(bool(math_verify.verify(gold, answer, timeout_seconds=None))), flush=True)


if __name__ == "__main__":
    _serve()
