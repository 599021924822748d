"""The command line. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import sys
import warnings

from rich.console import Console

from prune_opd.cli import runs as runs
from prune_opd.cli import start as start
from prune_opd.cli.app import app
from prune_opd.errors import PruneOPDError, RunInterrupted

__all__ = ["app", "main"]


def main() -> None:
    """Entry point: errors meant for people are printed without a traceback and exit with 1."""
    errors = Console(stderr=True, soft_wrap=True)  # a message keeps its words on one line, so that it can be searched
    warnings.showwarning = lambda message, *_, **__: errors.print(f"warning: {message}", style="yellow", markup=False)
    try:
        app()
    except RunInterrupted as error:
        errors.print(str(error), style="yellow", markup=False, highlight=False)
        sys.exit(error.exit_code)
    except PruneOPDError as error:
        errors.print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("interrupted; continue with --resume auto --output-dir DIR", style="yellow")
        sys.exit(130)
