"""The next step's rollouts, sampled in a thread while the student is updated: only with `rollout.ahead`.

Their policy is one update old, always one and never more: staleness 1. It is a copy of the student's weights, taken as
the update begins; the first step has none before it, and is sampled from the copy on its own policy. How far the copy
is from the policy that is trained is logged (`rollout/engine_kl`), and `rollout.importance_sampling_cap` corrects for
it. In flight, the teacher reads along in the same thread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from prune_opd.rollout.local import LocalSampler
from prune_opd.rollout.sample import Sampled
from prune_opd.rollout.student_copy import StudentCopy


class RolloutsAhead:
    """sample(step, max_length, sampler): the rollouts of a step, by that sampler. `steps`: of the whole run."""

    def __init__(
        self, student: StudentCopy, sample: Callable[[int, int, LocalSampler], Sampled], *, steps: int
    ) -> None:
        self.student, self.sample, self.steps = student, sample, steps
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts-ahead")
        self.coming: Future[Sampled] | None = None

    def begin(self, step: int, max_length: int) -> None:
        """Start to sample the rollouts of `step` from the current weights; does nothing after the run's last step."""
        if step < self.steps:
            self.coming = self.thread.submit(self.sample, step, max_length, self.student.refreshed())

    def take(self) -> Sampled | None:
        """Wait for the rollouts that were begun; None if none were. Raises what sampling raised."""
        coming, self.coming = self.coming, None
        return coming.result() if coming else None
