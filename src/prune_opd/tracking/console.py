"""What a person sees while a run goes on: one line a step."""

from __future__ import annotations

from typing import Any

from rich.console import Console

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


class StepLines:
    """Prints a heading, then one line for each step; plain text when the output is not a terminal."""

    def __init__(self, console: Console, *, label: str = "") -> None:
        self.console, self.label, self.printed = console, label, 0

    def show(self, record: dict[str, Any]) -> None:
        """Print the line of one metrics record."""
        if self.printed % 20 == 0:
            self.console.print("".join(f"{heading:>{width}}" for heading, width, _ in COLUMNS), style="bold")
        self.printed += 1
        self.console.print("".join(f"{show(record):>{width}}" for _, width, show in COLUMNS), highlight=False)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
