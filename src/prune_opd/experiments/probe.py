"""`prune-opd probe`: does the teacher's signal get worse where reliability falls, on this pair?

The student answers problems. Each answer is cut at the same lengths, whatever its reliability there, and from every cut
teacher and student go on; the task's grader says how often each still gets there. Where drift means what the method
takes it to mean, the teacher gets there less often from prefixes with a low R than from others that are as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prune_opd.config import Config, with_settings
from prune_opd.core.drift import drift_report
from prune_opd.errors import ConfigError, DataError
from prune_opd.evaluation.evaluate import response_texts
from prune_opd.evaluation.graders import are_right, check_gradable
from prune_opd.experiments.rescue import analyse, interval_text, table_rows
from prune_opd.experiments.signals import drift_signals
from prune_opd.models import loading as models
from prune_opd.reporting.wording import duration
from prune_opd.rollout.base import Sampler, rollout_uniforms
from prune_opd.rollout.events import drift_events
from prune_opd.rollout.local import LocalSampler
from prune_opd.teachers.local import LocalTeacher
from prune_opd.training.build import (
    Tokenizers,
    build_ends,
    build_problems,
    build_prompts,
    build_sampler,
    build_tokenizers,
)
from prune_opd.training.build_teachers import build_teacher
from prune_opd.training.calibration import calibrate, calibration_text, with_known_threshold
from prune_opd.training.environment import environment
from prune_opd.training.files import check_writable, write_json
from prune_opd.types import Prompt, Rollouts, TeacherScores

PROBE_STREAM = 5  # of random numbers; 0 to 4 are training, evaluation, audits, the random control and calibration
SHORTEST = 32  # the shortest cut is the longest response divided by this
WINDOW = 16  # tokens before a cut, over which a signal is averaged


@dataclass(frozen=True)
class Pair:
    """Student and teacher of a recipe, each with its sampler. config: the recipe, with a number for γ · positions: what
    a prompt and all that follows it may have in both models, None where there is no limit."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler
    teacher: LocalTeacher
    teacher_sampler: Sampler
    positions: int | None


def build_pair(config: Config, prompts: Sequence[Prompt], tokenizers: Tokenizers, console: Console) -> Pair:
    """The models of a recipe; γ is calibrated on these prompts where it is "auto".

    tokenizers: `build_tokenizers`. ConfigError for a teacher that is served, one of several, or reads other prompts.
    """
    if config.model.teacher_model_server_url is not None:
        raise ConfigError(
            "a probe has the teacher write, and model.teacher_model_server_url names a server that only scores; leave "
            "it unset, so that the teacher is loaded into this process"
        )
    if config.model.teachers or config.teacher_reads_other_prompts:
        raise ConfigError(
            "a probe was not built for model.teachers, nor for a teacher that reads other prompts than the student; "
            "probe a recipe with one of them and the student's prompts"
        )
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    device = models.resolve_device(config.training.device)
    student = models.load_student(config, device)
    tokenizer, _ = tokenizers
    ends = build_ends(config, student, *tokenizers)
    teacher, vocab_size = build_teacher(config, student, tokenizer, None, device=device, ends=ends)
    assert isinstance(teacher, LocalTeacher)
    width = config.data.max_prompt_length + config.longest_response
    limits = [getattr(model.config, "max_position_embeddings", None) for model in (student, teacher.model)]
    positions = min((limit for limit in limits if limit), default=None)
    longest = positions or 2 * width
    sampler = build_sampler(config, student, tokenizer, vocab_size=vocab_size, max_model_len=longest, ends=ends)
    # The servers of a recipe have the student's shape, so beside them the teacher writes in this process.
    served = {"rollout.use_vllm": False, "rollout.vllm_server_url": None} if config.rollout.vllm_server_url else {}
    theirs = with_settings(config, **served, **{"model.model_name_or_path": config.model.teacher_model_name_or_path})
    teacher_sampler = build_sampler(
        theirs, teacher.model, tokenizer, vocab_size=vocab_size, max_model_len=longest, ends=ends
    )
    if isinstance(sampler, LocalSampler):
        sampler.keep_sampled_logprobs = True
    config, _ = with_known_threshold(config, Path())
    if config.pruning.threshold == "auto":
        found = calibrate(config, prompts, student=student, sampler=sampler, teacher=teacher, tokenizer=tokenizer)
        console.print(calibration_text(found), highlight=False)
        config = config.with_threshold(found["threshold"])
    return Pair(config, tokenizer, sampler, teacher, teacher_sampler, positions)


def scored_rollouts(pair: Pair, prompts: Sequence[Prompt], seed: int) -> tuple[Rollouts, TeacherScores]:
    """A response of the student to each prompt, of up to the longest that training allows, and the teacher's scores."""
    top_k, length = pair.config.objective.top_k, pair.config.longest_response
    rollouts = pair.sampler.sample(
        [prompt.token_ids for prompt in prompts],
        rollout_uniforms(seed, 0, range(len(prompts)), length, stream=PROBE_STREAM),
        temperature=pair.config.rollout.temperature,
        top_k=top_k,
    )
    return rollouts, pair.teacher.score(rollouts, top_k=top_k)


@dataclass(frozen=True)
class Cuts:
    """Prefixes of rollouts. prompt, length (N,) int: of which, and how many tokens of its response · reliability (N,):
    R of the last of them · signals: means over the last tokens, (N,) each."""

    prompt: np.ndarray
    length: np.ndarray
    reliability: np.ndarray
    signals: dict[str, np.ndarray]


def cut_rollouts(rollouts: Rollouts, scores: TeacherScores, config: Config, lengths: int) -> Cuts:
    """Cut every rollout at up to `lengths` lengths, the same for all, closer to one another near the beginning.

    A cut leaves at least one token of the response away. DataError where all responses are too short.
    """
    pruning, mask = config.pruning, rollouts.response_mask
    assert rollouts.student is not None
    events = drift_events(rollouts.response_ids, mask, rollouts.student, scores.topk, pruning)
    drift = drift_report(events, mask, w_drop=pruning.w_drop, w_base=pruning.w_base, eps=pruning.positive_eps)
    longest = int(rollouts.lengths.max())
    at = sorted({int(longest * SHORTEST ** (-i / lengths)) for i in range(1, lengths + 1)} - {0})
    cuts = [(b, t) for b, n in enumerate(rollouts.lengths.tolist()) for t in at if t < n]
    if not cuts:
        raise DataError("a probe needs responses of two tokens or more; the student wrote none")
    prompt, length = (torch.tensor(column) for column in zip(*cuts, strict=True))

    def before(values: Tensor) -> np.ndarray:
        sums = torch.nn.functional.pad(values.double().cpu().cumsum(-1), (1, 0))
        start = (length - WINDOW).clamp(min=0)
        return ((sums[prompt, length] - sums[prompt, start]) / (length - start)).numpy()

    signals = {name: before(values.masked_fill(~mask, 0)) for name, values in drift_signals(rollouts, scores).items()}
    reliability = drift.reliability.cpu()[prompt, length - 1].numpy()
    return Cuts(prompt.numpy(), length.numpy(), reliability, signals)


def right_continuations(
    pair: Pair,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    rollouts: Rollouts,
    cuts: Cuts,
    n: int,
    *,
    seed: int,
    on_progress: Callable[[int], None],
) -> tuple[np.ndarray, int]:
    """(N,) int: how many of n continuations of each cut by this sampler's model are right; and tokens sampled.

    A continuation may have as many tokens as a response in training, or what the positions leave to the longest prefix
    that is continued with it. on_progress: called with the number of prefixes that are done since the last call.
    """
    right, tokens = np.zeros(len(cuts.prompt), dtype=int), 0
    order = np.argsort(cuts.length, kind="stable").tolist()
    at_once = max(1, 2 * pair.config.rollout.slots // n)
    for start in range(0, len(order), at_once):
        batch = [cut for cut in order[start : start + at_once] for _ in range(n)]
        asked = [prompts[cuts.prompt[cut]] for cut in batch]
        heads = [rollouts.response_ids[cuts.prompt[cut], : cuts.length[cut]].tolist() for cut in batch]
        prefixes = [[*prompt.token_ids, *head] for prompt, head in zip(asked, heads, strict=True)]
        room = pair.config.longest_response
        if pair.positions:
            room = min(room, pair.positions - max(map(len, prefixes)))
        numbers = [cut * n + i for cut, i in zip(batch, [*range(n)] * len(batch), strict=False)]
        written = sampler.sample(prefixes, rollout_uniforms(seed, 1, numbers, room, stream=PROBE_STREAM))
        tokens += int(written.lengths.sum())
        whole = [
            pair.tokenizer.decode([*head, *ids[:length]], skip_special_tokens=True)
            for head, ids, length in zip(heads, written.response_ids.tolist(), written.lengths.tolist(), strict=True)
        ]
        np.add.at(right, batch, [int(verdict) for verdict in are_right(asked, whole)])
        on_progress(len(batch) // n)
    return right, tokens


def probe(
    config: Config, *, problems: int, lengths: int, continuations: int, json_path: Path | None, console: Console
) -> dict[str, Any]:
    """Measure and say whether the teacher gets worse where R falls; returns what it wrote to `json_path`, if anywhere.

    problems: how many are answered, of evaluation.data, else of data.train · lengths: at which each answer is cut ·
    continuations: of each prefix, by each model. Raises what loading the recipe's models raises; DataError when a
    problem has nothing to grade against; ConfigError for a served teacher.
    """
    if json_path:
        check_writable(json_path.parent)
    config = with_settings(config, **{"model.compile": False, "evaluation.num_problems": problems})
    tokenizers = build_tokenizers(config)
    tokenizer, _ = tokenizers
    prompts = build_problems(config, tokenizer) or build_prompts(config, *tokenizers).batch(0, problems)
    check_gradable(prompts, "a probe", "name other problems with evaluation.data")
    most = len(prompts) * (1 + 2 * lengths * continuations)
    console.print(
        f"{len(prompts)} problems; each answer is cut at up to {lengths} lengths, and {continuations} times continued "
        f"by teacher and student: at most {most:,} responses of up to {config.longest_response:,} tokens",
        highlight=False,
    )
    began = time.perf_counter()
    pair = build_pair(config, prompts, tokenizers, console)
    config, seed = pair.config, pair.config.training.seed
    sampling = time.perf_counter()
    rollouts, scores = scored_rollouts(pair, prompts, seed)
    cuts = cut_rollouts(rollouts, scores, config, lengths)
    rate = (time.perf_counter() - sampling) / int(rollouts.lengths.sum())
    work = 2 * len(cuts.prompt)
    expected = rate * work * continuations * float(rollouts.lengths.double().mean())
    console.print(
        f"{work // 2} prefixes; about {duration(expected)}, if both go on as the student did", highlight=False
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("prefixes", total=work)
        (by_teacher, theirs), (by_student, ours) = (
            right_continuations(
                pair,
                sampler,
                prompts,
                rollouts,
                cuts,
                continuations,
                seed=seed,
                on_progress=lambda n: bar.advance(task, n),
            )
            for sampler in (pair.teacher_sampler, pair.sampler)
        )
    own = np.array(list(are_right(prompts, list(response_texts(rollouts, tokenizer)))))
    found = analyse(cuts.prompt, cuts.length, cuts.reliability, cuts.signals, by_teacher, by_student, continuations) | {
        "problems": len(prompts),
        "continuations": continuations,
        "student_accuracy": float(own.mean()),
        "tokens": {"answers": int(rollouts.lengths.sum()), "teacher": theirs, "student": ours},
        "seconds": time.perf_counter() - began,
        "cuts": [
            {"problem": int(b), "length": int(t), "reliability": float(r), "teacher": int(q), "student": int(p)}
            for b, t, r, q, p in zip(cuts.prompt, cuts.length, cuts.reliability, by_teacher, by_student, strict=True)
        ],
        "recipe": config.model_dump(),
        "environment": environment(models.resolve_device(config.training.device)),
    }
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(json_path, found)
    _say(found, json_path, console)
    return found


def _say(found: dict[str, Any], json_path: Path | None, console: Console) -> None:
    rescues = Table(title=f"right continuations of {found['continuations']} a prefix [95%]")
    for heading in ("prefixes with", "cuts", "teacher", "student"):
        rescues.add_column(heading, justify="left" if heading == "prefixes with" else "right")
    for row in table_rows(found):
        rescues.add_row(*row)
    signals = Table(title="AUC: what tells that a continuation by the teacher will go wrong")
    for heading in ("signal", "at equal lengths", "at all lengths"):
        signals.add_column(heading, justify="left" if heading == "signal" else "right")
    for row in found["signals"]:
        texts = (interval_text(row[key], percent=False) for key in ("auc_at_equal_length", "auc"))
        signals.add_row(row["signal"], *texts)
    signals.add_row("length alone", "-", interval_text(found["length_alone"], percent=False))
    console.print(rescues)
    console.print(signals)
    console.print(found["verdict"], markup=False, highlight=False, soft_wrap=True, style="bold")
    where = f"; written to {json_path}" if json_path else ""
    console.print(f"{duration(found['seconds'])}{where}", markup=False, highlight=False, soft_wrap=True)
