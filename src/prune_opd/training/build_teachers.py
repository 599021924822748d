"""The teachers that a recipe names, and how prompts are written for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prune_opd.config import Config
from prune_opd.data.teacher_prompts import TeacherView
from prune_opd.distributed import sharding as distributed
from prune_opd.distributed.world import ALONE, World
from prune_opd.errors import CheckpointError, ConfigError, ModelError
from prune_opd.models import loading as models
from prune_opd.models.loading import read_model_config
from prune_opd.reporting.records import TeacherProbe, read_object
from prune_opd.rollout.transcript import listed_for
from prune_opd.serving.client import Servers
from prune_opd.teachers.base import Teacher
from prune_opd.teachers.local import LocalTeacher
from prune_opd.teachers.routed import RoutedTeacher
from prune_opd.teachers.served import ServedTeacher
from prune_opd.training.files import write_json
from prune_opd.training.moving_teacher import MovingTeacher


def build_view(
    config: Config, tokenizer: PreTrainedTokenizerBase, theirs: Sequence[PreTrainedTokenizerBase]
) -> TeacherView | None:
    """What the teachers read of a prompt; None where that is what the student reads. theirs: their tokenizers.

    Raises ConfigError for a template that cannot be used.
    """
    if not config.model.teachers and not config.teacher_reads_other_prompts:
        return None
    chosen = config.data.teacher_chat_template
    templates: list[str | None]
    if chosen == "student":
        templates = [None] * len(theirs)
    elif chosen == "teacher":
        templates = [other.chat_template for other in theirs]
        if None in templates:
            name = config.each_teacher[templates.index(None)].model.teacher_model_name_or_path
            raise ConfigError(
                f'data.teacher_chat_template = "teacher", and the tokenizer of {name!r} has none; name a Jinja file, '
                'or write "student"'
            )
    else:
        try:
            templates = [Path(chosen).read_text(encoding="utf-8-sig")] * len(theirs)
        except (OSError, ValueError) as error:  # ValueError: not UTF-8
            raise ConfigError(
                f"data.teacher_chat_template = {chosen!r} cannot be read ({error}); write student, teacher, or the "
                "path of a Jinja file"
            ) from None
    return TeacherView(config.data, tokenizer, config.model.teachers, templates)


def build_teacher(
    config: Config,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run_dir: Path | None,
    *,
    device: torch.device,
    ends: Sequence[int] = (),
    world: World = ALONE,
) -> tuple[Teacher, int]:
    """The teacher, or all of them behind one, and how many ids every model has.

    world: the ranks that share it, where `model.teacher_placement` says so.

    Raises ModelError, TokenizerError or ServerError when one does not fit the student or the recipe, or is another
    served teacher than the one that this run directory, where there is one, began with.
    """
    teachers = [
        _build_one(one, student, tokenizer, _known_probe(run_dir, i), device=device, ends=ends, world=world)
        for i, one in enumerate(config.each_teacher)
    ]
    vocab_size = min(teacher.vocab_size for teacher in teachers)
    for teacher in teachers:
        teacher.vocab_size = vocab_size
    return (RoutedTeacher(teachers) if len(teachers) > 1 else teachers[0]), vocab_size


def build_moving_teacher(config: Config, teacher: Teacher) -> MovingTeacher | None:
    """What moves the teacher after each step; None where it stays as it is."""
    decay = config.model.teacher_ema_decay
    if decay is None:
        return None
    assert isinstance(teacher, LocalTeacher)  # config/rules.py lets no other
    return MovingTeacher(teacher.model, decay)


def served_teachers(teacher: Teacher) -> list[ServedTeacher]:
    """Those that a server holds."""
    return [one for one in _each(teacher) if isinstance(one, ServedTeacher)]


def _build_one(
    config: Config,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    known: list[float] | None,
    *,
    device: torch.device,
    ends: Sequence[int] = (),
    world: World = ALONE,
) -> LocalTeacher | ServedTeacher:
    """The teacher of a recipe that has one. known: how a served one scored its probe when the run began."""
    settings, top_k = config.model, config.objective.top_k
    name = settings.teacher_model_name_or_path
    longest = config.data.longest_for_teacher + config.rollout.max_completion_length
    if settings.teacher_model_server_url is None:
        shared = settings.teacher_placement == "sharded" and world.size > 1
        model = models.load_model(
            name,
            settings,
            dtype=settings.teacher_dtype,
            device=device,
            longest=config.data.longest_for_teacher + config.longest_response,
            on_cpu=shared,
        )
        models.check_context(model.config, name, longest)
        vocab_size = models.shared_vocab_size(student, model.get_output_embeddings().weight.shape[0], top_k)
        models.check_ends(ends, vocab_size)
        if not shared:
            return LocalTeacher(model, vocab_size=vocab_size, ends=ends, compile=settings.compile)
        local = LocalTeacher(model, vocab_size=vocab_size, ends=ends, world=world)
        distributed.shard(model, device=device)
        return local
    teacher_config = read_model_config(name, settings, local_files_only=False)
    if teacher_config is None:
        raise ModelError(
            f"config.json of the served teacher {name!r} cannot be read: not a folder, not on the Hub, or no network. "
            "Set model.teacher_model_name_or_path to a folder with its config.json and tokenizer"
        )
    vocab_size = models.shared_vocab_size(student, teacher_config.get_text_config().vocab_size, top_k)
    models.check_ends(ends, vocab_size)
    served = settings.teacher_server
    if served.top_logprobs < (listed := listed_for(top_k, ends)):
        raise ModelError(
            f"model.teacher_server.top_logprobs = {served.top_logprobs} is too few: {len(ends)} ids that end a "
            f"response count as one, so {listed} are needed for the {top_k} likeliest; raise it, and the servers' "
            "--max-logprobs"
        )
    servers = Servers(
        settings.teacher_model_server_url,
        timeout=served.timeout,
        deadline=served.deadline,
        concurrency=served.concurrency,
    )
    teacher = ServedTeacher(
        servers,
        model=served.model or name,
        vocab_size=vocab_size,
        top_logprobs=min(served.top_logprobs, vocab_size),
        ends=ends,
    )
    teacher.check(tokenizer, longest, known)
    return teacher


def remember_teacher(teacher: Teacher, run_dir: Path) -> None:
    """Write down how served teachers scored their probes, so that a resumed run notices another one."""
    for number, one in enumerate(_each(teacher)):
        if isinstance(one, ServedTeacher):
            write_json(_probe_file(run_dir, number), {"logprobs": one.fingerprint})


def _known_probe(run_dir: Path | None, number: int) -> list[float] | None:
    if run_dir is None or not (path := _probe_file(run_dir, number)).exists():
        return None
    return read_object(path, TeacherProbe, CheckpointError)["logprobs"]


def _probe_file(run_dir: Path, number: int) -> Path:
    return run_dir / (f"teacher_probe_{number}.json" if number else "teacher_probe.json")


def _each(teacher: Teacher) -> Sequence[Teacher]:
    return teacher.teachers if isinstance(teacher, RoutedTeacher) else [teacher]
