"""The commands that take a recipe or a run: train, doctor, compare, eval, report, replay."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from prune_opd.cli.app import OutputDir, Quiet, Recipe, Settings, app, console, default_output_dir, read_recipe, say
from prune_opd.config import Config, EvaluationSection
from prune_opd.config.values import MOST
from prune_opd.errors import ConfigError

if TYPE_CHECKING:
    from prune_opd.preflight.doctor import Finding


@app.command(
    epilog="Examples:\n\n"
    "prune-opd train recipes/quickstart.toml\n\n"
    "prune-opd train recipes/quickstart.toml --set training.steps=10 --set pruning.threshold=0.7\n\n"
    "prune-opd train recipes/paper/justrl-1.5b.toml --dry-run --gpus 8 --gpu-memory 80GB\n\n"
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
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="With --dry-run: how many GPUs the run is meant for."),
    ] = None,
    gpu_memory: Annotated[str, typer.Option(help="With --gpus: the memory of each, as 80GB or 74.5GiB.")] = "80GB",
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Upload the final checkpoint there; REPO is made, private, if it is new."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train the student of RECIPE."""
    console.quiet = quiet
    with read_recipe(recipe, set_) as config:
        if dry_run:
            from prune_opd.preflight.plan import describe_plan
            from prune_opd.preflight.topology import GPUs, parse_memory

            meant_for = None if gpus is None else GPUs(gpus, parse_memory(gpu_memory))
            console.print(describe_plan(config, meant_for), markup=False, highlight=False, soft_wrap=True)
        else:
            _train(config, recipe, output_dir, resume, push_to_hub)


def _train(config: Config, recipe: Path, output_dir: Path | None, resume: str, push_to_hub: str | None) -> None:
    from prune_opd.distributed.launcher import end_with_launcher

    end_with_launcher()  # before the imports, which take seconds
    from prune_opd.distributed.sharding import launched
    from prune_opd.reporting.report import write_report
    from prune_opd.training.checkpoint import latest_checkpoint
    from prune_opd.training.hub import check_repo, push
    from prune_opd.training.trainer import Trainer

    if resume == "auto" and output_dir is None:  # a new directory each time would begin anew each time
        earlier = sorted(path.parent for path in Path("runs").glob(f"{recipe.stem}-*/config.json"))
        there = f"; {earlier[-1]} is the newest of this recipe" if earlier else ""
        raise ConfigError(
            "--resume auto needs --output-dir, the run to go on with (it begins there if there is none yet)" + there
        )
    if output_dir is None and resume != "never":
        output_dir = next(iter(Path(resume).resolve().parents[1:]), Path(resume))
    with launched() as world:
        run_dir = world.gather(output_dir or default_output_dir(recipe.stem))[0]  # clocks may differ
        trainer = Trainer(config, run_dir, resume=resume, console=console, world=world)
        with closing(trainer):
            if push_to_hub and world.rank == 0:
                check_repo(push_to_hub)
            totals = trainer.train()
            world.gather(None)  # the ranks are done with one another
    if world.rank > 0:
        return
    say(
        f"trained in {totals.train_seconds:.0f} s on {totals.student_tokens:,} tokens; evaluation took "
        f"{totals.eval_seconds:.0f} s. Run directory: {trainer.run_dir}"
    )
    say(f"report: {write_report([trainer.run_dir])}")
    if push_to_hub:
        checkpoint, _ = latest_checkpoint(trainer.run_dir / "checkpoints")  # reads every byte of it
        if checkpoint:
            say(f"uploaded {checkpoint} to {push(checkpoint, push_to_hub)}")


MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]look[/]", "failed": "[red]FAILED[/]", "skipped": "[dim]skipped[/]"}


def tell(finding: Finding) -> None:
    """Print what a check of doctor found."""
    console.print(f"{MARKS[finding.status]} [bold]{finding.subject}[/]: ", end="")
    say(finding.text)


@app.command(
    epilog="Examples:\n\n"
    "prune-opd doctor recipes/quickstart.toml\n\n"
    "prune-opd doctor recipes/paper/justrl-1.5b.toml --prompts 0"
)
def doctor(
    recipe: Recipe,
    set_: Settings = None,
    prompts: Annotated[
        int, typer.Option(min=0, help="Prompts that both models answer for the probe; with 0 no weights are loaded.")
    ] = 8,
    probe_: Annotated[
        bool, typer.Option("--probe", help="Ask too what `prune-opd probe` asks, on 32 problems; takes minutes.")
    ] = False,
) -> None:
    """Check RECIPE before it costs anything, and say what its pair promises. Exits with 1 if it cannot run."""
    from prune_opd.preflight.doctor import examine

    with read_recipe(recipe, set_) as config:
        if not examine(config, probe_prompts=prompts, tell=tell):
            raise typer.Exit(1)
        if probe_:
            from prune_opd.experiments.probe import probe as run_probe

            run_probe(config, problems=32, lengths=8, continuations=2, json_path=None, console=console)


@app.command(
    epilog="Examples:\n\n"
    "prune-opd probe recipes/derail.toml\n\n"
    "prune-opd probe recipes/quickstart.toml --problems 128 --json runs/probe-low.json\n\n"
    "prune-opd probe recipes/quickstart.toml --set model.model_name_or_path=runs/mine/checkpoints/step_30"
)
def probe(
    recipe: Recipe,
    set_: Settings = None,
    problems: Annotated[int, typer.Option(min=2, max=MOST, help="Problems that the student answers.")] = 64,
    lengths: Annotated[int, typer.Option(min=1, max=64, help="Lengths at which each answer is cut.")] = 8,
    continuations: Annotated[int, typer.Option(min=1, max=64, help="How often each model goes on from a cut.")] = 4,
    json_path: Annotated[Path | None, typer.Option("--json", help="Default: runs/probe-RECIPE-TIME.json.")] = None,
    quiet: Quiet = False,
) -> None:
    """Does the teacher get worse where reliability falls? Measured on RECIPE's pair, before anything is trained."""
    console.quiet = quiet
    from prune_opd.experiments.probe import probe as run_probe

    with read_recipe(recipe, set_) as config:
        run_probe(
            config,
            problems=problems,
            lengths=lengths,
            continuations=continuations,
            json_path=json_path or default_output_dir(f"probe-{recipe.stem}").with_suffix(".json"),
            console=console,
        )


@app.command(
    epilog="Examples:\n\n"
    "prune-opd compare recipes/quickstart.toml --arms opd,prune\n\n"
    "prune-opd compare recipes/high.toml --arms opd,prune,fixed:64,ramp,replay --seeds 3 --output-dir runs/high\n\n"
    "prune-opd compare recipes/high.toml --arms opd,random --reference runs/high --output-dir runs/high-random"
)
def compare(
    recipe: Recipe,
    arms: Annotated[
        str,
        typer.Option(
            help="Comma-separated, the first is what the others are held against: opd, prune, prune-inflight, "
            "inflight-only, prune-topp, weights-only, window-only, opd-distinct, prune-distinct, fixed:N, ramp, "
            "replay, random."
        ),
    ] = "opd,prune",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds each arm runs with.")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, max=MOST, help="The first of them.")] = 0,
    reference: Annotated[
        Path | None,
        typer.Option(help="Finished run, or comparison, that ramp, replay and random follow. Default: arm prune."),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Runs at the same time; more than 1 spoils the timings.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the comparison in --output-dir.")] = False,
    set_: Settings = None,
    output_dir: OutputDir = None,
    quiet: Quiet = False,
) -> None:
    """Train several arms of RECIPE with the same seeds and compare accuracy and cost."""
    console.quiet = quiet
    from prune_opd.experiments.compare import compare as run_comparison
    from prune_opd.reporting.report import arm_rows, verdict, write_report
    from prune_opd.reporting.run_logs import read_runs

    output_dir = output_dir or default_output_dir(recipe.stem)
    with read_recipe(recipe, set_) as config:
        run_comparison(
            config,
            arms=[arm.strip() for arm in arms.split(",") if arm.strip()],
            seeds=range(first_seed, first_seed + seeds),
            output_dir=output_dir,
            console=console,
            reference=reference,
            resume=resume,
            parallel=parallel,
        )
    for sentence in verdict(arm_rows(read_runs([output_dir]))):
        say(sentence)
    say(f"report: {write_report([output_dir])}")


@app.command(
    "eval",
    epilog="Examples:\n\n"
    "prune-opd eval embedded:low-student --benchmark task:chain_sum --k 4 --num-problems 100\n\n"
    "prune-opd eval runs/mine/checkpoints/step_203 --benchmark aime24 --data-dir data\n\n"
    "prune-opd eval owner/model --benchmark problems.jsonl --k 4 --temperature 0.6 --max-tokens 8192\n\n"
    "prune-opd eval runs/mine --benchmark exam.jsonl --prompt-column Question --answer-column Key",
)
def evaluate(
    model: Annotated[str, typer.Argument(help="A folder, a Hub id, or embedded:NAME.")],
    benchmark: Annotated[
        str,
        typer.Option(
            help="amc23-40, amc23-83, aime24, aime25, aime26, hmmt-feb-24, hmmt-feb-25, hmmt-feb-26, math-500, gsm8k, "
            "task:chain_sum, reasoning_gym:NAME, a file, a folder, or a Hub id."
        ),
    ],
    k: Annotated[int, typer.Option(min=1, max=MOST, help="Answers to each problem: Avg@k.")] = 16,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Nucleus of the sampling.")] = 0.95,
    max_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="Most tokens of an answer.")] = 31744,
    num_problems: Annotated[int | None, typer.Option(min=1, max=MOST, help="Only the first of the problems.")] = None,
    prompt_suffix: Annotated[
        str | None,
        typer.Option(help="Added to each problem. Default: benchmarks by name ask for steps and a boxed answer."),
    ] = None,
    prompt_column: Annotated[
        str | None, typer.Option(help="Column with the problem, of a file, folder or Hub id; found by itself if unset.")
    ] = None,
    answer_column: Annotated[str | None, typer.Option(help="Column with the gold answer, likewise.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder to look for a benchmark's file before the Hub.")] = None,
    split: Annotated[str, typer.Option(help="Split of a folder or Hub id that is no benchmark by name.")] = "test",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Type of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto",
    threads: Annotated[int, typer.Option(min=0, max=1024, help="CPU threads of torch; 0 leaves it alone.")] = 1,
    slots: Annotated[int, typer.Option(min=1, max=MOST, help="Answers that decode at the same time.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=MOST, help="Seed of the sampling.")] = 0,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Must be new; for eval.json and responses.jsonl. Default: runs/eval-MODEL-TIME."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure a model on a benchmark: Avg@k and pass@k with 95% intervals."""
    console.quiet = quiet
    from prune_opd.experiments.evaluate_model import errors_of_eval, evaluate_model

    with errors_of_eval():
        evaluate_model(
            model,
            benchmark,
            EvaluationSection(k=k, temperature=temperature, top_p=top_p, max_tokens=max_tokens),
            output_dir or default_output_dir("eval-" + re.split("[/:]", model.rstrip("/"))[-1][:100]),
            console=console,
            data_dir=data_dir,
            split=split,
            num_problems=num_problems,
            prompt_suffix=prompt_suffix,
            prompt_column=prompt_column,
            answer_column=answer_column,
            dtype=dtype,
            device=device,
            threads=threads,
            slots=slots,
            seed=seed,
        )


@app.command(
    epilog="Examples:\n\n"
    "prune-opd report runs/mine\n\n"
    "prune-opd report runs/comparison --output comparison.html\n\n"
    "prune-opd report runs/opd runs/prune-0.6 runs/prune-0.7"
)
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories, or output directories of compare.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="The file to write. Default: report.html in RUN; of several, in this folder.")
    ] = None,
) -> None:
    """Write runs, or a comparison, as one HTML page that opens anywhere. A run that still goes on is fine."""
    from prune_opd.reporting.report import write_report

    say(f"report: {write_report(runs, output)}")


@app.command(
    epilog="Examples:\n\n"
    "prune-opd replay runs/mine --threshold 0.6,0.7,0.8\n\n"
    "prune-opd replay runs/mine --metric overlap_ratio,overlap_mass --w-drop 0.005,0.01,0.02\n\n"
    "prune-opd replay runs/mine --metric teacher_top_p_accept --teacher-top-p 0.9,0.95"
)
def replay(
    run_dir: Annotated[Path, typer.Argument(help="Directory of any run, one of plain OPD too.")],
    threshold: Annotated[
        str, typer.Option(help="Comma-separated thresholds γ. Default: 0.5 to 0.9, and the run's own.")
    ] = "",
    w_drop: Annotated[str, typer.Option(help="Comma-separated. Default: the run's own.")] = "",
    metric: Annotated[
        str, typer.Option(help="Comma-separated: overlap_ratio, overlap_mass, teacher_top_p_accept. Default: its own.")
    ] = "",
    teacher_top_p: Annotated[str, typer.Option(help="Comma-separated, for its metric. Default: the run's own.")] = "",
    json_path: Annotated[Path | None, typer.Option("--json", help="Default: RUN_DIR/replay.json.")] = None,
) -> None:
    """What other drift settings would have kept of a finished run: from its log, without a model."""
    from prune_opd.experiments.replay import replay as run_replay

    run_replay(
        run_dir,
        thresholds=_numbers("--threshold", threshold),
        w_drops=_numbers("--w-drop", w_drop),
        metrics=[name.strip() for name in metric.split(",") if name.strip()],
        top_ps=_numbers("--teacher-top-p", teacher_top_p),
        console=console,
        json_path=json_path,
    )


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{option} {text!r} is no list of numbers; write it as {option} 0.6,0.7,0.8") from None
