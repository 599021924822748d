"""drift.jsonl: how compatible student and teacher were at every token of a run, compactly, for what-ifs and reports.

Compatibility takes one byte a token and metric, written as two hexadecimal digits, so that every setting of drift can
be tried again without a model (`replay.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_opd.core.drift import DriftReport
from prune_opd.core.overlap import mass_above, overlap_mass, shared_candidates
from prune_opd.errors import RunLogError
from prune_opd.reporting.records import read_lines
from prune_opd.types import Rollouts, TeacherScores

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


def drift_record(
    step: int, rollouts: Rollouts, scores: TeacherScores, drift: DriftReport, weight: Tensor
) -> dict[str, Any]:
    """The line of one step; weight (B, T), as it was applied."""
    student, teacher = rollouts.student, scores.topk
    assert student is not None
    lengths = rollouts.lengths.tolist()
    above = mass_above(rollouts.response_ids, teacher.ids, teacher.logprobs)
    return {
        "step": step,
        "length": lengths,
        "finished": rollouts.finished.tolist(),
        "stopped": rollouts.stopped.tolist(),
        "effective_length": drift.effective_length.tolist(),
        "onset": drift.onset.tolist(),
        "shared": _hex(shared_candidates(student.ids, teacher.ids).sum(-1), lengths),
        "mass": _hex(_level(overlap_mass(student.ids, student.logprobs, teacher.ids)), lengths),
        "above": _hex(_level(above).where(above.isfinite(), 255), lengths),
        "weight_by_position": _mean_by_position(weight, rollouts.response_mask),
    }


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

    def bytes_of(name: str) -> Tensor:
        values = torch.zeros(mask.shape, dtype=torch.long)
        values[mask] = torch.tensor(list(bytes.fromhex("".join(record[name]))))
        return values

    above = bytes_of("above")
    return LoggedStep(
        record["step"],
        lengths,
        torch.tensor(record["finished"]),
        mask,
        bytes_of("shared"),
        bytes_of("mass") / MASS_LEVELS,
        (above / MASS_LEVELS).where(above < 255, torch.inf),
    )


def _level(mass: Tensor) -> Tensor:
    return (mass.clamp(0, 1) * MASS_LEVELS).round().long()


def _hex(values: Tensor, lengths: Sequence[int]) -> list[str]:
    return [bytes(row[:n]).hex() for row, n in zip(values.tolist(), lengths, strict=True)]


def _mean_by_position(values: Tensor, mask: Tensor) -> list[float]:
    """Mean over the rollouts that reach each position; values, mask (B, T)."""
    reached = mask.sum(0)
    means = values.double().masked_fill(~mask, 0).sum(0)[reached > 0] / reached[reached > 0]
    return [round(mean, 4) for mean in means.tolist()]
