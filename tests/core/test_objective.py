from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_opd.core.objective import (
    candidates,
    divergence_terms,
    forward_kl,
    jsd,
    reverse_kl,
    sampled_token_loss,
    topk_reverse_kl,
    topk_reverse_kl_terms,
    weighted_mean,
)

from . import reference

STRATEGIES = ("only_stu", "only_tch", "intersection", "union")
MODES = ("student_p", "teacher_p", "none")
NORMALIZATIONS = ("token_mean", "weight_mean")
DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}
GARBAGE = (float("nan"), float("inf"), float("-inf"), 1e30)

seeds = st.integers(0, 2**32 - 1)


class Case:
    """A random batch: logits of both models, their top-k ids, a mask with ragged ends, and weights.

    Log-probabilities are rounded to `dtype` before either side sees them, so only the arithmetic is compared.
    """

    def __init__(self, seed: int, dtype=np.float32, shape: tuple[int, int, int, int] | None = None):
        rng = np.random.default_rng(seed)
        B, T, K, V = shape or (
            rng.integers(1, 4),
            rng.integers(1, 6),
            rng.integers(1, 6),
            rng.integers(6, 12),
        )
        student = 2 * rng.normal(size=(B, T, V))
        teacher = student + rng.normal(size=(B, T, V))
        self.student_logits, self.teacher_logits = student.astype(dtype), teacher.astype(dtype)
        self.student_logprobs = reference.log_softmax(self.student_logits).astype(dtype)
        self.teacher_logprobs = reference.log_softmax(self.teacher_logits).astype(dtype)
        self.student_ids = np.argsort(-self.student_logits, -1)[..., :K].copy()
        self.teacher_ids = np.argsort(-self.teacher_logits, -1)[..., :K].copy()
        self.mask = np.arange(T) < rng.integers(1, T + 1, B)[:, None]
        self.mask &= rng.random((B, T)) < 0.9
        self.mask[0, 0] = True
        self.weight = (0.5 + rng.random((B, T))).astype(dtype) * self.mask
        self.response_ids = rng.integers(0, V, (B, T))
        self.valid = rng.random((B, T, K)) < 0.7

    def on_student_ids(self):
        return tuple(
            np.take_along_axis(x, self.student_ids, -1) for x in (self.student_logprobs, self.teacher_logprobs)
        )

    def on_response(self):
        at = self.response_ids[..., None]
        return tuple(np.take_along_axis(x, at, -1)[..., 0] for x in (self.student_logprobs, self.teacher_logprobs))


def tensor(x):
    return None if x is None else torch.from_numpy(np.ascontiguousarray(x))


def leaf(x):
    return tensor(x).clone().requires_grad_()


def assert_agrees(loss, sums, expected, normalization):
    total, tokens, weights = expected[:3]
    assert loss.shape == sums.loss.shape == ()
    assert float(sums.tokens) == tokens
    np.testing.assert_allclose(float(sums.weights), weights, rtol=1e-6)
    np.testing.assert_allclose(float(sums.loss.detach()), total, rtol=1e-6, atol=1e-6 * tokens)
    denominator = tokens if normalization == "token_mean" else weights
    np.testing.assert_allclose(float(loss.detach()), total / denominator, rtol=1e-6, atol=1e-6)


# ---- agreement with the reference, float32 ----


@given(seeds, st.sampled_from(MODES), st.sampled_from(NORMALIZATIONS), st.booleans(), st.booleans())
def test_topk_agrees_with_the_reference(seed, mode, normalization, weighted, masked):
    case = Case(seed)
    log_p, log_q = case.on_student_ids()
    weight, valid = case.weight if weighted else None, case.valid if masked else None
    student = leaf(log_p)
    loss, sums = topk_reverse_kl(
        student,
        tensor(log_q),
        tensor(case.mask),
        tensor(weight),
        candidate_mask=tensor(valid),
        reward_weight_mode=mode,
        normalization=normalization,
    )
    expected = reference.topk_reverse_kl(log_p, log_q, case.mask, weight, valid, mode)
    assert_agrees(loss, sums, expected, normalization)
    loss.backward()
    denominator = expected[1] if normalization == "token_mean" else expected[2]
    np.testing.assert_allclose(student.grad, expected[3] / denominator, rtol=1e-6, atol=1e-6)


@given(seeds, st.sampled_from(NORMALIZATIONS), st.booleans())
def test_sampled_token_agrees_with_the_reference(seed, normalization, weighted):
    case = Case(seed)
    log_p, log_q = case.on_response()
    weight = case.weight if weighted else None
    student = leaf(log_p)
    loss, sums = sampled_token_loss(
        student, tensor(log_q), tensor(case.mask), tensor(weight), normalization=normalization
    )
    expected = reference.sampled_token(log_p, log_q, case.mask, weight)
    assert_agrees(loss, sums, expected, normalization)
    loss.backward()
    denominator = expected[1] if normalization == "token_mean" else expected[2]
    np.testing.assert_allclose(student.grad, expected[3] / denominator, rtol=1e-6, atol=1e-6)


@given(
    seeds,
    st.sampled_from(list(DIVERGENCES)),
    st.sampled_from(NORMALIZATIONS),
    st.booleans(),
    st.floats(0.05, 0.95),
)
def test_divergences_agree_with_the_reference(seed, kind, normalization, weighted, beta):
    case = Case(seed)
    weight = case.weight if weighted else None
    options = {"beta": beta} if kind == "jsd" else {}
    loss, sums = DIVERGENCES[kind](
        tensor(case.student_logits),
        tensor(case.teacher_logits),
        tensor(case.mask),
        tensor(weight),
        normalization=normalization,
        **options,
    )
    expected = reference.divergence(
        kind, case.student_logits, case.teacher_logits, case.mask, weight, options.get("beta", 0.5)
    )
    assert_agrees(loss, sums, expected, normalization)


def test_direction_and_weighting_of_jsd():
    """A skewed beta tells teacher from student: ~ beta KL(q || p) near 0, ~ (1 - beta) KL(p || q) near 1."""
    case = Case(3, np.float64)
    inputs = tensor(case.student_logits), tensor(case.teacher_logits), tensor(case.mask)
    beta = 1e-5
    assert float(jsd(*inputs, beta=beta)[0]) / beta == pytest.approx(float(forward_kl(*inputs)[0]), rel=1e-3)
    assert float(jsd(*inputs, beta=1 - beta)[0]) / beta == pytest.approx(float(reverse_kl(*inputs)[0]), rel=1e-3)


# ---- candidates ----


@given(seeds, st.sampled_from(STRATEGIES))
def test_candidates_are_the_named_set_each_once(seed, strategy):
    case = Case(seed)
    ids, valid = candidates(tensor(case.student_ids), tensor(case.teacher_ids), strategy)
    B, T, K = case.student_ids.shape
    assert ids.shape == valid.shape == (B, T, 2 * K if strategy == "union" else K)
    assert valid.dtype == torch.bool
    for b, t in np.ndindex(B, T):
        s, q = set(case.student_ids[b, t].tolist()), set(case.teacher_ids[b, t].tolist())
        want = {"only_stu": s, "only_tch": q, "intersection": s & q, "union": s | q}[strategy]
        assert sorted(ids[b, t][valid[b, t]].tolist()) == sorted(want)
    assert ((ids >= 0) & (ids < case.student_logits.shape[-1])).all()  # safe to gather with, valid or not


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mode", MODES)
def test_every_strategy_gives_the_loss_over_its_set(strategy, mode):
    """Straight from the definition: a sum over the set, with no padding entries and no order."""
    case = Case(11, np.float64, (3, 5, 4, 9))
    ids, valid = candidates(tensor(case.student_ids), tensor(case.teacher_ids), strategy)
    log_p, log_q = (tensor(x).gather(-1, ids) for x in (case.student_logprobs, case.teacher_logprobs))
    loss, _ = topk_reverse_kl(
        log_p, log_q, tensor(case.mask), tensor(case.weight), candidate_mask=valid, reward_weight_mode=mode
    )
    total = 0.0
    for b, t in np.argwhere(case.mask):
        s, q = set(case.student_ids[b, t].tolist()), set(case.teacher_ids[b, t].tolist())
        chosen = sorted({"only_stu": s, "only_tch": q, "intersection": s & q, "union": s | q}[strategy])
        lp, lq = case.student_logprobs[b, t, chosen], case.teacher_logprobs[b, t, chosen]
        by = {"student_p": np.exp(lp), "teacher_p": np.exp(lq), "none": np.ones(len(chosen))}[mode]
        by = by if mode == "none" else by / by.sum()
        total += case.weight[b, t] * (by * (lp - lq)).sum()
    assert float(loss) == pytest.approx(total / case.mask.sum(), rel=1e-9)


def test_an_empty_intersection_is_nothing_not_nan():
    student = leaf(np.log(np.full((1, 2, 2), 0.25)))
    teacher = torch.full((1, 2, 2), 0.1, dtype=torch.float64).log()
    none_shared = torch.tensor([[[True, True], [False, False]]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, sums = topk_reverse_kl(student, teacher, mask, candidate_mask=none_shared)
    loss.backward()
    assert float(sums.tokens) == 2
    assert float(loss.detach()) == pytest.approx(np.log(2.5) / 2)
    assert (student.grad[0, 1] == 0).all() and (student.grad[0, 0] != 0).all()


# ---- gradients, float64 ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True])
def test_topk_gradient_on_the_logits(mode, masked):
    case = Case(7, np.float64, (2, 3, 4, 9))
    valid = case.valid if masked else None
    logits = leaf(case.student_logits)
    log_p = logits.log_softmax(-1).gather(-1, tensor(case.student_ids))
    _, log_q = case.on_student_ids()
    _, sums = topk_reverse_kl(
        log_p,
        tensor(log_q),
        tensor(case.mask),
        tensor(case.weight),
        candidate_mask=tensor(valid),
        reward_weight_mode=mode,
    )
    sums.loss.backward()

    *_, on_logprobs = reference.topk_reverse_kl(log_p.detach().numpy(), log_q, case.mask, case.weight, valid, mode)
    closed_form = reference.chain_to_logits(on_logprobs, case.student_ids, case.student_logits)
    finite = reference.central_difference(
        lambda x: reference.topk_surrogate(x, case.student_ids, on_logprobs, case.student_logits),
        case.student_logits,
    )
    assert np.abs(closed_form).max() > 0.1
    np.testing.assert_allclose(logits.grad, closed_form, atol=1e-12)
    np.testing.assert_allclose(logits.grad, finite, atol=1e-8)


def test_sampled_token_gradient_on_the_logits():
    case = Case(8, np.float64, (2, 4, 3, 7))
    logits = leaf(case.student_logits)
    at = case.response_ids[..., None]
    log_p = logits.log_softmax(-1).gather(-1, tensor(at)).squeeze(-1)
    _, log_q = case.on_response()
    _, sums = sampled_token_loss(log_p, tensor(log_q), tensor(case.mask), tensor(case.weight))
    sums.loss.backward()
    *_, on_logprobs = reference.sampled_token(log_p.detach().numpy(), log_q, case.mask, case.weight)
    closed_form = reference.chain_to_logits(on_logprobs[..., None], at, case.student_logits)
    finite = reference.central_difference(
        lambda x: reference.topk_surrogate(x, at, on_logprobs[..., None], case.student_logits),
        case.student_logits,
    )
    np.testing.assert_allclose(logits.grad, closed_form, atol=1e-12)
    np.testing.assert_allclose(logits.grad, finite, atol=1e-8)


@pytest.mark.parametrize("kind, options", [("forward_kl", {}), ("reverse_kl", {}), ("jsd", {"beta": 0.3})])
def test_divergence_gradient_on_the_logits(kind, options):
    case = Case(9, np.float64, (2, 3, 3, 7))
    logits = leaf(case.student_logits)
    _, sums = DIVERGENCES[kind](logits, tensor(case.teacher_logits), tensor(case.mask), tensor(case.weight), **options)
    sums.loss.backward()
    finite = reference.central_difference(
        lambda x: reference.divergence(kind, x, case.teacher_logits, case.mask, case.weight, **options)[0],
        case.student_logits,
    )
    assert np.abs(finite).max() > 0.01
    np.testing.assert_allclose(logits.grad, finite, atol=1e-8)


@pytest.mark.parametrize(
    "kind, forbidden_by",
    [("forward_kl", "qb"), ("reverse_kl", "pb"), ("jsd", "p"), ("jsd", "q"), ("jsd", "b")],
)
def test_forbidden_tokens(kind, forbidden_by):
    """A logit of -inf (a banned token, a padded row) changes nothing in a divergence that stays finite.

    p: token 0 forbidden by the student, q: token 1 by the teacher, b: token 2 by both.
    """
    case = Case(12, np.float64, (2, 3, 3, 7))
    if "p" in forbidden_by:
        case.student_logits[..., 0] = -np.inf
    if "q" in forbidden_by:
        case.teacher_logits[..., 1] = -np.inf
    if "b" in forbidden_by:
        case.student_logits[..., 2] = case.teacher_logits[..., 2] = -np.inf
    logits = leaf(case.student_logits)
    _, sums = DIVERGENCES[kind](logits, tensor(case.teacher_logits), tensor(case.mask))
    sums.loss.backward()
    value = lambda x: reference.divergence(kind, x, case.teacher_logits, case.mask)[0]  # noqa: E731
    assert float(sums.loss.detach()) == pytest.approx(value(case.student_logits), rel=1e-12)
    finite = reference.central_difference(value, case.student_logits)
    np.testing.assert_allclose(logits.grad, finite, atol=1e-8)


def test_nothing_but_the_student_receives_a_gradient():
    """The teacher's numbers and the drift weights are constants, even where they come with a graph."""
    case = Case(10)
    full = case.student_logits, case.teacher_logits
    calls = [(topk_reverse_kl, case.on_student_ids(), {"reward_weight_mode": mode}) for mode in MODES]
    calls += [(sampled_token_loss, case.on_response(), {})]
    calls += [(function, full, {}) for function in DIVERGENCES.values()]
    for function, (student, teacher), options in calls:
        student, teacher, weight = leaf(student), leaf(teacher), leaf(case.weight)
        function(student, teacher, tensor(case.mask), weight, **options)[0].backward()
        assert student.grad.abs().sum() > 0
        assert teacher.grad is None and weight.grad is None


# ---- what must not matter ----


def every_loss(case: Case, garbage: float | None = None):
    """Each objective, with `garbage` in the padding: (name, loss, sums, gradient on the student's input)."""

    def prepare(x):
        x = x.copy()
        if garbage is not None:
            x[~case.mask] = garbage
        return x

    mask, weight = tensor(case.mask), tensor(prepare(case.weight))
    topk, sampled = case.on_student_ids(), case.on_response()
    full = case.student_logits, case.teacher_logits
    calls = [(f"topk {m}", topk_reverse_kl, topk, {"reward_weight_mode": m}) for m in MODES]
    calls += [("sampled", sampled_token_loss, sampled, {})]
    calls += [(name, function, full, {}) for name, function in DIVERGENCES.items()]
    for name, function, (student, teacher), options in calls:
        for normalization in NORMALIZATIONS:
            x = leaf(prepare(student))
            loss, sums = function(x, tensor(prepare(teacher)), mask, weight, normalization=normalization, **options)
            loss.backward()
            yield f"{name} {normalization}", loss.detach(), sums, x.grad


@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_never_matters(garbage):
    """Not even NaN or infinity, neither in the loss nor in the gradient."""
    case = Case(21, shape=(3, 6, 4, 9))
    assert not case.mask.all()
    padding = tensor(~case.mask)
    for clean, dirty in zip(every_loss(case), every_loss(case, garbage), strict=True):
        name = clean[0]
        assert torch.equal(clean[1], dirty[1]), name
        for field in ("loss", "tokens", "weights"):
            assert torch.equal(getattr(clean[2], field), getattr(dirty[2], field)), (name, field)
        assert torch.equal(clean[3], dirty[3]), name
        assert (dirty[3][padding] == 0).all(), name


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("mode", MODES)
def test_candidates_ruled_out_never_matter(garbage, mode):
    case = Case(22, shape=(3, 5, 4, 9))
    log_p, log_q = case.on_student_ids()
    results = []
    for fill in (None, garbage):
        x, y = log_p.copy(), log_q.copy()
        if fill is not None:
            x[~case.valid], y[~case.valid] = fill, fill
        student = leaf(x)
        loss, _ = topk_reverse_kl(
            student, tensor(y), tensor(case.mask), candidate_mask=tensor(case.valid), reward_weight_mode=mode
        )
        loss.backward()
        results.append((loss.detach(), student.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert (results[1][1][tensor(~case.valid)] == 0).all()


def test_splitting_the_batch_does_not_matter():
    """Micro-batches add up: sums and counts of the parts give the loss and the gradient of the whole."""
    case = Case(23, np.float64, (6, 5, 4, 9))
    inputs = {
        topk_reverse_kl: case.on_student_ids(),
        sampled_token_loss: case.on_response(),
        **{function: (case.student_logits, case.teacher_logits) for function in DIVERGENCES.values()},
    }
    for function, (student, teacher) in inputs.items():
        for normalization, count in (("token_mean", "tokens"), ("weight_mean", "weights")):
            whole = leaf(student)
            loss, sums = function(
                whole, tensor(teacher), tensor(case.mask), tensor(case.weight), normalization=normalization
            )
            loss.backward()
            parts = leaf(student)
            pieces = [
                function(parts[rows], tensor(teacher[rows]), tensor(case.mask[rows]), tensor(case.weight[rows]))[1]
                for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
            ]
            for field in ("loss", "tokens", "weights"):
                together = sum(getattr(p, field) for p in pieces)
                torch.testing.assert_close(together, getattr(sums, field), rtol=1e-12, atol=1e-12)
            rebuilt = sum(p.loss for p in pieces) / sum(getattr(p, count) for p in pieces)
            rebuilt.backward()
            torch.testing.assert_close(rebuilt, loss, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-12, atol=1e-12)


def test_extra_padding_columns_do_not_matter():
    case = Case(24, np.float64, (3, 5, 4, 9))
    pad = lambda x: np.concatenate([x, np.zeros_like(x[:, :3])], 1)  # noqa: E731
    log_p, log_q = case.on_student_ids()
    short, _ = topk_reverse_kl(tensor(log_p), tensor(log_q), tensor(case.mask), tensor(case.weight))
    long, _ = topk_reverse_kl(tensor(pad(log_p)), tensor(pad(log_q)), tensor(pad(case.mask)), tensor(pad(case.weight)))
    torch.testing.assert_close(long, short, rtol=1e-12, atol=0)


# ---- the fixed point, and empty batches ----


def test_zero_when_student_equals_teacher():
    case = Case(25, np.float64)
    case.teacher_logits, case.teacher_logprobs = case.student_logits.copy(), case.student_logprobs.copy()
    for name, loss, _, grad in every_loss(case):
        assert abs(float(loss)) < 1e-14, name
        assert grad.abs().max() < 1e-14, name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_valid_token_is_zero_not_nan(dtype):
    case = Case(26, dtype)
    case.mask[:] = False
    case.weight[:] = 0
    for name, loss, sums, grad in every_loss(case):
        assert float(loss) == 0 and float(sums.tokens) == 0 and float(sums.weights) == 0, name
        assert (grad == 0).all(), name


def test_token_mean_does_not_divide_by_the_weights():
    """The paper's choice: halving every weight halves the loss; `weight_mean` undoes it."""
    case = Case(27, np.float64)
    log_p, log_q = map(tensor, case.on_student_ids())
    half = tensor(case.weight / 2)
    for normalization, factor in (("token_mean", 0.5), ("weight_mean", 1.0)):
        loss, halved = (
            float(topk_reverse_kl(log_p, log_q, tensor(case.mask), w, normalization=normalization)[0])
            for w in (tensor(case.weight), half)
        )
        assert halved == pytest.approx(factor * loss, rel=1e-12)


# ---- wrong settings ----


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_jsd_refuses_a_beta_outside_the_open_interval(beta):
    case = Case(28)
    with pytest.raises(ValueError, match="beta"):
        jsd(tensor(case.student_logits), tensor(case.teacher_logits), tensor(case.mask), beta=beta)


def test_unknown_names_are_refused():
    """What a caller sees outside the tests, where nothing checks the annotations."""
    case = Case(29)
    inputs = *map(tensor, case.on_student_ids()), tensor(case.mask)
    with pytest.raises(ValueError, match="sequence_mean"):
        inspect.unwrap(weighted_mean)(inputs[0][..., 0], tensor(case.mask), normalization="sequence_mean")
    with pytest.raises(ValueError, match="kl"):
        inspect.unwrap(divergence_terms)(tensor(case.student_logits), tensor(case.teacher_logits), loss="kl")
    with pytest.raises(ValueError, match="student_q"):
        inspect.unwrap(topk_reverse_kl_terms)(*inputs[:2], inputs[0] < 0, reward_weight_mode="student_q")
    with pytest.raises(ValueError, match="both"):
        inspect.unwrap(candidates)(tensor(case.student_ids), tensor(case.teacher_ids), "both")
