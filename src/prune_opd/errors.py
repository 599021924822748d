"""One exception tree. Leaves also inherit the built-in kin that a caller would catch.

Every message says what was wrong, where, what was expected and what to do about it.
"""


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
    """A checkpoint is missing, damaged, or belongs to another recipe."""


class RunDirectoryError(PruneOPDError, FileExistsError):
    """The run directory already exists; runs are never overwritten."""


class RewardError(PruneOPDError, ValueError):
    """A reward function raised, or returned something that is no finite number for each rollout."""


class NonFiniteError(PruneOPDError, ArithmeticError):
    """The loss or a gradient became NaN or infinite; training stops before the weights are touched."""


class ServerError(PruneOPDError, ConnectionError):
    """An inference server cannot be reached, refuses, or answers what nothing may be trained on."""


class RunLogError(PruneOPDError, ValueError):
    """The logs of a run are missing or cannot be read."""


class HubError(PruneOPDError, OSError):
    """A model cannot be pushed to the Hub."""
