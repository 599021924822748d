"""The sampler and the teacher that a recipe names, checked before the first step."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prune_opd.config import Config
from prune_opd.errors import EngineError, ModelError
from prune_opd.models import loading as models
from prune_opd.models.loading import read_model_config
from prune_opd.rollout.base import Sampler
from prune_opd.rollout.local import LocalSampler
from prune_opd.rollout.served import ServedSampler
from prune_opd.rollout.vllm import VLLMSampler
from prune_opd.serving.client import Servers
from prune_opd.teachers.base import Teacher
from prune_opd.teachers.local import LocalTeacher
from prune_opd.teachers.served import ServedTeacher
from prune_opd.training.files import read_json, write_json

TEACHER_PROBE = "teacher_probe.json"


def build_sampler(
    config: Config,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    max_model_len: int,
    processes: int = 1,
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
            slots=rollout.slots,
            compile=config.model.compile,
        )
    if processes > 1:
        raise EngineError(
            f"rollout.use_vllm is for one process, and this run has {processes}; set it to false, or train under verl "
            "(docs/scaling.md)"
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
            _servers(rollout.vllm_server_url, asked.timeout, asked.deadline, rollout.slots),
            model=asked.model or config.model.model_name_or_path,
            dtype=dtype,
            pad_id=pad_id,
            eos_ids=eos_ids,
            slots=rollout.slots,
            weights_dir=Path(asked.weights_dir).absolute() if asked.weights_dir else None,
        )
        sampler.check(max_model_len)
        return sampler
    return VLLMSampler(
        student,
        model=models.resolve_model(config.model.model_name_or_path),
        dtype=dtype,
        pad_id=pad_id,
        eos_ids=eos_ids,
        slots=rollout.slots,
        top_k=config.objective.top_k,
        max_model_len=max_model_len,
        seed=config.training.seed,
        gpu_memory_utilization=rollout.vllm_gpu_memory_utilization,
        trust_remote_code=config.model.trust_remote_code,
    )


def build_teacher(
    config: Config,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run_dir: Path | None,
    *,
    device: torch.device,
) -> tuple[Teacher, int]:
    """The teacher, and how many ids it shares with the student.

    Raises ModelError, TokenizerError or ServerError when it does not fit the student or the recipe, or is another
    served teacher than the one that this run directory, where there is one, began with.
    """
    settings, top_k = config.model, config.objective.top_k
    name = settings.teacher_model_name_or_path
    longest = config.data.max_prompt_length + config.rollout.max_completion_length
    if settings.teacher_model_server_url is None:
        model = models.load_model(name, settings, dtype=settings.teacher_dtype, device=device)
        models.check_context(model.config, name, longest)
        vocab_size = models.shared_vocab_size(student, model.get_output_embeddings().weight.shape[0], top_k)
        return LocalTeacher(model, vocab_size=vocab_size, compile=settings.compile), vocab_size
    teacher_config = read_model_config(name, settings, local_files_only=False)
    if teacher_config is None:
        raise ModelError(
            f"config.json of the served teacher {name!r} cannot be read: not a folder, not on the Hub, or no network. "
            "Set model.teacher_model_name_or_path to a folder with its config.json and tokenizer"
        )
    vocab_size = models.shared_vocab_size(student, teacher_config.get_text_config().vocab_size, top_k)
    served = settings.teacher_server
    servers = _servers(settings.teacher_model_server_url, served.timeout, served.deadline, served.concurrency)
    teacher = ServedTeacher(
        servers, model=served.model or name, vocab_size=vocab_size, top_logprobs=min(served.top_logprobs, vocab_size)
    )
    probe = run_dir / TEACHER_PROBE if run_dir else None
    teacher.check(tokenizer, longest, read_json(probe).get("logprobs") if probe and probe.exists() else None)
    return teacher, vocab_size


def _servers(urls: str | list[str], timeout: float, deadline: float, concurrency: int) -> Servers:
    replicas = [urls] if isinstance(urls, str) else urls
    return Servers(replicas, timeout=timeout, deadline=deadline, concurrency=concurrency)


def remember_teacher(teacher: Teacher, run_dir: Path) -> None:
    """Write down how a served teacher scored its probe, so that a resumed run notices another one."""
    if isinstance(teacher, ServedTeacher):
        write_json(run_dir / TEACHER_PROBE, {"logprobs": teacher.fingerprint})
