"""What a stop makes of a rollout, whichever engine sampled it."""

from __future__ import annotations

import pytest
import torch

from prune_opd.rollout.base import Progress
from prune_opd.types import TopK


class Stops:
    every = 1

    def __init__(self, kept: int) -> None:
        self.kept, self.spans = kept, []

    def watch(self, response_ids, student, spans):
        self.spans += spans
        return {span.rollout: self.kept for span in spans}


@pytest.mark.parametrize(("kept", "finished"), [(3, False), (5, True)])
def test_a_stop_before_the_end_token_is_a_stop_and_one_at_it_is_none(kept, finished):
    progress, watcher = Progress(1), Stops(kept)
    progress.lengths, progress.finished = [5], [True]
    progress.show(watcher, torch.zeros(1, 5, dtype=torch.long), TopK.empty(1, 5, 2), [0], [0])
    assert (progress.lengths, progress.finished, progress.stopped) == ([kept], [finished], [not finished])


def test_each_token_is_shown_once():
    progress, watcher = Progress(1), Stops(99)
    watcher.watch = lambda ids, student, spans: watcher.spans.extend(spans) or {}
    for length in (2, 2, 5):
        progress.lengths = [length]
        progress.show(watcher, torch.zeros(1, 5, dtype=torch.long), TopK.empty(1, 5, 2), [0], [])
    assert [(span.start, span.end) for span in watcher.spans] == [(0, 2), (2, 5)]
