"""What the commands have in common: the program, its console, the arguments that several take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prune_opd.config import Config, load_config, placed
from prune_opd.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="On-policy distillation that stops learning from rollouts once they drift from the teacher.",
)
console = Console()

Recipe = Annotated[Path, typer.Argument(help="A recipe (TOML), for example recipes/quickstart.toml.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but warnings and errors.")]
OutputDir = Annotated[Path | None, typer.Option(help="Run directory; must be new. Default: runs/RECIPE-TIME.")]


@contextmanager
def read_recipe(recipe: Path, overrides: list[str] | None) -> Iterator[Config]:
    """The settings of a recipe. What is found wrong with one of them later is said with its place, too."""
    config = load_config(recipe, overrides or ())
    try:
        yield config
    except ConfigError as error:
        raise placed(error, recipe, overrides or ()) from error


def say(text: str) -> None:
    """Print a line as it is: a path stays in one piece."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def default_output_dir(name: str) -> Path:
    """A new directory for each run."""
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
