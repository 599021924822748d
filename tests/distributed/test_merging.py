"""What ranks tell the process that writes: the numbers of one process, in few bytes."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

from prune_opd.core.drift import drift_report
from prune_opd.distributed import merging
from prune_opd.distributed.merging import Share, merged
from prune_opd.distributed.world import World
from prune_opd.reporting.drift_log import drift_record, drift_share
from prune_opd.reporting.metrics import metrics_of, step_share
from prune_opd.step import StepResult
from prune_opd.types import Rollouts, TeacherScores, TopK
from tests.test_step import config_of

K = 16


def result_of(rows: int, length: int, seed: int = 0) -> StepResult:
    """A made-up step: ids and log-probs as a model of 150,000 ids might give, half of the candidates shared."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(length // 2, length + 1, (rows,), generator=g)
    mask = torch.arange(length) < lengths[:, None]
    ids = torch.randint(0, 150_000 // K, (rows, length, K), generator=g) * K + torch.arange(K)
    other = torch.where(torch.rand(ids.shape, generator=g) < 0.7, ids, ids + 150_000)
    logprobs = torch.rand(rows, length, K, generator=g).mul(3).log_softmax(-1).sort(-1, descending=True).values
    entropy = torch.rand(rows, length, generator=g)
    student, teacher = TopK(ids, logprobs, entropy), TopK(other, logprobs, entropy)
    events = (torch.rand(rows, length, generator=g) < 0.05) & mask
    drift = drift_report(events, mask, w_drop=0.01, w_base=0.5, eps=1e-8)
    finished = lengths < length
    return StepResult(
        numbers=list(range(rows)),
        rollouts=Rollouts([[1]] * rows, ids[..., 0], mask, finished, ~finished, student, rows, rows, logprobs[..., 0]),
        scores=TeacherScores(teacher, logprobs, logprobs[..., 0], rows * length),
        events=events,
        drift=drift,
        weight=drift.weight,
        audit=torch.zeros(rows, dtype=torch.bool),
        spent_at=torch.full((rows,), -1),
        rewards=torch.rand(rows, dtype=torch.float64, generator=g),
        window=None,
        loss=1.0,
        grad_norm=1.0,
        packed_tokens=rows * length,
        padding=rows,
        trainer_logprobs=logprobs[..., 1],
        seconds={},
    )


def of_rows(result: StepResult, rows: list[int]) -> StepResult:
    """What a rank with these rollouts has of a step."""

    def pick(value):
        if isinstance(value, torch.Tensor):
            return value[rows]
        if isinstance(value, TopK | Rollouts | TeacherScores) or type(value).__name__ == "DriftReport":
            return replace(value, **{name: pick(part) for name, part in vars(value).items()})
        return [value[row] for row in rows] if isinstance(value, list) else value

    count = {"packed_tokens": len(rows) * 40, "padding": len(rows)}
    picked = replace(result, **{name: pick(value) for name, value in vars(result).items()} | count)
    counts = {"generated": len(rows), "slot_steps": len(rows)}
    scores = replace(picked.scores, scored=len(rows) * 40)
    return replace(picked, rollouts=replace(picked.rollouts, **counts), scores=scores)


def as_ranks(monkeypatch, shares: list[Share]) -> Share | None:
    """`merged` on rank 0 of as many ranks as there are shares."""

    def gather(own, found):
        found[:] = [pickle.loads(pickle.dumps(share)) for share in shares]

    monkeypatch.setattr(merging.dist, "gather_object", gather)
    return merged(shares[0], World(0, len(shares)))


@pytest.mark.parametrize("split", [([0, 3], [1, 2, 4]), ([2], [0, 1, 3, 4], []), ([4], [3], [2], [1], [0])])
def test_the_shares_of_any_ranks_are_that_of_one_process(monkeypatch, split):
    whole, config = result_of(5, 40), config_of(**{"rollout.num_generations": 1})
    parts = [of_rows(whole, rows) for rows in split]
    parts = [p if p.numbers else replace(p, spent_at=None, rewards=None, trainer_logprobs=None) for p in parts]
    expected = metrics_of(whole, config)
    share = as_ranks(monkeypatch, [step_share(part, config) for part in parts])
    found = metrics_of(whole, config, share)
    weight = "prune_opd/loss_weight_mean"  # a sum of float32, which depends on the order
    assert found.pop(weight) == pytest.approx(expected.pop(weight), rel=1e-6)
    assert found == pytest.approx(expected, rel=1e-12)
    log = as_ranks(monkeypatch, [drift_share(part) for part in parts])
    assert log is not None and drift_record(1, log) == drift_record(1, drift_share(whole))


@pytest.mark.slow
def test_what_a_step_of_the_papers_size_sends_is_small():
    """B = 256, T = 12,288, K = 16 over 8 ranks: at most 20 MB in all (the StepResult itself: 1.5 GB)."""
    rank = result_of(32, 12_288)
    sent = [step_share(rank, config_of()), drift_share(rank)]
    metrics, log = (8 * len(pickle.dumps(share)) for share in sent)
    assert metrics < 8e6 and metrics + log <= 20e6
    print(f"metrics {metrics / 1e6:.1f} MB, drift log {log / 1e6:.1f} MB of all ranks")
