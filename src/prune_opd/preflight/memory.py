"""What a run needs of memory, part by part, before anything is loaded.

No weights are loaded and no network is used. transformers builds the network from the model's config.json, without
memory behind it. The activations that its forward would keep are counted the same way. Where there is no config.json on
this machine, architectures.toml has the shapes of known models; of others, the parameter count in the model's name (7B,
135M) has to do.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prune_opd.config import Config, ModelSection
from prune_opd.core.head import CHUNK_BYTES
from prune_opd.errors import ConfigError
from prune_opd.models.loading import add_adapters, read_model_config, resolve_device
from prune_opd.models.packed_attention import attention_for, has_dense_mask
from prune_opd.models.packing import default_token_budget

UNMASKED = "prune_opd_unmasked"  # transformers makes a mask for sdpa where tensors are fake, and none for other names
AttentionInterface.register(UNMASKED, sdpa_attention_forward)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process that holds everything; None is unknown, `source` is where the numbers come from.

    student_copy: the weights that sample where the student's own do not · ahead: sampling goes on beside the update ·
    attention: what packed rows of the student attend by · micro_batch: rows and columns of the largest.
    """

    source: str
    ahead: bool
    attention: str | None = None
    micro_batch: tuple[int, int] | None = None
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


def estimate_memory(config: Config, device: torch.device | None = None) -> Memory:
    """Bytes by part, for one process on one device that holds the student and the teacher.

    device: a kind that the run is meant for; unset, what training.device is on this machine.
    """
    settings, training = config.model, config.training
    device = device or resolve_device(training.device)
    student_config = model_shape(settings.model_name_or_path, settings)
    here = [one.model.teacher_model_name_or_path for one in config.each_teacher if not one.teacher_is_served]
    teachers = [model_shape(name, settings) for name in here]
    if student_config is None or None in teachers:
        shapes = [(settings.model_name_or_path, student_config), *zip(here, teachers, strict=True)]
        return _memory_from_names(config, here, [name for name, shape in shapes if shape is None])

    student = _network(student_config, settings, settings.dtype)
    attention = attention_for(
        student,
        settings.attn_implementation,
        device=device,
        half=training.bf16 or settings.dtype == "bfloat16",
        compile=settings.compile,
    )
    rows, columns = micro_batch_shape(config, device, attention)
    width = config.longest_row
    if settings.lora is not None:
        student = add_adapters(student, settings.lora)
    trained = _bytes(p for p in student.parameters() if p.requires_grad)
    sampled_elsewhere = config.rollout.use_vllm  # vLLM has caches of its own, here or on a server
    return Memory(
        source="the shapes of both models",
        ahead=config.rollout.ahead,
        attention=attention,
        micro_batch=(rows, columns),
        student=_bytes(student.parameters()),
        student_copy=_copy_bytes(config, student),
        gradients=trained,
        optimizer=2 * trained,
        teacher=sum(
            _bytes(_network(shape, settings, settings.teacher_dtype).parameters()) for shape in teachers if shape
        ),
        activations=activation_bytes(
            student_config,
            settings,
            rows,
            columns,
            bf16=training.bf16,
            recompute=training.gradient_checkpointing,
            masked=has_dense_mask(attention),
        ),
        logits=_logit_bytes(config, student_config),
        cache_training=0
        if sampled_elsewhere
        else cache_bytes(student_config, config.rollout.dtype or settings.dtype, rollouts_at_once(config), width),
        cache_teacher=sum(
            cache_bytes(
                shape,
                settings.teacher_dtype,
                config.rollout.slots,
                config.data.longest_for_teacher + config.longest_response,
            )
            for shape in teachers
            if shape and config.stops_in_flight
        ),
        cache_evaluation=0
        if sampled_elsewhere
        else cache_bytes(student_config, settings.dtype, *evaluation_at_once(config)),
    )


def model_shape(name: str, settings: ModelSection) -> PretrainedConfig | None:
    """A model's config.json where it is on this machine, else its entry in architectures.toml; None without either."""
    found = read_model_config(name, settings)
    if found is not None:
        return found
    tables = tomllib.loads((Path(__file__).parent / "architectures.toml").read_text(encoding="utf-8"))
    for known, shape in tables.items():
        if name in (known, *shape.pop("same_as", ())):
            return AutoConfig.for_model(**shape)
    return None


def _memory_from_names(config: Config, teachers: Sequence[str], missing: Sequence[str]) -> Memory:
    """From the parameter counts in the models' names; the rest needs shapes that only config.json has.

    teachers: those in this process · missing: the models without a shape.
    """
    settings = config.model
    student, counts = parameters_in_name(settings.model_name_or_path), [parameters_in_name(name) for name in teachers]
    teacher = None if None in counts else sum(count or 0 for count in counts)
    dtypes = settings.dtype, settings.teacher_dtype, config.rollout.dtype or settings.dtype
    in_student, in_teacher, in_copy = (getattr(torch, dtype).itemsize for dtype in dtypes)
    weights = None if student is None else student * in_student
    trained = None if settings.lora is not None else weights
    return Memory(
        source=f"the names of the models, because config.json of {' and '.join(missing)} is not on this machine",
        ahead=config.rollout.ahead,
        student=weights,
        student_copy=None if student is None else student * in_copy if config.samples_from_copy else 0,
        gradients=trained,
        optimizer=None if trained is None else 2 * trained,
        teacher=None if teacher is None else teacher * in_teacher,
        cache_teacher=None if config.stops_in_flight and teachers else 0,
        cache_evaluation=0 if config.evaluation.data is None or config.rollout.vllm_server_url is not None else None,
    )


def micro_batch_shape(config: Config, device: torch.device, attention: str) -> tuple[int, int]:
    """(rows, columns) of the largest micro-batch, as `packing.pack` cuts it for packed rows that attend by this."""
    width, rollouts = config.longest_row, config.rollout.prompts_per_step * config.rollout.num_generations
    budget = config.training.micro_batch_tokens or default_token_budget(device)
    if has_dense_mask(attention):
        return min(max(1, budget // width), rollouts), width
    return 1, min(max(width, budget), rollouts * width)


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
    model_config: PretrainedConfig,
    settings: ModelSection,
    rows: int,
    width: int,
    *,
    bf16: bool,
    recompute: bool,
    masked: bool = True,
) -> int:
    """Bytes that a forward of the whole network over (rows, width) tokens keeps for the backward, its head left out.

    masked: it attends under a dense mask. With `recompute`, one layer at a time is made again in the backward and comes
    on top of what the forward kept. LoRA keeps less than this, since frozen matrices need no input kept: it is an upper
    bound there. ConfigError where torch cannot count so many tokens.
    """
    try:
        everything = _saved_bytes(model_config, settings, rows, width, bf16=bf16, recompute=False, masked=masked)
    except RuntimeError as error:
        raise ConfigError(
            f"a micro-batch of {rows} x {width} tokens is more than torch can count ({error}); lower "
            "rollout.max_completion_length, data.max_prompt_length, control.lengths or training.micro_batch_tokens"
        ) from error
    if not recompute:
        return everything
    kept = _saved_bytes(model_config, settings, rows, width, bf16=bf16, recompute=True, masked=masked)
    return kept + everything // model_config.get_text_config().num_hidden_layers


def _saved_bytes(
    model_config: PretrainedConfig,
    settings: ModelSection,
    rows: int,
    width: int,
    *,
    bf16: bool,
    recompute: bool,
    masked: bool,
) -> int:
    saved: dict[int, torch.UntypedStorage] = {}
    with FakeTensorMode():  # tensors with shapes and types, but no memory
        model = AutoModelForCausalLM.from_config(
            model_config,
            dtype=getattr(torch, settings.dtype),
            attn_implementation="sdpa",  # runs on shapes alone, and keeps as little as the kernels of an accelerator
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
        if not masked:
            model.config.get_text_config()._attn_implementation = UNMASKED
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            model(input_ids=tokens, attention_mask=mask if masked else None, use_cache=False, logits_to_keep=1)
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


def cache_bytes(model_config: PretrainedConfig, dtype: str, rows: int, width: int) -> int:
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
    width = config.longest_row
    yield "student weights", size_text(memory.student)
    if config.samples_from_copy:
        when = " during the update" if config.rollout.ahead else ""
        yield "student's copy", f"{size_text(memory.student_copy)} (rollouts are sampled from it{when})"
    yield "gradients", size_text(memory.gradients)
    yield "AdamW state", size_text(memory.optimizer)
    yield "teacher weights", size_text(memory.teacher)
    if memory.attention is not None and memory.micro_batch is not None:
        rows, columns = memory.micro_batch
        masked = has_dense_mask(memory.attention)
        mask = f"a dense mask of {size_text(rows * columns**2)}" if masked else "no dense mask"
        yield "attention", f"{memory.attention}, {mask}"
        how = ", layers made again in backward" if config.training.gradient_checkpointing else ""
        shape = f"micro-batch of {rows:,} x {columns:,} tokens{how}"
        yield "activations", f"{size_text(memory.activations)} ({shape})"
    else:
        yield "activations", size_text(memory.activations)
    yield "logits", size_text(memory.logits)
    if config.rollout.use_vllm:
        yield "KV cache", "vLLM has its own: a share of the GPU, or its server's"
    else:
        at_once = f"{rollouts_at_once(config)} rollouts x {width:,} tokens at a time"
        yield "KV cache, training", f"{size_text(memory.cache_training)} ({at_once})"
    if config.stops_in_flight:
        yield (
            "KV cache, teacher",
            f"{size_text(memory.cache_teacher)} ({config.rollout.slots} slots x {width:,} tokens, beside student's)",
        )
    answers, longest = evaluation_at_once(config)
    if answers and not config.rollout.use_vllm:
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
