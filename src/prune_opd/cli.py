"""The command line. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prune_opd.config import load_config
from prune_opd.errors import PruneOPDError

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
OutputDir = Annotated[Path | None, typer.Option(help="Run directory; must be new. Default: runs/RECIPE-TIME.")]


@app.command(
    epilog="Examples:\n\n"
    "prune-opd train recipes/quickstart.toml\n\n"
    "prune-opd train recipes/quickstart.toml --set training.steps=10 --set pruning.threshold=0.7\n\n"
    "prune-opd train recipes/paper/justrl-1.5b.toml --dry-run\n\n"
    "prune-opd train recipes/quickstart.toml --output-dir runs/mine --resume auto"
)
def train(
    recipe: Recipe,
    set_: Settings = None,
    output_dir: OutputDir = None,
    resume: Annotated[
        str, typer.Option(help="auto: continue --output-dir from its last checkpoint; never; or a checkpoint's path.")
    ] = "never",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and the memory estimate; load no model.")
    ] = False,
) -> None:
    """Train the student of RECIPE."""
    config = load_config(recipe, set_ or ())
    if dry_run:
        from prune_opd.training.plan import describe_plan

        console.print(describe_plan(config), markup=False, highlight=False, soft_wrap=True)
        return
    from prune_opd.training.trainer import Trainer

    if output_dir is None and resume not in ("auto", "never"):
        output_dir = Path(resume).resolve().parents[1]
    trainer = Trainer(config, output_dir or default_output_dir(recipe), resume=resume, console=console)
    totals = trainer.train()
    console.print(
        f"trained in {totals.train_seconds:.0f} s on {totals.student_tokens:,} tokens; evaluation took "
        f"{totals.eval_seconds:.0f} s. Run directory: {trainer.run_dir}",
        highlight=False,
    )


@app.command(
    epilog="Examples:\n\n"
    "prune-opd compare recipes/quickstart.toml --arms opd,prune\n\n"
    "prune-opd compare recipes/high.toml --arms opd,prune,fixed:64 --seeds 3 --output-dir runs/high"
)
def compare(
    recipe: Recipe,
    arms: Annotated[str, typer.Option(help="Comma-separated: opd, prune, fixed:N.")] = "opd,prune",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds each arm runs with.")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    set_: Settings = None,
    output_dir: OutputDir = None,
) -> None:
    """Train several arms of RECIPE with the same seeds and compare accuracy and cost."""
    config = load_config(recipe, set_ or ())
    from prune_opd.training.compare import compare as run_comparison

    run_comparison(
        config,
        arms=[arm.strip() for arm in arms.split(",") if arm.strip()],
        seeds=range(first_seed, first_seed + seeds),
        output_dir=output_dir or default_output_dir(recipe),
        console=console,
    )


def default_output_dir(recipe: Path) -> Path:
    """A new directory for each run."""
    return Path("runs") / f"{recipe.stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def main() -> None:
    """Entry point: errors meant for people are printed without a traceback and exit with 1."""
    errors = Console(stderr=True, soft_wrap=True)  # a message keeps its words on one line, so that it can be searched
    warnings.showwarning = lambda message, *_, **__: errors.print(f"warning: {message}", style="yellow", markup=False)
    try:
        app()
    except PruneOPDError as error:
        errors.print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("interrupted; continue with --resume auto --output-dir DIR", style="yellow")
        sys.exit(130)
