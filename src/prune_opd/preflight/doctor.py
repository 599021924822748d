"""What `prune-opd doctor` looks at: can a recipe run here, and what does its pair promise, before it costs anything.

Most of it needs no weights. The probe loads both models, and each answers a few prompts. From the answers it measures
how well the pair agrees, whether the threshold is too high, and how many tokens the recipe would save at the start.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from prune_opd.config import Config, with_settings
from prune_opd.core.drift import SAFE_SHARE, drift_report
from prune_opd.errors import ModelError, PruneOPDError
from prune_opd.models import loading as models
from prune_opd.models.loading import read_model_config
from prune_opd.preflight.memory import estimate_memory, memory_rows, size_text
from prune_opd.preflight.topology import GPUs, per_gpu
from prune_opd.rewards import load_reward
from prune_opd.rollout.events import drift_events
from prune_opd.serving.client import Servers
from prune_opd.teachers.local import LocalTeacher
from prune_opd.training.build import (
    Tokenizers,
    build_ends,
    build_problems,
    build_prompts,
    build_sampler,
    build_tokenizers,
)
from prune_opd.training.build_teachers import build_teacher, served_teachers
from prune_opd.training.calibration import (
    Written,
    candidates_along,
    largest_safe_threshold,
    share_whole,
    student_written,
    teacher_written,
)
from prune_opd.types import Prompt, Rollouts

T = TypeVar("T")
Whose = Literal["teacher", "student"]
Status = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The result of one check. failed: the recipe cannot run · warning: it can, but this may not be intended."""

    subject: str
    status: Status
    text: str


Tell = Callable[[str, Status, str], None]

SERVER_SECONDS = 5.0  # in which the servers of teacher and student each must answer


def examine(config: Config, *, probe_prompts: int, tell: Callable[[Finding], None]) -> bool:
    """Check a recipe and report each finding as it is made; returns whether nothing failed.

    probe_prompts: prompts that both models answer; with 0, no weights are loaded.
    """
    sound = True

    def say(subject: str, status: Status, text: str) -> None:
        nonlocal sound
        sound &= status != "failed"
        tell(Finding(subject, status, text))

    def attempt(subject: str, check: Callable[..., T], *needed: Any) -> T | None:
        if any(need is None for need in needed):
            say(subject, "skipped", "it needs what failed above")
            return None
        try:
            return check(config, *needed, say)
        except PruneOPDError as error:
            say(subject, "failed", str(error))
            return None

    attempt("device", _device)
    tokenizers = attempt("tokenizers", _tokenizers)
    attempt("end of a response", _ends, tokenizers)
    attempt("chat template", _chat_templates, tokenizers)
    prompts = attempt("prompts", _prompts, tokenizers)
    attempt("reward", _reward)
    fits = [attempt("positions", _positions), attempt("memory", check_memory)]
    fits += [attempt(subject, check) for subject, check in _served(config)]
    if probe_prompts and all(fits):
        attempt("probe", _probe, tokenizers, prompts and prompts[:probe_prompts])
    elif probe_prompts:
        say("probe", "skipped", "it needs what failed above")
    return sound


# ---- without weights ----


def _device(config: Config, say: Tell) -> None:
    say("device", "ok", str(models.resolve_device(config.training.device)))


def _label(config: Config, number: int) -> str:
    """What findings of a teacher are called by, where there are several."""
    return f" ({config.model.teachers[number].name})" if config.model.teachers else ""


def _tokenizers(config: Config, say: Tell) -> Tokenizers:
    ours, theirs = build_tokenizers(config)
    say("tokenizers", "ok", f"{len(ours.get_vocab()):,} tokens, each with the same id for student and teacher")
    return ours, theirs


def _ends(config: Config, tokenizers: Tokenizers, say: Tell) -> None:
    """A base model and an instruct model often share a tokenizer, but not the token that ends an answer."""
    (tokenizer, others), choice = tokenizers, config.data.end_tokens
    ours = models.read_end_ids(config.model.model_name_or_path, tokenizer)
    for number, (one, other) in enumerate(zip(config.each_teacher, others, strict=True)):
        subject = f"end of a response{_label(config, number)}"
        theirs = models.read_end_ids(one.model.teacher_model_name_or_path, other)
        for_student, for_teacher = _quoted(ours, tokenizer), _quoted(theirs, tokenizer)
        if ours == theirs:
            pad = tokenizer.convert_ids_to_tokens(tokenizer.pad_token_id)
            say(subject, "ok", f"{for_student} for the student and for the teacher; padding {pad!r}")
            continue
        differ = f"the student ends a response with {for_student}, the teacher with {for_teacher}"
        if models.one_end(ours, theirs, choice, tokenizer.eos_token_id):
            say(subject, "ok", f"{differ}: they count as one action (data.end_tokens = {choice!r})")
        else:
            say(
                subject,
                "warning",
                f"{differ}, and data.end_tokens = {choice!r}: the teacher calls the student's end a mistake, the "
                "student unlearns to end, and responses grow to the limit. Take data.end_tokens out",
            )


def _quoted(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return " or ".join(repr(tokenizer.convert_ids_to_tokens(number)) for number in ids)


def _chat_templates(config: Config, tokenizers: Tokenizers, say: Tell) -> None:
    ours, chosen = tokenizers[0].chat_template, config.data.teacher_chat_template
    for number, other in enumerate(tokenizers[1]):
        subject, theirs = f"chat template{_label(config, number)}", other.chat_template
        if ours == theirs and chosen != "student":
            say(subject, "ok", f"data.teacher_chat_template = {chosen!r}; the tokenizers have the same")
        elif ours == theirs:
            say(subject, "ok", "the same for student and teacher" if ours else "none: prompts are plain text")
        elif chosen == "student":
            which = (
                "the student has none, so prompts are plain text"
                if not ours
                else "prompts are written with the student's"
            )
            say(
                subject,
                "warning",
                f"student and teacher differ in it: {which}, and the teacher reads what it may not have been trained "
                'on. Look at the first prompt below, or set data.teacher_chat_template = "teacher"',
            )
        else:
            whose = "its own" if chosen == "teacher" else chosen
            say(subject, "ok", f"student and teacher differ in it: the teacher reads prompts written with {whose}")


def _prompts(config: Config, tokenizers: Tokenizers, say: Tell) -> Sequence[Prompt]:
    source = build_prompts(config, *tokenizers)
    prompts = source.batch(0, config.rollout.prompts_per_step)
    problems = build_problems(config, tokenizers[0])
    held_out = (
        f"{len(problems)} held-out problems from {config.evaluation.data}" if problems else "nothing is evaluated"
    )
    dropped = f"; {source.dropped_too_long} are too long and left out" if source.dropped_too_long else ""
    unknown = {tokenizers[0].unk_token_id, tokenizers[0].pad_token_id}
    strange = sum(not unknown.isdisjoint(prompt.token_ids) for prompt in prompts)
    lost = f"; {strange} of {len(prompts)} hold text that the tokenizer does not know" if strange else ""
    say(
        "prompts",
        "warning" if dropped or lost else "ok",
        f"{config.data.train}{dropped}{lost}; {held_out}. The first, {len(prompts[0].token_ids)} tokens: "
        f"{tokenizers[0].decode(prompts[0].token_ids)!r}",
    )
    for number in range(len(tokenizers[1])):
        own = [prompt.for_teacher.token_ids for prompt in prompts if prompt.for_teacher.teacher == number]
        subject = f"what the teacher reads{_label(config, number)}"
        if not own:
            say(subject, "warning", f"none of the first {len(prompts)} prompts is its own")
        elif config.model.teachers or config.teacher_reads_other_prompts:
            text = f"{len(own)} of the first {len(prompts)} prompts. The first, {len(own[0])} tokens: "
            say(subject, "ok", f"{text}{tokenizers[0].decode(own[0])!r}")
    return prompts


def _reward(config: Config, say: Tell) -> None:
    if config.reward.function:
        load_reward(config.reward.function)
        say("reward", "ok", f"{config.reward.function} is there; what it returns shows at the first step")


def _positions(config: Config, say: Tell) -> bool:
    response = config.rollout.max_completion_length
    longest_response = max(response, config.evaluation.max_tokens if config.evaluation.data else 0)
    needed = [(config.model.model_name_or_path, config.data.max_prompt_length + longest_response)]
    for one in config.each_teacher:
        needed.append((one.model.teacher_model_name_or_path, config.data.longest_for_teacher + response))
    for name, longest in needed:
        model_config = read_model_config(name, config.model, local_files_only=False)
        if model_config is None:
            raise ModelError(
                f"config.json of {name!r} cannot be read: no folder of a model, not on the Hub, or no network"
            )
        models.check_context(model_config, name, longest)
        limit = getattr(model_config, "max_position_embeddings", None)
        say("positions", "ok", f"{name} has {limit or 'no limit of'} positions, {longest} are needed")
    return True


def _served(config: Config) -> Iterator[tuple[str, Callable[..., bool]]]:
    """Checks of the servers that the recipe names, by what their findings are called."""
    rollout, response = config.rollout, config.rollout.max_completion_length
    for number, one in enumerate(config.each_teacher):
        if (urls := one.model.teacher_model_server_url) is not None:
            model = one.model.teacher_server.model or one.model.teacher_model_name_or_path
            longest = config.data.longest_for_teacher + response
            subject = f"teacher's servers{_label(config, number)}"
            yield subject, functools.partial(_servers, "teacher", subject, urls, model, longest)
    if rollout.use_vllm and (urls := rollout.vllm_server_url) is not None:
        model, longest = rollout.vllm_server.model or config.model.model_name_or_path, config.data.max_prompt_length
        yield (
            "student's servers",
            functools.partial(_servers, "student", "student's servers", urls, model, longest + response),
        )


def _servers(
    whose: Whose, subject: str, urls: str | list[str], model: str, longest: int, config: Config, say: Tell
) -> bool:
    """Ask each server what it serves, for a few seconds: a run would wait for it much longer."""
    setting = "model.teacher_server.model" if whose == "teacher" else "rollout.vllm_server.model"
    servers = Servers(urls, timeout=SERVER_SECONDS, deadline=SERVER_SECONDS)
    try:
        servers.check_model(model, longest + (whose == "teacher"), whose=whose, setting=setting)
    finally:
        servers.close()
    say(subject, "ok", f"{len(servers.replicas)} answer, and serve {model!r} with {longest} positions")
    return True


def check_memory(config: Config, say: Tell) -> bool | None:
    """Whether the device has what the recipe needs, told to `say`; None where one process alone has not."""
    memory, device = estimate_memory(config), models.resolve_device(config.training.device)
    parts = ", ".join(f"{name} {text}" for name, text in memory_rows(config, memory) if name != "peak")
    there = _device_bytes(device)
    if memory.peak is None or there is None:
        say("memory", "warning", f"what {device} has or the run needs is not known: {parts}")
        return True
    on_gpu = per_gpu(config, memory, GPUs(1, there)) if device.type == "cuda" else None  # with vLLM's share
    peak = on_gpu.peak if on_gpu else memory.peak
    text = f"about {size_text(peak)} at the peak, and {device} has {size_text(there)}: {parts}"
    if peak <= there:
        say("memory", "ok", text)
        return True
    if config.training.parallel == "fsdp2":
        say("memory", "warning", f"{text}. That is one process alone; fsdp2 shares student and optimiser among them")
        return None
    say(
        "memory",
        "failed",
        f"{text}. Lower training.micro_batch_tokens or rollout.slots, set training.gradient_checkpointing or "
        "model.lora, serve the teacher (model.teacher_model_server_url), or shard (training.parallel = fsdp2)",
    )
    return None


def _device_bytes(device: torch.device) -> int | None:
    """Memory that the device has in all; of the CPU, what this process may use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(there, int(text)) if text.isdigit() else there


# ---- with weights ----


def _probe(config: Config, tokenizers: Tokenizers, prompts: Sequence[Prompt], say: Tell) -> None:
    disable_progress_bar()  # of transformers, which would draw over our lines
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    device = models.resolve_device(config.training.device)
    student = models.load_student(config, device)
    config = with_settings(config, **{"model.compile": False})  # would take minutes, for a few responses
    ends = build_ends(config, student, *tokenizers)
    teacher, vocab_size = build_teacher(config, student, tokenizers[0], None, device=device, ends=ends)
    for served in served_teachers(teacher):
        say("teacher's answers", "ok", f"model, tokens and scores are as expected; {served.way}")
    width = config.data.max_prompt_length + config.longest_response
    sampler = build_sampler(config, student, tokenizers[0], vocab_size=vocab_size, max_model_len=width, ends=ends)
    by_student = student_written(config, prompts, sampler, teacher)
    _say_agreement("agreement, student's text", by_student, say)
    if isinstance(teacher, LocalTeacher):
        by_teacher = teacher_written(config, prompts, student, teacher, tokenizers[0])
        _say_agreement("agreement, teacher's text", by_teacher, say)
        _say_endings(by_teacher.rollouts, student, teacher, tokenizers[0], say)
        config = _threshold(config, by_teacher, say)
    if config.pruning.enable:
        _say_saving(config, by_student, say)


def _say_agreement(subject: str, written: Written, say: Tell) -> None:
    overlap, mask = written.compatibility("overlap_ratio").double(), written.rollouts.response_mask
    lengths = written.rollouts.lengths.double()
    place = torch.arange(mask.shape[1]) / lengths[:, None].cpu()
    thirds = [_mean(overlap.cpu()[mask.cpu() & (place >= i / 3) & (place < (i + 1) / 3)]) for i in range(3)]
    ended = written.rollouts.finished.double().mean().item()
    text = (
        f"overlap {_mean(overlap[mask]):.3f} over {int(mask.sum()):,} tokens of {len(mask)} responses "
        f"({', '.join(f'{third:.3f}' for third in thirds)} by thirds of a response); {lengths.mean():.0f} tokens on "
        f"average, {ended:.0%} ended by themselves"
    )
    if not ended:
        text += ": whoever wrote them may not know how to end, or needs a higher rollout.max_completion_length"
    say(subject, "ok" if ended else "warning", text)


def _say_endings(
    rollouts: Rollouts,
    student: PreTrainedModel,
    teacher: LocalTeacher,
    tokenizer: PreTrainedTokenizerBase,
    say: Tell,
) -> None:
    """What each model would say where the teacher ended its responses: the files may name an id that it never uses."""
    if not rollouts.finished.any():
        return
    last = rollouts.finished.nonzero().squeeze(-1), rollouts.lengths[rollouts.finished] - 1
    found = {}
    for whose, model in (("student", student), ("teacher", teacher.model)):
        likeliest = candidates_along(model, rollouts, 1, teacher.vocab_size).at(last)
        ids, counts = likeliest.ids.unique(return_counts=True)
        most = int(ids[counts.argmax()])
        found[whose] = most, likeliest.logprobs[likeliest.ids == most].exp().mean().item()
    said = ", ".join(
        f"the {whose} says {tokenizer.convert_ids_to_tokens(most)!r} ({mass:.2f})"
        for whose, (most, mass) in found.items()
    )
    (ours, _), (theirs, _) = found.values()
    if ours == theirs or {ours, theirs} <= set(teacher.ends):
        say("after an answer", "ok", said)
    else:
        say(
            "after an answer",
            "warning",
            f"{said}. If both mean the end of a response, name both in eos_token_id of the models' "
            'generation_config.json and set data.end_tokens = "equivalent"; else the student has not learnt to end',
        )


def _threshold(config: Config, by_teacher: Written, say: Tell) -> Config:
    """Hold the threshold against the teacher's own responses, which must not be drift; "auto" becomes a number."""
    pruning = config.pruning
    if not pruning.enable or pruning.metric == "teacher_top_p_accept":
        return config
    compatible, mask = by_teacher.compatibility(pruning.metric), by_teacher.rollouts.response_mask
    safe = largest_safe_threshold(compatible, mask, pruning, config.objective.top_k)
    safe_text = f"the largest that leaves {SAFE_SHARE:.0%} whole is {'none' if safe is None else f'{safe:g}'}"
    if pruning.threshold == "auto":
        if safe is None:
            raise ModelError(f'pruning.threshold = "auto" would find none: {safe_text}; lower pruning.w_drop')
        say("threshold", "ok", f'"auto" would be {safe:g} on these prompts')
        return config.with_threshold(safe)
    whole = share_whole(compatible, mask, pruning, pruning.threshold)
    say(
        "threshold",
        "ok" if whole >= SAFE_SHARE else "warning",
        f"{pruning.threshold:g} leaves {whole:.0%} of the teacher's own responses reliable to the end; {safe_text}",
    )
    return config


def _say_saving(config: Config, written: Written, say: Tell) -> None:
    pruning, rollouts = config.pruning, written.rollouts
    mask, lengths = rollouts.response_mask, rollouts.lengths
    events = drift_events(rollouts.response_ids, mask, written.student, written.teacher, pruning)
    drift = drift_report(events, mask, w_drop=pruning.w_drop, w_base=pruning.w_base, eps=pruning.positive_eps)
    effective = drift.effective_length

    def share(cap: int | Tensor) -> str:
        cut = lengths.minimum(torch.as_tensor(cap, device=lengths.device))
        return f"{1 - cut.sum().item() / lengths.sum().item():.0%}"

    savings = []
    if config.window_is_dynamic:
        window = pruning.dynamic_response_length
        settled = min(max(int(effective.double().quantile(1 - window.hit_ratio)), window.min_len), window.max_len)
        savings.append(f"{share(window.init_len)} by the first window, of {window.init_len} tokens")
        savings.append(f"{share(settled)} by one that has settled, at {settled}")
    savings.append(f"{share(effective + 1)} by in_flight{'' if config.stops_in_flight else ', which is off'}")
    say(
        "saving to expect",
        "ok",
        f"{events[mask].double().mean():.1%} of the student's tokens are drift events, and reliability lasts for "
        f"{effective.double().mean():.0f} of {lengths.double().mean():.0f} tokens. Of these tokens would be saved: "
        f"{'; '.join(savings)}. That is before training, for responses of up to {config.longest_response:,} tokens; "
        "agreement grows with training, and what is saved shrinks",
    )


def _mean(values: Tensor) -> float:
    return values.mean().item() if values.numel() else float("nan")
