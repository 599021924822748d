"""The rollouts of one step, and the watcher that saw them while they were generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from prune_opd.config import Config
from prune_opd.distributed.world import World
from prune_opd.rollout.base import Sampler, rollout_uniforms
from prune_opd.rollout.in_flight import InFlightStop, audited
from prune_opd.teachers.base import Teacher
from prune_opd.timing import Stopwatch
from prune_opd.types import Prompt, Rollouts


@dataclass(frozen=True)
class Sampled:
    """Rollouts of a step, before the teacher has scored all of them.

    numbers: which of the step's rollouts these are (a rank's share) · audit (B,) bool · in_flight: their watcher, None
    without one.
    """

    numbers: Sequence[int]
    audit: Tensor
    in_flight: InFlightStop | None
    rollouts: Rollouts


def sample_rollouts(
    step: int,
    prompts: Sequence[Prompt],
    max_length: int,
    sampler: Sampler,
    teacher: Teacher,
    config: Config,
    watch: Stopwatch,
    world: World,
) -> Sampled:
    """This rank's share of a step's rollouts, of at most `max_length` tokens."""
    rollout, pruning, top_k, seed = config.rollout, config.pruning, config.objective.top_k, config.training.seed
    numbers = world.partition([len(prompt.token_ids) + max_length for prompt in prompts])
    mine = [prompts[number] for number in numbers]
    asked = [prompt.for_teacher for prompt in mine]
    audit = audited(seed, step, numbers, pruning.in_flight.audit_share)
    in_flight = None
    if config.stops_in_flight and mine:
        stream = teacher.stream(asked, max_length, top_k=top_k, slots=rollout.slots)
        in_flight = InFlightStop(stream, pruning, audit, watch)
    rollouts = sampler.sample(
        [prompt.token_ids for prompt in mine],
        rollout_uniforms(seed, step, numbers, max_length),
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=top_k,
        watcher=in_flight,
    )
    return Sampled(numbers, audit, in_flight, replace(rollouts, teacher_prompts=asked))
