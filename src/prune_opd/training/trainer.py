"""The loop around `step.py`: builds what a recipe names, runs the steps, evaluates, logs, saves, resumes."""

from __future__ import annotations

import functools
import json
import os
import platform
import random
import shlex
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from prune_opd.config import Config
from prune_opd.core.overlap import shared_candidates
from prune_opd.core.window import TrainingWindow
from prune_opd.data.prompts import Prompt
from prune_opd.data.source import DatasetSource, held_out_prompts, training_prompts
from prune_opd.errors import CheckpointError, NonFiniteError, RunDirectoryError
from prune_opd.evaluation.evaluate import Evaluation, evaluate, response_texts
from prune_opd.report.logs import read_lines
from prune_opd.report.model_card import model_card
from prune_opd.rewards import GRADE, load_reward
from prune_opd.sampling.local import LocalSampler
from prune_opd.step import StepResult, prune_opd_step
from prune_opd.tracking.console import step_view
from prune_opd.tracking.metrics import (
    distillation_metrics,
    repetition_rate,
    reward_metrics,
    stop_metrics,
    trained_inputs,
)
from prune_opd.tracking.rollouts import rollout_record
from prune_opd.tracking.trackers import start_trackers
from prune_opd.training import models
from prune_opd.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)
from prune_opd.training.engines import build_teacher, remember_teacher
from prune_opd.types import Rollouts


@dataclass
class Totals:
    """Running sums of a run; part of its checkpoints, so that a resumed run reports the whole."""

    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    student_tokens: int = 0
    teacher_tokens: int = 0
    saved_tokens: int = 0


class Trainer:
    """One training run in one directory.

    Everything that can be wrong with a recipe is found here, before the first step. `resume`: "never" (the directory
    must not exist), "auto" (continue from its last checkpoint if it has one), or the path of a checkpoint.
    """

    def __init__(
        self, config: Config, output_dir: str | Path, *, resume: str = "never", console: Console | None = None
    ) -> None:
        self.config, self.console = config, console or Console()
        self.run_dir = Path(output_dir)
        checkpoint = self._find_checkpoint(resume)
        disable_progress_bar()  # of transformers, which would draw over ours

        if config.training.threads:
            torch.set_num_threads(config.training.threads)
        seed_everything(config.training.seed)
        device = models.resolve_device(config.training.device)
        names = config.model.model_name_or_path, config.model.teacher_model_name_or_path
        self.tokenizer = models.load_tokenizer(names[0], config.model)
        models.check_token_maps(self.tokenizer, models.load_tokenizer(names[1], config.model))
        self.prompts = training_prompts(config.data, self.tokenizer, seed=config.training.seed)
        self.reward = load_reward(config.reward.function) if config.reward.function else None
        if config.reward.function == GRADE and isinstance(self.prompts, DatasetSource):
            self.prompts.check_gradable()
        self.eval_prompts = (
            held_out_prompts(config.evaluation.data, config.data, self.tokenizer, count=config.evaluation.num_problems)
            if config.evaluation.data
            else []
        )
        self.student = models.load_student(config, device)
        longest = max(config.rollout.max_completion_length, config.evaluation.max_tokens if self.eval_prompts else 0)
        models.check_context(self.student, names[0], config.data.max_prompt_length + longest)
        self.teacher, self.vocab_size = build_teacher(config, self.student, self.tokenizer, self.run_dir, device=device)
        self.sampler = LocalSampler(
            self.student,
            pad_id=self.tokenizer.pad_token_id,
            eos_ids=models.end_ids(self.student, self.tokenizer),
            vocab_size=self.vocab_size,
            slots=config.rollout.slots,
        )
        self.window = build_window(config)
        self.optimizer, self.schedule = build_optimizer(self.student, config)
        self.totals, self.steps_done = Totals(), 0

        if checkpoint is not None:
            self.steps_done, totals = load_checkpoint(
                checkpoint,
                model=self.student,
                optimizer=self.optimizer,
                schedule=self.schedule,
                window=self.window,
                config=config,
            )
            self.totals = Totals(**totals)
            for name in ("metrics.jsonl", "drift.jsonl", "rollouts.jsonl"):
                _drop_later_steps(self.run_dir / name, self.steps_done)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        _write_json(self.run_dir / "config.json", config.model_dump())
        _write_json(self.run_dir / "env.json", environment(device))
        remember_teacher(self.teacher, self.run_dir)
        self.trackers = start_trackers(config.tracking.report_to, self.run_dir, config.model_dump())
        if checkpoint is not None:
            self.console.print(f"resumed from {checkpoint} after step {self.steps_done}")

    def train(self) -> Totals:
        """Run the remaining steps; returns the totals of the whole run."""
        training, evaluation = self.config.training, self.config.evaluation
        self._show_example()
        if self.eval_prompts and self.steps_done == 0:
            self._log({"step": 0, **self._evaluate(0)})
        with step_view(self.console, self._logged_steps()) as show:
            for step in range(self.steps_done, training.steps):
                done, last = step + 1, step + 1 == training.steps
                record = self._step(step)
                show(record)
                if self.eval_prompts and (last or done % evaluation.every == 0):
                    record |= self._evaluate(done)
                self._log(record)
                if last or done % training.save_every == 0:
                    self._save(done)
        return self.totals

    def _step(self, step: int) -> dict[str, Any]:
        began = time.perf_counter()
        rollout = self.config.rollout
        prompts = self.prompts.batch(step, rollout.prompts_per_step)
        of_rollout = [prompt for prompt in prompts for _ in range(rollout.num_generations)]
        try:
            result = prune_opd_step(
                step=step,
                prompts=[prompt.token_ids for prompt in of_rollout],
                student=self.student,
                sampler=self.sampler,
                teacher=self.teacher,
                optimizer=self.optimizer,
                window=self.window,
                vocab_size=self.vocab_size,
                config=self.config,
                reward=functools.partial(self._rewards, of_rollout) if self.reward else None,
            )
        except NonFiniteError as error:
            last_good = latest_checkpoint(self.run_dir / "checkpoints")
            kept = f"the last good checkpoint is {last_good}" if last_good else "no checkpoint had been written yet"
            raise NonFiniteError(
                f"{error}. Training stopped; {kept}. Lower training.learning_rate, or look at "
                f"{self.run_dir / 'rollouts.jsonl'}"
            ) from error
        self.schedule.step()
        seconds = time.perf_counter() - began
        record = metrics_of(result, self.config)
        self.totals.train_seconds += seconds
        self.totals.student_tokens += record["tokens/generated"]
        self.totals.teacher_tokens += record["tokens/scored"]
        self.totals.saved_tokens += record["tokens/saved"]
        per_step = self.totals.train_seconds / (step + 1)
        self._write_rollouts(step + 1, prompts, result)
        return {
            "step": step + 1,
            "steps": self.config.training.steps,
            "eta_seconds": per_step * (self.config.training.steps - step - 1),
            "learning_rate": self.schedule.get_last_lr()[0],
            **record,
            "time/total": seconds,
            "time/train_so_far": self.totals.train_seconds,
        }

    def _rewards(self, prompts: list[Prompt], rollouts: Rollouts) -> torch.Tensor:
        """(B,) float64: the task's reward of each rollout, NaN where it has none."""
        assert self.reward is not None
        rewards = self.reward(prompts, list(response_texts(rollouts, self.tokenizer)))
        if self.config.reward.mask_truncated_completions:
            rewards = rewards.masked_fill(~rollouts.finished.cpu(), torch.nan)
        return rewards

    def _evaluate(self, step: int) -> dict[str, Any]:
        found: Evaluation = evaluate(self.sampler, self.tokenizer, self.eval_prompts, self.config.evaluation)
        self.totals.eval_seconds += found.seconds
        low, high = found.ci95
        self.console.print(
            f"  step {step}: held-out accuracy [bold]{found.accuracy:.3f}[/] (95% {low:.3f}-{high:.3f}, "
            f"Avg@{self.config.evaluation.k} on {len(self.eval_prompts)} problems), mean length "
            f"{found.mean_length:.0f}, ended {found.eos_rate:.0%}, {found.seconds:.0f} s",
            highlight=False,
        )
        return {
            "eval/accuracy": found.accuracy,
            "eval/ci95": found.ci95,
            "eval/per_problem": found.per_problem,
            "eval/mean_length": found.mean_length,
            "eval/eos_rate": found.eos_rate,
            "time/eval": found.seconds,
        }

    def _save(self, step: int) -> None:
        folder = self.run_dir / "checkpoints"
        saved = save_checkpoint(
            folder,
            step=step,
            model=self.student,
            tokenizer=self.tokenizer,
            optimizer=self.optimizer,
            schedule=self.schedule,
            window=self.window,
            totals=vars(self.totals),
            config=self.config,
        )
        card = model_card(self.run_dir)
        card.save(saved / "README.md")
        card.save(self.run_dir / "README.md")
        remove_old_checkpoints(folder, self.config.training.keep_last)

    def _find_checkpoint(self, resume: str) -> Path | None:
        """The checkpoint to continue from; a run directory is never overwritten."""
        if resume not in ("never", "auto"):
            checkpoint = Path(resume)
            if not (checkpoint / "trainer_state.json").is_file():
                raise CheckpointError(f"{checkpoint} is no checkpoint; give a folder checkpoints/step_N of a run")
            if checkpoint.resolve().parents[1] != self.run_dir.resolve():
                raise CheckpointError(
                    f"{checkpoint} belongs to the run {checkpoint.resolve().parents[1]}, not to {self.run_dir}; "
                    "give that run's directory as --output-dir, or leave it out"
                )
            return checkpoint
        found = latest_checkpoint(self.run_dir / "checkpoints") if resume == "auto" else None
        if found is None and self.run_dir.exists() and any(self.run_dir.iterdir()):
            raise RunDirectoryError(
                f"{self.run_dir} exists and is not empty; runs are never overwritten. Choose another --output-dir"
                + (", or continue it with --resume auto" if resume == "never" else " (it holds no checkpoint)")
            )
        return found

    def _show_example(self) -> None:
        prompt = self.prompts.batch(self.steps_done, self.config.rollout.prompts_per_step)[0]
        dropped = self.prompts.dropped_too_long
        self.console.print(
            f"first prompt ({len(prompt.token_ids)} tokens, {prompt.source}), as the model sees it:", style="dim"
        )
        self.console.print(self.tokenizer.decode(prompt.token_ids), markup=False, highlight=False)
        if dropped:
            limit = self.config.data.max_prompt_length
            self.console.print(f"{dropped} prompts were longer than {limit} tokens and are left out", style="yellow")

    def _write_rollouts(self, step: int, prompts: Any, result: StepResult) -> None:
        drift, rollouts = result.drift, result.rollouts
        assert rollouts.student is not None
        shared = shared_candidates(rollouts.student.ids, result.scores.topk.ids).sum(-1)
        _append_json(
            self.run_dir / "drift.jsonl",
            {
                "step": step,
                "length": rollouts.lengths.tolist(),
                "effective_length": drift.effective_length.tolist(),
                "onset": drift.onset.tolist(),
                "stopped": rollouts.stopped.tolist(),
                # Shared candidates of each position, two hexadecimal digits a token: what `replay` needs.
                "shared": [
                    bytes(row[:n]).hex() for row, n in zip(shared.tolist(), rollouts.lengths.tolist(), strict=True)
                ],
                "weight_by_position": _mean_by_position(result.weight, rollouts.response_mask),
            },
        )
        for i in range(min(self.config.tracking.rollouts_per_step, len(rollouts.lengths))):
            prompt = prompts[i // self.config.rollout.num_generations]
            record = rollout_record(result, i, prompt, shared, self.tokenizer, self.config.tracking)
            _append_json(self.run_dir / "rollouts.jsonl", {"step": step, **record})

    def _logged_steps(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        return [record for record in read_lines(path) if record["step"] > 0] if path.is_file() else []

    def _log(self, record: dict[str, Any]) -> None:
        _append_json(self.run_dir / "metrics.jsonl", record)
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        for log in self.trackers:
            log(numbers, record["step"])


def metrics_of(result: StepResult, config: Config) -> dict[str, Any]:
    """The metrics record of one step; keys are listed in docs/metrics.md."""
    rollouts, scores, drift, change = result.rollouts, result.scores, result.drift, result.window
    lengths, effective = rollouts.lengths, drift.effective_length.double()
    budget = config.rollout.max_completion_length
    cap = change.previous_length if change else budget
    unfinished = ~rollouts.finished
    trained = int(lengths.sum())
    record = {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "prune_opd/current_max_response_length": cap,
        "prune_opd/next_max_response_length": change.length if change else cap,
        "prune_opd/effective_response_length_mean": effective.mean().item(),
        "prune_opd/effective_response_length_max": effective.max().item(),
        "prune_opd/effective_response_length_min": effective.min().item(),
        "prune_opd/effective_response_length_p90": effective.quantile(0.9).item(),
        "prune_opd/loss_weight_mean": (result.weight.sum() / trained).item(),
        **distillation_metrics(rollouts, scores),
        "completions/mean_length": lengths.double().mean().item(),
        "completions/eos_rate": rollouts.finished.double().mean().item(),
        "completions/clipped_ratio": (unfinished & ~rollouts.stopped).double().mean().item(),
        "completions/repetition_rate": repetition_rate(rollouts.response_ids, rollouts.response_mask),
        "tokens/generated": rollouts.generated,
        "tokens/scored": scores.scored,
        "tokens/trained": trained,
        "tokens/update_padding": 1 - trained_inputs(rollouts) / result.packed_tokens,
        # Upper bounds: a rollout that was cut might have ended by itself before the whole budget was used.
        "tokens/saved": int((budget - lengths)[unfinished].sum()),
        "tokens/saved_by_stops": int((cap - lengths)[rollouts.stopped].sum()),
        "rollout/slot_occupancy": rollouts.generated / max(rollouts.slot_steps, 1),
        **{f"time/{name}": seconds for name, seconds in result.seconds.items()},
    }
    if change:
        record["prune_opd/effective_response_length_hit_ratio"] = change.hit_ratio
    if result.rewards is not None:
        record |= reward_metrics(result.rewards, config.rollout.num_generations)
    if result.spent_at is not None:
        guard = config.pruning.repetition
        record |= stop_metrics(rollouts, result.events, result.audit, result.spent_at, guard)
    return record


def build_window(config: Config) -> TrainingWindow | None:
    """The training window of a recipe; None when its response length is fixed."""
    if not config.window_is_dynamic:
        return None
    return TrainingWindow(**config.pruning.dynamic_response_length.model_dump(exclude={"enable"}))


def build_optimizer(
    model: torch.nn.Module, config: Config
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW over what requires a gradient; linear warm-up, then constant or linear to zero."""
    training = config.training
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]  # norms and biases do not decay
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        fused=True,
    )

    def factor(step: int) -> float:
        if step < training.warmup_steps:
            return (step + 1) / training.warmup_steps
        if training.lr_scheduler_type == "constant":
            return 1.0
        return max(0.0, (training.steps - step) / (training.steps - training.warmup_steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def seed_everything(seed: int) -> None:
    """Seed the generators that libraries draw from; sampling has its own numbers (`rollout_uniforms`)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def environment(device: torch.device) -> dict[str, Any]:
    """What a number depends on besides the recipe."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        **{name: version(name) for name in ("prune-opd", "torch", "transformers", "tokenizers", "safetensors")},
    }


def _mean_by_position(values: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """Mean over the rollouts that reach each position; values, mask (B, T)."""
    reached = mask.sum(0)
    means = values.double().masked_fill(~mask, 0).sum(0)[reached > 0] / reached[reached > 0]
    return [round(mean, 4) for mean in means.tolist()]


def _append_json(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _drop_later_steps(path: Path, last_step: int) -> None:
    """After a resume each step must stand in a log once: lines that the dead run wrote past the checkpoint go."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step]
        path.write_text("".join(kept), encoding="utf-8")
