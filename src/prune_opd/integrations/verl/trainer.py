"""The driver's part: the training window, sent with each batch and steered by what the actors report."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict

from prune_opd.errors import CheckpointError, DataError, EngineError
from prune_opd.integrations.verl.loss import PruneActorWorker
from prune_opd.integrations.verl.settings import (
    AGENT_LOOP_MANAGER,
    MAX_TOKENS,
    SETTINGS,
    WHERE,
    batch_settings,
    recipe_of,
    teachers_of,
)
from prune_opd.integrations.verl.surface import (
    PPOTrainerSync,
    Role,
    find_latest_ckpt_path,
    register_trainer,
    tensordict_utils,
)
from prune_opd.training.build import build_window


@register_trainer("prune_opd")
class PruneTrainer(PPOTrainerSync):
    """verl's synchronous trainer with the training window of method.md §3.

    Raises ConfigError before any worker starts, EngineError with the causes when rollouts failed.
    """

    def __init__(self, config: DictConfig) -> None:
        self.recipe = recipe_of(config)
        self.window = build_window(self.recipe)
        chunk = self.recipe.pruning.in_flight.chunk
        if self.recipe.stops_in_flight and 8 * chunk < self.recipe.longest_response:
            warnings.warn(
                f"{WHERE}.pruning.in_flight.chunk = {chunk}: each chunk scores its whole prefix again, so a response "
                f"of {self.recipe.longest_response} tokens is scored more than four times over; take a longer chunk",
                UserWarning,
                stacklevel=2,
            )
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # verl takes every other name for an asynchronous mode
            config.actor_rollout_ref.rollout.agent.agent_loop_manager_class = AGENT_LOOP_MANAGER
        super().__init__(config)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in self.role_worker_mapping.keys() & {Role.ActorRollout, Role.ActorRolloutRef}:
            self.role_worker_mapping[role] = ray.remote(PruneActorWorker)

    def _next_train_batch(self, num_prompts: int | None = None) -> TensorDict:
        batch = super()._next_train_batch(num_prompts)
        for name in set(tensordict_utils.get(batch, "agent_name", [])) - {"prune_opd"}:
            raise DataError(
                f"the prompts have a column agent_name with {name!r}, by which verl picks an agent loop that does not "
                "know the window; leave the column out"
            )
        length = self.window.length if self.window else self.recipe.rollout.max_completion_length
        tensordict_utils.assign_non_tensor_data(batch, MAX_TOKENS, length)
        return batch

    def _step_once(self, metrics: dict[str, Any], timing_raw: dict[str, Any], sample_batch_size: int) -> Any:
        try:
            return super()._step_once(metrics, timing_raw, sample_batch_size)
        except RuntimeError as error:
            if "no materializable trajectories" in str(error):  # verl's word for it when not one rollout is left
                raise self._failed(self._expected_rollouts()) from error
            raise

    def _balance_batch(self, batch: Any, metrics: dict[str, Any], **kwargs: Any) -> Any:
        if len(batch) < self._expected_rollouts():  # verl would pad the batch and train on
            raise self._failed(self._expected_rollouts() - len(batch))
        return super()._balance_batch(batch, metrics=metrics, **kwargs)

    def _expected_rollouts(self) -> int:
        return self.config.data.train_batch_size * self.config.actor_rollout_ref.rollout.n

    def _failed(self, count: int) -> EngineError:
        causes = Counter(self.agent_loop_manager.failures()).most_common(3)
        listed = "".join(f"\n  {times} times {cause}" for cause, times in causes)
        return EngineError(
            f"step {self.global_steps}: {count} of {self._expected_rollouts()} rollouts failed; nothing was updated in "
            f"this step, and AgentLoopWorker's log has the tracebacks:{listed}"
        )

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        teachers = teachers_of(self.config)
        sent = batch_settings(self.recipe, self.window, self.config.distillation.teacher_key, teachers)
        batch.extra_info[SETTINGS] = sent
        batch = super()._update_actor(batch, metrics=metrics)
        for name in [name for name in metrics if name.startswith(("actor/prune_opd/", "actor/distillation/"))]:
            metrics[name.removeprefix("actor/")] = metrics.pop(name)
        for number, teacher in enumerate(teachers):
            of_teacher = "prune_opd/effective_response_length_mean"
            if f"{of_teacher}/{number}" in metrics:
                metrics[f"{of_teacher}/{teacher}"] = metrics.pop(f"{of_teacher}/{number}")
        current = self.recipe.rollout.max_completion_length
        if self.window:
            hit_ratio = metrics.get("prune_opd/effective_response_length_hit_ratio")
            if hit_ratio is None:
                raise EngineError("the actor did not report which rollouts hit, so the window cannot be steered")
            change = self.window.steer(float(hit_ratio))
            current = change.previous_length
        metrics["prune_opd/current_max_response_length"] = current
        metrics["prune_opd/next_max_response_length"] = self.window.length if self.window else current
        return batch

    def _save_checkpoint(self) -> None:
        # Before verl's own files: it writes last which step is the latest, and that step must be whole by then.
        path = _window_file(Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.window.state_dict() if self.window else None), encoding="utf-8")
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps == 0 or self.window is None:
            return
        trainer = self.config.trainer
        folder = trainer.resume_from_path
        if trainer.resume_mode == "auto":
            folder = find_latest_ckpt_path(os.path.abspath(trainer.default_local_dir))
        path = _window_file(Path(folder))
        try:
            self.window.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{path} holds no window state ({error}); resume from a step of a Prune-OPD run with the same window "
                "settings, or start anew with trainer.resume_mode=disable"
            ) from error


def _window_file(folder: Path) -> Path:
    return folder / "prune_opd_window.json"
