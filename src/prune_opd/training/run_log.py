"""The logs of a run: metrics of each step, drift by position, some rollouts, and the trackers that are told too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prune_opd.config import Config
from prune_opd.distributed.merging import Share
from prune_opd.reporting.drift_log import drift_record, drift_share
from prune_opd.reporting.pictures import run_picture
from prune_opd.reporting.rollout_log import rollout_record
from prune_opd.reporting.run_logs import read_metrics, trained
from prune_opd.reporting.trackers import Tracker, start_trackers
from prune_opd.step import StepResult
from prune_opd.training.files import append_json
from prune_opd.types import Prompt


class RunLog:
    """Appends to metrics.jsonl, drift.jsonl and rollouts.jsonl of a run directory."""

    def __init__(self, run_dir: Path, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        self.run_dir, self.config, self.tokenizer = run_dir, config, tokenizer
        self.trackers: list[Tracker] = []

    def start(self) -> None:
        """Start the trackers that `tracking.report_to` names."""
        done = self.steps()[-1:]
        next_step = done[0]["step"] + 1 if done else 0
        self.trackers = start_trackers(self.config.tracking, self.run_dir, self.config.model_dump(), next_step)

    def close(self) -> None:
        """End the trackers: another run of this process begins its own."""
        for tracker in self.trackers:
            tracker.close()
        self.trackers = []

    def steps(self) -> list[dict[str, Any]]:
        """The records of the steps that are logged already."""
        return [record for record in read_metrics(self.run_dir) if trained(record)]

    def metrics(self, record: dict[str, Any]) -> None:
        """Log the record of a step."""
        append_json(self.run_dir / "metrics.jsonl", record)
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        for tracker in self.trackers:
            tracker.numbers(numbers, record["step"])
        last = record["step"] == self.config.training.steps
        if self.trackers and trained(record) and (last or record["step"] % self.config.tracking.report_every == 0):
            pixels = run_picture(self.steps())
            for tracker in self.trackers:
                tracker.picture(pixels, record["step"])

    def share(self, prompts: Sequence[Prompt], result: StepResult) -> Share:
        """What `rollouts` writes of this rank's rollouts. prompts: of each of the step's rollouts."""
        tracking, share = self.config.tracking, drift_share(result)
        share.rows["logged"] = [
            rollout_record(result, row, prompts[number], self.tokenizer, tracking)
            if number < tracking.rollouts_per_step
            else None
            for row, number in enumerate(result.numbers)
        ]
        return share

    def rollouts(self, step: int, share: Share) -> None:
        """Log what drift did at each position of a step, and the first `tracking.rollouts_per_step` rollouts of it."""
        logged = share.rows.pop("logged")
        append_json(self.run_dir / "drift.jsonl", drift_record(step, share))
        for record in logged:
            if record is not None:
                append_json(self.run_dir / "rollouts.jsonl", {"step": step, **record})
