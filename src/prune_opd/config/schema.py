"""Every setting of a run, as recipes write it. Importable without torch, so that a recipe can be checked anywhere.

A recipe is a TOML file with the sections below; `extends = "other.toml"` takes another recipe's settings first.
Field names of `pruning` are those of the paper's release; other names follow TRL.
"""

from __future__ import annotations

import difflib
import re
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator

from prune_opd.core.choices import (
    AfterDrift,
    DriftMetric,
    LossName,
    Normalization,
    RewardWeightMode,
    TopKStrategy,
    VocabularyLoss,
)
from prune_opd.errors import ConfigError


class Section(BaseModel):
    """Unknown names are errors, `true` is no number and "3" neither, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class LoraSection(Section):
    """Low-rank adapters through peft; the base weights stay frozen."""

    r: PositiveInt = Field(16, description="Rank of the adapters.")
    alpha: PositiveInt = Field(32, description="Scale of the adapters; the update is multiplied by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapters.")
    target_modules: list[str] | Literal["all-linear"] = Field("all-linear", description="Modules that get adapters.")


class TeacherServerSection(Section):
    """How `model.teacher_model_server_url` is asked. A key is read from the environment, PRUNE_OPD_SERVER_API_KEY."""

    model: str | None = Field(None, description="Name that the servers serve the teacher under; unset, the teacher's.")
    top_logprobs: PositiveInt = Field(
        20, description="Teacher tokens asked for at each position; at most the servers' --max-logprobs."
    )
    timeout: float = Field(300.0, gt=0, description="Seconds of silence after which a request counts as lost.")
    deadline: float = Field(1800.0, gt=0, description="Seconds within which a request must be answered, with retries.")
    concurrency: PositiveInt = Field(8, description="Requests that one server holds at a time.")


class ModelSection(Section):
    """Student and teacher. `embedded:NAME` is a model that ships with the package."""

    model_name_or_path: str = Field(
        description="Student: a folder or Hub id, also of a peft adapter, or embedded:NAME."
    )
    teacher_model_name_or_path: str = Field(
        description="Teacher: a folder or Hub id, also of a peft adapter, or embedded:NAME."
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Type of the student's weights.")
    teacher_dtype: Literal["float32", "bfloat16"] = Field("float32", description="Type of the teacher's weights.")
    attn_implementation: str = Field("sdpa", description="Attention of both models, as transformers names it.")
    compile: bool = Field(
        False, description="torch.compile for decoding, scoring and the update: slow to start, faster from then on."
    )
    liger_head: bool = Field(
        False, description="The update's log-probs by Liger's fused kernel: a CUDA GPU and prune-opd[liger]."
    )
    trust_remote_code: bool = Field(False, description="Run model code that ships with a checkpoint.")
    lora: LoraSection | None = Field(
        None, description="Train adapters instead of all weights; `false` where an extended recipe has some."
    )
    teacher_model_server_url: str | list[str] | None = Field(
        None, description="Address of a vLLM server that scores in the teacher's place, or a list of replicas."
    )
    teacher_server: TeacherServerSection = Field(default_factory=TeacherServerSection, description="How it is asked.")

    @field_validator("lora", mode="before")
    @classmethod
    def _false_is_none(cls, value: Any) -> Any:
        return None if value is False else value  # TOML has no null


class DataSection(Section):
    """Where prompts come from."""

    train: str = Field(
        description="JSONL, parquet, local folder, Hub id, or task:chain_sum | running_sum | count_animals."
    )
    split: str = Field("train", description="Split of a data set that has several.")
    prompt_column: str | None = Field(None, description="Column with the prompt; found by itself when unset.")
    answer_column: str | None = Field(None, description="Column with the gold answer; found by itself when unset.")
    prompt_suffix: str = Field("", description="Added to each prompt, unless the prompt ends with it already.")
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="Variables of the tokenizer's chat template, for example enable_thinking = false."
    )
    max_prompt_length: PositiveInt = Field(1024, description="Longer prompts (in tokens) are dropped and counted.")


class VLLMServerSection(Section):
    """How `rollout.vllm_server_url` is asked. A key is read from the environment, PRUNE_OPD_SERVER_API_KEY."""

    model: str | None = Field(None, description="Name that the servers serve the student under; unset, the student's.")
    weights_dir: str | None = Field(
        None,
        description="Folder that servers see too, for weights; unset, a temporary one, for servers on this machine.",
    )
    timeout: float = Field(1800.0, gt=0, description="Seconds of silence after which a request counts as lost.")
    deadline: float = Field(3600.0, gt=0, description="Seconds within which a request must be answered, with retries.")


class RolloutSection(Section):
    """Sampling from the student. The defaults are truly on-policy: nothing is truncated or reshaped."""

    prompts_per_step: PositiveInt = Field(64, description="Prompts in one optimiser step.")
    num_generations: PositiveInt = Field(4, description="Rollouts of each prompt.")
    max_completion_length: PositiveInt = Field(12288, description="Most tokens of a response (the paper's M_max).")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; other than 1 is not on-policy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus of the student's sampling; below 1 is not on-policy.")
    slots: PositiveInt = Field(64, description="Rollouts that decode at the same time; as many as memory allows.")
    ahead: bool = Field(
        False, description="Sample the next step's rollouts while this one updates; their policy is one update old."
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Type of the weights that rollouts are decoded with; unset, the student's own."
    )
    use_vllm: bool = Field(False, description="Sample with vLLM, whose weights are synchronised at every step.")
    vllm_server_url: str | list[str] | None = Field(
        None,
        description="Address of a vLLM server that samples, or a list of replicas; unset, an engine in this process.",
    )
    vllm_server: VLLMServerSection = Field(default_factory=VLLMServerSection, description="How it is asked.")
    vllm_gpu_memory_utilization: float = Field(0.3, gt=0, le=1, description="Share of the GPU that vLLM may take.")
    importance_sampling_cap: float | None = Field(
        None,
        gt=0,
        description="With use_vllm, ahead, dtype: weigh tokens by min(cap, p_trainer / p_sampler); unset, not at all.",
    )


class ObjectiveSection(Section):
    """What is minimised on the kept tokens."""

    loss: LossName = Field("topk_reverse_kl", description="The objective; see core/objective.py.")
    top_k: PositiveInt = Field(16, description="K: candidates of each model at each position.")
    top_k_strategy: TopKStrategy = Field("only_stu", description="Whose candidates the top-k loss runs over.")
    reward_weight_mode: RewardWeightMode = Field("student_p", description="Weight of a candidate's reward.")
    weight_normalization: Normalization = Field("token_mean", description="Divide by valid tokens or their weights.")
    jsd_beta: float = Field(0.5, gt=0, lt=1, description="Interpolation of the jsd loss.")

    @property
    def vocabulary_loss(self) -> VocabularyLoss | None:
        """The loss, if it needs all logits of both models, not those of a few tokens."""
        return cast(VocabularyLoss, self.loss) if self.loss in get_args(VocabularyLoss) else None


class RewardSection(Section):
    """A verifiable reward of the task, beside the teacher's signal: loss = task + opd_kl_coef · teacher."""

    function: str | None = Field(
        None, description="grade (1 where the response is right), or package.module:name; docs/rewards.md."
    )
    opd_kl_coef: float = Field(1.0, ge=0, description="Factor of the teacher's signal, as in slime; the task has 1.")
    after_drift: AfterDrift = Field(
        "both", description="Where reliability is gone: the teacher counts with w_base, or the task reward is alone."
    )
    mask_truncated_completions: bool = Field(
        False, description="No task reward for rollouts that were cut before they ended; the teacher's signal stays."
    )


class DynamicResponseLengthSection(Section):
    """The training window: the next batch's maximum response length, in tokens."""

    enable: bool = Field(True, description="Steer the window; off, responses run to max_completion_length.")
    init_len: PositiveInt = Field(1024, description="First window.")
    min_len: PositiveInt = Field(1024, description="Smallest window.")
    max_len: PositiveInt = Field(12288, description="Largest window.")
    step: PositiveInt = Field(100, description="Growth and shrinkage per update.")
    hit_ratio: float = Field(0.1, gt=0, le=1, description="Share of rollouts reliable to the end that lets it grow.")
    margin: int = Field(100, ge=0, description="How far from its end a rollout may stop being reliable and still hit.")
    shrink_patience: PositiveInt = Field(3, description="Misses in a row before it shrinks.")


class InFlightSection(Section):
    """Ending a rollout while it is generated, once its reliability is spent."""

    enable: bool = Field(False, description="Stop drifted rollouts in flight; the paper only caps the next batch.")
    chunk: PositiveInt = Field(128, description="Decode steps between two looks; changes the cost, not the result.")
    min_tokens: int = Field(0, ge=0, description="A rollout keeps at least this many tokens.")
    stop_after_events: PositiveInt | None = Field(
        None, description="Stop after so many drift events; unset, when reliability is 0 (1 / w_drop events)."
    )
    audit_share: float = Field(1 / 16, ge=0, le=1, description="Share of rollouts that run on uncut, to be looked at.")


class RepetitionSection(Section):
    """Loops as drift: repetition keeps the overlap high, so a loop would look reliable."""

    enable: bool = Field(False, description="Count each token of a loop as a drift event; off in the paper.")
    max_period: PositiveInt = Field(32, description="Longest loop, in tokens.")
    min_run: PositiveInt = Field(32, description="Tokens that must repeat before it counts as a loop.")


class PruningSection(Section):
    """Drift, and what follows from it. `enable = false` is plain on-policy distillation."""

    enable: bool = Field(True, description="Weights and window from drift; off is plain OPD.")
    metric: DriftMetric = Field("overlap_ratio", description="Compatibility of student and teacher at a position.")
    threshold: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        0.7, description="γ: compatibility below it is a drift event. auto: found before training from the pair itself."
    )
    teacher_top_p: float = Field(0.95, gt=0, le=1, description="Teacher nucleus of metric teacher_top_p_accept.")
    w_drop: float = Field(0.01, ge=0, le=1, description="Reliability lost per drift event.")
    w_base: float = Field(0.5, ge=0, description="Weight that stays when reliability is gone.")
    reweight: bool = Field(
        True, description="Weigh tokens by reliability; off, every token has weight 1 and drift steers lengths alone."
    )
    positive_eps: float = Field(1e-8, ge=0, lt=1, description="Reliability at or below it counts as gone.")
    dynamic_response_length: DynamicResponseLengthSection = Field(
        default_factory=DynamicResponseLengthSection, description="The training window."
    )
    in_flight: InFlightSection = Field(default_factory=InFlightSection, description="Stopping in flight.")
    repetition: RepetitionSection = Field(default_factory=RepetitionSection, description="The repetition guard.")


class ControlSection(Section):
    """What `compare` holds Prune-OPD against; no part of the method. One entry for each step; `compare` writes them."""

    lengths: list[PositiveInt] | None = Field(
        None, description="Longest response of each step, in place of the window: arms ramp and replay."
    )
    kept_tokens: list[PositiveInt] | None = Field(
        None, description="Tokens of each step that train, at random positions, in place of weights: arm random."
    )


class TrainingSection(Section):
    """Optimiser, precision, checkpoints."""

    steps: PositiveInt = Field(203, description="Optimiser steps.")
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate of AdamW.")
    lr_scheduler_type: Literal["constant", "linear"] = Field(
        "constant", description="After warm-up: hold or decay to 0."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW β1.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW β2.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    micro_batch_tokens: PositiveInt | None = Field(
        None, description="Padded tokens in one forward and backward; unset, 2048 on a CPU and 16384 elsewhere."
    )
    bf16: bool = Field(False, description="bfloat16 autocast in the update's forward; weights keep their type.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in backward: less memory, more time."
    )
    seed: int = Field(0, ge=0, description="Seed of everything: order, sampling, initialisation of adapters.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps ...")
    parallel: Literal["ddp", "fsdp2"] = Field(
        "ddp", description="Under torchrun: each process holds all of the student and its AdamW state, or a shard."
    )
    threads: int = Field(1, ge=0, description="CPU threads of torch (0 leaves it alone); one is best on busy cores.")
    save_every: PositiveInt = Field(50, description="Steps between checkpoints; the last step is always saved.")
    keep_last: PositiveInt = Field(2, description="Newest checkpoints kept.")
    keep_every: PositiveInt | None = Field(
        None, description="Checkpoints of steps that it divides are kept for good; a multiple of save_every."
    )
    max_skipped_steps: int = Field(
        3, ge=0, description="Steps that may be skipped for NaN or infinite numbers before the run stops."
    )


class EvaluationSection(Section):
    """Validation during training, on held-out problems; its time is reported apart."""

    data: str | None = Field(None, description="Like data.train; a task: draws from its held-out problems.")
    split: str | None = Field(None, description="Split of evaluation.data; unset, that of data.split.")
    every: PositiveInt = Field(20, description="Steps between evaluations; the last step is always evaluated.")
    num_problems: PositiveInt = Field(100, description="Problems used, the first ones of the data.")
    k: PositiveInt = Field(16, description="Samples of each problem: Avg@k.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature; 0 is greedy.")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus of the evaluation's sampling.")
    max_tokens: PositiveInt = Field(31744, description="Most tokens of an answer.")


class TrackingSection(Section):
    """Where numbers go besides metrics.jsonl, which is always written."""

    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field([], description="Trackers to write to as well.")
    rollouts_per_step: int = Field(2, ge=0, description="Rollouts written to rollouts.jsonl at each step.")
    rollout_tokens: int = Field(512, ge=0, description="Their first tokens, which get weights and candidates.")
    rollout_candidates: PositiveInt = Field(5, description="Top candidates of each model written for such a token.")


class Config(Section):
    """A whole recipe."""

    model: ModelSection = Field(description="Student and teacher.")
    data: DataSection = Field(description="Prompts.")
    rollout: RolloutSection = Field(default_factory=RolloutSection, description="Sampling.")
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection, description="Loss.")
    reward: RewardSection = Field(default_factory=RewardSection, description="The task's reward.")
    pruning: PruningSection = Field(default_factory=PruningSection, description="Drift and window.")
    control: ControlSection = Field(default_factory=ControlSection, description="Controls of `compare`.")
    training: TrainingSection = Field(default_factory=TrainingSection, description="Optimisation.")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="Validation.")
    tracking: TrackingSection = Field(default_factory=TrackingSection, description="Logging.")

    @property
    def window_is_dynamic(self) -> bool:
        """Whether drift steers the response length."""
        return self.pruning.enable and self.pruning.dynamic_response_length.enable

    @property
    def longest_response(self) -> int:
        """The most tokens that a response can have in training."""
        if self.control.lengths:
            return max(self.control.lengths)
        if self.window_is_dynamic:
            return self.pruning.dynamic_response_length.max_len
        return self.rollout.max_completion_length

    @property
    def weighs_tokens(self) -> bool:
        """Whether a token's weight is its reliability; else it is 1."""
        return self.pruning.enable and self.pruning.reweight

    @property
    def calibrates(self) -> bool:
        """Whether the threshold is found before training."""
        pruning = self.pruning
        return pruning.enable and pruning.threshold == "auto" and pruning.metric != "teacher_top_p_accept"

    @property
    def stops_in_flight(self) -> bool:
        """Whether a rollout ends while it is generated."""
        return self.pruning.enable and self.pruning.in_flight.enable

    @property
    def other_rollout_dtype(self) -> str | None:
        """The type that rollouts are decoded in, where it is not the student's own."""
        return None if self.rollout.dtype == self.model.dtype else self.rollout.dtype

    @property
    def samples_from_copy(self) -> bool:
        """Whether rollouts come from a copy of the student's weights."""
        return self.rollout.ahead or (self.other_rollout_dtype is not None and not self.rollout.use_vllm)

    @property
    def teacher_ends_with_reliability(self) -> bool:
        """Whether the teacher's signal is dropped where reliability is gone, so that the task reward goes on alone."""
        return self.pruning.enable and self.reward.function is not None and self.reward.after_drift == "task_only"

    def with_threshold(self, threshold: float) -> Config:
        """A copy with γ in place of "auto"."""
        return self.model_copy(update={"pruning": self.pruning.model_copy(update={"threshold": threshold})})

    def with_settings(self, **changes: Any) -> Config:
        """A copy with dotted settings changed, checked again: ``with_settings(**{"training.seed": 1})``."""
        merged = self.model_dump(exclude_unset=True)
        for name, value in changes.items():
            _set(merged, name.split("."), value)
        return parse_config(merged, where="changed settings")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply ``key=value`` overrides (dotted key, TOML value; bare words are strings).

    Raises ConfigError with the file, the setting, what was expected and the nearest known name. Warns (UserWarning)
    of each setting that was written but has no effect.
    """
    settings, files = _read(Path(path), ())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override!r} has no '='; write it as key=value, for example training.steps=100")
        _set(settings, key.strip().split("."), _toml_value(text.strip()))
    return parse_config(settings, where=str(path), files=files)


def parse_config(settings: dict[str, Any], *, where: str, files: Mapping[Path, str] | None = None) -> Config:
    """Check a nested dict of settings. `where` names its origin in errors.

    files: text of the recipes that it came from, the last word first, so that errors can name the line.
    """
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(
                f"{_place(e['loc'], files or {}, missing=e['type'] == 'missing') or where}: {_explain(e)}"
                for e in error.errors()
            )
        ) from None
    _check_conflicts(config, where)
    for name, value in _texts(config.model_dump()):
        if SECRET.search(value):
            place = _place(tuple(name.split(".")), files or {}) or where
            raise ConfigError(
                f"{place}: {name} holds what looks like a password or key. Recipes are copied into config.json and "
                "shared, so it must not stand there: put it into an environment variable (HF_TOKEN, WANDB_API_KEY)"
            )
    for setting, reason in settings_without_effect(config):
        warnings.warn(f"{where}: {setting} has no effect: {reason}", UserWarning, stacklevel=3)
    return config


def settings_without_effect(config: Config) -> Iterator[tuple[str, str]]:
    """Settings that were written down but that nothing will read, with the reason."""
    pruning, dynamic, objective = config.pruning, config.pruning.dynamic_response_length, config.objective

    def written(section: Section, prefix: str, *names: str) -> Iterator[str]:
        yield from (f"{prefix}.{name}" for name in sorted(section.model_fields_set) if not names or name in names)

    if not pruning.enable:
        for name in written(pruning, "pruning"):
            if name != "pruning.enable":
                yield name, "pruning.enable is false"
    else:
        if pruning.metric == "teacher_top_p_accept":
            for name in written(pruning, "pruning", "threshold"):
                yield name, "metric teacher_top_p_accept uses teacher_top_p"
        else:
            for name in written(pruning, "pruning", "teacher_top_p"):
                yield name, f"metric is {pruning.metric}"
        for name, section in (("in_flight", pruning.in_flight), ("repetition", pruning.repetition)):
            for setting in written(section, f"pruning.{name}") if not section.enable else ():
                if not setting.endswith(".enable"):
                    yield setting, f"pruning.{name}.enable is false"
        if not dynamic.enable:
            for name in written(dynamic, "pruning.dynamic_response_length"):
                if not name.endswith(".enable"):
                    yield name, "dynamic_response_length.enable is false"
    if not config.rollout.use_vllm:
        for name in written(config.rollout, "rollout", "vllm_gpu_memory_utilization", "vllm_server_url"):
            yield name, "rollout.use_vllm is false"
        for name in () if config.samples_from_copy else written(config.rollout, "rollout", "importance_sampling_cap"):
            yield name, "without rollout.use_vllm, ahead or another dtype the policy that is trained samples"
    elif config.rollout.vllm_server_url is not None:
        for name in written(config.rollout, "rollout", "vllm_gpu_memory_utilization"):
            yield name, "rollout.vllm_server_url is set, so the servers chose it"
    if config.rollout.vllm_server_url is None:
        for name in written(config.rollout.vllm_server, "rollout.vllm_server"):
            yield name, "rollout.vllm_server_url is not set"
    if config.rollout.dtype == config.model.dtype:
        yield "rollout.dtype", f"the student's weights are {config.model.dtype} already (model.dtype)"
    if config.model.teacher_model_server_url is None:
        for name in written(config.model.teacher_server, "model.teacher_server"):
            yield name, "model.teacher_model_server_url is not set, so the teacher runs in this process"
    else:
        for name in written(config.model, "model", "teacher_dtype"):
            yield name, "the teacher is served; its server chose the type"
    reward = config.reward
    if reward.function is None:
        for name in written(reward, "reward"):
            if name != "reward.function":
                yield name, "reward.function is not set, so there is no task reward"
    elif reward.after_drift == "task_only":
        for name in written(reward, "reward", "after_drift"):
            if not pruning.enable:
                yield name, "pruning.enable is false, so nothing drifts"
            elif pruning.in_flight.enable:
                yield name, "pruning.in_flight ends rollouts where their reliability does (audit rollouts apart)"
    if objective.loss != "topk_reverse_kl":
        for name in written(objective, "objective", "top_k_strategy", "reward_weight_mode"):
            yield name, f"loss is {objective.loss}"
    if objective.loss != "jsd":
        for name in written(objective, "objective", "jsd_beta"):
            yield name, f"loss is {objective.loss}"
    if objective.vocabulary_loss:
        for name in written(config.model, "model", "liger_head"):
            yield name, f"loss is {objective.loss}, which needs all logits"
    if not pruning.reweight:
        for name in written(pruning, "pruning", "w_base") if pruning.enable else ():
            yield name, "pruning.reweight is false"
    if (config.evaluation.data or "").startswith(("task:", "reasoning_gym:")):
        for name in written(config.evaluation, "evaluation", "split"):
            yield name, "the task of evaluation.data has held-out problems of its own"
    if config.evaluation.data is None:
        for name in written(config.evaluation, "evaluation"):
            if name != "evaluation.data":
                yield name, "evaluation.data is not set, so nothing is evaluated"
    if config.data.train.startswith("task:"):
        worded = ("data.prompt_suffix", "data.chat_template_kwargs") if config.data.train != "task:chain_sum" else ()
        for name in written(config.data, "data"):
            if name not in ("data.train", "data.max_prompt_length", *worded):
                yield name, "the embedded task makes its own prompts"


def _check_conflicts(config: Config, where: str) -> None:
    dynamic = config.pruning.dynamic_response_length
    if config.window_is_dynamic:
        if not dynamic.min_len <= dynamic.init_len <= dynamic.max_len:
            raise ConfigError(
                f"{where}: pruning.dynamic_response_length needs min_len <= init_len <= max_len, got "
                f"{dynamic.min_len}, {dynamic.init_len}, {dynamic.max_len}; change the one that is out of order"
            )
        if dynamic.max_len > config.rollout.max_completion_length:
            raise ConfigError(
                f"{where}: pruning.dynamic_response_length.max_len = {dynamic.max_len} is above "
                f"rollout.max_completion_length = {config.rollout.max_completion_length}; lower it or raise the other"
            )
    if config.model.teacher_model_server_url is not None:
        served, objective = config.model.teacher_server, config.objective
        if config.model.teacher_model_server_url == []:
            raise ConfigError(f"{where}: model.teacher_model_server_url lists no server; name one, or leave it out")
        if config.calibrates:
            raise ConfigError(
                f'{where}: pruning.threshold = "auto" has the teacher write responses, which a served one is not asked '
                "to; set a number, for example one that a run on fewer steps with the teacher in this process found"
            )
        if served.top_logprobs < objective.top_k:
            raise ConfigError(
                f"{where}: model.teacher_server.top_logprobs = {served.top_logprobs} is below objective.top_k "
                f"= {objective.top_k}: the teacher's candidates would be cut; raise it, and the servers' --max-logprobs"
            )
        if objective.vocabulary_loss:
            raise ConfigError(
                f"{where}: objective.loss = {objective.loss!r} needs the teacher's logits over the whole vocabulary, "
                "which a server does not send; use topk_reverse_kl or sampled_token, or leave out "
                "model.teacher_model_server_url"
            )
    if config.rollout.vllm_server_url == []:
        raise ConfigError(f"{where}: rollout.vllm_server_url lists no server; name one, or leave it out")
    function = config.reward.function
    if function is not None:
        if function != "grade" and not re.fullmatch(r"[\w.]+:[\w.]+", function):
            raise ConfigError(
                f"{where}: reward.function = {function!r} is no import path; write package.module:name, or grade for "
                "the built-in graders"
            )
        if config.rollout.num_generations < 2:
            raise ConfigError(
                f"{where}: reward.function needs rollout.num_generations >= 2, got {config.rollout.num_generations}: a "
                "rollout is compared with others of its prompt; raise it, or take the reward out"
            )
    _check_controls(config, where)
    if config.samples_from_copy and (config.rollout.use_vllm or config.training.parallel == "fsdp2"):
        setting = "rollout.ahead" if config.rollout.ahead else "rollout.dtype"
        other = "rollout.use_vllm" if config.rollout.use_vllm else 'training.parallel = "fsdp2"'
        raise ConfigError(
            f"{where}: {setting} needs a copy of the whole student to sample from, which {other} does not have; "
            "leave one of them out"
        )
    if config.model.compile and config.training.parallel == "fsdp2":
        raise ConfigError(
            f'{where}: model.compile = true was not built for training.parallel = "fsdp2", whose weights come and go '
            "within a forward; leave one of them out"
        )
    if config.training.warmup_steps >= config.training.steps:
        raise ConfigError(
            f"{where}: training.warmup_steps = {config.training.warmup_steps} leaves none of training.steps = "
            f"{config.training.steps} at the full learning rate; use fewer warm-up steps"
        )
    keep_every, save_every = config.training.keep_every, config.training.save_every
    if keep_every is not None and keep_every % save_every:
        raise ConfigError(
            f"{where}: training.keep_every = {keep_every} is no multiple of training.save_every = {save_every}, so the "
            "checkpoints to keep would never be written; change one of them"
        )


def _check_controls(config: Config, where: str) -> None:
    control, budget = config.control, config.rollout.max_completion_length
    for name, entries in control:
        if entries is not None and len(entries) < config.training.steps:
            raise ConfigError(
                f"{where}: control.{name} has {len(entries)} entries for training.steps = {config.training.steps}; "
                "it needs one for each step"
            )
    if control.lengths and max(control.lengths) > budget:
        raise ConfigError(
            f"{where}: control.lengths goes up to {max(control.lengths)}, above rollout.max_completion_length = "
            f"{budget}; lower the one or raise the other"
        )
    if control.lengths and config.window_is_dynamic:
        raise ConfigError(
            f"{where}: control.lengths and the training window both set the length; switch the window off with "
            "pruning.dynamic_response_length.enable = false, or pruning.enable = false"
        )
    if control.kept_tokens and config.weighs_tokens:
        raise ConfigError(
            f"{where}: control.kept_tokens and reliability both set the weights; set pruning.reweight = false, or "
            "pruning.enable = false"
        )


SECRET = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|xox[abp]-[\w-]{10,}"
    r"|AKIA[A-Z0-9]{16}\b|eyJ[\w-]{10,}\.[\w-]{10,}\.)|://[^/\s:@]*:[^/\s@]+@|\bBearer\s+\S{8,}"
)


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested settings, with its dotted name."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{name}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, name)


def _place(keys: Sequence[Any], files: Mapping[Path, str], *, missing: bool = False) -> str | None:
    """file:line where a setting is written, as far as reading line by line can tell; None where it is not.

    missing: the line of the section that should have it.
    """
    wanted = [str(key) for key in keys]
    found: list[tuple[int, str]] = []  # how many of the keys the line shares, and the place
    for path, text in files.items():
        table: list[str] = []
        for number, line in enumerate(text.splitlines(), start=1):
            assigned_here = False
            if heading := re.match(r"\s*\[+([^\[\]]+)\]+", line):
                table = [part.strip(" \"'") for part in heading[1].split(".")]
                name = table
            elif assigned := re.match(r"\s*([\w.\"' -]+?)\s*=", line):
                name, assigned_here = table + [part.strip(" \"'") for part in assigned[1].split(".")], True
            else:
                continue
            shared = min(len(name), len(wanted))
            # A heading alone does not say that the setting is below it: it may have come by --set.
            if name[:shared] == wanted[:shared] and (assigned_here or shared == len(wanted) or missing):
                found.append((shared, f"{path}:{number}"))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _read(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], dict[Path, str]]:
    """The settings of a recipe and of those that it extends, and the text of each file, this one first."""
    try:
        path = path.resolve()
        if path in chain:
            raise ConfigError(f"{path}: recipes extend each other in a circle; remove one `extends`")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; give the path of a TOML recipe"
        raise ConfigError(f"{path}: no such recipe{hint}") from None
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # not UTF-8, a folder, a name that no file can have
        raise ConfigError(f"{path}: cannot be read as a UTF-8 text file: {error}; give a TOML recipe") from None
    try:
        settings = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        line = re.search(r"at line (\d+)", str(error))
        raise ConfigError(
            f"{path}{f':{line[1]}' if line else ''}: not valid TOML: {error}; repair the line, most often by quotes"
        ) from None
    parent = settings.pop("extends", None)
    if parent is None:
        return settings, {path: text}
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends must be the path of another recipe as a string, got {parent!r}; give one")
    inherited, files = _read(path.parent / parent, (*chain, path))
    return _merge(inherited, settings), {path: text, **files}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in over.items():
        both[key] = _merge(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


def _set(settings: dict[str, Any], keys: list[str], value: Any) -> None:
    *parents, last = keys
    for key in parents:
        inner = settings.get(key)
        settings[key] = dict(inner) if isinstance(inner, dict) else {}
        settings = settings[key]
    settings[last] = value


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def setting_names(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings."""
    for name, field in section.model_fields.items():
        inner = _section_type(field.annotation)
        if inner is not None:
            yield from setting_names(inner, f"{prefix}{name}.")
        if inner is None or type(None) in getattr(field.annotation, "__args__", ()):
            yield f"{prefix}{name}"


def _section_type(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _explain(error: Any) -> str:
    # pydantic also names the member of a union that it tried, as in list[str] or constrained-float.
    parts = (str(part) for part in error["loc"])
    name = ".".join(part for part in parts if "[" not in part and not part.startswith("constrained-"))
    if error["type"] == "extra_forbidden":
        near = _nearest(name)
        hint = f"did you mean {near}?" if near else "see docs/configuration.md for the settings there are"
        return f"unknown setting {name}; {hint}"
    if error["type"] == "missing":
        return f"setting {name} is required and missing; add it to the recipe"
    message = error["msg"][0].lower() + error["msg"][1:]
    written = repr(error["input"])
    written = written if len(written) <= 200 else f"{written[:200]}…"
    return f"setting {name} = {written} is not usable: {message}; change it"


def _nearest(name: str) -> str | None:
    """The setting that an unknown name most likely means, if any is like it."""
    known = [*setting_names(), *Config.model_fields]
    section, _, last = name.rpartition(".")

    def like_it(names: list[str]) -> list[str]:
        ends = {n.rpartition(".")[-1]: n for n in reversed(names)}
        return [ends[end] for end in difflib.get_close_matches(last, ends, 1, cutoff=0.75)]

    found = [
        *like_it([n for n in known if n.rpartition(".")[0] == section]),  # misspelt in its own section
        *(n for n in known if n.rpartition(".")[-1] == last),  # right, but in another section
        *difflib.get_close_matches(name, known, 1, cutoff=0.75),
        *like_it(known),
    ]
    return next(iter(found), None)
