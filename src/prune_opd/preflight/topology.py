"""Does a run fit on these GPUs? What each of them holds, part by part, and what to change where it does not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from prune_opd.config import Config
from prune_opd.errors import ConfigError
from prune_opd.preflight.memory import Memory, cache_bytes, model_shape, size_text

OVERHEAD = 2 * 2**30  # CUDA's context, cuBLAS and NCCL buffers, fragments: what is never to be had
ENGINE_OVERHEAD = 0.1  # of vLLM's share: activations of its own forward


@dataclass(frozen=True)
class GPUs:
    """`count` GPUs of `bytes` memory each, a process on each."""

    count: int
    bytes: int


def parse_memory(text: str) -> int:
    """Bytes of `80GB`, as makers of GPUs count them (80e9), or of `79.2GiB`. ConfigError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB)\s*", text, re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise ConfigError(f"--gpu-memory {text!r} is no size; write it as 80GB or 74.5GiB")
    return int(float(found[1]) * (2**30 if found[2].lower() == "gib" else 1e9))


@dataclass(frozen=True)
class PerGPU:
    """Bytes on one GPU. `resident` stays; on top of it come either `update` or `rollout`, whichever is larger.

    kv_rollouts: rollouts of the whole window that vLLM's cache holds at once; None without vLLM in the process.
    """

    resident: dict[str, int]
    update: dict[str, int]
    rollout: dict[str, int]
    kv_rollouts: int | None

    @property
    def peak(self) -> int:
        """The most that is held at a time."""
        return OVERHEAD + sum(self.resident.values()) + max(sum(self.update.values()), sum(self.rollout.values()))


def per_gpu(config: Config, memory: Memory, gpus: GPUs) -> PerGPU | None:
    """What one of these GPUs holds; None where a part of the memory is unknown."""
    if memory.peak is None:
        return None
    shards = gpus.count if config.training.parallel == "fsdp2" else 1
    student, trained = memory.student or 0, memory.gradients or 0
    resident = {
        "student": student // shards,
        "gradients": trained // shards,
        "AdamW state": (memory.optimizer or 0) // shards,
        "teacher": memory.teacher or 0,
    }
    sharded_teacher = config.model.teacher_placement == "sharded"
    if sharded_teacher:
        resident["teacher"] //= gpus.count
    update = {"activations": memory.activations or 0, "logits": memory.logits or 0}
    if shards > 1:
        half = config.training.bf16 and config.model.dtype == "float32"  # as `shard` gathers its layers
        update["gathered weights"] = _gathered(
            config, config.model.model_name_or_path, student, config.model.dtype, half=half
        )
    if sharded_teacher and gpus.count > 1 and memory.teacher:
        here = [one for one in config.each_teacher if not one.teacher_is_served]
        update["gathered teacher"] = max(  # one is asked at a time
            _gathered(one, one.model.teacher_model_name_or_path, memory.teacher, config.model.teacher_dtype)
            for one in here
        )
    rollout_settings = config.rollout
    rollout: dict[str, int] = {}
    kv_rollouts = None
    if rollout_settings.vllm_server_url is None and rollout_settings.use_vllm:
        share = int(rollout_settings.vllm_gpu_memory_utilization * gpus.bytes)
        dtype = rollout_settings.dtype or config.model.dtype
        weights = student * getattr(torch, dtype).itemsize // getattr(torch, config.model.dtype).itemsize
        shape = model_shape(config.model.model_name_or_path, config.model)
        assert shape is not None  # or the peak would be unknown
        one = cache_bytes(shape, dtype, 1, config.data.max_prompt_length + config.longest_response)
        kv_rollouts = max(0, int((share * (1 - ENGINE_OVERHEAD) - weights) // one))
        (rollout if rollout_settings.vllm_enable_sleep_mode else resident)["vLLM's share"] = share
    elif rollout_settings.vllm_server_url is None:
        rollout["rollout cache"] = max(memory.cache_training or 0, memory.cache_evaluation or 0)
        if shards > 1:
            rollout["whole weights"] = student  # WholeWeightsSampler
    rollout["teacher's cache"] = memory.cache_teacher or 0
    return PerGPU(resident, update, rollout, kv_rollouts)


def _gathered(config: Config, name: str, whole: int, dtype: str, *, half: bool = False) -> int:
    """Bytes that are whole at a time of a sharded model of `whole` bytes: two layers, embeddings and head.

    half: layers take half of the bytes there that they are stored in.
    """
    shape = model_shape(name, config.model)
    assert shape is not None  # or the peak would be unknown
    table = shape.vocab_size * shape.hidden_size * getattr(torch, dtype).itemsize
    tables = table * (1 if shape.tie_word_embeddings else 2)
    return tables + 2 * max(0, whole - tables) // shape.num_hidden_layers // (2 if half else 1)


def topology_rows(config: Config, memory: Memory, gpus: GPUs) -> Iterator[tuple[str, str]]:
    """The parts on one GPU, the peak, and the verdict, as (name, text)."""
    found = per_gpu(config, memory, gpus)
    if found is None:
        yield "verdict", "unknown: the shape of a model is (see above)"
        return
    for name, size in found.resident.items():
        yield name, size_text(size)
    for name, size in found.update.items():
        yield name, f"{size_text(size)} (during the update)"
    for name, size in found.rollout.items():
        if size:
            yield name, f"{size_text(size)} (during rollouts)"
    if found.kv_rollouts is not None:
        window = config.data.max_prompt_length + config.longest_response
        asked = f"rollout.slots asks for {config.rollout.slots:,}"
        yield "vLLM holds", f"{found.kv_rollouts:,} rollouts of {window:,} tokens at once ({asked})"
    yield "peak", f"about {size_text(found.peak)} of {size_text(gpus.bytes)}"
    yield "verdict", verdict(config, found, gpus)


def verdict(config: Config, found: PerGPU, gpus: GPUs) -> str:
    """`fits`, or why not and what to set."""
    if found.kv_rollouts == 0:
        return (
            "does not fit: vLLM's share has no room for one rollout of the window; raise "
            "rollout.vllm_gpu_memory_utilization, or set rollout.dtype = 'bfloat16'"
        )
    if found.peak <= gpus.bytes:
        return "fits"
    remedies = []
    if config.training.parallel == "ddp" and gpus.count > 1:
        remedies.append('training.parallel = "fsdp2"')
    if sum(found.update.values()) > sum(found.rollout.values()):
        if not config.training.gradient_checkpointing:
            remedies.append("training.gradient_checkpointing = true")
        remedies.append("a smaller training.micro_batch_tokens")
    elif "vLLM's share" in found.rollout:
        remedies.append("a lower rollout.vllm_gpu_memory_utilization")
    if "vLLM's share" in found.resident:
        remedies.append("rollout.vllm_enable_sleep_mode = true")
    if config.model.lora is None:
        remedies.append("model.lora")
    if found.resident["teacher"] > gpus.bytes // 8:
        if config.model.teacher_placement == "replicated" and gpus.count > 1 and not config.stops_in_flight:
            remedies.append('model.teacher_placement = "sharded"')
        remedies.append("a teacher on a server (model.teacher_model_server_url)")
    over = size_text(found.peak - gpus.bytes)
    return f"does not fit: {over} too much; try {', '.join(remedies)}, or a smaller model"
