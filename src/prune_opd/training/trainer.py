"""The loop around `step.py`: builds what a recipe names, runs the steps, evaluates, logs, saves, resumes."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from prune_opd.config import Config
from prune_opd.core.overlap import shared_candidates
from prune_opd.data.source import DatasetSource, held_out_prompts, training_prompts
from prune_opd.distributed import sharding as distributed
from prune_opd.distributed.merging import merged
from prune_opd.distributed.world import ALONE, World
from prune_opd.errors import CheckpointError, NonFiniteError, RunDirectoryError, RunInterrupted, ServerError
from prune_opd.evaluation.evaluate import Evaluation, evaluate, response_texts
from prune_opd.models import loading as models
from prune_opd.reporting.console import step_view
from prune_opd.reporting.drift_log import drift_record
from prune_opd.reporting.metrics import (
    metrics_of,
)
from prune_opd.reporting.model_card import model_card
from prune_opd.reporting.rollout_log import rollout_record
from prune_opd.reporting.run_logs import read_lines, trained
from prune_opd.reporting.trackers import Log, start_trackers
from prune_opd.rewards import GRADE, load_reward
from prune_opd.rollout.ahead import RolloutsAhead
from prune_opd.rollout.base import Sampler
from prune_opd.rollout.gathered import WholeWeightsSampler
from prune_opd.rollout.local import LocalSampler
from prune_opd.rollout.sample import Sampled, sample_rollouts
from prune_opd.rollout.student_copy import StudentCopy
from prune_opd.step import StepResult, prune_opd_step
from prune_opd.teachers.local import LocalTeacher
from prune_opd.timing import Stopwatch
from prune_opd.training.build import (
    build_optimizer,
    build_run,
    build_sampler,
    build_teacher,
    build_window,
    environment,
    remember_teacher,
    seed_everything,
)
from prune_opd.training.calibration import CALIBRATION, calibrate, with_known_threshold
from prune_opd.training.checkpoint import (
    Totals,
    check_same_recipe,
    checkpoint_bytes,
    checkpoints,
    damage_of,
    latest_checkpoint,
    load_training_state,
    load_weights,
    remove_old_checkpoints,
    save_checkpoint,
    tidy,
)
from prune_opd.training.faults import SPIKE, USUAL_AFTER, running_norm, write_skipped
from prune_opd.training.files import (
    append_json,
    check_room,
    check_writable,
    log_end,
    only_writer,
    read_json,
    storage_errors,
    sync,
    write_json,
)
from prune_opd.training.signals import EvaluationStopped, StopSignals
from prune_opd.types import Prompt, Rollouts

FIRST_FILES = {CALIBRATION, f".{CALIBRATION}.partial", ".config.json.partial"}  # that come before config.json
LOGS = ("metrics.jsonl", "drift.jsonl", "rollouts.jsonl", "skipped.jsonl")


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
        self.world = world
        self.console = (console or Console()) if world.rank == 0 else Console(quiet=True)
        self.run_dir = Path(output_dir)
        check_writable(self.run_dir)
        self.config, self.calibration = with_known_threshold(config, self.run_dir)
        config = self.config
        checkpoint = self._find_checkpoint(resume)
        world.gather(None)  # every rank has seen the directory as it was
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
        held_out = config.evaluation
        self.eval_prompts = (
            held_out_prompts(
                held_out.data, config.data, self.tokenizer, count=held_out.num_problems, split=held_out.split
            )
            if held_out.data
            else []
        )
        self.student = models.load_student(config, device)
        if checkpoint is not None:
            load_weights(checkpoint, self.student, config)
        longest = max(config.rollout.max_completion_length, config.evaluation.max_tokens if self.eval_prompts else 0)
        models.check_context(self.student.config, names[0], config.data.max_prompt_length + longest)
        self.teacher, self.vocab_size = build_teacher(config, self.student, self.tokenizer, self.run_dir, device=device)
        self.sampler: Sampler = build_sampler(
            config,
            self.student,
            self.tokenizer,
            vocab_size=self.vocab_size,
            max_model_len=config.data.max_prompt_length + longest,
            processes=world.size,
        )
        if config.calibrates:  # before the student is sharded; every rank measures the same
            self.calibration = world.gather(self._calibrate())[0]
            self.config = config = config.with_threshold(self.calibration["threshold"])
        if config.training.parallel == "fsdp2" and world.size > 1:
            assert isinstance(self.sampler, LocalSampler)  # vLLM is for one process
            self.sampler = WholeWeightsSampler(self.sampler, self.student)
            distributed.shard(self.student)
        self.window = build_window(config)
        self.rollout_sampler = self.sampler
        self.ahead: RolloutsAhead | None = None
        if config.samples_from_copy:
            assert isinstance(self.sampler, LocalSampler)  # config.py lets no other
            dtype = config.other_rollout_dtype
            self.rollout_sampler = student_copy = StudentCopy(self.sampler, getattr(torch, dtype) if dtype else None)
            if config.rollout.ahead:
                self.ahead = RolloutsAhead(student_copy, self._sample_ahead, steps=config.training.steps)
        self.optimizer, self.schedule = build_optimizer(self.student, config)
        self.run = build_run(
            config,
            student=self.student,
            sampler=self.rollout_sampler,
            teacher=self.teacher,
            optimizer=self.optimizer,
            window=self.window,
            vocab_size=self.vocab_size,
            world=world,
            ahead=self.ahead,
        )
        self.totals, self.steps_done = Totals(), 0
        self.unlogged: dict[str, Any] | None = None  # the record of a step whose evaluation a signal cut off

        if checkpoint is not None:
            state = load_training_state(
                checkpoint, model=self.student, optimizer=self.optimizer, schedule=self.schedule, window=self.window
            )
            self.steps_done, self.totals, self.unlogged = state.step, state.totals, state.unlogged
            self.console.print(f"resumed from {checkpoint} after step {self.steps_done}", soft_wrap=True)
        elif self.calibration is not None:
            ours, theirs = (self.calibration[name]["tokens"] for name in ("student_written", "teacher_written"))
            self.totals = Totals(self.calibration["seconds"], student_tokens=ours, teacher_tokens=ours + theirs)
        # Lines of the dead run past the checkpoint go; without a checkpoint, all of them.
        last_logged = dict.fromkeys(LOGS, -1 if checkpoint is None else self.steps_done)
        if self.unlogged is not None:
            last_logged["metrics.jsonl"] -= 1
        self.log_ends = {name: log_end(self.run_dir / name, step) for name, step in last_logged.items()}
        self.trackers: list[Log] = []
        self._check_room()

    def _calibrate(self) -> dict[str, Any]:
        """γ for threshold "auto", measured on the prompts of the first step."""
        assert isinstance(self.teacher, LocalTeacher)
        found = calibrate(
            self.config,
            [prompt.token_ids for prompt in self.prompts.batch(0, self.config.rollout.prompts_per_step)],
            student=self.student,
            sampler=self.sampler,
            teacher=self.teacher,
            tokenizer=self.tokenizer,
        )
        ours, theirs = found["student_written"], found["teacher_written"]
        self.console.print(
            f"threshold {found['threshold']:g}, calibrated in {found['seconds']:.0f} s on {ours['responses']} prompts: "
            f"{theirs['whole']:.0%} of the teacher's responses stay reliable to the end, {ours['whole']:.0%} of the "
            f"student's; compatibility {theirs['compatibility']:.3f} and {ours['compatibility']:.3f}, events "
            f"{theirs['events']:.1%} and {ours['events']:.1%}",
            highlight=False,
        )
        return found

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
                self._begin()
            self.world.gather(None)  # the directory is as the run needs it
            # Python collects cycles of old objects only when a quarter as many as there are have been added. There are
            # half a million from the imports, so what steps leave behind would lie around for hundreds of them.
            gc.collect()
            gc.freeze()
            try:
                self._run(signals, start)
            finally:
                gc.unfreeze()
        return self.totals

    def _begin(self) -> None:
        """What changes the run directory before the first step. A run that dies within it can be resumed like any."""
        for moved in tidy(self.run_dir / "checkpoints", self.steps_done):
            self._say(f"set aside as {moved}: it is not whole, or lies after the step that this run goes on from")
        self._remove_old_checkpoints()
        for name, end in self.log_ends.items():
            path = self.run_dir / name
            if path.exists() and path.stat().st_size > end:
                with storage_errors(path):
                    os.truncate(path, end)
        if self.calibration is not None:  # before config.json, whose threshold is from there
            write_json(self.run_dir / CALIBRATION, self.calibration)
        write_json(self.run_dir / "config.json", self.config.model_dump())
        write_json(self.run_dir / "env.json", environment(self.student.device) | {"processes": self.world.size})
        remember_teacher(self.teacher, self.run_dir)
        self.trackers = start_trackers(self.config.tracking.report_to, self.run_dir, self.config.model_dump())

    def _run(self, signals: StopSignals, start: dict[str, Any] | None) -> None:
        training, evaluation = self.config.training, self.config.evaluation
        self._show_example()
        if self.unlogged is not None:
            self._evaluate_and_log(self.unlogged, signals)
        elif start is not None and self.steps_done == 0:
            self.console.print(f"  step 0: held-out accuracy {start['eval/accuracy']:.3f}, as measured before")
            self._log(start | {"time/eval": 0.0})
        elif self.eval_prompts and self.steps_done == 0:
            self._evaluate_and_log({"step": 0}, signals)
        with step_view(self.console, self._logged_steps()) as show:
            for step in range(self.steps_done, training.steps):
                done, last = step + 1, step + 1 == training.steps
                try:
                    record = self._step(step)
                except ServerError as error:  # nothing of this step was learnt; what stands is the one before
                    saved = (self.run_dir / "checkpoints" / f"step_{step}").exists()
                    if step and not saved and self.world.size == 1:  # other ranks may not have met the error
                        self._save()
                        saved = True
                    raise ServerError(
                        f"{error}; stopped after step {step}{', saved' if saved else ''}; continue with --resume auto "
                        f"--output-dir {self.run_dir}"
                    ) from error
                if self.world.rank == 0 and "skipped" not in record:
                    show(record)
                self.steps_done = done
                if self.eval_prompts and (last or done % evaluation.every == 0):
                    self._evaluate_and_log(record, signals)
                else:
                    self._log(record)
                signal = next(filter(None, self.world.gather(signals.received)), None)  # it may have met some ranks yet
                if last or done % training.save_every == 0 or signal:
                    self._save()
                if signal and not last:
                    self._stop(signal)

    def _evaluate_and_log(self, record: dict[str, Any], signals: StopSignals) -> None:
        """Complete the record of a step by an evaluation. A signal cuts it off: it is done again after the resume."""
        try:
            # Ranks wait for each other at the end of an evaluation, so none may leave it early.
            with signals.interruptible() if self.world.size == 1 else contextlib.nullcontext():
                found = self._evaluate(record["step"])
        except EvaluationStopped:
            if self.steps_done:
                self.unlogged = record
                self._save()
            self._stop(signals.received)
        self._log(record | found)
        self.unlogged = None

    def _stop(self, signal: str | None) -> NoReturn:
        raise RunInterrupted(
            f"{signal}: stopped after step {self.steps_done} of {self.config.training.steps}, "
            f"{'saved' if self.steps_done else 'before there was anything to save'}; continue with "
            f"--resume auto --output-dir {self.run_dir}"
        )

    def _step(self, step: int) -> dict[str, Any]:
        began, processor_began = time.perf_counter(), time.process_time()
        prompts = self._prompts_of(step)
        try:
            reward = functools.partial(self._rewards, prompts) if self.reward else None
            result = prune_opd_step(self.run, step, [prompt.token_ids for prompt in prompts], reward)
        except NonFiniteError as error:
            return self._skip(step, prompts, error, began)
        self.schedule.step()
        of_all_ranks = merged(result, self.world, same=("window", "loss", "grad_norm", "seconds"))
        if of_all_ranks is None:  # rank 0 writes for all
            return {"step": step + 1}
        result = of_all_ranks
        seconds = time.perf_counter() - began
        record = metrics_of(result, self.config)
        self.totals.train_seconds += seconds
        self.totals.student_tokens += record["tokens/generated"]
        self.totals.teacher_tokens += record["tokens/scored"]
        self.totals.saved_tokens += record["tokens/saved"]
        per_step = self.totals.train_seconds / (step + 1)
        self._write_rollouts(step + 1, prompts, result)
        usual_norm = self._watch_norm(step + 1, result.grad_norm)
        return {
            "step": step + 1,
            "steps": self.config.training.steps,
            "eta_seconds": per_step * (self.config.training.steps - step - 1),
            "learning_rate": self.schedule.get_last_lr()[0],
            **record,
            "grad_norm_usual": usual_norm,
            "time/total": seconds,
            "time/cpu": time.process_time() - processor_began,
            "time/train_so_far": self.totals.train_seconds,
            "skipped_steps": self.totals.skipped_steps,
        }

    def _prompts_of(self, step: int) -> list[Prompt]:
        """The prompt of each rollout of a step; those of one prompt stand side by side."""
        rollout = self.config.rollout
        prompts = self.prompts.batch(step, rollout.prompts_per_step)
        return [prompt for prompt in prompts for _ in range(rollout.num_generations)]

    def _sample_ahead(self, step: int, max_length: int, sampler: LocalSampler) -> Sampled:
        prompts = [prompt.token_ids for prompt in self._prompts_of(step)]
        watch = Stopwatch(self.student.device)  # what it sees is not time that the step waited
        return sample_rollouts(step, prompts, max_length, sampler, self.teacher, self.config, watch, self.world)

    def _rewards(self, prompts: list[Prompt], numbers: Sequence[int], rollouts: Rollouts) -> torch.Tensor:
        """(B,) float64: the task's reward of each rollout, NaN where it has none."""
        assert self.reward is not None
        rewards = self.reward([prompts[number] for number in numbers], list(response_texts(rollouts, self.tokenizer)))
        if self.config.reward.mask_truncated_completions:
            rewards = rewards.masked_fill(~rollouts.finished.cpu(), torch.nan)
        return rewards

    def _skip(self, step: int, prompts: Sequence[Prompt], error: NonFiniteError, began: float) -> dict[str, Any]:
        """The record of a step that met NaN: nothing was learnt from it, and its rollouts are kept for a look.

        Raises NonFiniteError when more than `training.max_skipped_steps` of the run went this way.
        """
        path, totals, limit = self.run_dir / "skipped.jsonl", self.totals, self.config.training.max_skipped_steps
        if self.world.rank == 0:
            write_skipped(path, step + 1, prompts, error, self.tokenizer)
        totals.skipped_steps += 1
        totals.student_tokens += error.rollouts.generated if error.rollouts else 0  # they were paid for
        self.optimizer.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimiser's step, which was left out on purpose
            self.schedule.step()
        seconds = time.perf_counter() - began
        totals.train_seconds += seconds
        self._say(f"  {error}: step skipped, {totals.skipped_steps} so far")
        record = {
            "step": step + 1,
            "steps": self.config.training.steps,
            "skipped": str(error),
            "skipped_steps": totals.skipped_steps,
            "time/total": seconds,
            "time/train_so_far": totals.train_seconds,
        }
        if totals.skipped_steps > limit:
            self._log(record)
            last_good, _ = latest_checkpoint(self.run_dir / "checkpoints")
            kept = f"the last good checkpoint is {last_good}" if last_good else "no checkpoint had been written yet"
            raise NonFiniteError(
                f"{error}. It is skipped step {totals.skipped_steps}, and training.max_skipped_steps = {limit}: "
                f"training stopped; {kept}. The rollouts are in {path}; lower training.learning_rate, or try "
                "training.bf16 = false"
            ) from error
        return record

    def _watch_norm(self, step: int, norm: float) -> float | None:
        """Says so when a gradient norm is a spike; returns what was usual until now."""
        totals = self.totals
        usual = totals.usual_grad_norm
        if usual is not None and totals.updates >= USUAL_AFTER and norm > SPIKE * usual:
            self._say(f"  step {step}: the gradient norm is {norm:.3g}, {norm / usual:.0f} times the usual {usual:.3g}")
        totals.usual_grad_norm = running_norm(usual, norm, totals.updates)
        totals.updates += 1
        return usual

    def _say(self, text: str) -> None:
        self.console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def _evaluate(self, step: int) -> dict[str, Any]:
        found: Evaluation = evaluate(
            self.sampler, self.tokenizer, self.eval_prompts, self.config.evaluation, world=self.world
        )
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

    def _save(self) -> None:
        began, writes = time.perf_counter(), self.world.rank == 0
        for name in LOGS if writes else ():  # so that a checkpoint on the disk has its log on the disk
            if (self.run_dir / name).exists():
                with storage_errors(self.run_dir / name):
                    sync(self.run_dir / name)
        card = model_card(self.run_dir) if writes else None
        saved = save_checkpoint(
            self.run_dir / "checkpoints",
            step=self.steps_done,
            model=self.student,
            tokenizer=self.tokenizer,
            optimizer=self.optimizer,
            schedule=self.schedule,
            window=self.window,
            totals=self.totals,
            config=self.config,
            unlogged=self.unlogged,
            card=str(card),
            world=self.world,
        )
        if card is None:
            return
        with storage_errors(self.run_dir / "README.md"):
            card.save(self.run_dir / "README.md")
        self._remove_old_checkpoints()
        size = sum(path.stat().st_size for path in saved.rglob("*"))
        self.console.print(
            f"  saved {saved}, {size / 1e6:,.1f} MB in {time.perf_counter() - began:.1f} s", style="dim", soft_wrap=True
        )

    def _remove_old_checkpoints(self) -> None:
        training, folder = self.config.training, self.run_dir / "checkpoints"
        remove_old_checkpoints(folder, keep_last=training.keep_last, keep_every=training.keep_every)

    def _check_room(self) -> None:
        """As many checkpoints as will lie side by side must fit, less those that are there already."""
        training, there = self.config.training, len(checkpoints(self.run_dir / "checkpoints"))

        def multiples(period: int) -> int:
            return training.steps // period - self.steps_done // period

        saves = multiples(training.save_every) + (training.steps % training.save_every != 0)
        # One more than is kept, since the new one is written and read back before an old one goes.
        count = max(0, min(training.keep_last + 1, there + saves) - there)
        if training.keep_every:
            count += multiples(training.keep_every)
        check_room(self.run_dir, count * checkpoint_bytes(self.student), f"the {count} checkpoints to come")

    def _find_checkpoint(self, resume: str) -> Path | None:
        """The checkpoint to continue from, every byte of it verified; a run directory is never overwritten."""
        if resume not in ("never", "auto"):
            checkpoint = Path(resume)
            if not os.path.isfile(checkpoint / "trainer_state.json"):  # which takes names that no file can have
                raise CheckpointError(f"{checkpoint} is no checkpoint; give a folder checkpoints/step_N of a run")
            if checkpoint.resolve().parents[1] != self.run_dir.resolve():
                raise CheckpointError(
                    f"{checkpoint} belongs to the run {checkpoint.resolve().parents[1]}, not to {self.run_dir}; "
                    "give that run's directory as --output-dir, or leave it out"
                )
            if damage := damage_of(checkpoint):
                raise CheckpointError(f"{checkpoint} is damaged or incomplete ({damage}); resume from an earlier one")
            return checkpoint
        if not self.run_dir.exists() or not any(self.run_dir.iterdir()):
            return None
        if resume == "never":
            raise RunDirectoryError(
                f"{self.run_dir} exists and is not empty; runs are never overwritten. Choose another --output-dir, "
                "or continue it with --resume auto"
            )
        folder, config_file = self.run_dir / "checkpoints", self.run_dir / "config.json"
        found, passed_over = latest_checkpoint(folder)
        for reason in passed_over:
            self._say(f"not resuming from a checkpoint: {reason}")
        if found is not None:
            return found
        if checkpoints(folder):
            raise CheckpointError(
                f"{folder} holds checkpoints, but none is whole ({passed_over[-1]}); bring one back from a copy, "
                "or start a new run directory"
            )
        # The run died before its first checkpoint: it begins anew, if the directory is that of such a run.
        if config_file.is_file():
            check_same_recipe(read_json(config_file), self.config, str(config_file))
        elif {path.name for path in self.run_dir.iterdir()} - FIRST_FILES:
            raise RunDirectoryError(
                f"{self.run_dir} exists and is not empty, and is no run directory: it has no config.json. "
                "Choose another --output-dir"
            )
        self._say(f"{self.run_dir} holds no checkpoint; beginning at step 0")
        return None

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
        rollouts = result.rollouts
        assert rollouts.student is not None
        shared = shared_candidates(rollouts.student.ids, result.scores.topk.ids).sum(-1)
        append_json(
            self.run_dir / "drift.jsonl", drift_record(step, rollouts, result.scores, result.drift, result.weight)
        )
        for i in range(min(self.config.tracking.rollouts_per_step, len(rollouts.lengths))):
            record = rollout_record(result, i, prompts[i], shared, self.tokenizer, self.config.tracking)
            append_json(self.run_dir / "rollouts.jsonl", {"step": step, **record})

    def _logged_steps(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        return [record for record in read_lines(path) if trained(record)] if path.is_file() else []

    def _log(self, record: dict[str, Any]) -> None:
        if self.world.rank > 0:
            return
        append_json(self.run_dir / "metrics.jsonl", record)
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        for log in self.trackers:
            log(numbers, record["step"])
