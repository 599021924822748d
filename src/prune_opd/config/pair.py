"""The settings of student, teachers and prompts: sections `model` and `data`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from prune_opd.config.section import Section
from prune_opd.config.values import Address, Name
from prune_opd.core.choices import Attention, EndTokens


class LoraSection(Section):
    """Low-rank adapters through peft; the base weights stay frozen."""

    r: PositiveInt = Field(16, description="Rank of the adapters.")
    alpha: PositiveInt = Field(32, description="Scale of the adapters; the update is multiplied by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapters.")
    target_modules: list[Name] | Literal["all-linear"] = Field("all-linear", description="Modules that get adapters.")


class TeacherServerSection(Section):
    """Requests to `model.teacher_model_server_url`. Their API key is the environment's PRUNE_OPD_SERVER_API_KEY."""

    model: Name | None = Field(
        None, examples=["owner/teacher"], description="Name of the teacher on the servers; unset, its own."
    )
    top_logprobs: PositiveInt = Field(
        20, description="Teacher tokens asked for at each position; at most the servers' --max-logprobs."
    )
    timeout: float = Field(300.0, gt=0, description="Seconds of silence after which a request counts as lost.")
    deadline: float = Field(1800.0, gt=0, description="Seconds within which a request must be answered, with retries.")
    concurrency: PositiveInt = Field(8, description="Requests that one server holds at a time.")


class TeacherSection(Section):
    """One of several teachers. Type, placement and requests are those of `model`, the same for all."""

    name: Name = Field(examples=["math"], description="What prompts call it by.")
    model_name_or_path: Name = Field(
        examples=["embedded:teacher"], description="Folder or Hub id, also of a peft adapter, or embedded:NAME."
    )
    server_url: Address | list[Address] | None = Field(
        None, examples=["http://127.0.0.1:8000"], description="Address of a vLLM server that scores in its place."
    )
    data_sources: list[Name] = Field(
        [],
        examples=[["gsm8k", "dapo"]],
        description="Values of a prompt's column data_source that make it the teacher.",
    )


class ModelSection(Section):
    """Student and teacher. `embedded:NAME` is a model that ships with the package."""

    model_name_or_path: Name = Field(
        examples=["embedded:low-student"],
        description="Student: a folder or Hub id, also of a peft adapter, or embedded:NAME.",
    )
    teacher_model_name_or_path: Name = Field(
        examples=["embedded:teacher"],
        description="Teacher: a folder or Hub id, also of a peft adapter, or embedded:NAME; student: the student as it "
        "begins. With `teachers`, the first of them.",
    )
    teachers: list[TeacherSection] = Field(
        [],
        examples=[[{"name": "math", "model_name_or_path": "embedded:teacher"}]],
        description="Several teachers: each prompt goes to the one that its column data.teacher_column names.",
    )
    teacher_ema_decay: float | None = Field(
        None,
        examples=[0.99],
        ge=0,
        lt=1,
        description="After each step, teacher = decay · teacher + (1 - decay) · student; 0: the student of the step "
        "before. Unset, the teacher never changes.",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Type of the student's weights.")
    teacher_dtype: Literal["float32", "bfloat16"] = Field("float32", description="Type of the teacher's weights.")
    teacher_placement: Literal["replicated", "sharded"] = Field(
        "replicated", description="Under torchrun, each process holds the whole teacher, or a shard (FSDP2)."
    )
    attn_implementation: Attention = Field(
        "auto",
        description="Attention over whole rollouts, as transformers names it, or torch's varlen; auto: flash or "
        "flex_attention on a GPU, sdpa elsewhere.",
    )
    compile: bool = Field(
        False, description="torch.compile for decoding, scoring and the update: slow to start, faster from then on."
    )
    liger_head: bool = Field(
        False, description="Log-probs of the update from Liger's fused kernel; needs a CUDA GPU and prune-opd[liger]."
    )
    trust_remote_code: bool = Field(False, description="Run model code that ships with a checkpoint.")
    lora: LoraSection | None = Field(
        None, description="Train adapters instead of all weights; `false` where an extended recipe has some."
    )
    teacher_model_server_url: Address | list[Address] | None = Field(
        None,
        examples=["http://127.0.0.1:8000"],
        description="Address of a vLLM server that scores in the teacher's place, or a list of replicas.",
    )
    teacher_server: TeacherServerSection = Field(default_factory=TeacherServerSection, description="Requests to it.")

    @model_validator(mode="before")
    @classmethod
    def _name_the_teacher(cls, settings: Any) -> Any:
        """The student as its own teacher, and the first of several, by name."""
        if not isinstance(settings, dict):
            return settings
        teacher, student, teachers = (
            settings.get(name) for name in ("teacher_model_name_or_path", "model_name_or_path", "teachers")
        )
        if teacher == "student" and student is not None:
            return settings | {"teacher_model_name_or_path": student}
        if teacher is None and isinstance(teachers, list) and teachers and isinstance(teachers[0], dict):
            return settings | {"teacher_model_name_or_path": teachers[0].get("model_name_or_path")}
        return settings

    @field_validator("lora", mode="before")
    @classmethod
    def _false_is_none(cls, value: Any) -> Any:
        return None if value is False else value  # TOML has no null


class DataSection(Section):
    """Where prompts come from."""

    train: Name = Field(
        examples=["task:chain_sum"],
        description="JSONL, parquet, local folder, Hub id, or task:chain_sum | running_sum | count_animals.",
    )
    split: Name = Field("train", description="Split of a data set that has several.")
    prompt_column: Name | None = Field(
        None, examples=["prompt"], description="Column with the prompt; found by itself when unset."
    )
    answer_column: Name | None = Field(
        None, examples=["answer"], description="Column with the gold answer; found by itself when unset."
    )
    prompt_suffix: str = Field("", description="Added to each prompt, unless the prompt ends with it already.")
    chat_template_kwargs: dict[str, Any] = Field(
        {},
        examples=[{"enable_thinking": False}],
        description="Variables of the tokenizer's chat template, for example enable_thinking = false.",
    )
    max_prompt_length: PositiveInt = Field(1024, description="Prompts of more tokens are left out and counted.")
    teacher_prompt_template: str | None = Field(
        None,
        examples=["{{ prompt }} The answer is {{ answer }}."],
        description="What the teacher reads in place of a prompt, as a Jinja template of prompt, answer and the row's "
        "other columns (of a task also solution).",
    )
    teacher_prompt_column: Name | None = Field(
        None, examples=["teacher_prompt"], description="The same, as a column with text or a chat."
    )
    teacher_chat_template: Name = Field(
        "student",
        examples=["teacher"],
        description="Chat template of what the teacher reads: the student's, the teacher's, or a Jinja file.",
    )
    max_teacher_prompt_length: PositiveInt | None = Field(
        None,
        examples=[4096],
        description="Prompts of which the teacher would read more tokens are left out too; unset, max_prompt_length.",
    )
    teacher_column: Name = Field("teacher", description="Column that names a prompt's teacher, of model.teachers.")

    end_tokens: EndTokens = Field(
        "auto",
        description="Ids that end a response for student or teacher: one action (equivalent), or ids like any other "
        "(distinct, the paper). auto: equivalent where the two models have different ones.",
    )

    @property
    def longest_for_teacher(self) -> int:
        """The most tokens that a teacher reads in front of a response."""
        return self.max_teacher_prompt_length or self.max_prompt_length
