"""What stands in the files of a run, and the one way in which they are read.

Each kind of file has a type here. Whatever reads one checks it against the type first and gets it as plain dicts and
lists; what the type does not name is kept, so that logs of other versions can be read. An error has the file, the line
and the field.
"""

from __future__ import annotations

import re
import zlib
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pydantic_core
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from prune_opd.config.values import MOST
from prune_opd.config.words import shown
from prune_opd.errors import PruneOPDError, RunLogError, StorageError

Count = Annotated[int, Field(ge=0, le=MOST)]
Share = Annotated[float, Field(ge=0, le=1)]
Quantity = Annotated[float, Field(ge=0, le=1e15)]
LONGEST = 2**26  # tokens of one rollout, far above any: what a forged text may unpack to


class Record(BaseModel):
    """An object in a file. Strict: 3 is no text and "3" no number."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())


class StepRecord(Record):
    """A line of any log."""

    step: Count


THIS_WINDOW, NEXT_WINDOW = "prune_opd/current_max_response_length", "prune_opd/next_max_response_length"
TRAINED = (
    *("steps", "eta_seconds", "loss", THIS_WINDOW, NEXT_WINDOW, "distillation/overlap_ratio", "completions/eos_rate"),
    *(f"prune_opd/effective_response_length_{of}" for of in ("mean", "p90")),
    *(f"tokens/{of}" for of in ("generated", "scored", "trained", "saved")),
    *(f"time/{of}" for of in ("rollout", "teacher", "update", "total")),
)
EVALUATED = ("eval/accuracy", "eval/ci95", "eval/per_problem", "eval/mean_length", "eval/eos_rate", "time/eval")


class Metrics(StepRecord):
    """A line of metrics.jsonl: a step that trained, one that was skipped, or step 0, before training.

    Any of them may have an evaluation. What no field names is a number; of tokens and seconds, a finite one.
    """

    __pydantic_extra__: dict[str, float]
    skipped: str | None = None
    usual_norm: float | None = Field(None, alias="grad_norm_usual")
    window: Count | None = Field(None, alias=THIS_WINDOW)
    next_window: Count | None = Field(None, alias=NEXT_WINDOW)
    accuracy: Share | None = Field(None, alias="eval/accuracy")
    ci95: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(None, alias="eval/ci95")
    per_problem: Annotated[list[Share], Field(min_length=1)] | None = Field(None, alias="eval/per_problem")

    @model_validator(mode="after")
    def _complete(self) -> Metrics:
        extra = self.__pydantic_extra__
        there = {*extra, *(field.alias for n, field in type(self).model_fields.items() if getattr(self, n) is not None)}
        wanted = (TRAINED if self.step and self.skipped is None else ()) + (
            EVALUATED if there.intersection(EVALUATED[:3]) else ()
        )
        if lacking := [name for name in wanted if name not in there]:
            raise ValueError(f"{', '.join(lacking)} missing")
        finite = {n: v for n, v in extra.items() if n.startswith(("time/", "tokens/", "eta_", "steps"))}
        bad = next((n for n, v in finite.items() if not 0 <= v <= 1e15), None)
        if bad:
            raise ValueError(f"{bad} is {extra[bad]}, which it cannot be")
        return self


def bytes_of_text(text: str) -> bytes:
    """One byte for each token of a rollout, from the text that a drift log has of it. ValueError for another text."""
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(b64decode(text, validate=True), LONGEST)
    except zlib.error as error:
        raise ValueError(f"no bytes of a rollout: {error}") from None
    if not unpacker.eof:
        raise ValueError("the bytes of a rollout are cut off, or far too many")
    return found


Packed = Annotated[str, AfterValidator(bytes_of_text)]


class Drift(StepRecord):
    """A line of drift.jsonl; each list has an entry for each rollout, and `reporting/drift_log.py` says what."""

    step: Annotated[int, Field(ge=1, le=MOST)]
    length: Annotated[list[Count], Field(min_length=1)]
    finished: list[bool]
    stopped: list[bool]
    effective_length: list[Count]
    onset: list[Annotated[int, Field(ge=-1, le=MOST)]]
    shared: list[Packed]
    mass: list[Packed]
    above: list[Packed]
    weight_by_position: list[float] = []

    @model_validator(mode="after")
    def _of_one_shape(self) -> Drift:
        for name in ("finished", "stopped", "effective_length", "onset", "shared", "mass", "above"):
            if len(getattr(self, name)) != len(self.length):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {len(self.length)} rollouts")
        for name in ("shared", "mass", "above"):
            if [len(row) for row in getattr(self, name)] != self.length:  # in bytes, one a token
                raise ValueError(f"{name} has other lengths than `length`")
        return self


class Candidates(Record):
    """Of one model, at each token: the likeliest ids, and their log-probabilities."""

    ids: list[list[int]]
    logprobs: list[list[float]]


class Rollout(StepRecord):
    """A line of rollouts.jsonl, as `reporting/rollout_log.py` writes it; without token_ids, the text alone."""

    prompt: str
    response: str
    token_ids: list[int] = []
    weight: list[float] = []
    shared: list[int] = []
    teacher_logprob: list[float] = []
    student: Candidates | None = None
    teacher: Candidates | None = None
    texts: dict[str, str] = {}

    @model_validator(mode="after")
    def _of_one_length(self) -> Rollout:
        if not self.token_ids:
            return self
        if self.student is None or self.teacher is None:
            raise ValueError("student or teacher is missing")
        lists: list[list[Any]] = [self.weight, self.shared, self.teacher_logprob]
        lists += [self.student.ids, self.student.logprobs, self.teacher.ids, self.teacher.logprobs]
        if {len(values) for values in lists} != {len(self.token_ids)}:
            raise ValueError("the lists by token have different lengths")
        ids = {*self.token_ids, *(v for side in (self.student, self.teacher) for at in side.ids for v in at)}
        if unnamed := [v for v in sorted(ids) if str(v) not in self.texts]:
            raise ValueError(f"texts has none for id {unnamed[0]}")
        return self


class Environment(Record):
    """env.json: what a number depends on besides the recipe."""

    __pydantic_extra__: dict[str, str | int | float | None]


class Arm(Record):
    """One arm of a comparison."""

    arm: Annotated[str, Field(min_length=1)]


class Comparison(Record):
    """compare.json."""

    arms: list[Arm]


class Written(Record):
    """Who wrote the responses that a threshold was calibrated on, and what they showed."""

    tokens: Count
    responses: Count
    compatibility: float
    events: Share
    whole: Share


class Calibration(Record):
    """calibration.json."""

    threshold: Share
    seconds: Quantity
    student_written: Written
    teacher_written: Written


class Estimate(Record):
    """A share with its 95% interval; null where there was too little to tell."""

    value: Share | None
    low: Share | None
    high: Share | None


class Rescued(Record):
    """How many continuations of prefixes with this reliability were right."""

    reliability: str
    cuts: Count
    teacher: Estimate
    student: Estimate


class Probe(Record):
    """What `prune-opd probe` wrote; in a folder of runs, probe.json."""

    verdict: str
    problems: Count
    continuations: Count
    by_reliability: list[Rescued]


class TeacherProbe(Record):
    """teacher_probe.json: how a served teacher scored its probe."""

    logprobs: list[float] | None


class Settings(Record):
    """config.json, whose fields are those of `config.Config`."""


LOG_KINDS: dict[str, type[StepRecord]] = {
    "metrics.jsonl": Metrics,
    "drift.jsonl": Drift,
    "rollouts.jsonl": Rollout,
    "skipped.jsonl": StepRecord,
}


def parse(content: bytes, kind: type[Record], where: str, error: type[PruneOPDError] = RunLogError) -> Any:
    """JSON that was checked to be of a kind, as dicts and lists. `error` has `where` and the field."""
    try:
        value = pydantic_core.from_json(content)
    except ValueError as invalid:
        raise error(f"{where}: no JSON ({shown(str(invalid))}); restore or remove it") from None
    check(value, kind, where, error)
    return value


def check(value: Any, kind: type[Record], where: str, error: type[PruneOPDError] = RunLogError) -> None:
    """`error`, with `where` and the field, for a value that is not of a kind."""
    try:
        kind.model_validate(value)
    except ValidationError as invalid:
        first = invalid.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        written = f", got {shown(repr(first['input']))}" if name and first["type"] != "missing" else ""
        raise error(
            f"{where}: {f'field {name}: ' if name else ''}{message}{written}; it was edited or damaged, or another "
            "version wrote it: restore or remove it"
        ) from None


def read_object(path: Path, kind: type[Record], error: type[PruneOPDError] = RunLogError) -> dict[str, Any]:
    """The object in a JSON file; `error` when it cannot be read or is not of that kind."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as cause:
        raise error(f"{path} cannot be read ({cause}); restore it from the run that wrote it") from None
    return parse(content, kind, str(path), error)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a log that may still be written: a last line without its end is left out. Raises RunLogError."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                yield parse(line, LOG_KINDS[path.name], f"{path}:{number}")
    except OSError as cause:
        raise RunLogError(f"{path} cannot be read ({cause}); restore it from the run that wrote it") from None


def write_text(path: Path, text: str, option: str) -> None:
    """Write a file that a command was asked for; StorageError names the option that puts it elsewhere."""
    try:
        path.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as cause:
        raise StorageError(f"{path} could not be written ({cause}); choose another {option}") from None


POSITIONS = re.compile(r"/pos_(\d+)_(\d+)$")
"""The end of a metric's name that is of some positions of the responses: from, to."""
