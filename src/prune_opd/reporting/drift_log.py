"""drift.jsonl: how compatible student and teacher were at every token of a run, compactly, for what-ifs and reports.

Compatibility is one byte a token and metric, compressed (zlib, base64) for each rollout, so that every setting of drift
can be tried again without a model (`replay.py`).
"""

from __future__ import annotations

import zlib
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prune_opd.core.overlap import mass_above, overlap_mass, shared_candidates
from prune_opd.distributed.merging import Share
from prune_opd.errors import RunLogError
from prune_opd.reporting.records import bytes_of_text, read_lines

if TYPE_CHECKING:
    from prune_opd.step import StepResult

MASS_LEVELS = 254  # of a probability mass in a byte; 255 is left for "not among the candidates"


@dataclass(frozen=True)
class LoggedStep:
    """One step of drift.jsonl.

    lengths (B,) int64 · finished (B,) bool, the rollout ended by itself, else it was cut or stopped · mask (B, T) bool
    · shared (B, T) int64, candidates that both models have · mass (B, T) float32, the student's probability on them,
    and above (B, T) float32, the teacher's probability of what it ranks above the sampled token, +inf where that is
    none of its candidates; both to within 1/508.
    """

    step: int
    lengths: Tensor
    finished: Tensor
    mask: Tensor
    shared: Tensor
    mass: Tensor
    above: Tensor


def drift_share(result: StepResult) -> Share:
    """What the drift log keeps of this rank's rollouts: about two bytes a token, however large K and the vocabulary."""
    rollouts, teacher, drift, mask = result.rollouts, result.scores.topk, result.drift, result.rollouts.response_mask
    student = rollouts.student
    assert student is not None
    lengths = rollouts.lengths.tolist()
    above = mass_above(rollouts.response_ids, teacher.ids, teacher.logprobs)
    rows: dict[str, Tensor | list[Any]] = {
        "length": lengths,
        "finished": rollouts.finished.tolist(),
        "stopped": rollouts.stopped.tolist(),
        "effective_length": drift.effective_length.tolist(),
        "onset": drift.onset.tolist(),
        "shared": _text(shared_candidates(student.ids, teacher.ids).sum(-1), lengths),
        "mass": _text(_level(overlap_mass(student.ids, student.logprobs, teacher.ids)), lengths),
        "above": _text(_level(above).where(above.isfinite(), 255), lengths),
    }
    sums = {"weight": result.weight.double().masked_fill(~mask, 0).sum(0), "reached": mask.sum(0).double()}
    return Share(result.numbers, rows, sums)


def drift_record(step: int, share: Share) -> dict[str, Any]:
    """The line of one step, from the shares of all ranks."""
    weight, reached = share.sums["weight"], share.sums["reached"]
    means = weight[reached > 0] / reached[reached > 0]
    return {"step": step, **share.rows, "weight_by_position": [round(mean, 4) for mean in means.tolist()]}


def read_drift(run_dir: Path) -> Iterator[LoggedStep]:
    """The steps of a run's drift.jsonl, in order; RunLogError when there is none, or a line does not hold one."""
    path = run_dir / "drift.jsonl"
    if not path.is_file():
        raise RunLogError(f"{run_dir} holds no drift.jsonl; give the directory of a run")
    for record in read_lines(path):
        yield _parsed(record)


def _parsed(record: dict[str, Any]) -> LoggedStep:
    lengths = torch.tensor(record["length"])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]

    def whole(name: str) -> Tensor:
        values = torch.zeros(mask.shape, dtype=torch.long)
        values[mask] = torch.tensor(list(b"".join(map(bytes_of_text, record[name]))))
        return values

    above = whole("above")
    return LoggedStep(
        record["step"],
        lengths,
        torch.tensor(record["finished"]),
        mask,
        whole("shared"),
        whole("mass") / MASS_LEVELS,
        (above / MASS_LEVELS).where(above < 255, torch.inf),
    )


def _level(mass: Tensor) -> Tensor:
    return (mass.clamp(0, 1) * MASS_LEVELS).round().long()


def _text(values: Tensor, lengths: Sequence[int]) -> list[str]:
    """Bytes (B, T) as one compressed text for each rollout."""
    rows = values.to(torch.uint8).cpu().numpy()
    return [b64encode(zlib.compress(row[:n].tobytes())).decode() for row, n in zip(rows, lengths, strict=True)]
