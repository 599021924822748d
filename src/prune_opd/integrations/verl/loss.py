"""The actor's part: drift from the logits of the update, weights, the paper's objective."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prune_opd.config import RepetitionSection
from prune_opd.core.drift import drift_report, repetition_events
from prune_opd.core.objective import topk_reverse_kl_terms
from prune_opd.errors import EngineError, NonFiniteError
from prune_opd.integrations.verl.settings import FORWARD_KL, REVERSE_KL, settings_of
from prune_opd.integrations.verl.surface import (
    ActorRolloutRefWorker,
    AggregationType,
    Dispatch,
    DistillationLossSettings,
    Metric,
    compute_forward_kl_topk,
    get_ulysses_sequence_parallel_world_size,
    make_nd_compute_dataproto_dispatch_fn,
    no_padding_2_padding,
    register_dispatch,
    register_distillation_loss,
    slice_input_tensor,
    tensordict_utils,
)
from prune_opd.rollout.events import drift_events
from prune_opd.types import TopK

LOGIT_ROWS = 1024  # of float32 logits at a time: 0.6 GB for a vocabulary of 152k


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

    student_logits (1, N, V), this sequence-parallel rank's part, at temperature 1 · data: verl's micro-batch with
    nested input_ids (B, j), teacher_ids and teacher_logprobs (B, j, K'). Position i of all of them predicts token
    i + 1. Returns (1, N) each: `prune_opd_terms` with gradient, `prune_opd_events` (1 where an event),
    `overlap_count`, `student_mass` on S_t, `teacher_mass` on T_t, `prune_opd_covered`: share of the student mass on S_t
    whose log q is exact.
    """
    sent = settings_of(data)
    objective, pruning = sent.objective, sent.pruning
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
    """verl's worker, trained at temperature 1, whose actor looks at the student's top-k unless it does forward KL."""

    @register_dispatch(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """See `ActorRolloutRefWorker.init_model`."""
        super().init_model()
        if "actor" in self.role and self.distillation_config.distillation_loss.loss_mode == REVERSE_KL:
            self.actor.set_loss_fn(functools.partial(_actor_loss, self.loss_fn))

    @register_dispatch(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def update_actor(self, data: TensorDict) -> TensorDict:
        """See `ActorRolloutRefWorker.update_actor`, which would divide the logits by the temperature of sampling.

        The teacher's log q is at temperature 1, and so is p in the objective, whatever the rollouts were sampled at.
        """
        tensordict_utils.assign_non_tensor_data(data, "temperature", 1.0)
        return super().update_actor(data)


@register_distillation_loss(DistillationLossSettings(names=[REVERSE_KL, FORWARD_KL], use_topk=True))
def prune_opd_loss(
    config: Any, distillation_config: Any, model_output: dict[str, Tensor], data: TensorDict
) -> tuple[Tensor, dict[str, Any]]:
    """Weighted loss of each response position (B, T), in nats, and metrics; verl takes the mean over valid tokens.

    prune_opd: w_t Σ_v p̄ (log p - log q) over the student's top-k, with the gradient of `topk_reverse_kl` ·
    prune_opd_forward_kl: w_t Σ_v q (log q - log p) over the teacher's top-k, verl's own, floored at 0 as verl does.
    Raises EngineError when trainer or actor are not ours, NonFiniteError before anything is backpropagated.
    """
    sent = settings_of(data)
    objective, pruning = sent.objective, sent.pruning
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
    # One number a rollout: verl joins the lists of all ranks and takes min or max if the name says so, else the mean.
    there = mask.any(-1)  # rows without a token are verl's padding
    effective = drift.effective_length[there].tolist()
    metrics |= {f"prune_opd/effective_response_length_{name}": effective for name in ("mean", "max", "min")}
    if sent.hit_length is not None:
        hits = [float(length >= sent.hit_length) for length in effective]
        metrics["prune_opd/effective_response_length_hit_ratio"] = hits
    if sent.teachers:  # by number: a teacher's name may have `min` or `max` in it
        asked = tensordict_utils.get(data, sent.teacher_key)
        for row, length in zip(there.nonzero().flatten().tolist(), effective, strict=True):
            name = f"prune_opd/effective_response_length_mean/{sent.teachers.index(asked[row])}"
            metrics.setdefault(name, []).append(length)
    metrics["prune_opd/loss_weight_mean"] = _token_mean(weight, mask, data)
    return terms * weight, metrics


def _padded(tensor: Tensor) -> Tensor:
    return tensor.to_padded_tensor(0) if tensor.is_nested else tensor


def _token_mean(values: Tensor, mask: Tensor, data: TensorDict) -> Metric:
    """This micro-batch's part of the mean over the batch's tokens: verl adds up parts and averages over ranks."""
    part = values.detach().double()[mask].sum() / data["batch_num_tokens"] * data["dp_size"]
    return Metric(AggregationType.SUM, part)
