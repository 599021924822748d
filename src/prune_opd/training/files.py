"""Files that survive a crash: written aside, flushed to the disk, renamed; logs that only grow and are cut by steps."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prune_opd.config.values import MOST_IN_A_NAME
from prune_opd.errors import CheckpointError, RunDirectoryError, RunLogError, StorageError
from prune_opd.reporting.records import LOG_KINDS, StepRecord, check, parse


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, stand on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by `content`: whoever reads it finds the old or the new text, whole. Raises StorageError."""
    aside = path.with_name(f".{path.name}.partial")
    with storage_errors(path):
        with aside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync(path.parent)


def append_json(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a log. A crash can leave half a line at its end, which `log_end` does not count."""
    with storage_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def log_end(path: Path, last_step: int) -> tuple[int, int | None]:
    """Bytes of the log up to the end of `last_step`, and the last step that is there of them, None if there is none.

    What follows, half a line included, was written by a dead run. Raises CheckpointError with the line when a whole
    line is no record of this log. Changes nothing: `os.truncate` does.
    """
    end, last = 0, None
    if not path.exists():
        return end, last
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                record = parse(line, StepRecord, f"{path}:{number}")
                if record["step"] > last_step:  # a line that goes need not be whole
                    break
                check(record, LOG_KINDS[path.name], f"{path}:{number}")
            except RunLogError as error:
                raise CheckpointError(f"{error}; else the run would spoil its log by going on") from None
            end, last = end + len(line), record["step"]
    return end, last


@contextlib.contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Hold a run directory against a second process; RunDirectoryError when another one has it.

    The lock is on the folder itself (flock), so it leaves no file and ends with the process. Without fcntl (Windows)
    there is none.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with storage_errors(run_dir):
        descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunDirectoryError(
                f"{run_dir} is being written by another process; wait for it or stop it, or choose another --output-dir"
            ) from None
        yield
    finally:
        os.close(descriptor)


def check_no_writer(run_dir: Path) -> None:
    """RunDirectoryError when a process writes to this directory now: a second one is refused before it loads models."""
    if run_dir.is_dir():
        with only_writer(run_dir):
            pass


def _nearest(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists. os.path takes names that no file can have."""
    return next(above for above in (path.absolute(), *path.absolute().parents) if os.path.exists(above))


def check_writable(run_dir: Path) -> None:
    """StorageError when the run directory, or the nearest folder above it that exists, takes no new file."""
    there = _nearest(run_dir)
    long = max((len(os.fsencode(part)) for part in run_dir.absolute().relative_to(there).parts), default=0)
    if long > MOST_IN_A_NAME:
        raise StorageError(
            f"{run_dir} cannot be made: no folder has a name of more than {MOST_IN_A_NAME} bytes, and this one has "
            f"{long}; choose another --output-dir"
        )
    if not there.is_dir():
        raise StorageError(f"{run_dir} cannot be made: {there} is a file; choose another --output-dir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(f"{there} is not writable; choose another --output-dir, or change its permissions")


def check_room(run_dir: Path, needed: int, what: str) -> None:
    """StorageError when the file system of `run_dir` has fewer than `needed` bytes free. `what` they are for."""
    there = _nearest(run_dir)
    free = shutil.disk_usage(there).free
    if free < needed:
        raise StorageError(
            f"{there} has {free / 1e9:.3g} GB free, but {what} take {needed / 1e9:.3g} GB; free some, choose another "
            "--output-dir, or lower training.keep_last"
        )


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the system says of a write into a StorageError that names the file and the remedy."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise not_written(path, error.strerror or error) from error


def not_written(path: Path, why: object) -> StorageError:
    """The error of a file or checkpoint that the disk did not take."""
    return StorageError(
        f"{path} could not be written ({why}); free some space or repair the disk, then continue with --resume auto"
    )
