"""Loading student, teacher and tokenizer, and the checks that must pass before a token is sampled."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prune_opd.config import Config, LoraSection, ModelSection
from prune_opd.config.words import shown
from prune_opd.errors import ConfigError, ModelError, TokenizerError
from prune_opd.models.causal_lm import check_compiler, check_liger

log = logging.getLogger(__name__)


def resolve_model(name: str) -> str:
    """A path or Hub id; `embedded:NAME` becomes the folder of a model that ships with the package."""
    if not name.startswith("embedded:"):
        return name
    assets = Path(str(files("prune_opd") / "assets"))
    folder = assets / name.removeprefix("embedded:")
    if folder.parent != assets or not (folder / "config.json").is_file():
        known = sorted(f"embedded:{p.name}" for p in assets.glob("*") if (p / "config.json").is_file())
        raise ModelError(f"no embedded model {name!r}; there are {', '.join(known) or 'none: run `make assets`'}")
    return str(folder)


def resolve_device(name: str) -> torch.device:
    """`auto` is the accelerator where there is one, else the CPU. ConfigError for a device that is not here."""
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    there_are = ["cpu"]
    if here is not None:
        there_are += [here.type, *(f"{here.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if name == "auto":
        return here or torch.device("cpu")
    if name in there_are:
        return torch.device(name)
    raise ConfigError(
        f"training.device = {name!r} is no device of this machine, as torch {torch.__version__} sees it; there are "
        f"auto, {', '.join(there_are)}"
    )


def load_model(name: str, settings: ModelSection, *, dtype: str, device: torch.device) -> PreTrainedModel:
    """A causal LM on `device`. Weights are read as safetensors only."""
    log_remote_code(name, settings)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            resolve_model(name),
            dtype=getattr(torch, dtype),
            attn_implementation=settings.attn_implementation,
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,
        )
    except Exception as error:  # whatever transformers makes of files that are damaged or of another kind; chained
        raise ModelError(
            f"model {name!r} cannot be loaded: {type(error).__name__}: {error}\n"
            "Give a folder with config.json and safetensors weights, a Hub id, or embedded:NAME"
        ) from error
    return model.to(device)


def log_remote_code(name: str, settings: ModelSection) -> None:
    """Name a model whose own code the recipe allows to run, before it does."""
    if settings.trust_remote_code:
        log.warning("model.trust_remote_code is on: code that ships with %s may run", name)


def load_student(config: Config, device: torch.device) -> PreTrainedModel:
    """The model to train: all weights, or adapters when `model.lora` is set."""
    settings = config.model
    if settings.compile:
        check_compiler(device)
    model = load_model(settings.model_name_or_path, settings, dtype=settings.dtype, device=device)
    if settings.lora is not None:
        model = add_adapters(model, settings.lora)
    if settings.liger_head:
        check_liger(model)
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def add_adapters(model: PreTrainedModel, lora: LoraSection) -> PreTrainedModel:
    """The model with its weights frozen and trainable low-rank adapters beside them; ConfigError if they do not fit."""
    from peft import LoraConfig, get_peft_model

    try:
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=lora.target_modules,
            ),
        )
    except (ValueError, RuntimeError) as error:  # no such modules; no memory for so large a rank
        blamed = "target_modules" if isinstance(error, ValueError) else "r"
        raise ConfigError(
            f"model.lora.{blamed} does not fit the student ({shown(str(error))}); give modules that it has, "
            "or all-linear, and a rank below its width"
        ) from error


def load_tokenizer(name: str, settings: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, which must know padding and the end of a sequence."""
    folder = resolve_model(name)
    log_remote_code(name, settings)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    except Exception as error:  # likewise
        raise TokenizerError(
            f"the tokenizer of {name!r} cannot be loaded: {type(error).__name__}: {error}\n"
            "Give a folder with a tokenizer, a Hub id, or embedded:NAME"
        ) from error
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            f"the tokenizer of {name!r} has no EOS token, so no rollout could ever end by itself; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        raise TokenizerError(
            f"the tokenizer of {name!r} has no pad token, which batches of unequal prompts need; "
            "set pad_token in its tokenizer_config.json (an unused special token, or the EOS token)"
        )
    return tokenizer


def check_token_maps(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Student and teacher must give every token the same id: overlap compares ids. Sizes may differ by padding."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    moved = sorted((ours[t], t) for t in ours.keys() & theirs.keys() if ours[t] != theirs[t])
    alone = sorted((ours.get(t, theirs.get(t)), t) for t in ours.keys() ^ theirs.keys())
    example = (
        f"token {moved[0][1]!r} is id {moved[0][0]} for the student and {theirs[moved[0][1]]} for the teacher"
        if moved
        else f"token {alone[0][1]!r} (id {alone[0][0]}) is known to one of them only"
    )
    raise TokenizerError(
        f"student and teacher have different token maps: {len(moved)} tokens differ in id, {len(alone)} are known to "
        f"only one of them; {example}. Prune-OPD compares token ids: use a pair with the same tokenizer"
    )


def end_ids(settings: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a response: the tokenizer's EOS and those that the model's generation settings name."""
    named = getattr(settings, "eos_token_id", None)
    named = [] if named is None else named if isinstance(named, list) else [named]
    if not all(type(number) is int for number in named):
        raise ModelError(
            f"eos_token_id is {named} in generation_config.json; write the id of a token, or a list of ids"
        )
    return sorted({tokenizer.eos_token_id, *named})


def check_ids(model: PreTrainedModel, name: str, ids: Iterable[int]) -> None:
    """ModelError where the model has no embedding for one of the ids of its prompts."""
    rows, highest = model.get_input_embeddings().weight.shape[0], max(ids)
    if highest >= rows:
        raise ModelError(
            f"the tokenizer of {name!r} gives tokens ids up to {highest}, but the model has {rows} of them; use the "
            "tokenizer that belongs to it"
        )


def shared_vocab_size(student: PreTrainedModel, teacher_size: int, top_k: int) -> int:
    """Ids that student and teacher have a logit for, of which the teacher has so many; ModelError if top_k is more."""
    size = min(student.get_output_embeddings().weight.shape[0], teacher_size)
    if top_k > size:
        raise ModelError(f"objective.top_k = {top_k} is above the shared vocabulary of {size} tokens; lower top_k")
    return size


def check_context(model_config: PretrainedConfig, name: str, longest: int) -> None:
    """The longest prompt plus response must fit the model's positions."""
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ModelError(
            f"model {name!r} has {limit} positions, but data.max_prompt_length plus the longest response is {longest}; "
            "lower rollout.max_completion_length (and evaluation.max_tokens) or data.max_prompt_length"
        )


def read_model_config(name: str, settings: ModelSection, *, local_files_only: bool = True) -> PretrainedConfig | None:
    """The model's config.json from its folder or the Hub's cache, or from the Hub if allowed; None without one."""
    log_remote_code(name, settings)
    try:
        return AutoConfig.from_pretrained(
            resolve_model(name), trust_remote_code=settings.trust_remote_code, local_files_only=local_files_only
        )
    except ModelError:
        raise
    except Exception as error:  # whatever transformers makes of a file that is damaged; chained
        if os.path.isfile(os.path.join(name, "config.json")):  # which takes names that no file can have
            raise ModelError(
                f"{name}/config.json names no model that transformers knows ({type(error).__name__}: {error}); update "
                "transformers or repair the file"
            ) from error
        return None
