"""One exception tree. Leaves also inherit the built-in kin that a caller would catch.

Every message says what was wrong, where, what was expected and what to do about it.
"""

from __future__ import annotations

from typing import Any


class PruneOPDError(Exception):
    """Root of every error that this package raises on purpose."""


class ConfigError(PruneOPDError, ValueError):
    """A setting is unknown, out of range, or in conflict with another."""


class DataError(PruneOPDError, ValueError):
    """A prompt file or data set cannot be used; names the file and the line or row."""


class MissingColumnError(DataError, KeyError):
    """A column that the recipe names is not there; lists those that are."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class TokenizerError(PruneOPDError, ValueError):
    """Student and teacher do not share a token map, or a needed special token is missing."""


class ModelError(PruneOPDError, ValueError):
    """A model cannot be loaded, or does not fit the settings (for example top_k > vocabulary)."""


class CheckpointError(PruneOPDError, ValueError):
    """A checkpoint, or a log that goes on from it, is missing, damaged, or belongs to another recipe."""


class RunDirectoryError(PruneOPDError, FileExistsError):
    """The run directory already exists, or another process writes to it; runs are never overwritten."""


class StorageError(PruneOPDError, OSError):
    """The disk is full, read-only or broken; names the file that could not be written."""


class RewardError(PruneOPDError, ValueError):
    """A reward function raised, or returned something that is no finite number for each rollout."""


class EngineError(PruneOPDError, RuntimeError):
    """An engine (vLLM, verl) cannot be used as it is set up, or did not do what it was asked."""


class RankError(PruneOPDError, RuntimeError):
    """Another process of a run of several, or their launcher, ended or cannot be reached."""


class NonFiniteError(PruneOPDError, ArithmeticError):
    """Logits, the loss, a gradient or a weight became NaN or infinite; raised before the weights are touched.

    rollouts: the batch of the step, and `numbers`: which of the step's rollouts they are; rows (B,) bool: those where
    it was seen. None where nobody knows.
    """

    def __init__(self, message: str, *, rollouts: Any = None, numbers: Any = None, rows: Any = None) -> None:
        super().__init__(message)
        self.rollouts, self.numbers, self.rows = rollouts, numbers, rows


class RunInterrupted(PruneOPDError, InterruptedError):
    """A signal asked the run to stop; everything up to here is saved. The command line exits with `exit_code`."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: start it again, with --resume auto


class ServerError(PruneOPDError, ConnectionError):
    """An inference server cannot be reached, refuses, or answers what nothing may be trained on."""


class RunLogError(PruneOPDError, ValueError):
    """The logs of a run are missing or cannot be read."""


class HubError(PruneOPDError, OSError):
    """A model cannot be pushed to the Hub."""
