"""Stopping a rollout while it is generated, once its reliability is spent.

The paper says "no need to generate" but caps only the next batch. Here the teacher reads along: every `chunk` decode
steps it scores what is new, `DriftMonitor` counts events, and a rollout whose reliability is gone ends at the very
token that spent it. What was sampled past that token is thrown away, so the result does not depend on `chunk`.

A share of audit rollouts runs on uncut. They show how often a stopped rollout would have recovered, and keep EOS and
long responses in the training signal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prune_opd.config import PruningSection
from prune_opd.core.drift import DriftMonitor
from prune_opd.rollout.base import rollout_uniforms
from prune_opd.rollout.events import drift_events
from prune_opd.teachers.base import TeacherStream
from prune_opd.timing import Stopwatch
from prune_opd.types import Span, TeacherScores, TopK

AUDIT_STREAM = 2  # of random numbers; training samples from 0, evaluation from 1


def audited(seed: int, step: int, rollouts: Sequence[int], share: float) -> Tensor:
    """(B,) bool: which of these rollouts of a step are audit rollouts, drawn once from (seed, step, rollout)."""
    return rollout_uniforms(seed, step, rollouts, 1, stream=AUDIT_STREAM).squeeze(-1) < share


class InFlightStop:
    """A `Watcher` that ends rollouts whose reliability is spent. `scores` holds the teacher's scores so far."""

    def __init__(self, stream: TeacherStream, pruning: PruningSection, audit: Tensor, watch: Stopwatch) -> None:
        settings = pruning.in_flight
        self.stream, self.pruning, self.audit, self.stopwatch = stream, pruning, audit.tolist(), watch
        self.every, self.min_tokens = settings.chunk, settings.min_tokens
        w_drop = 1 / settings.stop_after_events if settings.stop_after_events else pruning.w_drop
        self.events_to_stop = math.ceil((1 - pruning.positive_eps) / w_drop) if w_drop else math.inf
        self.monitor = DriftMonitor(len(audit), w_drop=w_drop, eps=pruning.positive_eps)
        self.scores: TeacherScores | None = None
        self.unscored: dict[int, int] = {}  # rollout -> its first token that is not scored yet
        self.running = len(audit)
        self.whole: list[Span] = []  # rollouts that ended before a look; the teacher scores them last, packed

    def watch(self, response_ids: Tensor, student: TopK, spans: Sequence[Span]) -> Mapping[int, int]:
        """See `Watcher.watch`."""
        stops = self._read(response_ids, student, self._due(spans))
        self.running -= len(stops.keys() | {span.rollout for span in spans if span.ended})
        if self.running == 0:
            stops |= self._read(response_ids, student, self.whole)
            self.whole = []
        return stops

    def _read(self, response_ids: Tensor, student: TopK, spans: Sequence[Span]) -> dict[int, int]:
        """Have the teacher score these tokens; returns {rollout: tokens kept} of those that stop."""
        if not spans:
            return {}
        with self.stopwatch.phase("teacher"):
            self.scores = self.stream.score(response_ids, student, spans)
        with self.stopwatch.phase("drift"):
            return self._stops(response_ids, student, spans)

    def _stops(self, response_ids: Tensor, student: TopK, spans: Sequence[Span]) -> dict[int, int]:
        assert self.scores is not None
        # The last tokens before the chunk come along: a loop shows only against them.
        repetition = self.pruning.repetition
        context = repetition.min_run - 1 + repetition.max_period if repetition.enable else 0
        starts, ends = (torch.tensor(edge) for edge in zip(*((s.start, s.end) for s in spans), strict=True))
        columns = starts[:, None] + torch.arange(-context, int((ends - starts).max()))
        valid = (columns >= 0) & (columns < ends[:, None])
        rows = torch.tensor([span.rollout for span in spans])
        device = response_ids.device
        where = rows[:, None].to(device), columns.clamp(0, response_ids.shape[1] - 1).to(device)
        events = drift_events(
            response_ids[where], valid.to(device), student.at(where), self.scores.topk.at(where), self.pruning
        )
        self.monitor.update(events[:, context:].cpu(), valid[:, context:], rows)
        stops = {}
        for span, spent_at in zip(spans, self.monitor.spent_at[rows].tolist(), strict=True):
            kept = max(spent_at, self.min_tokens)
            if spent_at >= 0 and kept <= span.end and not self.audit[span.rollout]:
                stops[span.rollout] = kept
                self.stream.drop(span.rollout)
        return stops

    def _due(self, spans: Sequence[Span]) -> list[Span]:
        """The spans to be scored now, with what waited before them; the others wait.

        A token is at most one event, so a rollout with fewer new tokens than events left cannot be spent yet. Where
        each look reads the whole prefix again, looks are made further apart (`TeacherStream.growth`). And a rollout
        that ended before the first look at it can wait until all have ended: stopping it would save nothing.
        """
        due, events = [], self.monitor.events_so_far.tolist()
        for span in spans:
            span = replace(span, start=self.unscored.pop(span.rollout, span.start))
            events_left = self.events_to_stop - events[span.rollout]
            may_stop = span.end - span.start >= events_left and span.end >= self.min_tokens
            if span.ended and span.start == 0:
                self.whole.append(span)
            elif span.ended or (may_stop and span.end >= self.stream.growth * span.start):
                due.append(span)
            else:
                self.unscored[span.rollout] = span.start
        return due

    def scores_of(self, width: int) -> TeacherScores:
        """The teacher's scores of the first `width` response positions."""
        assert self.scores is not None and not self.whole
        where = slice(None), slice(width)
        return replace(
            self.scores,
            topk=self.scores.topk.at(where),
            candidate_logprobs=self.scores.candidate_logprobs[where],
            sampled_logprobs=self.scores.sampled_logprobs[where],
        )
