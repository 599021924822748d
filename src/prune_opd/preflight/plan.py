"""What `--dry-run` shows: the plan of a run in words, what it needs of memory, and every setting.

No weights are loaded and no network is used. Sizes come from the model's config.json, out of which transformers
builds the network without memory behind it; the activations that its forward would keep are counted the same way.
Where there is no config.json on this machine, the parameter count in the model's name (7B, 135M) has to do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from prune_opd.config import Config, ModelSection
from prune_opd.core.head import CHUNK_BYTES
from prune_opd.models.loading import add_adapters, read_model_config, resolve_device
from prune_opd.models.packing import default_token_budget


@dataclass(frozen=True)
class Memory:
    """Bytes of one process that holds everything; None is unknown, `source` says what the numbers come from.

    student_copy: the weights that sample where the student's own do not · ahead: sampling goes on beside the update.
    """

    source: str
    ahead: bool
    student: int | None = None
    student_copy: int | None = None
    gradients: int | None = None
    optimizer: int | None = None
    teacher: int | None = None
    activations: int | None = None
    logits: int | None = None
    cache_training: int | None = None
    cache_teacher: int | None = None
    cache_evaluation: int | None = None

    @property
    def checkpoint(self) -> int | None:
        """Bytes of one checkpoint on disk: what is trained, and the optimiser's state."""
        return None if self.gradients is None or self.optimizer is None else self.gradients + self.optimizer

    @property
    def peak(self) -> int | None:
        """Weights, gradients and optimiser state stay; sampling, update and evaluation take turns on top of them.

        Rollouts that are sampled ahead take no turn: they come on top of the update, and of an evaluation after it.
        """
        resident = (self.student, self.student_copy, self.gradients, self.optimizer, self.teacher)
        update = (self.activations, self.logits)
        rollout = (self.cache_training, self.cache_teacher)
        if None in (*resident, *update, *rollout, self.cache_evaluation):
            return None
        others = max(_total(update), self.cache_evaluation or 0)
        on_top = others + _total(rollout) if self.ahead else max(others, _total(rollout))
        return _total(resident) + on_top


def describe_plan(config: Config) -> str:
    """The plan, the memory estimate and all settings as text. Raises ModelError for an unknown embedded model."""
    memory = estimate_memory(config)
    blocks = [
        ("Plan", list(_plan(config, memory))),
        (f"Memory of one process, from {memory.source}", list(memory_rows(config, memory))),
        ("Settings", list(_settings(config))),
    ]
    return "\n\n".join(
        "\n".join([title, *(f"  {name:<{max(len(n) for n, _ in rows)}}  {text}" for name, text in rows)])
        for title, rows in blocks
    )


# ---- the plan ----


def most_response_tokens(config: Config) -> int:
    """Upper bound of the tokens sampled in training: every rollout full, the window growing at every step."""
    steps, rollouts = config.training.steps, config.rollout.prompts_per_step * config.rollout.num_generations
    if config.control.lengths:
        return rollouts * sum(config.control.lengths[:steps])
    if not config.window_is_dynamic:
        return steps * rollouts * config.rollout.max_completion_length
    window = config.pruning.dynamic_response_length
    return rollouts * sum(min(window.max_len, window.init_len + window.step * done) for done in range(steps))


def events_until_unreliable(config: Config) -> int | None:
    """Drift events after which reliability 1 - w_drop · C is at most positive_eps; None when they never suffice."""
    pruning = config.pruning
    if pruning.w_drop == 0:
        return None
    count = max(0, int((1 - pruning.positive_eps) / pruning.w_drop) - 1)  # just below; division rounds either way
    while max(0.0, 1 - pruning.w_drop * count) > pruning.positive_eps:
        count += 1
    return count


def evaluation_steps(config: Config) -> list[int]:
    """Steps after which the student is evaluated, 0 being before training."""
    if config.evaluation.data is None:
        return []
    return [0, *_every(config.evaluation.every, config.training.steps)]


def _every(period: int, last: int) -> list[int]:
    return sorted({*range(period, last + 1, period), last})


def _served(urls: str | list[str]) -> str:
    return f"served at {urls if isinstance(urls, str) else ', '.join(urls)}"


def _plan(config: Config, memory: Memory) -> Iterator[tuple[str, str]]:
    model, rollout, training = config.model, config.rollout, config.training
    lora = model.lora
    trained = f"LoRA adapters of rank {lora.r} on {lora.target_modules}" if lora else "all weights"
    rounded = f", rollouts in {config.other_rollout_dtype}" if config.other_rollout_dtype else ""
    if rollout.vllm_server_url is not None:
        rounded += f", sampled by vLLM {_served(rollout.vllm_server_url)}"
    yield "student", f"{model.model_name_or_path}, {trained} in {model.dtype}{rounded}"
    urls = model.teacher_model_server_url
    where = f"in {model.teacher_dtype}" if urls is None else _served(urls)
    yield "teacher", f"{model.teacher_model_name_or_path}, frozen, {where}"
    yield "prompts", f"{config.data.train}, at most {config.data.max_prompt_length:,} tokens each"
    rollouts = rollout.prompts_per_step * rollout.num_generations
    prompts = f"{rollout.prompts_per_step} prompts x {rollout.num_generations}"
    yield "steps", f"{training.steps:,}, each of {prompts} = {rollouts} rollouts"
    yield "objective", _objective(config)
    if config.reward.function is not None:
        yield "reward", _reward(config)
    yield (
        "optimiser",
        f"AdamW at {training.learning_rate:g}, {training.lr_scheduler_type}, {training.warmup_steps} steps of warm-up",
    )
    yield "drift", _drift(config)
    yield "length", _length(config)
    if config.stops_in_flight:
        yield "in flight", _in_flight(config)
    most, budget = most_response_tokens(config), training.steps * rollouts * rollout.max_completion_length
    uncut = f"; at most {budget:,} if no response were cut below {rollout.max_completion_length:,}"
    yield "tokens", f"at most {most:,} sampled and scored in training{uncut if most < budget else ''}"
    yield "evaluation", _evaluation(config)
    saved = len(_every(training.save_every, training.steps))
    size = f", {size_text(memory.checkpoint)} each" if memory.checkpoint is not None else ""
    yield (
        "checkpoints",
        f"{saved}, every {training.save_every} steps and after the last, of which {training.keep_last} are kept{size}",
    )
    if config.tracking.report_to:
        yield "trackers", f"metrics.jsonl and {', '.join(config.tracking.report_to)}"


def _objective(config: Config) -> str:
    objective = config.objective
    text = f"{objective.loss}, {objective.weight_normalization}"
    if objective.loss == "topk_reverse_kl":
        text += f", candidates {objective.top_k_strategy} of top-{objective.top_k}"
    return text


def _reward(config: Config) -> str:
    reward = config.reward
    text = f"{reward.function} within {config.rollout.num_generations} rollouts, + {reward.opd_kl_coef:g} x the teacher"
    if reward.mask_truncated_completions:
        text += "; none for rollouts that were cut"
    return text + ("; alone where reliability is gone" if config.teacher_ends_with_reliability else "")


def _drift(config: Config) -> str:
    pruning, k = config.pruning, config.objective.top_k
    if not pruning.enable:
        return "off: plain on-policy distillation, every token has weight 1"
    match pruning.metric:
        case "teacher_top_p_accept":
            event = f"the sampled token is outside the teacher's {pruning.teacher_top_p:g} nucleus (of its top-{k})"
        case _ if pruning.threshold == "auto":
            event = f"{pruning.metric} is below a threshold that is calibrated on the pair before the first step"
        case "overlap_ratio":
            assert pruning.threshold != "auto"
            needed = next(shared for shared in range(k + 1) if shared / k >= pruning.threshold)
            event = f"student and teacher share fewer than {needed} of their {k} likeliest tokens"
        case "overlap_mass":
            event = (
                f"less than {pruning.threshold:g} of the student's probability is on tokens of the teacher's top-{k}"
            )
        case _:
            event = f"{pruning.metric} is below {pruning.threshold:g}"
    spent = events_until_unreliable(config)
    end = "events never spend all reliability" if spent is None else f"{spent:,} events spend all reliability"
    weight = f", after which a token keeps weight {pruning.w_base:g}" if pruning.reweight else "; every token weighs 1"
    return f"an event where {event}; {end}{weight}"


def _length(config: Config) -> str:
    if lengths := config.control.lengths:
        return f"a fixed schedule from {lengths[0]:,} to {lengths[config.training.steps - 1]:,} tokens"
    if not config.window_is_dynamic:
        return f"every response may use {config.rollout.max_completion_length:,} tokens"
    window = config.pruning.dynamic_response_length
    return (
        f"window of {window.init_len:,} tokens at first, {window.min_len:,} to {window.max_len:,} later; "
        f"{window.step} more when {window.hit_ratio:.0%} of the rollouts are reliable up to {window.margin} tokens "
        f"before its end, {window.step} fewer after {window.shrink_patience} steps in a row when they are not"
    )


def _in_flight(config: Config) -> str:
    settings, spent = config.pruning.in_flight, events_until_unreliable(config)
    stop = settings.stop_after_events or spent
    return (
        f"every {settings.chunk} decode steps the teacher looks at rollouts that may be spent; one stops "
        + (f"at its event {stop:,}" if stop else "never, since no number of events spends its reliability")
        + (f", not before {settings.min_tokens:,} tokens" if settings.min_tokens else "")
        + f"; {settings.audit_share:.1%} of the rollouts run on as audits"
    )


def _evaluation(config: Config) -> str:
    evaluation, steps = config.evaluation, evaluation_steps(config)
    if not steps:
        return "none: evaluation.data is not set"
    answers = evaluation.num_problems * evaluation.k
    return (
        f"{len(steps)} times (before training, every {evaluation.every} steps, after the last) on {evaluation.data}: "
        f"Avg@{evaluation.k} on up to {evaluation.num_problems} problems, at most {answers * evaluation.max_tokens:,} "
        "tokens each time"
    )


# ---- memory ----


def estimate_memory(config: Config) -> Memory:
    """Bytes by part, for one process on one device that holds the student and the teacher."""
    settings, training = config.model, config.training
    student_config = read_model_config(settings.model_name_or_path, settings)
    teacher_config = read_model_config(settings.teacher_model_name_or_path, settings)
    if student_config is None or teacher_config is None:
        return _memory_from_names(config, student_config, teacher_config)

    student = _network(student_config, settings, settings.dtype)
    teacher = _network(teacher_config, settings, settings.teacher_dtype)
    if settings.lora is not None:
        student = add_adapters(student, settings.lora)
    trained = _bytes(p for p in student.parameters() if p.requires_grad)
    rows, width, response = micro_batch_shape(config)
    sampled_elsewhere = config.rollout.vllm_server_url is not None
    return Memory(
        source="config.json of both models",
        ahead=config.rollout.ahead,
        student=_bytes(student.parameters()),
        student_copy=_copy_bytes(config, student),
        gradients=trained,
        optimizer=2 * trained,
        teacher=0 if settings.teacher_model_server_url else _bytes(teacher.parameters()),
        activations=activation_bytes(
            student_config, settings, rows, width, bf16=training.bf16, recompute=training.gradient_checkpointing
        ),
        logits=_logit_bytes(config, student_config),
        cache_training=0
        if sampled_elsewhere
        else _cache_bytes(student_config, config.rollout.dtype or settings.dtype, rollouts_at_once(config), width),
        cache_teacher=_cache_bytes(teacher_config, settings.teacher_dtype, config.rollout.slots, width)
        if config.stops_in_flight
        else 0,
        cache_evaluation=0
        if sampled_elsewhere
        else _cache_bytes(student_config, settings.dtype, *evaluation_at_once(config)),
    )


def _memory_from_names(
    config: Config, student_config: PretrainedConfig | None, teacher_config: PretrainedConfig | None
) -> Memory:
    """What the parameter counts in the names tell; the rest depends on shapes that only config.json has."""
    settings = config.model
    names = settings.model_name_or_path, settings.teacher_model_name_or_path
    missing = [n for n, found in zip(names, (student_config, teacher_config), strict=True) if found is None]
    student, teacher = (parameters_in_name(name) for name in names)
    dtypes = settings.dtype, settings.teacher_dtype, config.rollout.dtype or settings.dtype
    in_student, in_teacher, in_copy = (getattr(torch, dtype).itemsize for dtype in dtypes)
    weights = None if student is None else student * in_student
    trained = None if settings.lora is not None else weights
    served = settings.teacher_model_server_url is not None
    return Memory(
        source=f"the names of the models, because config.json of {' and '.join(missing)} is not on this machine",
        ahead=config.rollout.ahead,
        student=weights,
        student_copy=None if student is None else student * in_copy if config.samples_from_copy else 0,
        gradients=trained,
        optimizer=None if trained is None else 2 * trained,
        teacher=0 if served else None if teacher is None else teacher * in_teacher,
        cache_teacher=None if config.stops_in_flight else 0,
        cache_evaluation=0 if config.evaluation.data is None or config.rollout.vllm_server_url is not None else None,
    )


def micro_batch_shape(config: Config) -> tuple[int, int, int]:
    """(rows, prompt + response tokens, response tokens) of the largest micro-batch, as `types.pack` cuts it."""
    response = config.longest_response
    width = config.data.max_prompt_length + response
    training = config.training
    budget = training.micro_batch_tokens or default_token_budget(resolve_device(training.device))
    rows = max(1, budget // width)
    return min(rows, config.rollout.prompts_per_step * config.rollout.num_generations), width, response


def rollouts_at_once(config: Config) -> int:
    """Rollouts that decode together in training."""
    return min(config.rollout.slots, config.rollout.prompts_per_step * config.rollout.num_generations)


def evaluation_at_once(config: Config) -> tuple[int, int]:
    """(answers that decode together, prompt + answer tokens) in evaluation; (0, 0) without one."""
    evaluation = config.evaluation
    if evaluation.data is None:
        return 0, 0
    rows = min(config.rollout.slots, evaluation.num_problems * evaluation.k)
    return rows, config.data.max_prompt_length + evaluation.max_tokens


def parameters_in_name(name: str) -> int | None:
    """7_000_000_000 of `org/Model-7B`: the count that model names carry, which is a rounded one."""
    found = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([BM])(?![A-Za-z0-9])", name.rsplit("/", 1)[-1], re.IGNORECASE)
    return round(float(found[1]) * {"B": 1e9, "M": 1e6}[found[2].upper()]) if found else None


def activation_bytes(
    model_config: PretrainedConfig, settings: ModelSection, rows: int, width: int, *, bf16: bool, recompute: bool
) -> int:
    """Bytes that a forward of the whole network over (rows, width) tokens keeps for the backward, its head left out.

    With `recompute`, one layer at a time is made again in the backward and comes on top of what the forward kept.
    LoRA keeps less than this, since frozen matrices need no input kept: it is an upper bound there.
    """
    everything = _saved_bytes(model_config, settings, rows, width, bf16=bf16, recompute=False)
    if not recompute:
        return everything
    kept = _saved_bytes(model_config, settings, rows, width, bf16=bf16, recompute=True)
    return kept + everything // model_config.get_text_config().num_hidden_layers


def _saved_bytes(
    model_config: PretrainedConfig, settings: ModelSection, rows: int, width: int, *, bf16: bool, recompute: bool
) -> int:
    saved: dict[int, torch.UntypedStorage] = {}
    with FakeTensorMode():  # tensors with shapes and types, but no memory
        model = AutoModelForCausalLM.from_config(
            model_config,
            dtype=getattr(torch, settings.dtype),
            attn_implementation="sdpa",  # knows shapes without a kernel of the accelerator, and keeps as little
            trust_remote_code=settings.trust_remote_code,
        ).train()
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        weights = {p.untyped_storage()._cdata for p in model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                saved[storage._cdata] = storage
            return tensor

        tokens = torch.zeros(rows, width, dtype=torch.long)
        mask = torch.ones(rows, 1, width, width, dtype=torch.bool)  # sdpa keeps a float copy of it in every layer
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            model(input_ids=tokens, attention_mask=mask, use_cache=False, logits_to_keep=1)
        return sum(storage.nbytes() for storage in saved.values())


def _network(model_config: PretrainedConfig, settings: ModelSection, dtype: str) -> PreTrainedModel:
    """The network with its shapes and types, and no memory behind them."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            model_config, dtype=getattr(torch, dtype), trust_remote_code=settings.trust_remote_code
        )


def _logit_bytes(config: Config, student: PretrainedConfig) -> int:
    """Losses make logits in chunks, and a gradient of the head beside the one that it is added to."""
    shape = student.get_text_config()
    head = 0 if config.model.lora is not None else shape.vocab_size * shape.hidden_size * 4
    return CHUNK_BYTES + head


def _cache_bytes(model_config: PretrainedConfig, dtype: str, rows: int, width: int) -> int:
    """Keys and values of `rows` rollouts of `width` tokens in all layers."""
    shape = model_config.get_text_config()
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    head_size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return 2 * shape.num_hidden_layers * heads * head_size * rows * width * getattr(torch, dtype).itemsize


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _copy_bytes(config: Config, student: PreTrainedModel) -> int:
    """The copy that rollouts are sampled from, if any: adapters keep their own type unless the copy is given one."""
    if not config.samples_from_copy:
        return 0
    if config.other_rollout_dtype is None:
        return _bytes(student.parameters())
    return sum(p.numel() for p in student.parameters()) * getattr(torch, config.other_rollout_dtype).itemsize


def _total(parts: Iterable[int | None]) -> int:
    return sum(part or 0 for part in parts)


def memory_rows(config: Config, memory: Memory) -> Iterator[tuple[str, str]]:
    """What each part of a run takes, as (name, text)."""
    rows, width, _ = micro_batch_shape(config)
    yield "student weights", size_text(memory.student)
    if config.samples_from_copy:
        when = " during the update" if config.rollout.ahead else ""
        yield "student's copy", f"{size_text(memory.student_copy)} (rollouts are sampled from it{when})"
    yield "gradients", size_text(memory.gradients)
    yield "AdamW state", size_text(memory.optimizer)
    yield "teacher weights", size_text(memory.teacher)
    shape = f"micro-batch of {rows:,} x {width:,} tokens"
    how = ", layers made again in backward" if config.training.gradient_checkpointing else ""
    yield "activations", f"{size_text(memory.activations)} ({shape}{how})"
    yield "logits", size_text(memory.logits)
    yield (
        "KV cache, training",
        f"{size_text(memory.cache_training)} ({rollouts_at_once(config)} rollouts x {width:,} tokens at a time)",
    )
    if config.stops_in_flight:
        yield (
            "KV cache, teacher",
            f"{size_text(memory.cache_teacher)} ({config.rollout.slots} slots x {width:,} tokens, beside student's)",
        )
    answers, longest = evaluation_at_once(config)
    if answers:
        yield (
            "KV cache, evaluation",
            f"{size_text(memory.cache_evaluation)} ({answers} answers x {longest:,} tokens at a time)",
        )
    if memory.peak is not None:
        yield "peak", f"about {size_text(memory.peak)}: what is not sharded or offloaded must fit on one device"
    else:
        yield "peak", "unknown without config.json; for a model of the Hub: hf download NAME config.json"


def size_text(count: int | None) -> str:
    """Bytes as people read them."""
    if count is None:
        return "unknown"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"


# ---- settings ----


def _settings(config: Config) -> Iterator[tuple[str, str]]:
    """Every setting by its dotted name with the value that the run will use."""
    yield from _flat(config.model_dump(), "")


def _flat(settings: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "not set" if value is None else json.dumps(value, ensure_ascii=False)
