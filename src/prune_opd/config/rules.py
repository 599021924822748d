"""What a recipe may not combine, what it may not hold, and which of its settings nothing reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from prune_opd.config.schema import Config

SECRET = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|xox[abp]-[\w-]{10,}"
    r"|AKIA[A-Z0-9]{16}\b|eyJ[\w-]{10,}\.[\w-]{10,}\.)|://[^/\s:@]*:[^/\s@]+@|\bBearer\s+\S{8,}"
)

# A run reads these even where it reads nothing else of their section: `section.*` in `_unread` leaves them out.
SWITCHES = {"enable", "function", "data", "train", "max_prompt_length"}


def settings_without_effect(config: Config) -> Iterator[tuple[str, str]]:
    """Settings that were written down but that nothing will read, with the reason."""
    for setting, reason in _unread(config):
        section, _, name = setting.rpartition(".")
        for written in sorted(attrgetter(section)(config).model_fields_set):
            if written == name or (name == "*" and written not in SWITCHES):
                yield f"{section}.{written}", reason


def _unread(config: Config) -> Iterator[tuple[str, str]]:
    """Settings that a run of `config` does not read, written down or not, and why; `section.*` is a whole section."""
    pruning, rollout, model, reward = config.pruning, config.rollout, config.model, config.reward
    if not pruning.enable:
        yield "pruning.*", "pruning.enable is false"
    else:
        if pruning.metric == "teacher_top_p_accept":
            yield "pruning.threshold", "metric teacher_top_p_accept uses teacher_top_p"
        else:
            yield "pruning.teacher_top_p", f"metric is {pruning.metric}"
        if not pruning.in_flight.enable:
            yield "pruning.in_flight.*", "pruning.in_flight.enable is false"
        if not pruning.repetition.enable:
            yield "pruning.repetition.*", "pruning.repetition.enable is false"
        if not pruning.dynamic_response_length.enable:
            yield "pruning.dynamic_response_length.*", "dynamic_response_length.enable is false"
        if not pruning.reweight:
            yield "pruning.w_base", "pruning.reweight is false"

    if not rollout.use_vllm:
        yield "rollout.vllm_gpu_memory_utilization", "rollout.use_vllm is false"
        yield "rollout.vllm_enable_sleep_mode", "rollout.use_vllm is false"
        yield "rollout.vllm_server_url", "rollout.use_vllm is false"
        if not config.samples_from_copy:
            reason = "without rollout.use_vllm, ahead or another dtype the policy that is trained samples"
            yield "rollout.importance_sampling_cap", reason
    elif rollout.vllm_server_url is not None:
        yield "rollout.vllm_gpu_memory_utilization", "rollout.vllm_server_url is set, so the servers chose it"
        yield "rollout.vllm_enable_sleep_mode", "rollout.vllm_server_url is set, so the servers chose it"
    if rollout.vllm_server_url is None:
        yield "rollout.vllm_server.*", "rollout.vllm_server_url is not set"
    if rollout.dtype == model.dtype:
        yield "rollout.dtype", f"the student's weights are {model.dtype} already (model.dtype)"

    served = [one.teacher_is_served for one in config.each_teacher]
    if not any(served):
        reason = "model.teacher_model_server_url is not set, so the teacher runs in this process"
        yield "model.teacher_server.*", reason
    if all(served):
        yield "model.teacher_dtype", "the teacher is served; its server chose the type"
        yield "model.teacher_placement", "the teacher is served, so no process holds it"

    if not model.teachers:
        yield "data.teacher_column", "model.teachers is not set, so there is one teacher"
    if not config.teacher_reads_other_prompts:
        yield "data.max_teacher_prompt_length", "the teacher reads the student's prompts"

    if reward.function is None:
        yield "reward.*", "reward.function is not set, so there is no task reward"
    elif reward.after_drift == "task_only" and not pruning.enable:
        yield "reward.after_drift", "pruning.enable is false, so nothing drifts"
    elif reward.after_drift == "task_only" and pruning.in_flight.enable:
        reason = "pruning.in_flight ends rollouts where their reliability does (audit rollouts apart)"
        yield "reward.after_drift", reason

    loss = config.objective.loss
    if loss != "topk_reverse_kl":
        yield "objective.reward_weight_mode", f"loss is {loss}"
        yield "objective.top_k_strategy", f"loss is {loss}"
    if loss != "jsd":
        yield "objective.jsd_beta", f"loss is {loss}"
    if config.objective.vocabulary_loss:
        yield "model.liger_head", f"loss is {loss}, which needs all logits"

    if not config.tracking.report_to:
        for name in ("report_every", "run_name", "group"):
            yield f"tracking.{name}", "tracking.report_to names no tracker"

    if config.evaluation.data is None:
        yield "evaluation.*", "evaluation.data is not set, so nothing is evaluated"
    elif config.evaluation.data.startswith(("task:", "reasoning_gym:")):
        yield "evaluation.split", "the task of evaluation.data has held-out problems of its own"
    if config.data.train.startswith("task:"):
        columns = ("split", "prompt_column", "answer_column")
        # Prompts of the other tasks are user turns, rendered as a row's would be.
        written = ("prompt_suffix", "chat_template_kwargs", "teacher_chat_template")
        for name in columns + (written if config.data.train == "task:chain_sum" else ()):
            yield f"data.{name}", "the embedded task makes its own prompts"


def conflicts(config: Config) -> Iterator[str]:
    """What in the settings contradicts itself or was not built, and what to change."""
    yield from _window_conflicts(config)
    for one in config.each_teacher:
        yield from _server_conflicts(one)
    yield from _reward_conflicts(config)
    yield from _control_conflicts(config)
    yield from _teachers_conflicts(config)
    yield from _sharded_teacher_conflicts(config)
    yield from _attention_conflicts(config)
    yield from _training_conflicts(config)


def _window_conflicts(config: Config) -> Iterator[str]:
    if not config.window_is_dynamic:
        return
    window, budget = config.pruning.dynamic_response_length, config.rollout.max_completion_length
    if not window.min_len <= window.init_len <= window.max_len:
        yield (
            "pruning.dynamic_response_length needs min_len <= init_len <= max_len, got "
            f"{window.min_len}, {window.init_len}, {window.max_len}; change the one that is out of order"
        )
    if window.max_len > budget:
        yield (
            f"pruning.dynamic_response_length.max_len = {window.max_len} is above "
            f"rollout.max_completion_length = {budget}; lower it or raise the other"
        )


def _server_conflicts(config: Config) -> Iterator[str]:
    model, objective = config.model, config.objective
    if model.teacher_model_server_url is not None:
        if model.teacher_model_server_url == []:
            yield "model.teacher_model_server_url lists no server; name one, or leave it out"
        if config.calibrates:
            yield (
                'pruning.threshold = "auto" has the teacher write responses, which a served one is not asked '
                "to; set a number, for example one that a run on fewer steps with the teacher in this process found"
            )
        if model.teacher_server.top_logprobs < objective.top_k:
            yield (
                f"model.teacher_server.top_logprobs = {model.teacher_server.top_logprobs} is below objective.top_k "
                f"= {objective.top_k}: the teacher's candidates would be cut; raise it, and the servers' --max-logprobs"
            )
        if objective.vocabulary_loss:
            yield (
                f"objective.loss = {objective.loss!r} needs the teacher's logits over the whole vocabulary, "
                "which a server does not send; use topk_reverse_kl or sampled_token, or leave out "
                "model.teacher_model_server_url"
            )
    if config.rollout.vllm_server_url == []:
        yield "rollout.vllm_server_url lists no server; name one, or leave it out"


def _reward_conflicts(config: Config) -> Iterator[str]:
    function, siblings = config.reward.function, config.rollout.num_generations
    if function is None:
        return
    if function != "grade" and not re.fullmatch(r"[\w.]+:[\w.]+", function):
        yield (
            f"reward.function = {function!r} is no import path; write package.module:name, or grade for "
            "the built-in graders"
        )
    if siblings < 2:
        yield (
            f"reward.function needs rollout.num_generations >= 2, got {siblings}: a "
            "rollout is compared with others of its prompt; raise it, or take the reward out"
        )


def _control_conflicts(config: Config) -> Iterator[str]:
    control, budget = config.control, config.rollout.max_completion_length
    for name, entries in control:
        if entries is not None and len(entries) < config.training.steps:
            yield (
                f"control.{name} has {len(entries)} entries for training.steps = {config.training.steps}; "
                "it needs one for each step"
            )
    if control.lengths and max(control.lengths) > budget:
        yield (
            f"control.lengths goes up to {max(control.lengths)}, above rollout.max_completion_length = "
            f"{budget}; lower the one or raise the other"
        )
    if control.lengths and config.window_is_dynamic:
        yield (
            "control.lengths and the training window both set the length; switch the window off with "
            "pruning.dynamic_response_length.enable = false, or pruning.enable = false"
        )
    if control.kept_tokens and config.weighs_tokens:
        yield (
            "control.kept_tokens and reliability both set the weights; set pruning.reweight = false, or "
            "pruning.enable = false"
        )


def _teachers_conflicts(config: Config) -> Iterator[str]:
    """Several teachers, one that reads other prompts than the student, one that follows the student."""
    model, data = config.model, config.data
    names = [teacher.name for teacher in model.teachers]
    sources = [source for teacher in model.teachers for source in teacher.data_sources]
    for what, values in (("name", names), ("data source", sources)):
        if twice := sorted({value for value in values if values.count(value) > 1}):
            yield f"model.teachers has the {what} {twice[0]!r} twice; give each teacher its own"
    if model.teachers and model.teacher_model_name_or_path != model.teachers[0].model_name_or_path:
        yield (
            "model.teacher_model_name_or_path and model.teachers name different teachers; leave the first out, and "
            "list its teacher in model.teachers"
        )
    if model.teachers and model.teacher_model_server_url is not None:
        yield (
            "model.teacher_model_server_url is of a single teacher; give each of model.teachers a server_url of its own"
        )
    if data.teacher_prompt_template and data.teacher_prompt_column:
        yield (
            "data.teacher_prompt_template and data.teacher_prompt_column both say what the teacher reads; leave one of "
            "them out (a template can name the column, as {{ teacher_prompt }})"
        )
    if data.teacher_prompt_column and data.train.startswith(("task:", "reasoning_gym:")):
        yield (
            f"data.teacher_prompt_column needs a data set with columns, and data.train is {data.train!r}; write "
            "data.teacher_prompt_template, which may name prompt and answer"
        )
    several, other = bool(model.teachers), config.teacher_reads_other_prompts
    reason = "model.teachers" if several else "a teacher that reads other prompts than the student"
    if (several or other) and config.objective.vocabulary_loss:
        yield (
            f"objective.loss = {config.objective.loss!r} runs over the whole vocabulary, which was not built for "
            f"{reason}; use topk_reverse_kl or sampled_token"
        )
    if several and config.calibrates:
        yield 'pruning.threshold = "auto" was not built for model.teachers; set a number'
    if model.teacher_ema_decay is None:
        return
    if several or model.teacher_model_server_url is not None or model.teacher_placement == "sharded":
        yield (
            "model.teacher_ema_decay needs one teacher, whole in each process; leave out model.teachers, "
            "model.teacher_model_server_url and model.teacher_placement"
        )
    if config.rollout.ahead:
        yield "model.teacher_ema_decay would move the teacher while rollout.ahead has it score; leave one of them out"
    if model.teacher_dtype == "bfloat16":
        yield (
            'model.teacher_ema_decay was not built for model.teacher_dtype = "bfloat16", which rounds small moves to '
            'nothing; set "float32"'
        )
    if model.teacher_model_name_or_path != model.model_name_or_path:
        yield (
            "model.teacher_ema_decay moves the weights of the teacher towards the student's, so both must begin as the "
            f'same model: set model.teacher_model_name_or_path = "student" (it is {model.teacher_model_name_or_path!r})'
        )


def _sharded_teacher_conflicts(config: Config) -> Iterator[str]:
    if config.model.teacher_placement != "sharded" or all(one.teacher_is_served for one in config.each_teacher):
        return
    alone = {
        "pruning.in_flight.enable = true": config.stops_in_flight,  # each rank asks at times of its own
        'pruning.threshold = "auto"': config.calibrates,
        "model.compile = true": config.model.compile,
    }
    for setting, chosen in alone.items():
        if chosen:
            yield (
                f'{setting} was not built for model.teacher_placement = "sharded", where all processes must ask the '
                "teacher at the same time; leave one of them out, or serve the teacher (model.teacher_model_server_url)"
            )


def _attention_conflicts(config: Config) -> Iterator[str]:
    model, name = config.model, config.model.attn_implementation
    if model.compile and name not in ("auto", "sdpa", "eager"):
        yield (
            f"model.attn_implementation = {name!r} was not built for model.compile = true; leave one of them out, or "
            "write sdpa, whose dense mask grows with the square of a row"
        )
    if not name.startswith("flash"):
        return
    if model.dtype == "float32" and not config.training.bf16:
        yield (
            f"model.attn_implementation = {name!r} computes in half precision, and the student in float32; set "
            "training.bf16 = true, or write auto"
        )
    if model.teacher_dtype == "float32" and any(not one.teacher_is_served for one in config.each_teacher):
        yield (
            f"model.attn_implementation = {name!r} computes in half precision, and the teacher in float32; set "
            "model.teacher_dtype = 'bfloat16', or write auto"
        )


def _training_conflicts(config: Config) -> Iterator[str]:
    training, rollout = config.training, config.rollout
    if config.samples_from_copy and (rollout.use_vllm or training.parallel == "fsdp2"):
        setting = "rollout.ahead" if rollout.ahead else "rollout.dtype"
        other = "rollout.use_vllm" if rollout.use_vllm else 'training.parallel = "fsdp2"'
        yield (
            f"{setting} needs a copy of the whole student to sample from, which {other} does not have; "
            "leave one of them out"
        )
    if config.model.compile and training.parallel == "fsdp2":
        yield (
            'model.compile = true was not built for training.parallel = "fsdp2", whose weights come and go '
            "within a forward; leave one of them out"
        )
    if training.warmup_steps >= training.steps:
        yield (
            f"training.warmup_steps = {training.warmup_steps} leaves none of training.steps = "
            f"{training.steps} at the full learning rate; use fewer warm-up steps"
        )
    if training.keep_every is not None and training.keep_every % training.save_every:
        yield (
            f"training.keep_every = {training.keep_every} is no multiple of training.save_every = "
            f"{training.save_every}, so the checkpoints to keep would never be written; change one of them"
        )


def secrets(value: Any, name: str = "") -> Iterator[str]:
    """Dotted names of the texts in nested settings that look like a password or a key."""
    if isinstance(value, str):
        if SECRET.search(value):
            yield name
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from secrets(inner, f"{name}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for inner in value:
            yield from secrets(inner, name)
