"""A picture of a run so far, for trackers: where student and teacher agree, and how long responses may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prune_opd.reporting.records import POSITIONS, THIS_WINDOW

OVERLAP = "distillation/overlap_ratio"
REACHED = "prune_opd/effective_response_length_p90"


def overlap_map(records: Sequence[Mapping[str, Any]]) -> tuple[list[int], np.ndarray]:
    """(the first position of each bucket and the end of the last, the mean overlap in it at each step).

    records: those of metrics.jsonl. The array is (buckets, steps) float64, NaN where no rollout of a step came so far.
    """
    found = [
        {(int(at[1]), int(at[2])): value for key, value in record.items() if (at := _bucket(key))} for record in records
    ]
    buckets = sorted({bucket for step in found for bucket in step})
    cells = [[step.get(bucket, np.nan) for step in found] for bucket in buckets]
    edges = [start for start, _ in buckets] + [end for _, end in buckets[-1:]]
    return edges, np.array(cells, dtype=float).reshape(len(buckets), len(found))


def _bucket(key: str) -> Any:
    return POSITIONS.fullmatch(key, len(OVERLAP)) if key.startswith(OVERLAP) else None


def run_picture(records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Overlap by position and step, above the window and what of it was reliable: (height, width, 3) uint8.

    records: those of metrics.jsonl that are of steps, in order; at least one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [record["step"] for record in records]
    edges, overlap = overlap_map(records)
    figure = Figure(figsize=(8, 6), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    drawn = above.pcolormesh(
        np.append(steps, steps[-1] + 1) - 0.5, edges, np.ma.masked_invalid(overlap), vmin=0, vmax=1, cmap="RdYlBu"
    )
    figure.colorbar(drawn, ax=above, label="overlap")
    above.set(ylabel="position", title="Overlap by position and step")
    below.plot(steps, [record[THIS_WINDOW] for record in records], label="window")
    below.plot(steps, [record[REACHED] for record in records], label="90% of rollouts are reliable no further")
    below.set(xlabel="step", ylabel="tokens", ylim=(0, None))
    below.legend()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
