"""What `--dry-run` shows: the plan of a run in words, the memory that it needs, and every setting.

No weights are loaded and no network is used; see preflight/memory.py for the sizes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import torch

from prune_opd.config import Config
from prune_opd.config.values import MOST
from prune_opd.core.budget import MOST_TIMES
from prune_opd.models.loading import resolve_device
from prune_opd.preflight.memory import Memory, estimate_memory, memory_rows, size_text
from prune_opd.preflight.topology import GPUs, topology_rows
from prune_opd.reporting.wording import flattened


def describe_plan(config: Config, gpus: GPUs | None = None) -> str:
    """The plan, the memory estimate and all settings as text.

    gpus: those that the run is meant for; says what each of them holds, and whether it fits. Raises ModelError for an
    unknown embedded model, and ConfigError for a device that is not here.
    """
    resolve_device(config.training.device)
    memory = estimate_memory(config, torch.device("cuda") if gpus else None)
    blocks = [
        ("Plan", list(_plan(config, memory))),
        (f"Memory of one process, from {memory.source}", list(memory_rows(config, memory))),
    ]
    if gpus is not None:
        title = f"Memory of each of {gpus.count} GPUs of {size_text(gpus.bytes)}"
        blocks.append((title, list(topology_rows(config, memory, gpus))))
    blocks.append(("Settings", list(_settings(config))))
    return "\n\n".join(
        "\n".join([title, *(f"  {name:<{max(len(n) for n, _ in rows)}}  {text}" for name, text in rows)])
        for title, rows in blocks
    )


# ---- the plan ----


def most_response_tokens(config: Config) -> int:
    """Upper bound of the tokens sampled in training: every rollout full, the window growing at every step."""
    steps, rollouts = config.training.steps, config.rollout.prompts_per_step * config.rollout.num_generations
    if config.rollout.token_budget is not None:
        rollouts *= MOST_TIMES
    if config.control.lengths:
        return rollouts * sum(config.control.lengths[:steps])
    if not config.window_is_dynamic:
        return steps * rollouts * config.rollout.max_completion_length
    window = config.pruning.dynamic_response_length
    growing = min(steps, -(-(window.max_len - window.init_len) // window.step))  # steps before it is at its largest
    grown = growing * window.init_len + window.step * growing * (growing - 1) // 2
    return rollouts * (grown + (steps - growing) * window.max_len)


def events_until_unreliable(config: Config) -> int | None:
    """Drift events after which reliability 1 - w_drop · C is at most positive_eps; None when they never suffice."""
    pruning = config.pruning
    if pruning.w_drop == 0:
        return None
    needed = (1 - pruning.positive_eps) / pruning.w_drop
    if needed > MOST:  # no response is so long
        return None
    count = max(0, int(needed) - 1)  # just below; division rounds either way
    while max(0.0, 1 - pruning.w_drop * count) > pruning.positive_eps:
        count += 1
    return count


def evaluations(config: Config) -> int:
    """How often the student is evaluated, before training and after the last step among them."""
    return 0 if config.evaluation.data is None else 1 + _times(config.evaluation.every, config.training.steps)


def _times(period: int, last: int) -> int:
    """Steps up to `last` that `period` divides, and `last`."""
    return last // period + (last % period > 0)


def _served(urls: str | list[str]) -> str:
    return f"served at {urls if isinstance(urls, str) else ', '.join(urls)}"


def _teacher_prompts(config: Config) -> str:
    data = config.data
    what = f"column {data.teacher_prompt_column!r}" if data.teacher_prompt_column else data.teacher_prompt_template
    template = "" if data.teacher_chat_template == "student" else f", chat template: {data.teacher_chat_template}"
    return f"{what or 'the same'}, at most {data.longest_for_teacher:,} tokens{template}"


def _plan(config: Config, memory: Memory) -> Iterator[tuple[str, str]]:
    model, rollout, training = config.model, config.rollout, config.training
    lora = model.lora
    trained = f"LoRA adapters of rank {lora.r} on {lora.target_modules}" if lora else "all weights"
    rounded = f", rollouts in {config.other_rollout_dtype}" if config.other_rollout_dtype else ""
    if rollout.vllm_server_url is not None:
        rounded += f", sampled by vLLM {_served(rollout.vllm_server_url)}"
    yield "student", f"{model.model_name_or_path}, {trained} in {model.dtype}{rounded}"
    for number, one in enumerate(config.each_teacher):
        name = f"teacher {model.teachers[number].name}" if model.teachers else "teacher"
        urls = one.model.teacher_model_server_url
        where = f"in {model.teacher_dtype}" if urls is None else _served(urls)
        moves = "frozen" if model.teacher_ema_decay is None else f"follows the student ({model.teacher_ema_decay:g})"
        yield name, f"{one.model.teacher_model_name_or_path}, {moves}, {where}"
    if config.teacher_reads_other_prompts:
        yield "teacher's prompts", _teacher_prompts(config)
    yield "prompts", f"{config.data.train}, at most {config.data.max_prompt_length:,} tokens each"
    rollouts = rollout.prompts_per_step * rollout.num_generations
    prompts = f"{rollout.prompts_per_step} prompts x {rollout.num_generations}"
    each = f"each of {prompts} = {rollouts} rollouts"
    if rollout.token_budget is not None:
        later = f"then as many as take {rollout.token_budget:,} tokens, at most {MOST_TIMES} times as many"
        each = f"the first of {prompts} = {rollouts} rollouts, {later}"
    yield "steps", f"{training.steps:,}, {each}"
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
    saved = _times(training.save_every, training.steps)
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
            around = math.ceil(k * pruning.threshold)  # the product rounds either way
            needed = next(shared for shared in range(max(0, around - 1), k + 1) if shared / k >= pruning.threshold)
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
    evaluation, times = config.evaluation, evaluations(config)
    if not times:
        return "none: evaluation.data is not set"
    answers = evaluation.num_problems * evaluation.k
    return (
        f"{times} times (before training, every {evaluation.every} steps, after the last) on {evaluation.data}: "
        f"Avg@{evaluation.k} on up to {evaluation.num_problems} problems, at most {answers * evaluation.max_tokens:,} "
        "tokens each time"
    )


# ---- settings ----


def _settings(config: Config) -> Iterator[tuple[str, str]]:
    """Every setting by its dotted name with the value that the run will use."""
    for name, value in flattened(config.model_dump()):
        yield name, "not set" if value is None else json.dumps(value, ensure_ascii=False)
