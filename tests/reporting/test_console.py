"""What stands on the terminal, and what stands in a log file."""

from __future__ import annotations

import io
import logging
import re

import pytest
from rich.console import Console

from prune_opd.reporting.console import duration, sparkline, step_view


def record(step: int, overlap: float) -> dict:
    return {
        "step": step,
        "steps": 40,
        "eta_seconds": 83.0,
        "loss": 0.0521,
        "prune_opd/current_max_response_length": 44 + 4 * step,
        "prune_opd/effective_response_length_mean": 41.5,
        "prune_opd/effective_response_length_p90": 52.0,
        "distillation/overlap_ratio": overlap,
        "tokens/generated": 1000,
        "tokens/trained": 1000,
        "tokens/saved": 3000,
        "time/total": 2.0,
        "time/rollout": 1.0,
        "time/teacher": 0.5,
        "time/update": 0.4,
    }


def shown(records, *, terminal: bool, earlier=(), quiet: bool = False) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100, quiet=quiet, color_system=None)
    with step_view(console, earlier) as show:
        for one in records:
            show(one)
    return file.getvalue()


RECORDS = [record(step, overlap) for step, overlap in ((1, 0.5), (2, 0.75), (3, 1.0))]


def test_a_terminal_gets_a_panel_that_stays_in_place():
    out = shown(RECORDS, terminal=True)
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out[out.rindex("╭") :])
    assert out.count("\x1b[?25l") == 1  # the cursor is hidden while it is redrawn
    for text in ("step 3 of 40", "ETA 1:23", "56 tokens", "41.5 mean, 52 at the 90th percentile", "1.000", "▁▅█"):
        assert text in last, text
    assert "at most 75% of tokens (9,000 cut off, 3,000 made)" in last
    assert "rollout 50%, teacher 25%, update 20%" in last


def test_a_resumed_run_keeps_its_trend_and_sums():
    out = shown(RECORDS[2:], terminal=True, earlier=RECORDS[:2])
    assert "▁▅█" in out and "3,000 made" in out


def test_the_panel_stands_before_the_first_step():
    assert "first step, 0:00 so far" in shown([], terminal=True)


def test_elsewhere_each_step_is_a_plain_line():
    out = shown(RECORDS, terminal=False)
    assert "\x1b" not in out and "╭" not in out
    heading, *lines = out.splitlines()
    assert heading.split() == ["step", "window", "eff.len", "overlap", "loss", "tok/s", "saved", "s/step", "eta"]
    assert lines[2].split() == ["3/40", "56", "41.5", "1.000", "0.0521", "500", "3,000", "2.00", "1:23"]


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_is_silent(terminal):
    assert shown(RECORDS, terminal=terminal, quiet=True) == ""


def test_sparkline_and_duration():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert (duration(59.6), duration(3661)) == ("1:00", "1:01:01")


def test_a_server_that_cannot_be_reached_is_shown_above_the_panel():
    """Its warning goes to standard error, which the panel draws around."""
    shown = io.StringIO()
    with step_view(Console(file=shown, force_terminal=True, width=100)):
        # What handles a warning where nobody set up logging; pytest does.
        logging.lastResort.emit(logging.makeLogRecord({"msg": "cannot reach h:1 (connection refused)"}))
    assert "cannot reach h:1 (connection refused)" in shown.getvalue()
