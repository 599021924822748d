"""The plain path: what a step is when nobody hurries, to hold the records of tests/invariant/matrix_runs.py against.

One rollout at a time, so no padding and no packing; transformers' own model in float64 (but for rotations, norms and
softmax, which it computes in float32) with eager attention and all of its logits; adapters multiplied out; plain
autograd; torch's AdamW, a tensor at a time. The method's arithmetic is that of tests/core/reference.py. Of the record
it takes what chance decided (tokens, and candidates, which are checked to be the likeliest) and the weights before each
step; everything else is computed anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from prune_opd.config import Config
from tests.core import reference

LISTED = 20  # tokens that a served teacher lists


@dataclass(frozen=True)
class Plain:
    """student, teacher: of each rollout, log-probs (n, V) of float64 · loss, grad_norm · gradients: clipped · after."""

    student: list[Tensor]
    teacher: list[Tensor]
    candidates: list[Tensor]
    events: list[np.ndarray]
    weight: list[np.ndarray]
    effective_length: list[int]
    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]
    after: dict[str, Tensor]


class PlainRun:
    """Student and teacher of a case from their folders. listed: whether the teacher is known by its lists alone."""

    def __init__(self, config: Config, *, listed: bool) -> None:
        self.config, self.listed = config, listed
        served = config.model.teacher_model_server_url is not None
        self.student = _float64(config.model.model_name_or_path, config.model.dtype)
        self.teacher = _float64(
            config.model.teacher_model_name_or_path, "float32" if served else config.model.teacher_dtype
        )
        self.vocabulary = min(len(model.get_output_embeddings().weight) for model in (self.student, self.teacher))
        self.leaves: dict[str, Tensor] = {}
        self.optimizer: torch.optim.AdamW | None = None

    def step(self, record: dict[str, Any]) -> Plain:
        """The same step from the recorded weights, tokens and candidates."""
        rows, pruning = record["rollouts"], self.config.pruning
        self._take(record["before"])
        weights = self._multiplied_out()
        student = [self._logprobs(self.student, weights, row) for row in rows]
        with torch.no_grad():
            teacher = [self._logprobs(self.teacher, {}, row) for row in rows]
        events, weight, effective = [], [], []
        for row in rows:
            overlap = reference.topk_overlap(row["student_ids"].numpy()[None], row["teacher_ids"].numpy()[None])
            events.append((overlap < pruning.threshold)[0])
            mask = np.ones_like(overlap, dtype=bool)
            _, of_row, reach, _ = reference.drift(overlap < pruning.threshold, mask, pruning.w_drop, pruning.w_base)
            weight.append(of_row[0])
            effective.append(int(reach[0]))
        candidates = [self._at_candidates(of_teacher, row) for of_teacher, row in zip(teacher, rows, strict=True)]
        loss, norm = self._backward(student, candidates, weight, rows)
        gradients = {name: leaf.grad.clone() for name, leaf in self.leaves.items() if leaf.grad is not None}
        assert self.optimizer is not None
        self.optimizer.step()
        after = {name: leaf.detach().clone() for name, leaf in self.leaves.items()}
        student = [one.detach() for one in student]
        return Plain(student, teacher, candidates, events, weight, effective, loss, norm, gradients, after)

    def _take(self, before: dict[str, Tensor]) -> None:
        """The recorded weights as the leaves; made at the first step, with an optimiser that outlives it."""
        if not self.leaves:
            self.leaves = {name: value.double().requires_grad_() for name, value in before.items()}
            training = self.config.training
            groups = [
                {"params": [p for p in self.leaves.values() if (p.dim() >= 2) == decays], "weight_decay": rate}
                for decays, rate in ((True, training.weight_decay), (False, 0.0))
            ]
            betas = training.adam_beta1, training.adam_beta2
            self.optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=betas, foreach=False)
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf.copy_(before[name])
                leaf.grad = None

    def _multiplied_out(self) -> dict[str, Tensor]:
        """Weights of the plain model by its names: W + alpha / r · B A where there are adapters."""
        lora = self.config.model.lora
        if lora is None:
            return self.leaves
        whole = dict(self.student.named_parameters())
        for name, a in self.leaves.items():
            layer, is_a, _ = name.partition(".lora_A.")
            if is_a:
                b = self.leaves[name.replace(".lora_A.", ".lora_B.")]
                whole[f"{layer}.weight"] = whole[f"{layer}.weight"] + lora.alpha / lora.r * b @ a
        return whole

    def _logprobs(self, model: torch.nn.Module, weights: dict[str, Tensor], row: dict[str, Any]) -> Tensor:
        ids = torch.tensor([[*row["prompt"], *row["response"].tolist()]])
        logits = functional_call(model, weights, (ids,), {"use_cache": False}).logits[0]
        return logits[len(row["prompt"]) - 1 : -1, : self.vocabulary].log_softmax(-1)

    def _at_candidates(self, teacher: Tensor, row: dict[str, Any]) -> Tensor:
        """The teacher's log-probs (n, K) at the student's candidates; what a list leaves out shares the rest evenly."""
        exact = teacher.gather(-1, row["student_ids"])
        if not self.listed:
            return exact
        for t, token in enumerate(row["response"].tolist()):
            top = teacher[t].topk(LISTED)
            listed = {*top.indices.tolist(), token}
            left = 1 - sum(math.exp(teacher[t, v]) for v in listed)
            share = min(math.log(left / (self.vocabulary - len(listed))), float(top.values[-1]))
            for k, v in enumerate(row["student_ids"][t].tolist()):
                if v not in listed:
                    exact[t, k] = share
        return exact

    def _backward(
        self, student: list[Tensor], candidates: list[Tensor], weight: list[np.ndarray], rows: list[dict[str, Any]]
    ) -> tuple[float, float]:
        """Gradients of the leaves, clipped; the loss and the norm before clipping."""
        total, count = 0.0, sum(len(row["response"]) for row in rows)
        for own, log_q, w, row in zip(student, candidates, weight, rows, strict=True):
            log_p = own.gather(-1, row["student_ids"])
            one = np.ones((1, len(w)), dtype=bool)
            loss, _, _, gradient = reference.topk_reverse_kl(
                log_p.detach().numpy()[None], log_q.numpy()[None], one, w[None]
            )
            total += loss / count
            log_p.backward(torch.from_numpy(gradient[0]) / count, retain_graph=True)
        found = [leaf.grad for leaf in self.leaves.values() if leaf.grad is not None]
        norm = math.sqrt(sum(float(g.square().sum()) for g in found))
        for gradient in found:
            gradient.mul_(min(1.0, self.config.training.max_grad_norm / norm))
        return total, norm


def _float64(folder: str, dtype: str) -> torch.nn.Module:
    """Of weights that were rounded to `dtype`."""
    assert Path(folder).is_dir()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager")
    return model.double().eval().requires_grad_(False)
