"""Arms against each other: the same seeds, data order, sampling numbers and validation steps; one setting differs."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from prune_opd.config import Config, with_settings
from prune_opd.errors import ConfigError, RunDirectoryError, RunInterrupted
from prune_opd.experiments.arms import (
    FOLLOW_REFERENCE,
    FOLLOWED,
    Reference,
    arm_config,
    check_arms,
    read_reference,
    run_order,
)
from prune_opd.experiments.results import plot_results, results_table, run_record, write_results
from prune_opd.reporting.records import read_lines
from prune_opd.training.files import check_writable
from prune_opd.training.trainer import Trainer


def compare(
    config: Config,
    *,
    arms: Sequence[str],
    seeds: Sequence[int],
    output_dir: Path,
    console: Console,
    reference: Path | None = None,
    resume: bool = False,
    parallel: int = 1,
) -> dict[str, Any]:
    """Train every arm with every seed; returns and writes what `compare.json` holds, and compare.csv and the plot.

    Runs go one after the other, arms alternating within a seed, so that a machine that slows down slows all of them;
    arms that follow another run after it. They begin with the same student, which is evaluated once, by the first.
    `reference`: a finished run with a window, or the output of another comparison with arm prune, for the arms that
    follow one; else they follow arm prune of this comparison. `output_dir` must be new unless `resume`: then finished
    runs are kept and the others go on from their last checkpoint. `parallel`: runs at the same time, each in a process
    of its own; they share the machine, so a warning tells not to compare their times.
    """
    check_arms(config, arms, references=reference is not None)
    if config.evaluation.data is None:
        raise ConfigError("compare needs held-out problems to compare on; set evaluation.data in the recipe")
    if config.tracking.report_to and config.tracking.group is None:
        config = with_settings(config, **{"tracking.group": output_dir.name})
    check_writable(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()) and not resume:
        raise RunDirectoryError(
            f"{output_dir} exists and is not empty; choose another --output-dir, or go on with --resume"
        )
    given = {
        seed: read_reference(_reference_dir(reference, seed), config, seed)
        for seed in (seeds if reference and set(arms) & set(FOLLOW_REFERENCE) else ())
    }
    if parallel > 1:
        warnings.warn(
            f"{parallel} runs at the same time slow each other down: compare accuracy and tokens, not times",
            stacklevel=2,
        )
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    output_dir.mkdir(parents=True, exist_ok=True)
    for arm, record in _all_runs(config, arms, seeds, given, output_dir, console, resume, parallel):
        runs[arm] = sorted([*runs[arm], record], key=lambda run: run["seed"])
        results = write_results(output_dir, config, runs)
    for suffix in ("png", "svg"):
        plot_results(results, output_dir / f"accuracy_over_time.{suffix}")
    console.print(results_table(results))
    console.print(f"written to {output_dir}: compare.json, compare.csv, accuracy_over_time.png and .svg")
    return results


def _all_runs(
    config: Config,
    arms: Sequence[str],
    seeds: Sequence[int],
    given: dict[int, Reference],
    output_dir: Path,
    console: Console,
    resume: bool,
    parallel: int,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(arm, record) of each run as it ends."""
    count = len(arms) * len(seeds)

    def prepared(arm: str, seed: int) -> tuple[Config, Path, int, bool]:
        followed = given.get(seed)
        if followed is None and arm in FOLLOW_REFERENCE and FOLLOWED in arms:
            followed = read_reference(_run_dir(output_dir, FOLLOWED, seed), config, seed)
        return arm_config(config, arm, seed, followed), _run_dir(output_dir, arm, seed), seed, resume

    if parallel == 1:
        start: dict[str, Any] | None = None
        for i, (seed, arm) in enumerate(((seed, arm) for seed in seeds for arm in run_order(arms)), start=1):
            console.rule(f"arm {arm}, seed {seed} ({i} of {count})")
            arguments = prepared(arm, seed)
            if lengths := arguments[0].control.lengths:
                console.print(f"lengths: {lengths[0]} at first, {lengths[-1]} at the end", highlight=False)
            yield arm, _run(*arguments, console, start)
            start = start or next(read_lines(arguments[1] / "metrics.jsonl"))
        return

    waves = [arm for arm in arms if arm not in FOLLOW_REFERENCE], [arm for arm in arms if arm in FOLLOW_REFERENCE]
    done = 0
    # Spawned, not forked: a fork of a process that has run torch threads may hang.
    with ProcessPoolExecutor(parallel, mp_context=multiprocessing.get_context("spawn")) as pool:
        for wave in waves:
            started = [(seed, arm, pool.submit(_run, *prepared(arm, seed))) for seed in seeds for arm in wave]
            for seed, arm, run in started:
                record, done = run.result(), done + 1
                console.print(f"arm {arm}, seed {seed} done ({done} of {count}): {record['accuracy']:.1%} right")
                yield arm, record


def _run(
    config: Config,
    run_dir: Path,
    seed: int,
    resume: bool,
    console: Console | None = None,
    start: dict[str, Any] | None = None,
) -> dict[str, Any]:
    trainer = Trainer(config, run_dir, resume="auto" if resume else "never", console=console or Console(quiet=True))
    try:
        totals = trainer.train(start=start)
    except RunInterrupted as error:  # its own advice is for a run that `train` began
        raise RunInterrupted(
            f"{str(error).split(';')[0]}; go on with the same command, with --resume and --output-dir {run_dir.parent}"
        ) from None
    return run_record(run_dir, seed, vars(totals), config)


def _run_dir(output_dir: Path, arm: str, seed: int) -> Path:
    return output_dir / f"{arm.replace(':', '-')}-seed{seed}"


def _reference_dir(reference: Path | None, seed: int) -> Path:
    """The run for this seed: of a comparison, its prune run; else the run that was given."""
    assert reference is not None
    of_comparison = _run_dir(reference, FOLLOWED, seed)
    return of_comparison if of_comparison.is_dir() else reference
