"""Steps of a tiny model as `prune_opd_step` ran them: what every engine must reproduce from the same rollouts.

The window grows, stays and shrinks on the way, rollouts end by themselves or at the window, and weights differ.
"""

from __future__ import annotations

import copy
import functools
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prune_opd.config import Config, parse_config
from prune_opd.sampling.local import LocalSampler
from prune_opd.step import StepResult, prune_opd_step
from prune_opd.teachers.local import LocalTeacher
from prune_opd.training.trainer import build_optimizer, build_window
from prune_opd.types import TeacherScores
from tests.families import EOS, PAD, VOCAB, tiny_model, tiny_prompts

TOP_K = 4
PRUNING = {
    "threshold": 0.5,
    "w_drop": 0.2,
    "dynamic_response_length": {
        "init_len": 10,
        "min_len": 4,
        "max_len": 16,
        "step": 3,
        "margin": 2,
        "hit_ratio": 0.5,
        "shrink_patience": 1,
    },
}


@dataclass(frozen=True)
class EngineStep:
    """One step: the student before it, what `prune_opd_step` made of it, and the gradients that it took.

    scores: the teacher's whole distribution, most likely first, K = VOCAB (`topk`), for engines that are given top-k.
    """

    prompts: list[list[int]]
    student: PreTrainedModel
    result: StepResult
    gradients: dict[str, Tensor]
    scores: TeacherScores


def config_of(pruning: dict | None = None) -> Config:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return parse_config(
            {
                "model": {"model_name_or_path": "none", "teacher_model_name_or_path": "none"},
                "data": {"train": "none"},
                "rollout": {"prompts_per_step": 8, "num_generations": 1, "max_completion_length": 16, "slots": 8},
                "objective": {"top_k": TOP_K},
                "pruning": PRUNING | (pruning or {}),
                "training": {"learning_rate": 0.02, "max_grad_norm": 1e9, "micro_batch_tokens": 64},
            },
            where="engines_fixture",
        )


def teacher_of(student: PreTrainedModel) -> PreTrainedModel:
    """Agrees with the student here and not there: its weights with noise."""
    torch.manual_seed(0)
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.07 * torch.randn_like(parameter))
    return teacher


@functools.cache
def engine_steps(count: int = 5) -> tuple[EngineStep, ...]:
    """The steps of one run of `config_of()`; the teacher is `teacher_of(tiny_model("qwen3", seed=3))`."""
    config, prompts = config_of(), tiny_prompts()
    student = tiny_model("qwen3", seed=3)
    teacher = LocalTeacher(teacher_of(student), vocab_size=VOCAB)
    optimizer, window = build_optimizer(student, config)[0], build_window(config)
    steps = []
    for step in range(count):
        before = copy.deepcopy(student)
        result = prune_opd_step(
            step=step,
            prompts=prompts,
            student=student,
            sampler=LocalSampler(student, pad_id=PAD, eos_ids=[EOS], vocab_size=VOCAB, slots=8),
            teacher=teacher,
            optimizer=optimizer,
            window=window,
            vocab_size=VOCAB,
            config=config,
        )
        gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
        scores = teacher.score(result.rollouts, top_k=VOCAB)
        steps.append(EngineStep(prompts, before, result, gradients, scores))
    return tuple(steps)
