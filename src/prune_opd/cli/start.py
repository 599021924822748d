"""The commands to begin with, which need no checkout of the repository: demo, init, recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_opd.cli import runs
from prune_opd.cli.app import OutputDir, Quiet, Settings, app, console, default_output_dir, say
from prune_opd.config import load_config
from prune_opd.config.recipes import about, copy_recipe, recipe_path, shipped
from prune_opd.errors import ConfigError

SHORT = ("training.steps=20", "rollout.prompts_per_step=12", "evaluation.every=20", "evaluation.num_problems=100")
"""What the demo changes in quickstart.toml, so that it ends in minutes: accuracy is measured before and after alone."""


@app.command(
    epilog="Examples:\n\nprune-opd demo --output-dir runs/demo\n\n"
    "prune-opd demo --set training.steps=2 --set evaluation.num_problems=20"
)
def demo(set_: Settings = None, output_dir: OutputDir = None, quiet: Quiet = False) -> None:
    """Train the embedded pair with and without pruning and compare: a few minutes on one core, without a network.

    It is recipe quickstart with fewer steps and problems; `prune-opd compare` runs it whole.
    """
    output_dir = output_dir or default_output_dir("demo")
    runs.compare(recipe_path("quickstart"), set_=[*SHORT, *(set_ or ())], output_dir=output_dir, quiet=quiet)


@app.command(
    epilog="Examples:\n\n"
    "prune-opd init --student ./my-student --teacher ./my-teacher --data prompts.jsonl\n\n"
    "prune-opd init --student embedded:low-student --teacher embedded:teacher --data train.jsonl --output sums.toml"
)
def init(
    student: Annotated[str, typer.Option(help="The model to train: a folder, a Hub id, or embedded:NAME.")],
    teacher: Annotated[str, typer.Option(help="The model that it learns from, with the same tokens.")],
    data: Annotated[str, typer.Option(help="Prompts: JSONL, parquet, a folder, or a Hub id.")],
    held_out: Annotated[
        str | None, typer.Option(help="Rows with answers to evaluate on. Default: a file of that kind beside --data.")
    ] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column with the prompt; found by itself if unset.")] = None,
    answer_column: Annotated[str | None, typer.Option(help="Column with the gold answer, likewise.")] = None,
    output: Annotated[Path, typer.Option(help="The recipe to write; must be new.")] = Path("recipe.toml"),
) -> None:
    """Write a commented recipe for two models and a data file, from what they say themselves; loads no weights."""
    from prune_opd.preflight.doctor import examine
    from prune_opd.preflight.draft import Wishes, draft_recipe
    from prune_opd.reporting.records import write_text

    if output.exists():
        raise ConfigError(f"{output} exists; give another name with --output, or remove it")
    wishes = Wishes(student, teacher, data, held_out, prompt_column, answer_column)
    write_text(output, draft_recipe(wishes, str(output)), "--output")
    sound = examine(load_config(output), probe_prompts=0, tell=runs.tell)
    say(f"written: {output}. Read it, then:\n  prune-opd doctor {output}\n  prune-opd train {output}")
    if not sound:
        raise typer.Exit(1)


@app.command(epilog="Examples:\n\nprune-opd recipes quickstart\n\nprune-opd recipes scale/1x8 mine.toml")
def recipes(
    name: Annotated[str | None, typer.Argument(help="A recipe to copy; without one, all are listed.")] = None,
    path: Annotated[Path, typer.Argument(help="A folder, or the new file.")] = Path("."),
) -> None:
    """List the recipes that ship with the package, or copy one, with those that it extends, to change it."""
    if name is None:
        names = shipped()
        for known, file in names.items():
            console.print(f"[bold]{known:<{max(map(len, names))}}[/]  ", end="")
            say(about(file))
    else:
        for written in copy_recipe(name, path):
            say(f"written: {written}")
