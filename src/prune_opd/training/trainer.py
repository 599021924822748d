"""The loop around `step.py`: run the steps of a recipe, log, evaluate, save, and go on where a run was stopped."""

from __future__ import annotations

import contextlib
import functools
import gc
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from prune_opd.config import Config
from prune_opd.distributed.merging import merged
from prune_opd.distributed.world import ALONE, World
from prune_opd.errors import ConfigError, NonFiniteError, RunDirectoryError, RunInterrupted, ServerError
from prune_opd.reporting.console import step_view
from prune_opd.reporting.metrics import metrics_of, step_share
from prune_opd.reporting.saturation import saturated
from prune_opd.step import prune_opd_step
from prune_opd.training.build import build_parts, prompts_of
from prune_opd.training.calibration import with_known_threshold
from prune_opd.training.checkpoint import Totals, load_training_state
from prune_opd.training.faults import Faults
from prune_opd.training.files import check_no_writer, check_writable, only_writer, storage_errors
from prune_opd.training.held_out import HeldOut
from prune_opd.training.run_directory import LOGS, RunDirectory
from prune_opd.training.run_log import RunLog
from prune_opd.training.signals import EvaluationStopped, StopSignals
from prune_opd.types import Prompt


class Trainer:
    """One training run in one directory.

    Everything that can be wrong with a recipe is found here, before the first step; nothing is written before `train`.
    `resume`: "never" (the directory must not exist), "auto" (continue from its last whole checkpoint; without one,
    begin), or the path of a checkpoint.
    """

    def __init__(
        self,
        config: Config,
        output_dir: str | Path,
        *,
        resume: str = "never",
        console: Console | None = None,
        world: World = ALONE,
    ) -> None:
        self.world, self.run_dir = world, Path(output_dir)
        self.console = (console or Console()) if world.rank == 0 else Console(quiet=True)
        self.directory = RunDirectory(self.run_dir, world, self.console, self._note)
        check_writable(self.run_dir)
        with world.raising_together(RunDirectoryError):
            if world.rank == 0:
                check_no_writer(self.run_dir)
        config, calibration = with_known_threshold(config, self.run_dir)
        checkpoint = self.directory.checkpoint_to_resume(resume, config)
        world.gather(None)  # every rank has seen the directory as it was
        disable_progress_bar()  # of transformers, which would draw over ours
        self.parts = parts = build_parts(
            config, self.run_dir, checkpoint=checkpoint, calibration=calibration, console=self.console, world=world
        )
        self.config, self.run = parts.config, parts.run
        self.totals, self.steps_done = Totals(), 0
        self.unlogged: dict[str, Any] | None = None  # the record of a step whose evaluation a signal cut off
        if checkpoint is not None:
            state = load_training_state(
                checkpoint,
                model=parts.student,
                optimizer=parts.optimizer,
                schedule=parts.schedule,
                window=self.run.window,
                budget=self.run.budget,
                teacher=parts.moving_teacher,
            )
            self.steps_done, self.totals, self.unlogged = state.step, state.totals, state.unlogged
            steps = config.training.steps
            if self.steps_done > steps:
                raise ConfigError(
                    f"training.steps = {steps}, but {checkpoint} is of step {self.steps_done}; give at least that "
                    "many, or start a new run directory"
                )
            rest = "; the run is finished, raise training.steps to go on" if self.steps_done == steps else ""
            self.console.print(f"resumed from {checkpoint} after step {self.steps_done}{rest}", soft_wrap=True)
        elif (cost := parts.calibration) is not None:
            ours, theirs = (cost[name]["tokens"] for name in ("student_written", "teacher_written"))
            self.totals = Totals(cost["seconds"], student_tokens=ours, teacher_tokens=ours + theirs)

        evaluation, skips = self.config.evaluation, self.config.training.max_skipped_steps
        self.log = RunLog(self.run_dir, self.config, parts.tokenizer)
        self.held_out = HeldOut(
            parts.problems, evaluation, parts.sampler, parts.tokenizer, self.totals, self.console, world
        )
        self.faults = Faults(self.run_dir, self.totals, skips, parts.tokenizer, self._note, world.rank == 0)
        # Lines of a dead run past the checkpoint go; without a checkpoint, all of them.
        last_logged = dict.fromkeys(LOGS, -1 if checkpoint is None else self.steps_done)
        last_logged["metrics.jsonl"] -= self.unlogged is not None
        self.directory.check(parts, last_logged, self.steps_done)

    def train(self, *, start: dict[str, Any] | None = None) -> Totals:
        """Run the remaining steps; returns the totals of the whole run.

        start: the record of step 0 of a run that began with the same student and evaluates it in the same way, which
        then is not done again.
        Raises RunInterrupted after SIGTERM or SIGINT, everything being saved, and StorageError when the disk fails.
        """
        with storage_errors(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
        writes = self.world.rank == 0
        with only_writer(self.run_dir) if writes else contextlib.nullcontext(), StopSignals() as signals:
            if writes:
                self.directory.begin(self.parts, self.run.teacher, self.steps_done)
                self.log.start()
            self.world.gather(None)  # the directory is as the run needs it
            # Python collects cycles of old objects only when a quarter as many as there are have been added. There are
            # half a million from the imports, so what steps leave behind would lie around for hundreds of them.
            gc.collect()
            gc.freeze()
            try:
                self._show_example()
                self._evaluate_at_start(signals, start)
                self._steps(signals)
            finally:
                gc.unfreeze()
                self.log.close()
        return self.totals

    def close(self) -> None:
        """Let go of the sampler's engine. vLLM's ends torch.distributed too: close after the last use of either."""
        self.parts.sampler.close()

    def _steps(self, signals: StopSignals) -> None:
        """The loop: a step, its log or evaluation, a checkpoint where one is due."""
        training = self.config.training
        records = self.log.steps()
        with step_view(self.console, records) as show:
            for step in range(self.steps_done, training.steps):
                done, last = step + 1, step + 1 == training.steps
                try:
                    record = self._step(step)
                except ServerError as error:
                    self._stop_for_server(step, error)
                if self.world.rank == 0 and "skipped" not in record:
                    show(record)
                    records.append(record)
                    if (said := saturated(records)) and not saturated(records[:-1]):
                        self._note(f"  {said}")
                self.steps_done = done
                if self.held_out.due(done, last=last):
                    self._evaluate_and_log(record, signals)
                else:
                    self._log(record)
                signal = self.world.first(signals.received)  # it may have met some ranks only
                if last or done % training.save_every == 0 or signal:
                    self._save()
                if signal and not last:
                    self._stop(signal)

    def _step(self, step: int) -> dict[str, Any]:
        """One step of the method; its record for metrics.jsonl."""
        began, processor_began, totals = time.perf_counter(), time.process_time(), self.totals
        prompts = prompts_of(self.parts.prompts, self.config, step, self.run.budget)
        try:
            reward = functools.partial(self.parts.reward, prompts) if self.parts.reward else None
            result = prune_opd_step(self.run, step, prompts, reward)
        except NonFiniteError as error:
            return self._skip(step, prompts, error, began)
        self.parts.schedule.step()
        if self.parts.moving_teacher:
            self.parts.moving_teacher.follow(self.parts.student)
        share = merged(step_share(result, self.config), self.world)
        logged = merged(self.log.share(prompts, result), self.world)
        if share is None or logged is None:  # rank 0 writes for all
            return {"step": step + 1}
        self.log.rollouts(step + 1, logged)
        seconds = time.perf_counter() - began
        record = metrics_of(result, self.config, share)
        totals.train_seconds += seconds
        totals.student_tokens += record["tokens/generated"]
        totals.teacher_tokens += record["tokens/scored"]
        totals.saved_tokens += record["tokens/saved"]
        steps = self.config.training.steps
        return {
            "step": step + 1,
            "steps": steps,
            "eta_seconds": totals.train_seconds / (step + 1) * (steps - step - 1),
            "learning_rate": self.parts.schedule.get_last_lr()[0],
            **record,
            "grad_norm_usual": self.faults.watch_norm(step + 1, result.grad_norm),
            "time/total": seconds,
            "time/cpu": time.process_time() - processor_began,
            "time/train_so_far": totals.train_seconds,
            "skipped_steps": totals.skipped_steps,
        }

    def _skip(self, step: int, prompts: Sequence[Prompt], error: NonFiniteError, began: float) -> dict[str, Any]:
        """The record of a step that met NaN: nothing was learnt from it. Raises NonFiniteError after too many."""
        self.faults.skip(step + 1, prompts, error)
        if self.run.budget:
            self.run.budget.skip()
        self.parts.optimizer.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimiser's step, which was left out on purpose
            self.parts.schedule.step()
        seconds = time.perf_counter() - began
        self.totals.train_seconds += seconds
        record = {
            "step": step + 1,
            "steps": self.config.training.steps,
            "skipped": str(error),
            "skipped_steps": self.totals.skipped_steps,
            "time/total": seconds,
            "time/train_so_far": self.totals.train_seconds,
        }
        if self.faults.too_many:
            self._log(record)
            raise self.faults.final(error) from error
        return record

    def _evaluate_at_start(self, signals: StopSignals, start: dict[str, Any] | None) -> None:
        if self.unlogged is not None:
            self._evaluate_and_log(self.unlogged, signals)
        elif start is not None and self.steps_done == 0:
            self.console.print(f"  step 0: held-out accuracy {start['eval/accuracy']:.3f}, as measured before")
            self._log(start | {"time/eval": 0.0})
        elif self.parts.problems and self.steps_done == 0:
            self._evaluate_and_log({"step": 0}, signals)

    def _evaluate_and_log(self, record: dict[str, Any], signals: StopSignals) -> None:
        """Complete the record of a step by an evaluation. A signal cuts it off: it is done again after the resume."""
        try:
            # Ranks wait for each other at the end of an evaluation, so none may leave it early.
            with signals.interruptible() if self.world.size == 1 else contextlib.nullcontext():
                found = self.held_out.record(record["step"])
        except EvaluationStopped:
            if self.steps_done:
                self.unlogged = record
                self._save()
            self._stop(signals.received)
        except ServerError as error:
            if self.steps_done:
                self.unlogged = record
            self._stop_for_server(self.steps_done, error)
        self._log(record | found)
        self.unlogged = None

    def _log(self, record: dict[str, Any]) -> None:
        if self.world.rank == 0:
            self.log.metrics(record)

    def _save(self) -> None:
        self.directory.save(self.parts, self.steps_done, self.totals, self.unlogged)

    def _stop(self, signal: str | None) -> NoReturn:
        raise RunInterrupted(
            f"{signal}: stopped after step {self.steps_done} of {self.config.training.steps}, "
            f"{'saved' if self.steps_done else 'before there was anything to save'}; continue with "
            f"--resume auto --output-dir {self.run_dir}"
        )

    def _stop_for_server(self, step: int, error: ServerError) -> NoReturn:
        """What was learnt in `step` steps is saved; the evaluation of the last one, if that failed, is done again."""
        saved = self.world.gather((self.directory.checkpoints / f"step_{step}").exists())[0]
        if step and not saved:
            self._save()
            saved = True
        raise ServerError(
            f"{error}; stopped after step {step}{', saved' if saved else ''}; continue with --resume auto "
            f"--output-dir {self.run_dir}"
        ) from error

    def _note(self, text: str) -> None:
        self.console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def _show_example(self) -> None:
        prompts, tokenizer = self.parts.prompts, self.parts.tokenizer
        prompt = prompts_of(prompts, self.config, self.steps_done, self.run.budget)[0]
        self.console.print(
            f"first prompt ({len(prompt.token_ids)} tokens, {prompt.source}), as the model sees it:", style="dim"
        )
        self.console.print(tokenizer.decode(prompt.token_ids), markup=False, highlight=False)
        if dropped := prompts.dropped_too_long:
            limit = self.config.data.max_prompt_length
            self.console.print(f"{dropped} prompts were longer than {limit} tokens and are left out", style="yellow")
