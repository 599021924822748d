"""What a person sees while a run goes on: a panel on a terminal, one line a step anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

COLUMNS = (  # heading, width, how to show one metrics record
    ("step", 9, lambda m: f"{m['step']}/{m['steps']}"),
    ("window", 7, lambda m: f"{m['prune_opd/current_max_response_length']}"),
    ("eff.len", 8, lambda m: f"{m['prune_opd/effective_response_length_mean']:.1f}"),
    ("overlap", 8, lambda m: f"{m['distillation/overlap_ratio']:.3f}"),
    ("loss", 8, lambda m: f"{m['loss']:.4f}"),
    ("tok/s", 8, lambda m: f"{m['tokens/trained'] / m['time/total']:,.0f}"),
    ("saved", 8, lambda m: f"{m['tokens/saved']:,}"),
    ("s/step", 7, lambda m: f"{m['time/total']:.2f}"),
    ("eta", 8, lambda m: duration(m["eta_seconds"])),
)
BARS = "▁▂▃▄▅▆▇█"
TREND = 40  # steps that a sparkline shows
PHASES = ("rollout", "teacher", "update")


@contextmanager
def step_view(console: Console, earlier: Sequence[dict[str, Any]] = ()) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives `show(metrics record of a step)`; a panel that stays in place if `console` is a terminal, else lines.

    earlier: records of the steps before a resume, which belong to the trends and sums of the panel.
    """
    if console.quiet or not console.is_terminal:
        yield _lines(console)
        return
    view = StepPanel(earlier)
    with Live(view, console=console, refresh_per_second=2):
        yield view.show


def _lines(console: Console) -> Callable[[dict[str, Any]], None]:
    printed = 0

    def show(record: dict[str, Any]) -> None:
        nonlocal printed
        if printed % 20 == 0:
            console.print("".join(f"{heading:>{width}}" for heading, width, _ in COLUMNS), style="bold")
        printed += 1
        console.print("".join(f"{show(record):>{width}}" for _, width, show in COLUMNS), highlight=False)

    return show


class StepPanel:
    """Progress, window, overlap and savings of a run, drawn anew whenever rich asks."""

    def __init__(self, earlier: Sequence[dict[str, Any]] = ()) -> None:
        self.records = list(earlier)
        self.shown_at = time.monotonic()

    def show(self, record: dict[str, Any]) -> None:
        """Take the metrics record of the step that just ended."""
        self.records.append(record)
        self.shown_at = time.monotonic()

    def __rich__(self) -> Panel:
        waited = duration(time.monotonic() - self.shown_at)
        if not self.records:
            return Panel(f"first step, {waited} so far", title="prune-opd", title_align="left")
        now = self.records[-1]
        head = Table.grid(expand=True, padding=(0, 2))
        head.add_column(ratio=1)
        head.add_column(justify="right")
        head.add_row(
            ProgressBar(total=now["steps"], completed=now["step"]),
            f"{now['time/total']:.2f} s a step, {waited} since the last, ETA {duration(now['eta_seconds'])}",
        )
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim")
        for name, value, trend in self._rows():
            facts.add_row(name, value, Text(trend, style="cyan"))
        title = f"[bold]prune-opd[/] step {now['step']} of {now['steps']}"
        return Panel(Group(head, facts), title=title, title_align="left", border_style="dim")

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        now = self.records[-1]
        window, effective = "prune_opd/current_max_response_length", "prune_opd/effective_response_length"
        yield "window", f"{now[window]:,} tokens", self._trend(window)
        yield (
            "effective length",
            f"{now[f'{effective}_mean']:,.1f} mean, {now[f'{effective}_p90']:,.0f} at the 90th percentile",
            self._trend(f"{effective}_mean"),
        )
        yield "overlap", f"{now['distillation/overlap_ratio']:.3f}", self._trend("distillation/overlap_ratio")
        yield "loss", f"{now['loss']:.4f}", self._trend("loss")
        saved, made = (sum(r[f"tokens/{name}"] for r in self.records) for name in ("saved", "generated"))
        yield "saved", f"at most {saved / max(saved + made, 1):.0%} of tokens ({saved:,} cut off, {made:,} made)", ""
        parts = {name: sum(r[f"time/{name}"] for r in self.records) for name in PHASES}
        whole = sum(r["time/total"] for r in self.records)
        yield "time", ", ".join(f"{name} {seconds / max(whole, 1e-9):.0%}" for name, seconds in parts.items()), ""

    def _trend(self, key: str) -> str:
        return sparkline([record[key] for record in self.records[-TREND:]])


def sparkline(values: Sequence[float]) -> str:
    """One block character a value, from the lowest to the highest of them."""
    low, high = min(values), max(values)
    if high == low:
        return BARS[0] * len(values)
    return "".join(BARS[round((value - low) / (high - low) * (len(BARS) - 1))] for value in values)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
