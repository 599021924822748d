"""The parts that a recipe names, one function each, checked before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prune_opd.config import Config
from prune_opd.core.budget import TokenBudget
from prune_opd.core.window import LengthSchedule, TrainingWindow
from prune_opd.data.source import DatasetSource, PromptSource, held_out_prompts, training_prompts
from prune_opd.distributed import sharding as distributed
from prune_opd.distributed.world import ALONE, World
from prune_opd.errors import EngineError
from prune_opd.evaluation.evaluate import response_texts
from prune_opd.models import loading as models
from prune_opd.models.causal_lm import output_head
from prune_opd.rewards import GRADE, load_reward
from prune_opd.rollout.ahead import RolloutsAhead
from prune_opd.rollout.base import Sampler
from prune_opd.rollout.gathered import WholeWeightsSampler
from prune_opd.rollout.local import LocalSampler
from prune_opd.rollout.sample import Sampled, sample_rollouts
from prune_opd.rollout.served import ServedSampler
from prune_opd.rollout.student_copy import StudentCopy
from prune_opd.rollout.vllm import VLLMSampler
from prune_opd.serving.client import Servers
from prune_opd.step import Run
from prune_opd.teachers.base import Teacher
from prune_opd.teachers.local import LocalTeacher
from prune_opd.timing import Stopwatch
from prune_opd.training.build_teachers import (
    build_moving_teacher,
    build_teacher,
    build_view,
    served_teachers,
)
from prune_opd.training.calibration import calibrate, calibration_text
from prune_opd.training.checkpoint import load_weights
from prune_opd.training.environment import seed_everything
from prune_opd.training.moving_teacher import MovingTeacher
from prune_opd.types import Prompt, Rollouts
from prune_opd.update.student_update import StudentUpdate
from prune_opd.update.weights import token_weights

TaskReward = Callable[[Sequence[Prompt], Sequence[int], Rollouts], Tensor]


@dataclass(frozen=True)
class Parts:
    """All that a run is made of.

    config: the recipe, with the threshold where it was "auto" · problems: those held out for evaluation · reward: of
    the task, or None · sampler: of the weights as they are, for evaluation; `run.sampler` may sample from a copy ·
    calibration: what an "auto" threshold was found from · moving_teacher: what moves the teacher, where it does.
    """

    config: Config
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSource
    problems: Sequence[Prompt]
    reward: TaskReward | None
    student: PreTrainedModel
    sampler: Sampler
    optimizer: torch.optim.AdamW
    schedule: torch.optim.lr_scheduler.LambdaLR
    calibration: dict[str, Any] | None
    moving_teacher: MovingTeacher | None
    run: Run

    @property
    def teacher_bytes(self) -> int:
        """What a checkpoint holds of the teacher."""
        return sum(w.nbytes for w in self.moving_teacher.state_dict().values()) if self.moving_teacher else 0


def build_parts(
    config: Config,
    run_dir: Path,
    *,
    checkpoint: Path | None = None,
    calibration: dict[str, Any] | None = None,
    console: Console,
    world: World = ALONE,
) -> Parts:
    """Build everything that a run needs; whatever can be wrong with a recipe is found here.

    checkpoint: where the student's weights come from, instead of the model's · calibration: of a run that goes on.
    """
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    seed_everything(config.training.seed)
    device = models.resolve_device(config.training.device)
    tokenizer, theirs = build_tokenizers(config)
    prompts = build_prompts(config, tokenizer, theirs)
    reward = build_reward(config, tokenizer)
    problems = build_problems(config, tokenizer)
    student = models.load_student(config, device)
    if checkpoint is not None:
        load_weights(checkpoint, student, config)
    longest = max(config.rollout.max_completion_length, config.evaluation.max_tokens if problems else 0)
    max_model_len = config.data.max_prompt_length + longest
    models.check_context(student.config, config.model.model_name_or_path, max_model_len)
    ends = build_ends(config, student, tokenizer, theirs)
    if ends:
        console.print(ends_text(ends, tokenizer), highlight=False)
    teacher, vocab_size = build_teacher(config, student, tokenizer, run_dir, device=device, ends=ends, world=world)
    for served in served_teachers(teacher):
        console.print(served.way, highlight=False)
    sampler = build_sampler(
        config, student, tokenizer, vocab_size=vocab_size, max_model_len=max_model_len, ends=ends, world=world
    )
    if config.calibrates:  # before the student is sharded; every rank measures the same
        first = prompts.batch(0, config.rollout.prompts_per_step)
        assert isinstance(teacher, LocalTeacher)  # config/rules.py lets no other
        calibration = world.gather(
            calibrate(config, first, student=student, sampler=sampler, teacher=teacher, tokenizer=tokenizer)
        )[0]
        config = config.with_threshold(calibration["threshold"])
        console.print(calibration_text(calibration), highlight=False)
    if config.training.parallel == "fsdp2" and world.size > 1:
        if isinstance(sampler, LocalSampler):  # vLLM has weights of its own, which it is handed shard by shard
            sampler = WholeWeightsSampler(sampler, student)
        output_head(student)  # compared with the model's own logits while it can still run by itself
        distributed.shard(student, bf16=config.training.bf16)
    optimizer, schedule = build_optimizer(student, config)
    budget = build_budget(config)
    rollout_sampler, ahead = build_rollouts(config, sampler, prompts, teacher, budget, world)
    run = build_run(
        config,
        student=student,
        sampler=rollout_sampler,
        teacher=teacher,
        optimizer=optimizer,
        window=build_window(config),
        vocab_size=vocab_size,
        ends=ends,
        world=world,
        ahead=ahead,
        budget=budget,
    )
    return Parts(
        config,
        tokenizer,
        prompts,
        problems,
        reward,
        student,
        sampler,
        optimizer,
        schedule,
        calibration,
        build_moving_teacher(config, teacher),
        run,
    )


Tokenizers = tuple[PreTrainedTokenizerBase, list[PreTrainedTokenizerBase]]  # the student's, and of each teacher


def build_tokenizers(config: Config) -> Tokenizers:
    """The student's, and each teacher's; TokenizerError when a teacher's gives tokens other ids."""
    tokenizer = models.load_tokenizer(config.model.model_name_or_path, config.model)
    theirs = [models.load_tokenizer(one.model.teacher_model_name_or_path, one.model) for one in config.each_teacher]
    for other in theirs:
        models.check_token_maps(tokenizer, other)
    return tokenizer, theirs


def build_ends(
    config: Config,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    theirs: Sequence[PreTrainedTokenizerBase],
) -> tuple[int, ...]:
    """The ids that count as one end, by `data.end_tokens`; the student then ends a response with each of them.

    They are written into its generation settings, so that they are saved with it. theirs: the teachers' tokenizers.
    """
    names = [one.model.teacher_model_name_or_path for one in config.each_teacher]
    ours = models.end_ids(student.generation_config, tokenizer)
    of_teachers = [models.read_end_ids(name, other) for name, other in zip(names, theirs, strict=True)]
    every = sorted({number for ids in of_teachers for number in ids})
    ends = models.one_end(ours, every, config.data.end_tokens, tokenizer.eos_token_id)
    if ends:
        student.generation_config.eos_token_id = list(ends)
    return ends


def ends_text(ends: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """For the console: which ids count as one end."""
    named = ", ".join(f"{tokenizer.convert_ids_to_tokens(end)!r} ({end})" for end in ends)
    return f"student and teacher end with different ids; {named} count as one action (data.end_tokens)"


def build_prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, theirs: Sequence[PreTrainedTokenizerBase]
) -> PromptSource:
    """What the student is trained on, and what its teachers read of it. theirs: the tokenizers of the teachers.

    DataError where the recipe's reward grades and a prompt has no gold answer.
    """
    view = build_view(config, tokenizer, theirs)
    prompts = training_prompts(config.data, tokenizer, seed=config.training.seed, view=view)
    if config.reward.function == GRADE and isinstance(prompts, DatasetSource):
        prompts.check_gradable()
    return prompts


def build_problems(config: Config, tokenizer: PreTrainedTokenizerBase) -> Sequence[Prompt]:
    """The held-out problems of a recipe's evaluation; none without `evaluation.data`."""
    held_out = config.evaluation
    if not held_out.data:
        return []
    return held_out_prompts(held_out.data, config.data, tokenizer, count=held_out.num_problems, split=held_out.split)


def build_reward(config: Config, tokenizer: PreTrainedTokenizerBase) -> TaskReward | None:
    """The task's reward, as a function of the rollouts' prompts, numbers and tokens: (B,) float64, NaN without one."""
    settings = config.reward
    if not settings.function:
        return None
    function = load_reward(settings.function)

    def reward(asked: Sequence[Prompt], numbers: Sequence[int], rollouts: Rollouts) -> Tensor:
        rewards = function([asked[number] for number in numbers], list(response_texts(rollouts, tokenizer)))
        if settings.mask_truncated_completions:
            rewards = rewards.masked_fill(~rollouts.finished.cpu(), torch.nan)
        return rewards

    return reward


def prompts_of(source: PromptSource, config: Config, step: int, budget: TokenBudget | None) -> list[Prompt]:
    """The prompt of each rollout of a step, the next one of the budget; those of one prompt stand side by side."""
    if budget:
        prompts = source.batch(step, budget.prompts, budget.first)
    else:
        prompts = source.batch(step, config.rollout.prompts_per_step)
    return [prompt for prompt in prompts for _ in range(config.rollout.num_generations)]


def build_sampler(
    config: Config,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    max_model_len: int,
    ends: Sequence[int] = (),
    world: World = ALONE,
) -> Sampler:
    """The sampler of a recipe. Raises EngineError, ModelError or ServerError when vLLM or its server cannot be used."""
    rollout, pad_id, eos_ids = (
        config.rollout,
        tokenizer.pad_token_id,
        models.end_ids(student.generation_config, tokenizer),
    )
    if not rollout.use_vllm:
        return LocalSampler(
            student,
            pad_id=pad_id,
            eos_ids=eos_ids,
            vocab_size=vocab_size,
            ends=ends,
            slots=rollout.slots,
            compile=config.model.compile,
        )
    rows = student.get_output_embeddings().weight.shape[0]
    if vocab_size < rows:
        raise EngineError(
            f"the student has {rows} ids and the teacher {vocab_size}; vLLM could sample ids that the teacher does not "
            "have. Set rollout.use_vllm = false, whose sampler leaves them out"
        )
    dtype = rollout.dtype or config.model.dtype
    if rollout.vllm_server_url is not None:
        asked = rollout.vllm_server
        sampler = ServedSampler(
            student,
            Servers(rollout.vllm_server_url, timeout=asked.timeout, deadline=asked.deadline, concurrency=rollout.slots),
            model=asked.model or config.model.model_name_or_path,
            dtype=dtype,
            pad_id=pad_id,
            eos_ids=eos_ids,
            slots=rollout.slots,
            weights_dir=Path(asked.weights_dir).absolute() if asked.weights_dir else None,
            ends=ends,
            world=world,
        )
        sampler.check(max_model_len)
        return sampler
    return VLLMSampler(
        student,
        model=models.plain_model(config.model.model_name_or_path),  # an adapter's base: weights are handed over
        dtype=dtype,
        pad_id=pad_id,
        eos_ids=eos_ids,
        slots=rollout.slots,
        top_k=config.objective.top_k,
        max_model_len=max_model_len,
        seed=config.training.seed,
        gpu_memory_utilization=rollout.vllm_gpu_memory_utilization,
        enable_sleep_mode=rollout.vllm_enable_sleep_mode,
        trust_remote_code=config.model.trust_remote_code,
        ends=ends,
        world=world,
    )


def build_window(config: Config) -> TrainingWindow | LengthSchedule | None:
    """What sets the response length of each step; None when it is fixed."""
    if config.control.lengths:
        return LengthSchedule(config.control.lengths)
    if not config.window_is_dynamic:
        return None
    return TrainingWindow(**config.pruning.dynamic_response_length.model_dump(exclude={"enable"}))


def build_budget(config: Config) -> TokenBudget | None:
    """What sets the number of prompts of each step; None when it is fixed."""
    rollout = config.rollout
    if rollout.token_budget is None:
        return None
    return TokenBudget(rollout.token_budget, prompts=rollout.prompts_per_step, num_generations=rollout.num_generations)


def build_optimizer(
    model: torch.nn.Module, config: Config
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW over what requires a gradient; linear warm-up, then constant or linear to zero."""
    training = config.training
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]  # norms and biases do not decay
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        fused=True,
    )

    def factor(step: int) -> float:
        if step < training.warmup_steps:
            return (step + 1) / training.warmup_steps
        if training.lr_scheduler_type == "constant":
            return 1.0
        return max(0.0, (training.steps - step) / (training.steps - training.warmup_steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def build_rollouts(
    config: Config,
    sampler: Sampler,
    prompts: PromptSource,
    teacher: Teacher,
    budget: TokenBudget | None,
    world: World,
) -> tuple[Sampler, RolloutsAhead | None]:
    """What samples the rollouts of a step: `sampler`, or a copy of the student in another type or a step ahead."""
    if not config.samples_from_copy:
        return sampler, None
    assert isinstance(sampler, LocalSampler)  # config/rules.py lets no other
    dtype = config.other_rollout_dtype
    student_copy = StudentCopy(sampler, getattr(torch, dtype) if dtype else None)
    if not config.rollout.ahead:
        return student_copy, None

    def sample(step: int, max_length: int, sampler: LocalSampler) -> Sampled:
        asked = prompts_of(prompts, config, step, budget)
        watch = Stopwatch(sampler.model.device)  # its seconds are not time that the step waited
        return sample_rollouts(step, asked, max_length, sampler, teacher, config, watch, world)

    return student_copy, RolloutsAhead(student_copy, sample, steps=config.training.steps)


def build_run(
    config: Config,
    *,
    student: torch.nn.Module,
    sampler: Sampler,
    teacher: Teacher,
    optimizer: torch.optim.Optimizer,
    window: TrainingWindow | LengthSchedule | None,
    vocab_size: int,
    ends: Sequence[int] = (),
    world: World = ALONE,
    ahead: RolloutsAhead | None = None,
    budget: TokenBudget | None = None,
) -> Run:
    """What the step works with. vocab_size: ids that student and teacher share; `ends` of them count as one action."""
    update = StudentUpdate(
        config, student=student, teacher=teacher, optimizer=optimizer, vocab_size=vocab_size, ends=ends, world=world
    )
    return Run(config, sampler, teacher, token_weights(config, world), window, update, world, ahead, budget)
