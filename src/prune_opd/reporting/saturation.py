"""A window that grows because no response ends, and not because student and teacher agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prune_opd.reporting.records import NEXT_WINDOW, THIS_WINDOW

STEPS = 10  # in a row
CLIPPED = 0.95  # of the responses of each of them


def saturated(records: Sequence[Mapping[str, Any]]) -> str | None:
    """What to say of steps in a row, oldest first: None unless nearly all responses of the last `STEPS` were cut.

    records: of metrics.jsonl, of steps that were trained. While that goes on and the window grows, effective length
    reads the window itself: whatever it is set to is reached.
    """
    last = records[-STEPS:]
    if len(last) < STEPS or any(record.get("completions/clipped_ratio", 0) < CLIPPED for record in last):
        return None
    began, now = last[0][THIS_WINDOW], last[-1][NEXT_WINDOW]
    if now <= began:
        return None
    return (
        f"up to step {last[-1]['step']}, for {STEPS} steps at least {CLIPPED:.0%} of the responses were cut by the "
        f"window, which grew from {began:,} to {now:,} tokens: it follows responses that do not end, not drift. See "
        "whether student and teacher end with the same token: prune-opd doctor"
    )


def when_saturated(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What `saturated` says, where it begins to: once for each stretch of steps."""
    before = None
    for end in range(STEPS, len(records) + 1):
        said = saturated(records[end - STEPS : end])
        if said and not before:
            yield said
        before = said
