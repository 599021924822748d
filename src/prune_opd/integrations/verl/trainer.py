"""The driver's part: the training window, sent with each batch and steered by what the actors report."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer
from verl.utils import tensordict_utils
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

from prune_opd.errors import CheckpointError, EngineError
from prune_opd.integrations.verl.loss import PruneActorWorker
from prune_opd.integrations.verl.settings import MAX_TOKENS, REVERSE_KL, SETTINGS, WHERE, batch_settings, recipe_of
from prune_opd.training.build import build_window


@register_trainer("prune_opd")
class PruneTrainer(PPOTrainerSync):
    """verl's synchronous trainer with the training window of method.md §3.

    Raises ConfigError before any worker starts, EngineError when a rollout failed (verl would train on without it).
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
        super().__init__(config)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        if self.config.distillation.distillation_loss.loss_mode == REVERSE_KL:
            for role in self.role_worker_mapping.keys() & {Role.ActorRollout, Role.ActorRolloutRef}:
                self.role_worker_mapping[role] = ray.remote(PruneActorWorker)

    def _next_train_batch(self, num_prompts: int | None = None) -> TensorDict:
        batch = super()._next_train_batch(num_prompts)
        length = self.window.length if self.window else self.recipe.rollout.max_completion_length
        tensordict_utils.assign_non_tensor_data(batch, MAX_TOKENS, length)
        return batch

    def _balance_batch(self, batch: Any, metrics: dict[str, Any], **kwargs: Any) -> Any:
        expected = self.config.data.train_batch_size * self.config.actor_rollout_ref.rollout.n
        if len(batch) < expected:
            raise EngineError(
                f"step {self.global_steps}: {expected - len(batch)} of {expected} rollouts failed, and verl would "
                "train on without them. The log of AgentLoopWorker has their errors; nothing was updated in this step"
            )
        return super()._balance_batch(batch, metrics=metrics, **kwargs)

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch.extra_info[SETTINGS] = batch_settings(self.recipe, self.window)
        batch = super()._update_actor(batch, metrics=metrics)
        for name in [name for name in metrics if name.startswith(("actor/prune_opd/", "actor/distillation/"))]:
            metrics[name.removeprefix("actor/")] = metrics.pop(name)
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
