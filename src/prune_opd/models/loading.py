"""Loading student, teacher and tokenizer, and the checks that must pass before a token is sampled."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

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
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, cached_file

from prune_opd.config import Config, LoraSection, ModelSection
from prune_opd.config.words import shown
from prune_opd.core.choices import EndTokens
from prune_opd.errors import ConfigError, ModelError, TokenizerError
from prune_opd.models.causal_lm import check_compiler, check_liger
from prune_opd.models.packed_attention import choose_attention, has_dense_mask

if TYPE_CHECKING:
    from peft import PeftConfig

log = logging.getLogger(__name__)


def resolve_model(name: str) -> str:
    """A path or Hub id; `embedded:NAME` becomes the folder of a model or adapter that ships with the package."""
    if not name.startswith("embedded:"):
        return name
    assets = Path(str(files("prune_opd") / "assets"))
    found = [path.parent for kind in ("config.json", ADAPTER_CONFIG_NAME) for path in assets.rglob(kind)]
    known = {f"embedded:{folder.relative_to(assets).as_posix()}": str(folder) for folder in found}
    if name not in known:
        raise ModelError(
            f"no embedded model {name!r}; there are {', '.join(sorted(known)) or 'none: run `make assets`'}"
        )
    return known[name]


@dataclass(frozen=True)
class Adapter:
    """A peft adapter on this machine; `base` is what its adapter_config.json names, perhaps another adapter."""

    name: str
    folder: Path
    settings: PeftConfig
    base: str


def find_adapter(name: str, *, local_files_only: bool = False) -> Adapter | None:
    """The adapter that `name` (a folder, a Hub id or embedded:NAME) is; None for any other model.

    As for transformers, adapter_config.json makes it one, whatever else is there. ModelError where peft is missing,
    or the adapter names no base or has no safetensors weights.
    """
    path = resolve_model(name)
    config_file = _file_of(path, ADAPTER_CONFIG_NAME, local_files_only=local_files_only)
    if config_file is None:
        return None
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ModelError(
            f"{name!r} is a peft adapter, and peft cannot be imported: {error}\nInstall it with pip install peft, or "
            "give a model with the adapter merged into it"
        ) from error
    try:
        settings = PeftConfig.from_pretrained(str(Path(config_file).parent))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"the adapter {name!r} has an {ADAPTER_CONFIG_NAME} that peft cannot read: {error}") from error
    if not settings.base_model_name_or_path:
        raise ModelError(
            f"the adapter {name!r} does not say which model it belongs to; write base_model_name_or_path into its "
            f"{ADAPTER_CONFIG_NAME}"
        )
    return Adapter(name, Path(config_file).parent, settings, settings.base_model_name_or_path)


def adapters_of(name: str, *, local_files_only: bool = False) -> tuple[str, list[Adapter]]:
    """(the plain model behind `name`, its adapters in the order in which they go onto it).

    Most names are plain models. An adapter may name another as its base: so does one trained over a student that was
    an adapter itself.
    """
    adapters: list[Adapter] = []
    while (adapter := find_adapter(name, local_files_only=local_files_only)) is not None:
        if any(adapter.folder.resolve() == above.folder.resolve() for above in adapters):
            chain = " -> ".join([*(above.name for above in adapters), adapter.name])
            raise ModelError(f"these adapters name one another as their base, and no model: {chain}")
        adapters.append(adapter)
        name = adapter.base
    return name, adapters[::-1]


def plain_model(name: str, *, local_files_only: bool = False) -> str:
    """The folder or Hub id with config.json and whole weights behind `name`, which may be an adapter."""
    return resolve_model(adapters_of(name, local_files_only=local_files_only)[0])


def _file_of(path: str, file: str, *, local_files_only: bool = False) -> str | None:
    """Where a file of a folder or Hub repository lies on this machine, fetched if need be; None without one."""
    if os.path.isdir(path):  # os.path takes names that no file can have
        return os.path.join(path, file) if os.path.isfile(os.path.join(path, file)) else None
    try:
        return cached_file(
            path,
            file,
            local_files_only=local_files_only,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # no such repository: the model's own loading says it better
        return None


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


def load_model(
    name: str,
    settings: ModelSection,
    *,
    dtype: str,
    device: torch.device,
    autocast: bool = False,
    longest: int | None = None,
    on_cpu: bool = False,
) -> PreTrainedModel:
    """A causal LM on `device`, or on the CPU (`on_cpu`) if its shards will go there. Weights are read as safetensors
    only.

    Where `name` is a peft adapter, this is its base with the adapter merged into it, in `dtype`: a plain model.
    autocast: whether its packed rows are computed in bfloat16 whatever the weights' type · longest: tokens of the
    longest packed row, for a warning.
    """
    log_remote_code(name, settings)
    plain, adapters = adapters_of(name)
    asked = settings.attn_implementation
    try:
        model = AutoModelForCausalLM.from_pretrained(
            resolve_model(plain),
            dtype=getattr(torch, dtype),
            attn_implementation=asked if asked in ("sdpa", "eager") else None,  # sdpa, or eager where there is none
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,
            **({"revision": adapters[0].settings.revision} if adapters and adapters[0].settings.revision else {}),
        )
    except Exception as error:  # whatever transformers makes of files that are damaged or of another kind; chained
        raise ModelError(_not_loaded(name, adapters, error)) from error
    for adapter in adapters:
        model = _merged(model, adapter)
    half = autocast or dtype == "bfloat16"
    attention = choose_attention(model, asked, device=device, half=half, compile=settings.compile)
    if device.type != "cpu" and has_dense_mask(attention):
        log.warning("%s: %s", name, dense_mask_warning(attention, longest))
    return model.to("cpu" if on_cpu else device)


def dense_mask_warning(attention: str, longest: int | None) -> str:
    """What the mask of packed rows that attend by this takes on a GPU, and what to do."""
    size = "" if longest is None else f" of {longest * longest:,} bytes for a row of {longest:,} tokens"
    return (
        f"packed rows attend by {attention} under a dense mask{size}, which rules out flash attention; to do without "
        "it, set model.attn_implementation = 'auto', training.bf16 = true and model.teacher_dtype = 'bfloat16', and "
        "leave model.compile out"
    )


def _not_loaded(name: str, adapters: list[Adapter], error: Exception) -> str:
    if not adapters:
        return (
            f"model {name!r} cannot be loaded: {type(error).__name__}: {error}\n"
            "Give a folder with config.json and safetensors weights, a Hub id, or embedded:NAME"
        )
    made = "; `make setup-smollm` makes it, and is called, as this is, from the root of the repository"
    return (
        f"{name!r} is an adapter, and its base model {adapters[0].base!r} cannot be loaded: {error}\n"
        f"base_model_name_or_path in {adapters[0].folder / ADAPTER_CONFIG_NAME} must be a Hub id or a folder with "
        f"config.json and safetensors weights, where a relative path begins in the working directory "
        f"({Path.cwd()}){made if name.startswith('embedded:smollm/') else ''}"
    )


def _merged(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """The model with the adapter added to its weights; what is trained over it later names the adapter as its base."""
    from peft import PeftModel

    path = resolve_model(adapter.name)
    if _file_of(path, ADAPTER_SAFE_WEIGHTS_NAME) is None:  # peft would read a pickle instead
        raise ModelError(
            f"the adapter {adapter.name!r} has no {ADAPTER_SAFE_WEIGHTS_NAME}; adapters are read as safetensors only: "
            "save it again with a peft that is not from before 2024"
        )
    try:
        with_adapter = PeftModel.from_pretrained(model, str(adapter.folder))
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ModelError(
            f"the adapter {adapter.name!r} does not fit its base model {adapter.base!r}: {error}\n"
            f"Correct base_model_name_or_path in {adapter.folder / ADAPTER_CONFIG_NAME}"
        ) from error
    if not hasattr(with_adapter, "merge_and_unload"):
        raise ModelError(
            f"the adapter {adapter.name!r} is of the kind {adapter.settings.peft_type}, which cannot be merged into "
            "weights; LoRA and its like can"
        )
    merged = with_adapter.merge_and_unload()
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    merged.name_or_path = adapter.name
    return merged.requires_grad_(True)  # peft had frozen it


def log_remote_code(name: str, settings: ModelSection) -> None:
    """Name a model whose own code the recipe allows to run, before it does."""
    if settings.trust_remote_code:
        log.warning("model.trust_remote_code is on: code that ships with %s may run", name)


def load_student(config: Config, device: torch.device) -> PreTrainedModel:
    """The model to train: all weights, or adapters when `model.lora` is set."""
    settings = config.model
    if settings.compile:
        check_compiler(device)
    model = load_model(
        settings.model_name_or_path,
        settings,
        dtype=settings.dtype,
        device=device,
        autocast=config.training.bf16,
        longest=config.longest_row,
    )
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
    """The tokenizer of a model, which must know padding and the end of a sequence.

    An adapter that comes without one has its base's. Raises TokenizerError.
    """
    folder = resolve_model(name)
    log_remote_code(name, settings)
    while _file_of(folder, "tokenizer_config.json") is None and (adapter := find_adapter(folder)) is not None:
        folder = resolve_model(adapter.base)
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


def read_end_ids(name: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`end_ids` of a model whose weights are not loaded, from its folder or the Hub."""
    try:
        settings = GenerationConfig.from_pretrained(plain_model(name))
    except (OSError, ValueError):  # the file is optional
        settings = None
    return end_ids(settings, tokenizer)


def one_end(student: Sequence[int], teacher: Sequence[int], choice: EndTokens, first: int) -> tuple[int, ...]:
    """The ids that count as one action (core/ends.py), `first` in front; () where ids are compared as they are.

    student, teacher: the ids that end a response for each · choice: `data.end_tokens` · first: the student's EOS.
    """
    if choice == "distinct" or (choice == "auto" and set(student) == set(teacher)):
        return ()
    others = sorted({*student, *teacher} - {first})
    return (first, *others) if others else ()


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


def check_ends(ends: Sequence[int], vocab_size: int) -> None:
    """ModelError where an id that ends a response is beyond the ids that student and teacher share."""
    if beyond := [end for end in ends if not 0 <= end < vocab_size]:
        raise ModelError(
            f"id {beyond[0]} ends a response of one model, and the two share {vocab_size} ids; repair eos_token_id in "
            'its generation_config.json, or set data.end_tokens = "distinct"'
        )


def check_context(model_config: PretrainedConfig, name: str, longest: int) -> None:
    """The longest prompt plus response must fit the model's positions."""
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ModelError(
            f"model {name!r} has {limit} positions, but data.max_prompt_length plus the longest response is {longest}; "
            "lower rollout.max_completion_length (and evaluation.max_tokens) or data.max_prompt_length"
        )


def read_model_config(name: str, settings: ModelSection, *, local_files_only: bool = True) -> PretrainedConfig | None:
    """The model's config.json from its folder or the Hub's cache, or from the Hub if allowed; None without one.

    Of an adapter, its base's.
    """
    log_remote_code(name, settings)
    plain = plain_model(name, local_files_only=local_files_only)
    try:
        return AutoConfig.from_pretrained(
            plain, trust_remote_code=settings.trust_remote_code, local_files_only=local_files_only
        )
    except ModelError:
        raise
    except Exception as error:  # whatever transformers makes of a file that is damaged; chained
        if os.path.isfile(os.path.join(plain, "config.json")):  # which takes names that no file can have
            raise ModelError(
                f"{plain}/config.json names no model that transformers knows ({type(error).__name__}: {error}); update "
                "transformers or repair the file"
            ) from error
        return None
