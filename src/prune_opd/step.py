"""Prune-OPD on one page: one training step, top to bottom. This is the code that trains.

    sample → teacher scores → drift → weights → window → loss → optimiser
       └──── stop in flight ────┘

The student answers each prompt with at most M tokens, and its top-k is kept as it samples. The teacher scores the same
positions. Where the two top-k sets part, drift events add up; they lower the weight of everything after them, and how
far reliability reaches decides the next step's M. With `pruning.in_flight` the teacher scores while the student still
writes, and a rollout ends where its reliability does (rollout/in_flight.py).

Source: arXiv 2605.07804. Where we differ from it, and why:

  * One optimiser step a batch: the policy that sampled is the policy that is trained, so p_θ / stopgrad(p_θ) has the
    same gradient as the importance ratio at its starting point, 1, and no old-log-prob pass exists.
  * R_t is computed in float64: in float32, 1 - w_drop · C_t can miss zero by more than ε, and E would not stop.
  * −∞ log-probs of a teacher that forbids tokens are floored at −50 nats (core/objective.py), so rewards stay finite.
  * Ids beyond the vocabulary that both models share (padded embedding rows) are cut from samples and normalisers.
  * Ids that end a response are one action where student and teacher have different ones (core/ends.py): compared id by
    id, the teacher calls every end a mistake, and the student unlearns to end. `data.end_tokens` has the paper's.
  * M starts at 1024 in the default recipe; the paper gives 1024, 2048 and 6144 in different places.
  * Options beyond the paper, off by default: stopping in flight, more prompts for what was saved (core/budget.py), the
    repetition guard, `weight_mean`, `overlap_mass`, losses other than `topk_reverse_kl`, a reward of the task beside
    the teacher's signal, several teachers, one that reads another prompt (teachers/routed.py, data/teacher_prompts.py),
    and rollouts of a policy that is not the trained one: another engine's, that of one update ago, or its weights
    rounded (update/correction.py).
  * A batch in which no token carries weight is no update: momentum alone would move the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from prune_opd.config import Config
from prune_opd.core.budget import TokenBudget
from prune_opd.core.drift import DriftReport, drift_report
from prune_opd.core.objective import group_advantage
from prune_opd.core.window import LengthSchedule, TrainingWindow, WindowChange
from prune_opd.distributed.world import ALONE, World
from prune_opd.errors import EngineError, ServerError
from prune_opd.rollout.ahead import RolloutsAhead
from prune_opd.rollout.base import Sampler
from prune_opd.rollout.events import drift_events
from prune_opd.rollout.sample import sample_rollouts
from prune_opd.teachers.base import Teacher
from prune_opd.timing import Stopwatch
from prune_opd.types import Prompt, Rollouts, TeacherScores
from prune_opd.update.finite import check_finite
from prune_opd.update.student_update import StudentUpdate
from prune_opd.update.weights import TokenWeights

Reward = Callable[[Sequence[int], Rollouts], Tensor]
"""(numbers, rollouts) -> (B,) float64: the task's reward of each rollout, NaN where there is none."""


@dataclass(frozen=True)
class Run:
    """The parts that a step works with, built once (training/build.py).

    token_weights: what a token counts · window: None where every response may use the whole budget · update: loss,
    gradient and optimiser · ahead: may have sampled a step's rollouts already, during the update before it · budget:
    sets how many prompts the next step has, where that is not fixed.
    """

    config: Config
    sampler: Sampler
    teacher: Teacher
    token_weights: TokenWeights
    window: TrainingWindow | LengthSchedule | None
    update: StudentUpdate
    world: World = ALONE
    ahead: RolloutsAhead | None = None
    budget: TokenBudget | None = None

    @property
    def max_length(self) -> int:
        """Tokens that the next responses may have."""
        return self.window.length if self.window else self.config.rollout.max_completion_length


@dataclass(frozen=True)
class StepResult:
    """What one step did. numbers: which of the step's rollouts these are (a rank's share) · events, weight (B, T) ·
    audit (B,) bool · spent_at (B,) as in `DriftMonitor`, when in flight · rewards (B,) float64 of the task, NaN where
    it gave none; None without one · the rest: `UpdateResult`.
    """

    numbers: Sequence[int]
    rollouts: Rollouts
    scores: TeacherScores
    events: Tensor
    drift: DriftReport
    weight: Tensor
    audit: Tensor
    spent_at: Tensor | None
    rewards: Tensor | None
    window: WindowChange | None
    loss: float
    grad_norm: float
    packed_tokens: int
    padding: int
    trainer_logprobs: Tensor | None
    seconds: dict[str, float]


def prune_opd_step(run: Run, step: int, prompts: Sequence[Prompt], reward: Reward | None = None) -> StepResult:
    """Sample, score, weigh, steer the window, update.

    prompts: one for each rollout; `rollout.num_generations` consecutive ones are the same prompt. Each rank is given
    all of them and takes its share. Rollouts, loss, gradient and window are those of one process, whatever the
    number of ranks. Raises NonFiniteError, with the rollouts and before the weights are touched, when logits of
    student or teacher, the loss or the gradient are NaN or infinite.
    """
    config, pruning, world, watch = run.config, run.config.pruning, run.world, Stopwatch(run.update.device)

    # 1. The student answers on its own policy, up to the window; in flight, the teacher reads along and may end it.
    with watch.phase("rollout"), world.raising_together(ServerError, EngineError):
        sampled = run.ahead.take() if run.ahead else None
        if sampled is None:
            sampled = sample_rollouts(step, prompts, run.max_length, run.sampler, run.teacher, config, watch, world)
    numbers, rollouts, in_flight = sampled.numbers, sampled.rollouts, sampled.in_flight
    mask = rollouts.response_mask
    assert rollouts.student is not None

    # 2. The teacher scores every position: its own top-k, the student's candidates, the sampled token.
    with watch.phase("teacher"), world.raising_together(ServerError):
        top_k = config.objective.top_k
        scores = in_flight.scores_of(mask.shape[1]) if in_flight else run.teacher.score(rollouts, top_k=top_k)
    check_finite(step + 1, numbers, rollouts, scores, world)

    # 3. Drift: events, what they leave of reliability, and the weight that follows.
    with watch.phase("drift"):
        events = drift_events(rollouts.response_ids, mask, rollouts.student, scores.topk, pruning)
        drift = drift_report(events, mask, w_drop=pruning.w_drop, w_base=pruning.w_base, eps=pruning.positive_eps)
        weight = run.token_weights(step, numbers, mask, drift)

    # 4. A task that can check answers adds how much better a rollout was than the others of its prompt, on every token.
    rewards = advantage = None
    if reward is not None:
        with watch.phase("reward"):
            rewards = reward(numbers, rollouts)
            everyone = group_advantage(world.gather_rollouts(numbers, rewards), config.rollout.num_generations)
            advantage = everyone[numbers].float().to(mask.device).unsqueeze(-1).expand(mask.shape)

    # 5. How far reliability reached decides how long the next responses may be; what is saved may pay for more prompts.
    effective_length = drift.effective_length.cpu()
    change = run.window.update(world.gather_rollouts(numbers, effective_length)) if run.window else None
    if run.budget:
        run.budget.update(world.gather_rollouts(numbers, rollouts.lengths.cpu()))
    if run.ahead:
        run.ahead.begin(step + 1, run.max_length)

    # 6. The objective on the kept tokens, its gradient over the whole batch of all ranks, one optimiser step.
    with watch.phase("update"):
        update = run.update(step + 1, numbers, rollouts, scores, weight, advantage)

    return StepResult(
        numbers=numbers,
        rollouts=rollouts,
        scores=scores,
        events=events,
        drift=drift,
        weight=weight,
        audit=sampled.audit,
        spent_at=in_flight.monitor.spent_at if in_flight else None,
        rewards=rewards,
        window=change,
        **vars(update),
        seconds=dict(watch.seconds),
    )
