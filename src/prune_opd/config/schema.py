"""Every setting of a run, as recipes write it. Importable without torch, so that a recipe can be checked anywhere.

A recipe is a TOML file with the sections below; `extends = "other.toml"` takes another recipe's settings first.
Field names of `pruning` are those of the paper's release; other names follow TRL.
"""

from __future__ import annotations

from typing import Annotated, Literal, cast, get_args

from pydantic import Field, PositiveInt

from prune_opd.config.pair import DataSection, ModelSection
from prune_opd.config.section import Section
from prune_opd.config.values import Address, Folder, Name
from prune_opd.core.choices import (
    AfterDrift,
    DriftMetric,
    LossName,
    Normalization,
    RewardWeightMode,
    TopKStrategy,
    VocabularyLoss,
)


class VLLMServerSection(Section):
    """Requests to `rollout.vllm_server_url`. Their API key is the environment's PRUNE_OPD_SERVER_API_KEY."""

    model: Name | None = Field(
        None, examples=["owner/student"], description="Name of the student on the servers; unset, its own."
    )
    weights_dir: Folder | None = Field(
        None,
        examples=["/shared/weights"],
        description="Folder for weights that the servers can read too; unset, a temporary one on this machine.",
    )
    timeout: float = Field(1800.0, gt=0, description="Seconds of silence after which a request counts as lost.")
    deadline: float = Field(3600.0, gt=0, description="Seconds within which a request must be answered, with retries.")


class RolloutSection(Section):
    """Sampling from the student. The defaults are truly on-policy: nothing is truncated or reshaped."""

    prompts_per_step: PositiveInt = Field(64, description="Prompts in one optimiser step.")
    num_generations: PositiveInt = Field(4, description="Rollouts of each prompt.")
    token_budget: PositiveInt | None = Field(
        None,
        examples=[16384],
        description="Response tokens of a step: from the second on, as many prompts as take about so many, at most 8 "
        "times prompts_per_step. Unset, each step has prompts_per_step.",
    )
    max_completion_length: PositiveInt = Field(12288, description="Most tokens of a response (the paper's M_max).")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; other than 1 is not on-policy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus of the student's sampling; below 1 is not on-policy.")
    slots: PositiveInt = Field(64, description="Rollouts that decode at the same time; as many as memory allows.")
    ahead: bool = Field(
        False, description="Sample the next step's rollouts while this one updates; their policy is one update old."
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None,
        examples=["bfloat16"],
        description="Type of the weights that rollouts are decoded with; unset, the student's own.",
    )
    use_vllm: bool = Field(False, description="Sample with vLLM, whose weights are synchronised at every step.")
    vllm_server_url: Address | list[Address] | None = Field(
        None,
        examples=["http://127.0.0.1:8000"],
        description="Address of a vLLM server that samples, or a list of replicas; unset, an engine in this process.",
    )
    vllm_server: VLLMServerSection = Field(default_factory=VLLMServerSection, description="Requests to it.")
    vllm_gpu_memory_utilization: float = Field(0.3, gt=0, le=1, description="Share of the GPU that vLLM may take.")
    vllm_enable_sleep_mode: bool = Field(
        True, description="vLLM gives its memory back while the student is updated. On a CPU it cannot."
    )
    importance_sampling_cap: float | None = Field(
        None,
        examples=[2.0],
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
        None,
        examples=["grade"],
        description="grade (1 where the response is right), or package.module:name; docs/rewards.md.",
    )
    opd_kl_coef: float = Field(1.0, ge=0, description="Factor of the teacher's signal, as in slime; the task has 1.")
    after_drift: AfterDrift = Field(
        "both", description="Where reliability is gone, the teacher counts with w_base (both) or not (task_only)."
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
    hit_ratio: float = Field(0.1, gt=0, le=1, description="It grows when this share of rollouts hits it.")
    margin: int = Field(100, ge=0, description="A rollout hits if reliable until so many tokens before the end.")
    shrink_patience: PositiveInt = Field(3, description="It shrinks after so many steps in a row below that share.")


class InFlightSection(Section):
    """Ending a rollout while it is generated, once its reliability is gone."""

    enable: bool = Field(False, description="Stop drifted rollouts in flight; the paper only caps the next batch.")
    chunk: PositiveInt = Field(128, description="Decode steps between two checks; changes the cost, not the result.")
    min_tokens: int = Field(0, ge=0, description="A rollout keeps at least this many tokens.")
    stop_after_events: PositiveInt | None = Field(
        None,
        examples=[100],
        description="Stop after so many drift events; unset, when reliability is 0 (1 / w_drop events).",
    )
    audit_share: float = Field(
        1 / 16, ge=0, le=1, description="Share of rollouts never stopped, to see what is cut off."
    )


class RepetitionSection(Section):
    """Loops count as drift. Without this guard a loop looks reliable, because repetition keeps the overlap high."""

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
        True, description="Weigh tokens by reliability; off, every token has weight 1, and drift steers only lengths."
    )
    positive_eps: float = Field(1e-8, ge=0, lt=1, description="Reliability at or below it counts as gone.")
    dynamic_response_length: DynamicResponseLengthSection = Field(
        default_factory=DynamicResponseLengthSection, description="The training window."
    )
    in_flight: InFlightSection = Field(default_factory=InFlightSection, description="Stopping in flight.")
    repetition: RepetitionSection = Field(default_factory=RepetitionSection, description="The repetition guard.")


class ControlSection(Section):
    """Controls that `compare` writes, one entry for each step, to hold Prune-OPD against. No part of the method."""

    lengths: list[PositiveInt] | None = Field(
        None,
        examples=[[256, 512]],
        description="Longest response of each step, in place of the window: arms ramp and replay.",
    )
    kept_tokens: list[PositiveInt] | None = Field(
        None,
        examples=[[1000, 1000]],
        description="Tokens of each step that train, at random positions, in place of weights: arm random.",
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
        None,
        examples=[2048],
        description="Padded tokens in one forward and backward; unset, 2048 on a CPU and 16384 elsewhere.",
    )
    bf16: bool = Field(False, description="bfloat16 autocast in the update's forward; weights keep their type.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in backward: less memory, more time."
    )
    seed: int = Field(0, ge=0, description="Seed of everything: order, sampling, initialisation of adapters.")
    device: Name = Field("auto", description="auto, cpu, cuda, cuda:1, mps ...")
    parallel: Literal["ddp", "fsdp2"] = Field(
        "ddp", description="Under torchrun, each process holds the whole student and AdamW state, or a shard."
    )
    threads: int = Field(
        1, ge=0, le=1024, description="CPU threads of torch (0 leaves its default); one is best on busy cores."
    )
    save_every: PositiveInt = Field(50, description="Steps between checkpoints; the last step is always saved.")
    keep_last: PositiveInt = Field(2, description="Newest checkpoints kept.")
    keep_every: PositiveInt | None = Field(
        None,
        examples=[100],
        description="Checkpoints at multiples of it are kept for good; itself a multiple of save_every.",
    )
    max_skipped_steps: int = Field(
        3, ge=0, description="Steps with NaN or infinite numbers that are skipped before the run stops."
    )


class EvaluationSection(Section):
    """Validation during training, on held-out problems; its time is reported apart."""

    data: Name | None = Field(
        None,
        examples=["task:chain_sum"],
        description="Like data.train; a task: draws from its held-out problems.",
    )
    split: Name | None = Field(
        None, examples=["test"], description="Split of evaluation.data; unset, that of data.split."
    )
    every: PositiveInt = Field(20, description="Steps between evaluations; the last step is always evaluated.")
    num_problems: PositiveInt = Field(100, description="Problems used, the first ones of the data.")
    k: PositiveInt = Field(16, description="Samples of each problem: Avg@k.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature; 0 is greedy.")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus of the evaluation's sampling.")
    max_tokens: PositiveInt = Field(31744, description="Most tokens of an answer.")


class TrackingSection(Section):
    """Where numbers go besides metrics.jsonl, which is always written."""

    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], examples=[["wandb"]], description="Trackers to write to as well."
    )
    report_every: PositiveInt = Field(
        20, description="Steps between pictures for them: overlap by position and step, and the window."
    )
    run_name: Name | None = Field(
        None, examples=["first try"], description="The run's name in them; unset, that of its directory."
    )
    group: Name | None = Field(
        None,
        examples=["gamma sweep"],
        description="Of runs that belong together; unset, compare gives its directory's.",
    )
    rollouts_per_step: int = Field(2, ge=0, description="Rollouts written to rollouts.jsonl at each step.")
    rollout_tokens: int = Field(512, ge=0, description="First tokens of each, which get weights and candidates.")
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
    def longest_row(self) -> int:
        """The most tokens of a prompt with its response in training."""
        return self.data.max_prompt_length + self.longest_response

    @property
    def each_teacher(self) -> list[Config]:
        """The recipe as it would be with each of its teachers alone."""
        alone = [
            self.model.model_copy(
                update={
                    "teachers": [],
                    "teacher_model_name_or_path": teacher.model_name_or_path,
                    "teacher_model_server_url": teacher.server_url,
                }
            )
            for teacher in self.model.teachers
        ]
        return [self.model_copy(update={"model": model}) for model in alone] or [self]

    @property
    def teacher_is_served(self) -> bool:
        """Whether a server scores in the place of the teacher; see `each_teacher` for several."""
        return self.model.teacher_model_server_url is not None

    @property
    def teacher_reads_other_prompts(self) -> bool:
        """Whether the teacher reads something else than the student in front of a response."""
        data = self.data
        return (
            bool(data.teacher_prompt_template or data.teacher_prompt_column) or data.teacher_chat_template != "student"
        )

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
