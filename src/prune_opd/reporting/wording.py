"""Numbers and settings as people read them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def duration(seconds: float) -> str:
    """Seconds for people: 57 s, 12 min 5 s, 6 h 54 min."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def percent(share: float) -> str:
    """A share with one decimal."""
    return f"{share:.1%}".replace("-", "−")


def flattened(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings under their dotted names."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
