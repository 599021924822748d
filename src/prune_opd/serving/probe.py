"""A fixed sequence whose log-probabilities tell two models apart."""

from __future__ import annotations

PROBE_TOKENS = 64


def probe_ids(vocab_size: int) -> list[int]:
    """A fixed sequence over the whole vocabulary."""
    return [i * vocab_size // PROBE_TOKENS for i in range(PROBE_TOKENS)]
