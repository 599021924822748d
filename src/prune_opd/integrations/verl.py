"""Prune-OPD inside verl 0.9, without a fork: verl rolls out, scores and trains, this module says what is learnt.

    export VERL_USE_EXTERNAL_MODULES=prune_opd.integrations.verl
    python -m verl.trainer.main_ppo trainer.v1.trainer_mode=prune_opd distillation.enabled=true \
        distillation.distillation_loss.loss_mode=prune_opd ...                # all of it: docs/scaling.md

Importing this module registers a distillation loss, a trainer and an agent loop, all under the name `prune_opd`. verl's
entry point `verl.plugins` is not used, because verl swallows what goes wrong there.

    trainer (driver)        the window: sends M with each batch, steers it by the share of rollouts that hit
    agent loop (rollout)    generates at most M tokens; with `in_flight`, in chunks that the teacher reads along
    actor (training)        drift from the logits of the update, weights, the paper's objective

Settings are the sections `pruning` and `objective` of our recipes, under `actor_rollout_ref.rollout.custom.prune_opd`.

What differs from step.py, and why:

  * verl's teacher returns its K' most likely tokens (`distillation_loss.topk`) and nothing else. For candidates of the
    student outside of them log q is unknown; its upper bound is used (`logprobs_at`). With K' = vocabulary it is exact.
  * verl's own actor knows no student top-k: its top-k loss is forward KL over the teacher's. `prune_opd` therefore runs
    on `PruneActorWorker`, which computes the paper's reverse KL. `prune_opd_forward_kl` is verl's loss on verl's actor
    with our weights: another objective than the paper's.
  * S_t comes from the logits of the update, not from sampling: the same weights, but another kernel and dtype.
  * verl's server returns no student top-k while it generates, so a stop by overlap scores the prefix again by
    `prompt_logprobs`, for student and teacher alike. `teacher_top_p_accept` needs the teacher only.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from tensordict import TensorDict
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.single_controller.base.decorator import Dispatch
from verl.single_controller.base.decorator import register as register_dispatch
from verl.trainer.distillation.losses import (
    DistillationLossSettings,
    compute_forward_kl_topk,
    register_distillation_loss,
)
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, AgentLoopWorkerTQ, PPOTrainerSync, register_trainer
from verl.utils import tensordict_utils
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path
from verl.utils.metric import AggregationType, Metric
from verl.utils.profiler import simple_timer
from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.padding import no_padding_2_padding

from prune_opd.config import Config, ObjectiveSection, PruningSection, RepetitionSection, parse_config
from prune_opd.core.drift import drift_report, repetition_events
from prune_opd.core.objective import topk_reverse_kl_terms
from prune_opd.core.window import LengthSchedule, TrainingWindow
from prune_opd.errors import CheckpointError, ConfigError, EngineError, NonFiniteError
from prune_opd.rollout.events import drift_events
from prune_opd.rollout.in_flight import InFlightStop
from prune_opd.timing import Stopwatch
from prune_opd.training.build import build_window
from prune_opd.types import Span, TeacherScores, TopK

REVERSE_KL, FORWARD_KL = "prune_opd", "prune_opd_forward_kl"
SETTINGS, MAX_TOKENS = "prune_opd_settings", "prune_opd_max_tokens"
WHERE = "actor_rollout_ref.rollout.custom.prune_opd"
LOGIT_ROWS = 1024  # of float32 logits at a time: 0.6 GB for a vocabulary of 152k


# ---- settings ----


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
        (f"{rollout}.agent.default_agent_loop", ("prune_opd",), "another agent loop does not know the window"),
    ]
    if recipe.stops_in_flight:
        manager = f"{__name__}.{PruneAgentLoopManager.__name__}"
        needed += [
            (f"{rollout}.agent.agent_loop_manager_class", (manager,), "in_flight needs the teacher in the agent loop"),
            (f"{rollout}.full_determinism", (False,), "one seed for every chunk would repeat its random numbers"),
        ]
        if recipe.pruning.metric != "teacher_top_p_accept":
            needed.append((f"{rollout}.name", ("vllm",), "the student's server must give its top-k"))
    return needed


def _batch_settings(recipe: Config, window: TrainingWindow | LengthSchedule | None) -> str:
    """What the actors must know of a batch, as one string: what verl carries along with it unchanged."""
    return json.dumps(
        {
            "objective": recipe.objective.model_dump(),
            "pruning": recipe.pruning.model_dump(),
            "hit_length": window.hit_length if window else None,
        }
    )


def _settings_of(data: TensorDict) -> tuple[ObjectiveSection, PruningSection, int | None]:
    sent = tensordict_utils.get_non_tensor_data(data=data, key=SETTINGS, default=None)
    if sent is None:
        raise EngineError(
            "the batch came to the actor without Prune-OPD's settings, so another trainer sent it; "
            "set trainer.v1.trainer_mode=prune_opd"
        )
    found = json.loads(sent)
    return (
        ObjectiveSection.model_validate(found["objective"]),
        PruningSection.model_validate(found["pruning"]),
        found["hit_length"],
    )


# ---- actor: drift, weights, objective ----


def logprobs_at(ids: Tensor, known_ids: Tensor, known_logprobs: Tensor) -> Tensor:
    """log q at ids (..., K), of a q whose J most likely tokens are known: known_ids, known_logprobs (..., J).

    Where an id is not among them, the upper bound of what q can be: no more than the least likely of the known ones,
    and no more than all the mass that they leave. The reward of such a token is therefore too high, if anything.
    """
    same = ids.unsqueeze(-1) == known_ids.unsqueeze(-2)
    found = known_logprobs.gather(-1, same.long().argmax(-1))
    tiny = torch.finfo(known_logprobs.dtype).tiny
    left = (1 - known_logprobs.exp().sum(-1, keepdim=True)).clamp(min=tiny).log()
    return torch.where(same.any(-1), found, torch.minimum(left, known_logprobs.amin(-1, keepdim=True)))


def student_topk_outputs(student_logits: Tensor, data: TensorDict) -> dict[str, Tensor]:
    """The paper's objective and its drift events for every position of a packed micro-batch, before weights.

    student_logits (1, N, V), this sequence-parallel rank's part, already divided by the temperature · data: verl's
    micro-batch with nested input_ids (B, j), teacher_ids and teacher_logprobs (B, j, K'). Position i of all of them
    speaks of token i + 1. Returns (1, N) each: `prune_opd_terms` with gradient, `prune_opd_events` (1 where an event),
    `overlap_count`, `student_mass` on S_t, `teacher_mass` on T_t, `prune_opd_covered`: share of the student mass on S_t
    whose log q is exact.
    """
    objective, pruning, _ = _settings_of(data)
    sampled = data["input_ids"].values().roll(-1).unsqueeze(0)
    teacher_ids = data["teacher_ids"].values().unsqueeze(0).long()
    teacher_logprobs = data["teacher_logprobs"].values().unsqueeze(0).float()
    if get_ulysses_sequence_parallel_world_size() > 1:
        sampled, teacher_ids, teacher_logprobs = (
            slice_input_tensor(part, dim=1) for part in (sampled, teacher_ids, teacher_logprobs)
        )
    ids = student_logits.detach().topk(objective.top_k).indices
    logprobs = torch.cat(
        [
            checkpoint(_gather_logprobs, rows, chosen, use_reentrant=False)
            for rows, chosen in zip(student_logits[0].split(LOGIT_ROWS), ids[0].split(LOGIT_ROWS), strict=True)
        ]
    ).unsqueeze(0)
    everything = torch.ones_like(ids, dtype=torch.bool)
    terms = topk_reverse_kl_terms(
        logprobs,
        logprobs_at(ids, teacher_ids, teacher_logprobs),
        everything,
        reward_weight_mode=objective.reward_weight_mode,
    )
    nothing = torch.zeros_like(terms)
    student = TopK(ids, logprobs.detach(), nothing)
    first = slice(objective.top_k)  # verl orders the teacher's tokens by rank
    teacher = TopK(teacher_ids[..., first], teacher_logprobs[..., first], nothing)
    alone = pruning.model_copy(update={"repetition": RepetitionSection()})  # a loop shows only along its rollout
    events = drift_events(sampled, everything[..., 0], student, teacher, alone)
    shared = (ids.unsqueeze(-1) == teacher.ids.unsqueeze(-2)).any(-1)
    known = (ids.unsqueeze(-1) == teacher_ids.unsqueeze(-2)).any(-1)
    probs = student.logprobs.exp()
    return {
        "prune_opd_terms": terms,
        "prune_opd_events": events.float(),
        "prune_opd_covered": probs.masked_fill(~known, 0).sum(-1) / probs.sum(-1),
        "overlap_count": shared.sum(-1),
        "student_mass": probs.sum(-1),
        "teacher_mass": teacher.logprobs.exp().sum(-1),
    }


def _gather_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    logits = logits.float()
    return logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)


def _actor_loss(
    stock: Callable[..., Any],
    *,
    model_output: dict[str, Tensor] | None = None,
    data: TensorDict | None = None,
    dp_group: Any = None,
    student_logits: Tensor | None = None,
    data_format: str = "thd",
) -> Any:
    """verl asks its loss twice: with logits for what each position contributes, then without for the loss itself."""
    if student_logits is None:
        return stock(model_output=model_output, data=data, dp_group=dp_group)
    assert data is not None
    return student_topk_outputs(student_logits, data)


class PruneActorWorker(ActorRolloutRefWorker):
    """verl's worker, whose actor looks at the student's top-k instead of the teacher's."""

    @register_dispatch(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """See `ActorRolloutRefWorker.init_model`."""
        super().init_model()
        if "actor" in self.role:
            self.actor.set_loss_fn(functools.partial(_actor_loss, self.loss_fn))


@register_distillation_loss(DistillationLossSettings(names=[REVERSE_KL, FORWARD_KL], use_topk=True))
def prune_opd_loss(
    config: Any, distillation_config: Any, model_output: dict[str, Tensor], data: TensorDict
) -> tuple[Tensor, dict[str, Any]]:
    """Weighted loss of each response position (B, T), in nats, and metrics; verl takes the mean over valid tokens.

    prune_opd: w_t Σ_v p̄ (log p - log q) over the student's top-k, with the gradient of `topk_reverse_kl` ·
    prune_opd_forward_kl: w_t Σ_v q (log q - log p) over the teacher's top-k, verl's own, floored at 0 as verl does.
    Raises EngineError when trainer or actor are not ours, NonFiniteError before anything is backpropagated.
    """
    objective, pruning, hit_length = _settings_of(data)
    mask = _padded(data["response_mask"]).bool()
    metrics: dict[str, Any] = {}
    if distillation_config.distillation_loss.loss_mode == FORWARD_KL:
        terms, metrics = compute_forward_kl_topk(
            config=config, distillation_config=distillation_config, model_output=model_output, data=data
        )
        events = no_padding_2_padding(model_output["overlap_count"], data).float() / objective.top_k < pruning.threshold
    else:
        if "prune_opd_terms" not in model_output:
            raise EngineError(
                "loss_mode prune_opd needs the student's top-k, which verl's own actor does not compute; "
                "set trainer.v1.trainer_mode=prune_opd, or take loss_mode prune_opd_forward_kl"
            )
        terms = no_padding_2_padding(model_output["prune_opd_terms"], data)
        events = no_padding_2_padding(model_output["prune_opd_events"], data) > 0
        metrics = {
            f"distillation/{name}": _token_mean(no_padding_2_padding(model_output[key], data), mask, data)
            for name, key in {
                "student_mass": "student_mass",
                "teacher_mass": "teacher_mass",
                "covered_mass": "prune_opd_covered",
            }.items()
        }
        shared = no_padding_2_padding(model_output["overlap_count"], data) / objective.top_k
        metrics["distillation/overlap_ratio"] = _token_mean(shared, mask, data)
    if not terms[mask].isfinite().all():
        raise NonFiniteError("the distillation loss of a response position is not finite; the weights were not updated")
    events = events & mask
    guard = pruning.repetition
    if guard.enable:
        responses = _padded(data["responses"])
        events |= repetition_events(responses, mask, max_period=guard.max_period, min_run=guard.min_run) & mask
    drift = drift_report(events, mask, w_drop=pruning.w_drop, w_base=pruning.w_base, eps=pruning.positive_eps)
    weight = drift.weight if pruning.enable and pruning.reweight else mask.float()
    # One number a rollout: verl joins the lists of all ranks and takes what the name says, min, max or else the mean.
    effective = drift.effective_length[mask.any(-1)].tolist()  # rows without a token are verl's padding
    metrics |= {f"prune_opd/effective_response_length_{name}": effective for name in ("mean", "max", "min")}
    if hit_length is not None:
        metrics["prune_opd/effective_response_length_hit_ratio"] = [float(length >= hit_length) for length in effective]
    metrics["prune_opd/loss_weight_mean"] = _token_mean(weight, mask, data)
    return terms * weight, metrics


def _padded(tensor: Tensor) -> Tensor:
    return tensor.to_padded_tensor(0) if tensor.is_nested else tensor


def _token_mean(values: Tensor, mask: Tensor, data: TensorDict) -> Metric:
    """This micro-batch's part of the mean over the batch's tokens: verl adds up parts and averages over ranks."""
    part = values.detach().double()[mask].sum() / data["batch_num_tokens"] * data["dp_size"]
    return Metric(AggregationType.SUM, part)


# ---- driver: the window ----


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
        batch.extra_info[SETTINGS] = _batch_settings(self.recipe, self.window)
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


# ---- rollouts: at most M tokens, and stopping in flight ----


@register("prune_opd")
class PruneAgentLoop(SingleTurnAgentLoop):
    """One answer of at most M tokens, where M comes with each training prompt; validation runs to `response_length`.

    With `pruning.in_flight`, training answers are generated in chunks. After each, the teacher scores the whole prefix
    and the rollout ends at the event that spends its reliability, as `InFlightStop` has it. Every chunk is a request on
    the same prefix: the student's server finds it in its prefix cache, but scores by `prompt_logprobs` do not use that
    cache. n chunks score (n + 1) / 2 times the tokens, so chunks should be long: a sixth of M scores 3.5 times.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = recipe_of(self.config)

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        """See `AgentLoopBase.run`; kwargs are the prompt's fields, with M where the prompt is one to train on."""
        limit = kwargs.get(MAX_TOKENS)
        if limit is None:
            return await super().run(sampling_params, priority=priority, **kwargs)
        if not self.recipe.stops_in_flight:
            return await super().run({**sampling_params, "max_tokens": int(limit)}, priority=priority, **kwargs)
        return await self._run_in_flight(sampling_params, int(limit), int(priority), **kwargs)

    async def _run_in_flight(
        self, sampling_params: dict[str, Any], limit: int, priority: int, **kwargs: Any
    ) -> AgentLoopOutput:
        messages = list(kwargs["raw_prompt"])
        if await self.process_multi_modal_info(messages):
            raise ConfigError("pruning.in_flight is for text prompts only; this one has images, video or audio")
        prompt_ids = await self.ct_build_initial_tokens(messages)
        routing = kwargs.get(self.config.distillation.teacher_key)
        # Of a random uid: verl's sampling has no seed for each rollout that the choice could be tied to.
        draw = zlib.crc32(f"{kwargs['uid']}-{kwargs['session_id']}".encode()) / 2**32
        audit = torch.tensor([draw < self.recipe.pruning.in_flight.audit_share])
        reader = _Reader()
        watcher = InFlightStop(reader, self.recipe.pruning, audit, Stopwatch(torch.device("cpu")))
        request_id = uuid4().hex  # the same for all chunks: verl sends them to one server, whose cache has the prefix
        response: list[int] = []
        logprobs: list[float] = []
        fields: dict[str, Any] = {}
        metrics: dict[str, Any] = {"num_preempted": -1}
        stop, ended, raw = None, False, None
        with simple_timer("generate_sequences", metrics):
            while stop is None and not ended:
                start, size = len(response), min(self.recipe.pruning.in_flight.chunk, limit - len(response))
                output = await self.server_manager.generate(
                    request_id=request_id,
                    prompt_ids=prompt_ids + response,
                    sampling_params={**sampling_params, "max_tokens": size},
                    priority=priority,
                )
                response += output.token_ids
                logprobs += output.log_probs or []
                fields = {**output.extra_fields, **{k: v for k, v in fields.items() if k == "min_global_steps"}}
                # verl does not say why a request ended: fewer tokens than asked for, or the last of them ends it.
                ended = len(output.token_ids) < size or len(response) == limit or response[-1] in self._end_ids()
                if len(response) > start:
                    student, reader.scores, raw = await self._score(prompt_ids, response, routing)
                    span = Span(0, start, len(response), ended)
                    stop = watcher.watch(torch.tensor([response]), student, [span]).get(0)
        kept = len(response) if stop is None else stop
        fields |= {"turn_scores": [], "tool_rewards": []}
        if raw is not None:  # what verl's worker would ask for again
            fields |= {name: scores[: len(prompt_ids) + kept] for name, scores in raw.items()}
        return AgentLoopOutput(
            prompt_ids=prompt_ids,
            response_ids=response[:kept],
            response_mask=[1] * kept,
            response_logprobs=logprobs[:kept] if logprobs else None,
            num_turns=2,
            metrics=AgentLoopMetrics(**metrics),
            extra_fields=fields,
        )

    async def _score(
        self, prompt_ids: list[int], response: list[int], routing: Any
    ) -> tuple[TopK, TeacherScores, dict[str, Tensor]]:
        """Top-k of student and teacher at the response positions (1, T, K), and the teacher's answer as verl keeps it.

        Row i of an answer speaks of token i + 1 of the sequence, so the rows of the response begin one before it.
        """
        sequence, top_k = prompt_ids + response, self.recipe.objective.top_k
        routing = routing.item() if hasattr(routing, "item") else routing
        asked = [self.server_manager.teacher.compute_teacher_logprobs_single(sequence, routing_key=routing)]
        if self.recipe.pruning.metric != "teacher_top_p_accept":
            asked.append(self._student_topk(sequence, top_k))
        (teacher_ids, teacher_logprobs), *rest = await asyncio.gather(*asked)
        rows = slice(len(prompt_ids) - 1, -1)
        nothing = torch.zeros(1, len(response))
        teacher = TopK(teacher_ids[None, rows, :top_k].long(), teacher_logprobs[None, rows, :top_k].float(), nothing)
        student = TopK(rest[0][0][None, rows], rest[0][1][None, rows], nothing) if rest else teacher
        # The watcher looks at the teacher's top-k only; log q at the student's candidates is the actor's business.
        scores = TeacherScores(teacher, candidate_logprobs=teacher.logprobs, sampled_logprobs=nothing)
        return student, scores, {"teacher_ids": teacher_ids, "teacher_logprobs": teacher_logprobs}

    async def _student_topk(self, sequence: list[int], top_k: int) -> tuple[Tensor, Tensor]:
        """ids and log-probabilities (S, K) of the student's most likely tokens after each token of a sequence."""
        output = await self.server_manager.generate(
            request_id=uuid4().hex,
            prompt_ids=sequence,
            sampling_params={"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": top_k, "detokenize": False},
        )
        found = output.extra_fields
        return torch.tensor(found["prompt_ids"]), torch.tensor(found["prompt_logprobs"])

    def _end_ids(self) -> frozenset[int]:
        if self.rollout_config.ignore_eos:
            return frozenset()
        return _end_ids(str(self.config.actor_rollout_ref.model.path), self.tokenizer.eos_token_id)


class _Reader:
    """A `TeacherStream` that hands on what was fetched before: verl's servers are asynchronous, the watcher is not."""

    growth = 1.0  # what was fetched is looked at
    scores: TeacherScores | None = None

    def score(self, response_ids: Tensor, student: TopK, spans: Sequence[Span]) -> TeacherScores:
        assert self.scores is not None
        return self.scores

    def drop(self, rollout: int) -> None:
        """Nothing is kept of a rollout."""


@functools.lru_cache
def _end_ids(model_path: str, tokenizer_eos: int) -> frozenset[int]:
    """Every id that ends a response: the tokenizer's, and those that the model's generation settings name."""
    try:
        named = GenerationConfig.from_pretrained(model_path).eos_token_id
    except OSError:  # the model has no generation_config.json; verl's servers then know the tokenizer's id alone, too
        named = None
    return frozenset({tokenizer_eos, *([] if named is None else named if isinstance(named, list) else [named])})


class PruneAgentLoopWorker(AgentLoopWorkerTQ.__ray_metadata__.modified_class):  # the class that verl made an actor of
    """verl's worker, whose agent loops reach the teacher, and which scores nothing twice."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.llm_client.teacher = self.teacher_server_manager

    async def _compute_teacher_logprobs(self, output: AgentLoopOutput, *args: Any, **kwargs: Any) -> None:
        if "teacher_ids" not in output.extra_fields:
            await super()._compute_teacher_logprobs(output, *args, **kwargs)


class PruneAgentLoopManager(AgentLoopManagerTQ):
    """Starts `PruneAgentLoopWorker`s; `actor_rollout_ref.rollout.agent.agent_loop_manager_class` names it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(PruneAgentLoopWorker)
