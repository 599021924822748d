"""Our own step on what verl's actor was given: the same rollouts and teacher's scores, our candidates, loss and update.

Nothing here is the plug-in's. The student starts with verl's first weights, and from there on our optimiser moves it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prune_opd.config import Config, load_config, with_settings
from prune_opd.core.drift import DriftReport, drift_report
from prune_opd.core.window import LengthSchedule, TrainingWindow, WindowChange
from prune_opd.rollout.events import drift_events
from prune_opd.training.build import build_optimizer
from prune_opd.types import Rollouts, TeacherScores, TopK
from tests.integrations.verl_e2e.launch import PROMPTS, PRUNING, ROLLOUTS_OF_A_PROMPT, ROOT, TOP_K, Step
from tests.steps import step_of

Window = TrainingWindow | LengthSchedule


def our_config(**changes: Any) -> Config:
    """The recipe that `launch.command` asks verl for."""
    settings = {f"pruning.{name}": value for name, value in PRUNING.items()} | {
        "rollout.prompts_per_step": PROMPTS,
        "rollout.num_generations": ROLLOUTS_OF_A_PROMPT,
        "rollout.max_completion_length": 64,
        "objective.top_k": TOP_K,
    }
    return with_settings(load_config(str(ROOT / "recipes" / "quickstart.toml")), **(settings | changes))


class Recorded:
    """Sampler and teacher of our step, who say what was recorded.

    Where the student has a candidate that is not among the teacher's, log q is the upper bound that docs/scaling.md
    gives: the least of the known ones, or all that is left.
    """

    def __init__(self, student: PreTrainedModel, step: Step) -> None:
        self.student, self.recorded = student, step.rollouts
        self.lengths = [int(row["response_mask"].sum()) for row in self.recorded]
        self.prompts = [row["input_ids"][:-n].tolist() for row, n in zip(self.recorded, self.lengths, strict=True)]

    def sample(self, prompts: Sequence[Sequence[int]], uniforms: Tensor, *, top_k: int, **settings: Any) -> Rollouts:
        shape = len(self.lengths), max(self.lengths)
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        top, nobody = TopK.empty(*shape, top_k), torch.zeros(shape[0], dtype=torch.bool)
        for b, (row, n) in enumerate(zip(self.recorded, self.lengths, strict=True)):
            ids[b, :n], mask[b, :n] = row["input_ids"][-n:], True
            best = logprobs_of(self.student, row["input_ids"], n).topk(top_k)
            top.ids[b, :n], top.logprobs[b, :n] = best.indices, best.values
        return Rollouts(self.prompts, ids, mask, finished=nobody, stopped=nobody, student=top)

    def score(self, rollouts: Rollouts, *, top_k: int) -> TeacherScores:
        top, student = TopK.empty(*rollouts.response_ids.shape, top_k), rollouts.student
        at_candidates = torch.zeros_like(student.logprobs)
        for b, n in enumerate(self.lengths):
            known_ids, known = teachers_of(self.recorded[b])
            top.ids[b, :n], top.logprobs[b, :n] = known_ids[:, :top_k], known[:, :top_k]
            for t in range(n):
                said = dict(zip(known_ids[t].tolist(), known[t].tolist(), strict=True))
                left = 1 - sum(math.exp(value) for value in said.values())
                bound = min(min(said.values()), math.log(left) if left > 0 else -math.inf)
                at_candidates[b, t] = torch.tensor([said.get(token, bound) for token in student.ids[b, t].tolist()])
        return TeacherScores(top, at_candidates, torch.zeros_like(top.entropy))


@torch.no_grad()
def logprobs_of(model: PreTrainedModel, sequence: Tensor, length: int) -> Tensor:
    """(length, V): of each of the last `length` tokens of a sequence."""
    return model(sequence[None]).logits[0, -length - 1 : -1].log_softmax(-1)


def teachers_of(row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """ids and log-probs (T, K') that the teacher gave for the tokens of a response; row i speaks of token i + 1."""
    n = int(row["response_mask"].sum())
    return row["teacher_ids"][-n - 1 : -1].long(), row["teacher_logprobs"][-n - 1 : -1].float()


@dataclass(frozen=True)
class Ours:
    """What our code makes of a step's rollouts. events, weight (B, T) · weights: of the student after the update."""

    events: Tensor
    drift: DriftReport
    weight: Tensor
    window: WindowChange
    loss: float
    grad_norm: float
    weights: dict[str, Tensor]


def our_steps(steps: Sequence[Step], student: PreTrainedModel, config: Config, window: Window) -> Iterator[Ours]:
    """`prune_opd_step` for each of verl's steps. student: as verl's began; it is trained in place."""
    optimizer, _ = build_optimizer(student, config)
    for number, step in enumerate(steps):
        recorded = Recorded(copy.deepcopy(student).eval(), step)
        done = step_of(
            step=number,
            prompts=recorded.prompts,
            student=student,
            sampler=recorded,
            teacher=recorded,
            optimizer=optimizer,
            window=window,
            vocab_size=student.config.vocab_size,
            config=config,
        )
        yield Ours(
            done.events, done.drift, done.weight, done.window, done.loss, done.grad_norm, trained_weights(student)
        )


def our_forward_kl_steps(
    steps: Sequence[Step], student: PreTrainedModel, config: Config, window: Window
) -> Iterator[Ours]:
    """The same for verl's own loss, forward KL over the teacher's top-k floored at 0, times our weights."""
    optimizer, _ = build_optimizer(student, config)
    pruning = config.pruning
    for step in steps:
        recorded = Recorded(student, step)
        rollouts = recorded.sample(recorded.prompts, torch.empty(0), top_k=TOP_K)
        top, mask = recorded.score(rollouts, top_k=TOP_K).topk, rollouts.response_mask
        events = drift_events(rollouts.response_ids, mask, rollouts.student, top, pruning)
        drift = drift_report(events, mask, w_drop=pruning.w_drop, w_base=pruning.w_base, eps=pruning.positive_eps)
        loss = torch.zeros(())
        for b, (row, n) in enumerate(zip(step.rollouts, recorded.lengths, strict=True)):
            log_p = student(row["input_ids"][None]).logits[0, -n - 1 : -1].log_softmax(-1).gather(-1, top.ids[b, :n])
            log_q = top.logprobs[b, :n]
            kl = (log_q.exp() * (log_q - log_p)).sum(-1).clamp(min=0)
            loss = loss + (drift.weight[b, :n] * kl).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.training.max_grad_norm)
        optimizer.step()
        change = window.update(drift.effective_length)
        yield Ours(events, drift, drift.weight, change, loss.item(), float(grad_norm), trained_weights(student))


def trained_weights(student: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in student.named_parameters()}
