from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

import prune_opd
from prune_opd.core import objective
from prune_opd.core.drift import DriftMonitor, DriftReport
from prune_opd.core.overlap import nucleus_accept, overlap_mass, topk_overlap

from . import reference

seeds = st.integers(0, 2**32 - 1)


def candidates_of(seed: int):
    """Top-k lists of two models: student ids, log-probs, teacher ids, log-probs; and sampled tokens."""
    rng = np.random.default_rng(seed)
    B, T, K = rng.integers(1, 4), rng.integers(1, 6), rng.integers(1, 9)
    V = K + rng.integers(0, 8)
    ids = [np.argsort(rng.random((B, T, V)), -1)[..., :K] for _ in range(2)]
    full = [reference.log_softmax(3 * rng.normal(size=(B, T, V))).astype(np.float32) for _ in range(2)]
    logprobs = [np.take_along_axis(f, i, -1) for f, i in zip(full, ids, strict=True)]
    response = rng.integers(0, V, (B, T))
    return [torch.from_numpy(x) for x in (ids[0], logprobs[0], ids[1], logprobs[1], response)]


@given(seeds)
def test_overlap_agrees_with_the_reference(seed):
    student_ids, student_logprobs, teacher_ids, _, _ = candidates_of(seed)
    ratio = topk_overlap(student_ids, teacher_ids)
    assert ratio.dtype == torch.float32
    np.testing.assert_allclose(ratio, reference.topk_overlap(student_ids, teacher_ids), atol=1e-6)
    np.testing.assert_allclose(
        overlap_mass(student_ids, student_logprobs, teacher_ids),
        reference.overlap_mass(student_ids, student_logprobs, teacher_ids),
        atol=1e-6,
    )


@given(seeds, st.floats(0.05, 0.99))
def test_nucleus_agrees_with_the_reference(seed, top_p):
    _, _, teacher_ids, teacher_logprobs, response = candidates_of(seed)
    accepted = nucleus_accept(response, teacher_ids, teacher_logprobs, top_p)
    assert accepted.dtype == torch.bool
    np.testing.assert_array_equal(accepted, reference.nucleus_accept(response, teacher_ids, teacher_logprobs, top_p))


@given(seeds)
def test_the_order_of_candidates_does_not_matter(seed):
    student_ids, student_logprobs, teacher_ids, teacher_logprobs, response = candidates_of(seed)
    generator = torch.Generator().manual_seed(seed % 2**31)
    s, t = (torch.randperm(student_ids.shape[-1], generator=generator) for _ in range(2))
    assert torch.equal(topk_overlap(student_ids[..., s], teacher_ids[..., t]), topk_overlap(student_ids, teacher_ids))
    torch.testing.assert_close(
        overlap_mass(student_ids[..., s], student_logprobs[..., s], teacher_ids[..., t]),
        overlap_mass(student_ids, student_logprobs, teacher_ids),
    )
    assert torch.equal(
        nucleus_accept(response, teacher_ids[..., t], teacher_logprobs[..., t], 0.8),
        nucleus_accept(response, teacher_ids, teacher_logprobs, 0.8),
    )


def test_nucleus_by_hand():
    # Probabilities 0.5, 0.3, 0.1 of tokens 7, 2, 9, not in order; 0.1 of the mass lies outside the three.
    ids = torch.tensor([2, 9, 7]).expand(1, 4, 3)
    logprobs = torch.tensor([0.3, 0.1, 0.5]).log().expand(1, 4, 3)
    response = torch.tensor([[7, 2, 9, 4]])
    assert nucleus_accept(response, ids, logprobs, 0.45).tolist() == [[True, False, False, False]]
    assert nucleus_accept(response, ids, logprobs, 0.6).tolist() == [[True, True, False, False]]
    assert nucleus_accept(response, ids, logprobs, 0.85).tolist() == [[True, True, True, False]]
    # The three hold 0.9: short of 0.95, so all of them are the nucleus.
    assert nucleus_accept(response, ids, logprobs, 0.95).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("K", [1, 3, 7, 10, 16, 20, 50, 100])
def test_a_threshold_met_exactly_is_no_event(K):
    """7 of 10 shared is not below 0.7, whatever float32 makes of either."""
    student = torch.arange(K).expand(1, K + 1, K)
    shared = torch.arange(K + 1)
    teacher = torch.where(torch.arange(K) < shared[:, None], student, student + K)
    overlap = topk_overlap(student, teacher)
    for n in range(K + 1):
        assert not (overlap[0, n] < n / K), (n, K)
        assert not (overlap < n / K)[0, n], (n, K)
        assert n == 0 or (overlap < n / K)[0, n - 1], (n, K)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf")])
def test_a_position_depends_on_itself_alone(garbage):
    student_ids, student_logprobs, teacher_ids, teacher_logprobs, response = candidates_of(5)
    padding = torch.zeros(response.shape, dtype=torch.bool)
    padding[:, -1] = True
    dirty = [
        torch.where(padding[..., None], torch.full_like(x, garbage), x) for x in (student_logprobs, teacher_logprobs)
    ]
    dirty_ids = torch.where(padding[..., None], torch.full_like(student_ids, -1), student_ids)
    for clean, other in [
        (topk_overlap(student_ids, teacher_ids), topk_overlap(dirty_ids, teacher_ids)),
        (
            overlap_mass(student_ids, student_logprobs, teacher_ids),
            overlap_mass(dirty_ids, dirty[0], teacher_ids),
        ),
        (
            nucleus_accept(response, teacher_ids, teacher_logprobs, 0.8),
            nucleus_accept(response, teacher_ids, dirty[1], 0.8),
        ),
    ]:
        assert torch.equal(clean[~padding], other[~padding])


IDS = torch.zeros(2, 3, 4, dtype=torch.long)
ROW = torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    "call",
    [
        lambda: topk_overlap(IDS, IDS[:, :2]),
        lambda: topk_overlap(IDS, IDS.float()),
        lambda: prune_opd.topk_overlap(IDS, IDS[:, :2]),
        lambda: overlap_mass(IDS, torch.zeros(2, 3, 5), IDS),
        lambda: objective.shared_candidates(IDS, IDS[:1]),  # as another module of the core imported it
        lambda: DriftMonitor(2).update(IDS[..., 0].bool(), IDS[:, 1:, 0].bool()),
        lambda: DriftReport(torch.zeros(2, 3), torch.zeros(2, 4), ROW, ROW),
    ],
)
def test_shapes_are_checked_while_tests_run(call):
    """In functions, methods and dataclasses of the core, however they were imported (see conftest)."""
    with pytest.raises(TypeCheckError):
        call()
