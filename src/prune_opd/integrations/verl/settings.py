"""Our settings out of verl's, checked, and what the driver sends to the workers with each batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel
from tensordict import TensorDict

from prune_opd.config import Config, ObjectiveSection, PruningSection, parse_config
from prune_opd.core.window import LengthSchedule, TrainingWindow
from prune_opd.errors import ConfigError, EngineError
from prune_opd.integrations.verl.surface import tensordict_utils

REVERSE_KL, FORWARD_KL = "prune_opd", "prune_opd_forward_kl"
SETTINGS, MAX_TOKENS = "prune_opd_settings", "prune_opd_max_tokens"
WHERE = "actor_rollout_ref.rollout.custom.prune_opd"
AGENT_LOOP_MANAGER = f"{__package__}.PruneAgentLoopManager"


def recipe_of(config: DictConfig) -> Config:
    """Our settings out of verl's, checked. Raises ConfigError, of all that this plug-in cannot honour at once."""
    rollout, loss = config.actor_rollout_ref.rollout, config.distillation.distillation_loss
    custom = (OmegaConf.to_container(rollout.get("custom") or OmegaConf.create(), resolve=True)).get("prune_opd") or {}
    for unknown in set(custom) - {"objective", "pruning"}:
        raise ConfigError(f"{WHERE} has no section {unknown!r}; there are objective and pruning")
    recipe = parse_config(
        {
            "model": {
                "model_name_or_path": str(config.actor_rollout_ref.model.path),
                "teacher_model_name_or_path": ", ".join(
                    str(teacher.model_path) for teacher in config.distillation.teacher_models.values()
                ),
            },
            "data": {"train": str(config.data.train_files)},
            "rollout": {
                "prompts_per_step": config.data.train_batch_size,
                "num_generations": rollout.n,
                "max_completion_length": rollout.response_length,
                "temperature": rollout.temperature,
                "top_p": rollout.top_p,
            },
            **custom,
        },
        where=WHERE,
    )
    wrong = [
        f"{name} = {OmegaConf.select(config, name)!r}, expected {' or '.join(map(repr, allowed))}: {why}"
        for name, allowed, why in _requirements(config, recipe)
        if OmegaConf.select(config, name) not in allowed
    ]
    objective = recipe.objective
    if (objective.loss, objective.top_k_strategy, objective.weight_normalization) != (
        "topk_reverse_kl",
        "only_stu",
        "token_mean",
    ):
        wrong.append(f"{WHERE}.objective: only topk_reverse_kl over only_stu with token_mean runs in verl")
    if loss.topk < objective.top_k or (loss.loss_mode == FORWARD_KL and loss.topk != objective.top_k):
        wrong.append(
            f"distillation.distillation_loss.topk = {loss.topk} with {WHERE}.objective.top_k = {objective.top_k}: it "
            "must be at least as large, so that the teacher's top-k is known, and equal under prune_opd_forward_kl"
        )
    if loss.loss_mode == FORWARD_KL and recipe.pruning.metric != "overlap_ratio":
        wrong.append(f"{WHERE}.pruning.metric = {recipe.pruning.metric!r}: verl's own actor reports overlap alone")
    if recipe.calibrates:
        wrong.append(f'{WHERE}.pruning.threshold = "auto": it is measured by our own trainer alone; set a number')
    if wrong:
        raise ConfigError("verl cannot run Prune-OPD with these settings:\n  " + "\n  ".join(wrong))
    return recipe


def _requirements(config: DictConfig, recipe: Config) -> list[tuple[str, tuple[Any, ...], str]]:
    """(setting of verl, values that work, why)"""
    loss, rollout = "distillation.distillation_loss", "actor_rollout_ref.rollout"
    needed: list[tuple[str, tuple[Any, ...], str]] = [
        ("distillation.enabled", (True,), "there is no teacher otherwise"),
        (f"{loss}.loss_mode", (REVERSE_KL, FORWARD_KL), "other losses do not know our weights"),
        (f"{loss}.use_task_rewards", (False,), "the objective is distillation alone"),
        (f"{loss}.use_policy_gradient", (False,), "one KL a position as an advantage has zero expected gradient"),
        (f"{loss}.loss_max_clamp", (None,), "a clamped loss has no gradient"),
        ("actor_rollout_ref.actor.loss_agg_mode", ("token-mean",), "the paper's mean is over valid tokens"),
        ("actor_rollout_ref.actor.strategy", ("fsdp", "fsdp2"), "the loss needs logits over the whole vocabulary"),
        ("actor_rollout_ref.actor.ppo_epochs", (1,), "one optimiser step a batch keeps it on-policy"),
        ("actor_rollout_ref.actor.ppo_mini_batch_size", (config.data.train_batch_size,), "as above"),
        ("actor_rollout_ref.model.use_fused_kernels", (False,), "fused kernels return no logits"),
        ("algorithm.rollout_correction.rollout_rs", (None,), "it takes tokens out of the middle of responses"),
        ("algorithm.filter_groups.enable", (None, False), "it drops prompts by the task's reward"),
        (f"{rollout}.agent.default_agent_loop", ("prune_opd",), "another agent loop does not know the window"),
        (f"{rollout}.agent.agent_loop_manager_class", (None, AGENT_LOOP_MANAGER), "the trainer sets its own"),
    ]
    if config.distillation.distillation_loss.loss_mode == REVERSE_KL:
        needed.append((f"{loss}.log_prob_min_clamp", (None,), "this loss clamps nothing"))
    if recipe.stops_in_flight:
        why = "one seed for every chunk would repeat its random numbers"
        needed.append((f"{rollout}.full_determinism", (False,), why))
        if recipe.pruning.metric != "teacher_top_p_accept":
            needed.append((f"{rollout}.name", ("vllm",), "the student's server must give its top-k"))
    return needed


def teachers_of(config: DictConfig) -> list[str]:
    """Routing keys of the teachers where there are several, in the order of the configuration; else none."""
    teachers = config.distillation.teacher_models
    named = [str(teacher.key) for name, teacher in teachers.items() if name != "teacher_model"]
    return named if len(named) > 1 else []


class BatchSettings(BaseModel):
    """What the actors must know of a step. hit_length: effective length of a hit, None without a window ·
    teachers: as `teachers_of`, and `teacher_key` the column of the data that names one of them.
    """

    objective: ObjectiveSection
    pruning: PruningSection
    hit_length: int | None = None
    teacher_key: str = ""
    teachers: list[str] = []


def batch_settings(
    recipe: Config,
    window: TrainingWindow | LengthSchedule | None,
    teacher_key: str = "",
    teachers: Sequence[str] = (),
) -> str:
    """`BatchSettings` as one string, which verl passes on with the batch unchanged."""
    return BatchSettings(
        objective=recipe.objective,
        pruning=recipe.pruning,
        hit_length=window.hit_length if window else None,
        teacher_key=teacher_key,
        teachers=list(teachers),
    ).model_dump_json()


def settings_of(data: TensorDict) -> BatchSettings:
    """What `batch_settings` sent with a batch; EngineError when another trainer sent it."""
    sent = tensordict_utils.get_non_tensor_data(data=data, key=SETTINGS, default=None)
    if sent is None:
        raise EngineError(
            "the batch came to the actor without Prune-OPD's settings, so another trainer sent it; set "
            "trainer.v1.trainer_mode=prune_opd. verl's asynchronous trainers are not supported: their rollouts come "
            "from older weights, under which neither events nor effective lengths are those of the student they steer"
        )
    return BatchSettings.model_validate_json(sent)
