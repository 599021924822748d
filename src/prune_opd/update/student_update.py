"""The update of a step: micro-batches, loss, gradient over all ranks, optimiser."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from prune_opd.config import Config
from prune_opd.distributed.world import World, full_tensor
from prune_opd.errors import NonFiniteError
from prune_opd.models.causal_lm import compiled, output_head
from prune_opd.models.packed_attention import packed_states, packing_of, use_packed_attention
from prune_opd.models.packing import Packed, pack
from prune_opd.teachers.base import Teacher
from prune_opd.types import Rollouts, TeacherScores
from prune_opd.update.correction import corrected
from prune_opd.update.losses import loss_sums, student_terms


@dataclass(frozen=True)
class UpdateResult:
    """What an update did. loss, of all ranks: the teacher's per `weight_normalization`, in nats, and the task's ·
    packed_tokens: columns that were fed, of which `padding` held nothing · trainer_logprobs (B, T) of the sampled
    tokens before the update, where another policy sampled them.
    """

    loss: float
    grad_norm: float
    packed_tokens: int
    padding: int
    trainer_logprobs: Tensor | None


class StudentUpdate:
    """One optimiser step on weighed rollouts. Built once: it knows how this student is fed, compiled or not.

    vocab_size: ids that student and teacher share · ends: those that count as one action (core/ends.py). The teacher is
    asked only by losses over the whole vocabulary.
    """

    def __init__(
        self,
        config: Config,
        *,
        student: torch.nn.Module,
        teacher: Teacher,
        optimizer: Optimizer,
        vocab_size: int,
        world: World,
        ends: Sequence[int] = (),
    ) -> None:
        self.config, self.student, self.teacher, self.optimizer = config, student, teacher, optimizer
        self.vocab_size, self.ends, self.world = vocab_size, tuple(ends), world
        self.device = next(student.parameters()).device
        compile, self.bf16 = config.model.compile, config.training.bf16
        self.states = compiled(packed_states) if compile else packed_states
        self.packing = packing_of(student, compile=compile and not self.bf16)

    def __call__(
        self,
        step: int,
        numbers: Sequence[int],
        rollouts: Rollouts,
        scores: TeacherScores,
        weight: Tensor,
        advantage: Tensor | None,
    ) -> UpdateResult:
        """Train on this rank's rollouts; weight, advantage (B, T), the latter None without a task reward.

        Gradients of loss sums add up, so the grouping into micro-batches is free. Where no token carries weight there
        is nothing to learn: a warning, and no update, since momentum would move the weights. Raises NonFiniteError
        before the weights are touched.
        """
        config, world, mask = self.config, self.world, rollouts.response_mask
        tokens, weighed = world.sum(float(mask.sum())), world.sum(float(weight.sum()))
        denominator = tokens if config.objective.weight_normalization == "token_mean" else weighed
        teacher_factor = config.reward.opd_kl_coef / denominator if weighed else 0.0
        loss_sum, packed_tokens, padding = 0.0, 0, 0
        trainer_logprobs = None if rollouts.sampled_logprobs is None else torch.zeros_like(rollouts.sampled_logprobs)
        self.optimizer.zero_grad(set_to_none=True)
        with use_packed_attention(self.student):
            for part in self._micro_batches(rollouts):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    hidden = self.states(self.student, part)[part.row, part.column]
                terms = student_terms(
                    output_head(self.student),
                    hidden,
                    part,
                    rollouts,
                    scores,
                    self.teacher,
                    config.objective,
                    vocab_size=self.vocab_size,
                    ends=self.ends,
                    liger=config.model.liger_head,
                )
                part_weight, part_advantage = weight, advantage
                if trainer_logprobs is not None:  # another policy sampled: how far is it from the one that is trained?
                    trainer_logprobs[part.rollout, part.position] = terms.sampled.detach()
                    part_weight, part_advantage = corrected(weight, advantage, rollouts, trainer_logprobs, config)
                of_teacher, of_task = loss_sums(terms, part, scores, part_weight, part_advantage, config.objective)
                loss = teacher_factor * of_teacher.loss
                if of_task is not None and tokens:
                    loss = loss + of_task.loss / tokens
                loss.backward()
                loss_sum += loss.item()
                packed_tokens, padding = packed_tokens + part.input_ids.numel(), padding + part.padding
        loss_sum = world.sum(loss_sum)
        if not math.isfinite(loss_sum):
            message = f"step {step}: the loss is {loss_sum}; the weights were not updated"
            raise NonFiniteError(message, rollouts=rollouts, numbers=numbers)
        parameters = [p for p in self.student.parameters() if p.grad is not None]
        world.sum_gradients(parameters)
        max_norm = config.training.max_grad_norm
        grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm)).item()
        if not math.isfinite(grad_norm):
            message = f"step {step}: the gradient norm is {grad_norm}; the weights were not updated"
            raise NonFiniteError(message, rollouts=rollouts, numbers=numbers)
        if weighed or (advantage is not None and tokens):
            self.optimizer.step()
        else:
            warnings.warn(f"step {step}: no token carries weight; the update was skipped", stacklevel=3)
        return UpdateResult(loss_sum, grad_norm, packed_tokens, padding, trainer_logprobs)

    def _micro_batches(self, rollouts: Rollouts) -> Iterator[Packed]:
        parts = pack(rollouts, self.config.training.micro_batch_tokens, **self.packing)
        return self.world.equal_count(parts, Packed.empty(self.device))
