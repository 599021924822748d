"""One model on one benchmark: what `prune-opd eval` does."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from prune_opd.config import EvaluationSection, ModelSection
from prune_opd.data.benchmarks import load_benchmark
from prune_opd.errors import CheckpointError, ModelError, PruneOPDError, RunDirectoryError
from prune_opd.evaluation.evaluate import Evaluation, evaluate
from prune_opd.models import loading as models
from prune_opd.reporting.console import duration
from prune_opd.rollout.local import LocalSampler
from prune_opd.training.checkpoint import latest_checkpoint
from prune_opd.training.environment import environment
from prune_opd.training.files import check_writable

OPTIONS = {  # of `prune-opd eval`, by the setting that they take the place of
    "data.train": "--benchmark",
    "evaluation.data": "--benchmark",
    "data.split": "--split",
    "data.prompt_column": "--prompt-column",
    "data.answer_column": "--answer-column",
    "data.prompt_suffix": "--prompt-suffix",
    "training.device": "--device",
    "training.threads": "--threads",
    "training.seed": "--seed",
    "model.model_name_or_path": "MODEL",
    "model.dtype": "--dtype",
    "rollout.slots": "--slots",
    **{f"evaluation.{name}": f"--{name.replace('_', '-')}" for name in ("k", "temperature", "top_p", "max_tokens")},
    "evaluation.num_problems": "--num-problems",
}
ANSWERS_PER_SLOT = 2  # sampled in one go: more fills the slots better at its end, fewer show progress more often
SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal


def evaluate_model(
    model_name: str,
    benchmark: str,
    settings: EvaluationSection,
    output_dir: Path,
    *,
    console: Console,
    data_dir: Path | None = None,
    split: str = "test",
    num_problems: int | None = None,
    prompt_suffix: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
    threads: int = 1,
    slots: int = 64,
    seed: int = 0,
) -> Evaluation:
    """Evaluate a model (a folder, a Hub id or embedded:NAME; of a run, its last checkpoint) and print a table.

    Writes eval.json and responses.jsonl into output_dir, which must be new or empty. settings.max_tokens is lowered,
    with a warning, to what the model has positions for. threads: of torch on the CPU, 0 leaves them alone. slots:
    answers that decode at once. Raises ModelError, DataError, ConfigError and RunDirectoryError, all before the first
    token.
    """
    _check_new(output_dir)
    torch_device = models.resolve_device(device)
    if threads:
        torch.set_num_threads(threads)
    model_name = _checkpoint_of(model_name, console)
    section = ModelSection(model_name_or_path=model_name, teacher_model_name_or_path=model_name)
    tokenizer = models.load_tokenizer(model_name, section)
    prompts = load_benchmark(
        benchmark,
        tokenizer,
        data_dir=data_dir,
        split=split,
        num_problems=num_problems,
        prompt_suffix=prompt_suffix,
        prompt_column=prompt_column,
        answer_column=answer_column,
    )
    model = models.load_model(model_name, section, dtype=dtype, device=torch_device).eval()
    models.check_ids(model, model_name, (i for prompt in prompts for i in (*prompt.token_ids, tokenizer.pad_token_id)))
    settings = _fitted(settings, model, model_name, max(len(p.token_ids) for p in prompts), console)
    sampler = LocalSampler(
        model, pad_id=tokenizer.pad_token_id, eos_ids=models.end_ids(model.generation_config, tokenizer), slots=slots
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    with _progress(console, len(prompts), settings.k) as on_progress:
        found = evaluate(
            sampler,
            tokenizer,
            prompts,
            settings,
            seed=seed,
            responses_path=output_dir / "responses.jsonl",
            problems_at_once=max(1, ANSWERS_PER_SLOT * slots // settings.k),
            on_progress=on_progress,
        )
    record = {
        "model": model_name,
        "benchmark": benchmark,
        "problems": len(prompts),
        "first_source": prompts[0].source,
        "first_prompt": prompts[0].text,
        **settings.model_dump(include={"k", "temperature", "top_p", "max_tokens"}),
        "seed": seed,
        "dtype": dtype,
        **dataclasses.asdict(found),
        "environment": environment(torch_device),
    }
    (output_dir / "eval.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    title = f"{model_name} on {benchmark}, {len(prompts)} problems"
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(_table(found, settings))
    console.print(f"answers: {output_dir / 'responses.jsonl'}", markup=False, highlight=False, soft_wrap=True)
    return found


def _check_new(output_dir: Path) -> None:
    check_writable(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise RunDirectoryError(
            f"{output_dir} exists and is not empty; results are never overwritten. Choose another --output-dir"
        )


def _checkpoint_of(name: str, console: Console) -> str:
    """The last whole checkpoint where `name` is a run directory, which is said; else `name`."""
    run_dir = Path(name)
    if not os.path.isdir(run_dir / "checkpoints") and not os.path.isfile(run_dir / "metrics.jsonl"):
        return name
    found, passed_over = latest_checkpoint(run_dir / "checkpoints")
    if found is None:
        why = f": {passed_over[-1]}" if passed_over else ""
        raise CheckpointError(f"{name} is a run directory without a whole checkpoint{why}; evaluate it when it has one")
    console.print(f"{name} is a run directory; this is its last checkpoint, {found}", markup=False, soft_wrap=True)
    return str(found)


@contextmanager
def errors_of_eval() -> Iterator[None]:
    """What other modules say of settings, `eval` says of its options."""
    try:
        yield
    except PruneOPDError as error:
        text = str(error)
        for setting, option in OPTIONS.items():
            text = re.sub(rf"\b{re.escape(setting)}\b", option, text)
        error.args = (text, *error.args[1:])
        raise


def _fitted(
    settings: EvaluationSection, model: Any, name: str, longest_prompt: int, console: Console
) -> EvaluationSection:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None or longest_prompt + settings.max_tokens <= positions:
        return settings
    if longest_prompt >= positions:
        raise ModelError(
            f"model {name!r} has {positions} positions, but the longest prompt has {longest_prompt} tokens and leaves "
            "none for an answer; use a model with a longer context, or other problems"
        )
    fits = positions - longest_prompt
    console.print(
        f"{name} has {positions} positions and the longest prompt {longest_prompt} tokens: answers may have {fits} "
        f"tokens instead of {settings.max_tokens}",
        style="yellow",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return settings.model_copy(update={"max_tokens": fits})


@contextmanager
def _progress(console: Console, problems: int, k: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, else a line now and then: problems done, accuracy so far, time left."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(elapsed_when_finished=False),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("problems", total=problems)
            yield lambda done, right: bar.update(
                task, completed=done, description=f"problems, Avg@{k} so far {right / (done * k):.3f}"
            )
        return
    began = last = time.perf_counter()

    def line(done: int, right: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if done < problems and now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = duration((now - began) / done * (problems - done))
            console.print(f"{done}/{problems} problems, Avg@{k} so far {right / (done * k):.3f}, left {left}")

    yield line


def _table(found: Evaluation, settings: EvaluationSection) -> Table:
    table = Table()
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("95% interval", justify="right")
    table.add_row(f"Avg@{settings.k}", f"{found.accuracy:.1%}", _interval(found.ci95))
    for k, value in found.pass_at_k.items():
        table.add_row(f"pass@{k}", f"{value:.1%}", _interval(found.pass_at_k_ci95[k]))
    table.add_row("mean length", f"{found.mean_length:,.1f} tokens", "")
    table.add_row("ended by itself", f"{found.eos_rate:.1%}", "")
    table.add_row("time", f"{found.seconds:,.1f} s", "")
    table.add_row("speed", f"{found.tokens / found.sample_seconds:,.0f} tokens/s", "")
    return table


def _interval(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.1%} – {bounds[1]:.1%}"
