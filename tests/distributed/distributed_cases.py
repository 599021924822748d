"""What each process of test_distributed.py runs: `torchrun ... distributed_cases.py OUT`, or in-process.

The student is float64, so that ranks differ from one process by the order of sums alone, and not by what Adam makes of
rounded zeros.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from prune_opd.distributed.merging import Share, merged
from prune_opd.distributed.sharding import launched, shard, whole_weights
from prune_opd.distributed.world import ALONE, full_tensor
from prune_opd.errors import NonFiniteError
from prune_opd.models.causal_lm import output_head
from prune_opd.models.loading import add_adapters
from prune_opd.reporting.metrics import metrics_of, step_share
from prune_opd.rollout.gathered import WholeWeightsSampler
from prune_opd.rollout.local import LocalSampler
from prune_opd.teachers.local import LocalTeacher
from prune_opd.teachers.routed import RoutedTeacher
from prune_opd.training.build import build_optimizer, build_window
from prune_opd.training.moving_teacher import MovingTeacher
from prune_opd.types import Prompt, TeacherPrompt
from tests.families import EOS, PAD, VOCAB, tiny_model, tiny_prompts
from tests.steps import step_of
from tests.test_step import IN_FLIGHT, config_of, related

STEPS = 3
TWO_TEACHERS = [{"name": name, "model_name_or_path": "none"} for name in "ab"]
CASES = {
    "window": {},
    "in-flight": IN_FLIGHT | {"pruning.in_flight.audit_share": 0.3},
    "micro-batches": {"training.micro_batch_tokens": 20},
    "weight-mean": {"objective.weight_normalization": "weight_mean"},
    "full-logits": {"objective.loss": "jsd", "pruning.enable": False},
    "controls": {
        "pruning.enable": False,
        "control.lengths": [9, 12, *[16] * 201],
        "control.kept_tokens": [30] * 203,
        "objective.weight_normalization": "weight_mean",
    },
    "tied": {},
    "lora": {"model.lora.r": 2},
    "one-prompt": {},
    "sharded-teacher": {"model.teacher_placement": "sharded", "training.micro_batch_tokens": 20},
    "sharded-full-logits": {"model.teacher_placement": "sharded", "objective.loss": "jsd", "pruning.enable": False},
    "two-teachers": {"model.teachers": TWO_TEACHERS},
    "two-teachers-in-flight": IN_FLIGHT | {"model.teachers": TWO_TEACHERS},
    "sharded-two-teachers": {"model.teachers": TWO_TEACHERS, "model.teacher_placement": "sharded"},
    "moving-teacher": {"model.lora.r": 2},
    "sharded-one-prompt": {"model.teacher_placement": "sharded"},
    "one-prompt-in-flight": IN_FLIGHT,
}

# What four processes may do otherwise than two: more uneven shares, more ranks without a rollout, weights cut finer.
CASES_OF = {2: tuple(CASES), 4: ("in-flight", "tied", "one-prompt")}


def run_case(name, world, parallel="ddp"):
    """Metrics of each step (rank 0), the last gradients, and the weights."""
    settings = CASES[name]
    config = config_of(**settings)
    student = tiny_model("gemma3" if name == "tied" else "qwen3", seed=3)
    teacher = related(student)
    if config.model.lora:
        torch.manual_seed(0)
        student = add_adapters(student, config.model.lora)
    student = student.double().train()
    sampler = LocalSampler(student, pad_id=PAD, eos_ids=[EOS], vocab_size=VOCAB, slots=config.rollout.slots)
    if parallel == "fsdp2" and world.size > 1:
        sampler = WholeWeightsSampler(sampler, student)
        output_head(student)
        shard(student)
    optimizer, window = build_optimizer(student, config)[0], build_window(config)
    shared = config.model.teacher_placement == "sharded" and world.size > 1
    teachers = [teacher, related(teacher)] if config.model.teachers else [teacher]
    scorers = [LocalTeacher(one, vocab_size=VOCAB, world=world if shared else ALONE) for one in teachers]
    for one in teachers if shared else ():
        shard(one)
        assert all(hasattr(p, "full_tensor") and len(p.to_local()) < len(p) for p in one.parameters() if len(p) > 1)
    mover = MovingTeacher(teacher, 0.5) if name == "moving-teacher" else None
    prompts = tiny_prompts()[:1] if "one-prompt" in name else tiny_prompts()
    if config.model.teachers:  # of two neighbours each: ranks have unequal shares of each teacher
        prompts = [
            Prompt("", tuple(p), None, "", teacher=TeacherPrompt([9, *p], i // 2 % 2)) for i, p in enumerate(prompts)
        ]
    found = {"steps": [], "lengths": [], "effective": [], "ids": [], "rows": []}
    for step in range(STEPS):
        mine = step_of(
            step=step,
            prompts=prompts,
            student=student,
            sampler=sampler,
            teacher=RoutedTeacher(scorers) if config.model.teachers else scorers[0],
            optimizer=optimizer,
            window=window,
            vocab_size=VOCAB,
            config=config,
            world=world,
        )
        if mover:
            mover.follow(student)
        found["rows"].append(world.gather(len(mine.numbers)))
        share = merged(step_share(mine, config), world)
        ids = [
            row[:length].tolist() for row, length in zip(mine.rollouts.response_ids, mine.rollouts.lengths, strict=True)
        ]
        everyone = merged(Share(mine.numbers, {"ids": ids}), world)
        if share is not None and everyone is not None:
            # What a share of the work changes: padding, and tokens past a stop, which depend on when the teacher looks.
            skip = ("time/", "tokens/generated", "tokens/scored", "tokens/update_padding", "rollout/slot_occupancy")
            record = {k: v for k, v in metrics_of(mine, config, share).items() if not k.startswith(skip)}
            found["steps"].append(record)
            found["lengths"].append(share.rows["length"])
            found["effective"].append(share.rows["effective_length"])
            found["ids"].append(everyone.rows["ids"])
    found["gradients"] = {n: full_tensor(p.grad) for n, p in student.named_parameters() if p.grad is not None}
    found["weights"] = whole_weights(student, world)
    if mover:
        found["weights"] |= {f"teacher.{name}": weight for name, weight in mover.state_dict().items()}
    return found


def run_half(world, parallel):
    """One step under autocast: loss, gradients, and the types of a layer's weights as its forward and the optimiser see
    them."""
    config = config_of(**{"training.bf16": True})
    student = tiny_model("qwen3", seed=3).train()
    teacher = related(student)
    sampler = LocalSampler(student, pad_id=PAD, eos_ids=[EOS], vocab_size=VOCAB)
    if parallel == "fsdp2" and world.size > 1:
        sampler = WholeWeightsSampler(sampler, student)
        output_head(student)
        shard(student, bf16=True)
    optimizer = build_optimizer(student, config)[0]
    seen = {}
    projection = student.model.layers[0].self_attn.q_proj
    projection.register_forward_hook(
        lambda module, _, out: seen.update(weight=module.weight.dtype) if torch.is_grad_enabled() else None
    )
    student.model.layers[1].register_forward_pre_hook(
        lambda _, inputs: seen.update(between=inputs[0].dtype) if torch.is_grad_enabled() else None
    )
    result = step_of(
        step=0,
        prompts=tiny_prompts(),
        student=student,
        sampler=sampler,
        teacher=LocalTeacher(teacher, vocab_size=VOCAB),
        optimizer=optimizer,
        window=None,
        vocab_size=VOCAB,
        config=config,
        world=world,
    )
    gradients = {n: full_tensor(p.grad) for n, p in student.named_parameters() if p.grad is not None}
    masters = {p.dtype for group in optimizer.param_groups for p in group["params"]}
    return {"loss": result.loss, "gradients": gradients, "masters": masters, **seen}


def run_broken(world, parallel):
    """The teacher of the last rank says NaN: every rank must raise, and none may wait for another."""
    student = tiny_model("qwen3", seed=3).train()
    teacher = related(student)
    if world.rank == world.size - 1:
        torch.nn.init.constant_(teacher.model.norm.weight, float("nan"))
    sampler = LocalSampler(student, pad_id=PAD, eos_ids=[EOS], vocab_size=VOCAB)
    if parallel == "fsdp2":
        sampler = WholeWeightsSampler(sampler, student)
        output_head(student)
        shard(student)
    config = config_of()
    try:
        step_of(
            step=7,
            prompts=tiny_prompts(),
            student=student,
            sampler=sampler,
            teacher=LocalTeacher(teacher, vocab_size=VOCAB),
            optimizer=build_optimizer(student, config)[0],
            window=None,
            vocab_size=VOCAB,
            config=config,
            world=world,
        )
    except NonFiniteError as error:
        return world.gather(str(error))
    return world.gather("went on")


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with launched() as world:
        assert world != ALONE
        names = CASES_OF[world.size]
        found = {(name, parallel): run_case(name, world, parallel) for name in names for parallel in ("ddp", "fsdp2")}
        if world.size == 2:
            found["half"] = run_half(world, "fsdp2")
        found["broken"] = {parallel: run_broken(world, parallel) for parallel in ("ddp", "fsdp2")}
        if world.rank == 0:
            torch.save(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
