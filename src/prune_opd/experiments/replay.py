"""What-if: other drift settings on the compatibilities that a run has logged, without a model.

Events, weights and lengths come from the functions that train (`drift_report`, `TrainingWindow`). A log has
two limits. Under other settings the student would have learnt other things and written other responses. And where a
response was cut, its continuation is unknown; where that matters, results come as two bounds.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prune_opd.config import Config, PruningSection
from prune_opd.core.drift import SAFE_SHARE, drift_report
from prune_opd.core.window import TrainingWindow
from prune_opd.errors import ConfigError, RunLogError
from prune_opd.reporting.drift_log import LoggedStep, read_drift
from prune_opd.reporting.records import write_text
from prune_opd.reporting.run_logs import read_config

SHORT_NAMES = {"overlap_ratio": "overlap", "overlap_mass": "mass", "teacher_top_p_accept": "nucleus"}


@dataclass
class WhatIf:
    """One setting over a whole log; tokens and counts are sums over its steps.

    limit: the threshold, or teacher_top_p for its metric · events: drift events · kept: tokens with R > ε · weight: sum
    of the weights · ended_whole: responses that ended by themselves, reliable to their last token · window_low,
    window_high: M_t, the longest response that the window would have allowed at each step · sampled_low, sampled_high:
    tokens sampled under it · in_flight: tokens left of sampled_low if rollouts also stopped when spent · open: rollouts
    that were cut in the log at fewer tokens than window_high.

    Low assumes that an open rollout ended where it was cut. High assumes that it filled the window, and stayed reliable
    if it was reliable so far.
    """

    metric: str
    limit: float
    w_drop: float
    events: int = 0
    kept: int = 0
    weight: float = 0.0
    ended_whole: int = 0
    sampled_low: int = 0
    sampled_high: int = 0
    in_flight: int = 0
    open: int = 0
    window_low: list[int] = field(default_factory=list)
    window_high: list[int] = field(default_factory=list)


@dataclass
class Logged:
    """What the log itself holds: steps, rollouts, those that ended by themselves, tokens."""

    steps: int = 0
    rollouts: int = 0
    ended: int = 0
    tokens: int = 0


def replay(
    run_dir: Path,
    *,
    thresholds: Sequence[float],
    w_drops: Sequence[float],
    metrics: Sequence[str],
    top_ps: Sequence[float],
    console: Console,
    json_path: Path | None = None,
) -> list[WhatIf]:
    """Try every combination on the log of a run; print a table, write the same as JSON (default: RUN_DIR/replay.json).

    An empty list stands for the run's own setting; of thresholds, for 0.5 to 0.9 and the run's own. Raises RunLogError
    when the directory holds no drift log, and ConfigError for a value out of range.
    """
    config = read_config(run_dir)
    settings = variants(config.pruning, thresholds, w_drops, metrics, top_ps)
    if config.pruning.repetition.enable:
        warnings.warn(
            f"{run_dir} counted loops as drift (pruning.repetition); the log has no tokens to find them in, so what "
            "follows leaves them out",
            stacklevel=2,
        )
    logged, found = what_if(config, read_drift(run_dir), settings)
    if not logged.tokens:
        raise RunLogError(f"{run_dir / 'drift.jsonl'} holds no step yet; replay the run when it has done some")
    choice = suggested_threshold(found, logged.ended)
    _print(console, run_dir, config, logged, found, choice)
    path = json_path or run_dir / "replay.json"
    content = {"log": asdict(logged), "settings": [asdict(f) for f in found], "suggested_threshold": choice}
    write_text(path, json.dumps(content, indent=1) + "\n", "--json")
    console.print(f"written to {path}", soft_wrap=True, highlight=False)
    return found


def variants(
    pruning: PruningSection,
    thresholds: Sequence[float],
    w_drops: Sequence[float],
    metrics: Sequence[str],
    top_ps: Sequence[float],
) -> list[PruningSection]:
    """Every combination, checked; teacher_top_p_accept takes `top_ps`, the other metrics `thresholds`."""
    found = []
    for metric in metrics or [pruning.metric]:
        nucleus = metric == "teacher_top_p_accept"
        name = "teacher_top_p" if nucleus else "threshold"
        assert pruning.threshold != "auto"  # a run's config.json has the number
        own = [pruning.teacher_top_p] if nucleus else sorted({0.5, 0.6, 0.7, 0.8, 0.9, pruning.threshold})
        for limit, w_drop in product((top_ps if nucleus else thresholds) or own, w_drops or [pruning.w_drop]):
            try:
                changed = pruning.model_dump() | {"metric": metric, name: limit, "w_drop": w_drop}
                found.append(PruningSection.model_validate(changed))
            except ValueError:
                raise ConfigError(
                    f"metric {metric}, {name} {limit:g}, w_drop {w_drop:g}: cannot be tried; metrics are "
                    f"{', '.join(SHORT_NAMES)}, the numbers lie between 0 and 1"
                ) from None
    return found


def what_if(
    config: Config, logs: Iterable[LoggedStep], settings: Sequence[PruningSection]
) -> tuple[Logged, list[WhatIf]]:
    """Every setting on every step of a log: one pass, one step in memory."""
    logged, found = Logged(), []
    for s in settings:
        assert s.threshold != "auto"
        found.append(WhatIf(s.metric, s.teacher_top_p if s.metric == "teacher_top_p_accept" else s.threshold, s.w_drop))
    windows = [(_window(s), _window(s)) for s in settings]
    for log in logs:
        logged.steps += 1
        logged.rollouts += len(log.lengths)
        logged.ended += int(log.finished.sum())
        logged.tokens += int(log.lengths.sum())
        for pruning, result, (low, high) in zip(settings, found, windows, strict=True):
            _add_step(result, log, pruning, low, high, config.objective.top_k)
    return logged, found


def events_of(log: LoggedStep, pruning: PruningSection, top_k: int) -> Tensor:
    """(B, T) bool: the drift events that `drift_events` would have found, the repetition guard left out.

    ConfigError for a metric that a drift log does not hold.
    """
    assert pruning.threshold != "auto"
    match pruning.metric:
        case "overlap_ratio":
            compatible = log.shared / torch.tensor(top_k, dtype=torch.float32)  # as in topk_overlap
            events = compatible < pruning.threshold
        case "overlap_mass":
            events = log.mass < pruning.threshold
        case "teacher_top_p_accept":
            events = log.above >= pruning.teacher_top_p
        case _:
            raise ConfigError(f"drift.jsonl does not hold {pruning.metric}; it holds {', '.join(SHORT_NAMES)}")
    return events & log.mask


def suggested_threshold(found: Sequence[WhatIf], ended: int) -> float | None:
    """The largest threshold tried, with its w_drop, that is safe for the responses that ended by themselves.

    They are what pruning should leave whole. None if no response did, or if no threshold is safe.
    """
    limits = [f.limit for f in found if f.metric != "teacher_top_p_accept" and f.ended_whole >= SAFE_SHARE * ended > 0]
    return max(limits, default=None)


def _window(pruning: PruningSection) -> TrainingWindow:
    return TrainingWindow(**pruning.dynamic_response_length.model_dump(exclude={"enable"}))


def _add_step(
    result: WhatIf, log: LoggedStep, pruning: PruningSection, low: TrainingWindow, high: TrainingWindow, top_k: int
) -> None:
    events = events_of(log, pruning, top_k)
    drift = drift_report(events, log.mask, w_drop=pruning.w_drop, w_base=pruning.w_base, eps=pruning.positive_eps)
    effective, lengths = drift.effective_length, log.lengths
    whole = effective == lengths
    still_open = ~log.finished & (lengths < high.length)
    result.events += int(events.sum())
    result.kept += int(effective.sum())
    result.weight += drift.weight.double().sum().item()
    result.ended_whole += int((whole & log.finished).sum())
    result.open += int(still_open.sum())
    result.window_low.append(low.length)
    result.window_high.append(high.length)
    result.sampled_low += int(lengths.clamp(max=low.length).sum())
    result.sampled_high += int(lengths.masked_fill(still_open, high.length).clamp(max=high.length).sum())
    # The event that spends reliability is the last token of a stopped rollout.
    result.in_flight += int(torch.minimum(effective + 1, lengths).clamp(max=low.length).sum())
    # R never rises: of a response cut at M, the reliable tokens are the first min(E, M).
    low.update(effective.clamp(max=low.length))
    high.update(effective.masked_fill(still_open & whole, high.length).clamp(max=high.length))


# ---- for people ----


def _print(
    console: Console, run_dir: Path, config: Config, logged: Logged, found: Sequence[WhatIf], choice: float | None
) -> None:
    table = Table(padding=(0, 1, 0, 0), box=box.SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True)
    for heading in ("setting", "w_drop", "events", "kept", "whole", "window", "sampled", "in flight", "open"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for f in found:
        table.add_row(
            f"{SHORT_NAMES[f.metric]} {f.limit:g}",
            f"{f.w_drop:g}",
            f"{f.events / logged.tokens:.1%}",
            f"{f.kept / logged.tokens:.1%}",
            f"{f.ended_whole / logged.ended:.0%}" if logged.ended else "-",
            _bounds(f"{f.window_low[-1]}", f"{f.window_high[-1]}"),
            _bounds(f"{f.sampled_low / logged.tokens:.0%}", f"{f.sampled_high / logged.tokens:.0%}"),
            f"{f.in_flight / logged.tokens:.0%}",
            f"{f.open / logged.rollouts:.0%}",
        )
    dynamic = config.window_is_dynamic
    console.print(
        f"{run_dir}: {logged.steps} steps, {logged.rollouts:,} rollouts, {logged.tokens:,} tokens, of which "
        f"{logged.ended:,} rollouts ended by themselves; lengths were "
        + ("capped by a window" if dynamic else "set by a schedule" if config.control.lengths else "not capped")
        + f" within a budget of {config.rollout.max_completion_length:,}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(table)
    console.print(
        "events, kept: share of the logged tokens · whole: of the responses that ended by themselves, those reliable "
        "to the end · window: M of the last step · sampled: tokens under that window, as a share of the log's · "
        "in flight: the same, rollouts also stopping when spent · open: rollouts cut in the log where "
        "this window would have let them go on, low and high bound of which are given",
        style="dim",
        highlight=False,
    )
    rule = f"the largest threshold tried that leaves {SAFE_SHARE:.0%} of the responses that ended by themselves whole"
    if choice is not None:
        text = f"suggested: threshold {choice:g}, {rule}"
    elif not logged.ended:
        text = "no suggestion: not one response in this log ended by itself, and those are what must not be cut"
    else:
        text = f"no suggestion: the rule is {rule}, and none does; try lower thresholds or a lower w_drop"
    console.print(text, style="bold", highlight=False)
    console.print(
        "Read with care: the student would have learnt other things under other settings"
        + (", and this log never saw what lies past its window" if dynamic or config.control.lengths else ""),
        style="dim",
        highlight=False,
    )


def _bounds(low: str, high: str) -> str:
    return low if low == high else f"{low}-{high}"
