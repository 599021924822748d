"""SIGTERM and SIGINT: finish the step, save, exit; a second one ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class EvaluationStopped(Exception):
    """Raised by the signal handler inside `StopSignals.interruptible()`."""


class StopSignals:
    """A context in which the first SIGTERM or SIGINT sets `received` instead of ending the process.

    In a thread other than the main one, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None  # the signal's name
        self._interruptible = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Work that may be thrown away: a signal ends it by EvaluationStopped, in the middle."""
        self._interruptible = True
        try:
            if self.received:
                raise EvaluationStopped
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            # Files are renamed into place, so ending anywhere is safe. By the signal itself, so that the shell sees it.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = signal.Signals(number).name
        # Not through the console: its lock or buffer may be held by what the signal interrupted.
        os.write(2, f"{self.received}: finishing this step and saving; once more ends it at once\n".encode())
        if self._interruptible:
            self._interruptible = False
            raise EvaluationStopped
