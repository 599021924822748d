"""The chunked head against the plain computation on full logits, which is written here without the module's help."""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from prune_opd.core import head as head_module
from prune_opd.core.choices import VocabularyLoss
from prune_opd.core.head import (
    LOGIT_COPIES,
    OutputHead,
    candidate_logprobs,
    differentiable_head_statistics,
    head_statistics,
    over_vocabulary,
)
from prune_opd.core.objective import divergence_terms

N, H, V, K, C = 13, 6, 57, 4, 2

VOCABULARY_LOSSES = get_args(VocabularyLoss)

MATRIX_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)

TRANSFORMATIONS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.4},
    "scale and softcap": {"scale": 1.7, "softcap": 2.0},
}


def full_logits(hidden, weight, bias=None, *, scale=1.0, softcap=None):
    logits = torch.einsum("nh,vh->nv", hidden, weight)
    logits = (logits if bias is None else logits + bias) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits


def tensors(dtype=torch.float64, *, bias=False, n=N, v=V, h=H):
    hidden = torch.randn(n, h, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, h, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randn(v, dtype=torch.float64).to(dtype).requires_grad_() if bias else None


def chunk_of(rows, v=V, dtype=torch.float64):
    """A budget that gives chunks of about `rows` rows (the passes keep one to three buffers)."""
    return rows * 2 * v * dtype.itemsize


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("settings", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
@pytest.mark.parametrize("statistics", [head_statistics, differentiable_head_statistics])
def test_statistics_are_those_of_the_full_logits(statistics, settings, bias, dtype, tolerance):
    hidden, weight, b = tensors(dtype, bias=bias)
    ids = torch.randint(V, (N, C))
    got = statistics(hidden, OutputHead(weight, b, **settings), top_k=K, ids=ids, chunk_bytes=chunk_of(3))

    logits = full_logits(*(t if t is None else t.double() for t in (hidden, weight, b)), **settings)
    logprobs = logits.log_softmax(-1)
    values, order = logprobs.topk(K)
    assert torch.equal(got.topk_ids, order)
    for found, expected in [
        (got.topk_logprobs, values),
        (got.logprobs, logprobs.gather(-1, ids)),
        (got.log_z, logits.exp().sum(-1).log()),
        (got.entropy, -(logprobs.exp() * logprobs).sum(-1)),
    ]:
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("settings", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_the_definition_that_full_vocabulary_objectives_use_is_the_same(settings, bias):
    hidden, weight, b = tensors(bias=bias)
    got = OutputHead(weight, b, **settings).logits(hidden)
    torch.testing.assert_close(got, full_logits(hidden, weight, b, **settings))
    assert got.requires_grad


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("settings", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_gradients_are_those_of_finite_differences(settings, bias):
    """Of every differentiable output, with an id that is asked for twice and one that is also in the top-k."""
    hidden, weight, b = tensors(bias=bias, n=4, v=11, h=3)
    top = full_logits(hidden, weight, b, **settings).argmax(-1, keepdim=True)
    ids = torch.cat([top, top, torch.randint(11, (4, 1))], dim=-1)

    def outputs(hidden, weight, b=None):
        got = differentiable_head_statistics(
            hidden, OutputHead(weight, b, **settings), top_k=3, ids=ids % 9, vocab_size=9, chunk_bytes=chunk_of(2, 11)
        )
        return got.topk_logprobs, got.logprobs, got.log_z

    inputs = (hidden, weight) if b is None else (hidden, weight, b)
    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("settings", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_gradients_are_those_of_the_full_logits(settings, dtype, tolerance):
    hidden, weight, bias = inputs = tensors(dtype, bias=True)
    ids = torch.randint(V, (N, C))
    coefficients = torch.randn(N, K + C, dtype=dtype)

    got = differentiable_head_statistics(
        hidden, OutputHead(weight, bias, **settings), top_k=K, ids=ids, chunk_bytes=chunk_of(4)
    )
    logprobs = torch.cat([got.topk_logprobs, got.logprobs], dim=-1)
    found = torch.autograd.grad((coefficients * logprobs).sum(), inputs)

    exact = [t.detach().double().requires_grad_() for t in inputs]
    full = full_logits(*exact, **settings).log_softmax(-1)
    chosen = torch.cat([full.topk(K).indices, ids], dim=-1)
    expected = torch.autograd.grad((coefficients.double() * full.gather(-1, chosen)).sum(), exact)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < tolerance


def test_candidate_logprobs_are_the_same_numbers_with_gradient():
    hidden, weight, _ = tensors()
    ids = torch.randint(V, (N, 5))
    got = candidate_logprobs(hidden, OutputHead(weight), ids, chunk_bytes=chunk_of(2))
    expected = full_logits(hidden, weight).log_softmax(-1).gather(-1, ids)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got.exp().sum(), (hidden, weight)),
        torch.autograd.grad(expected.exp().sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 2, 5, N, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_chunk_size_changes_nothing(rows, softcap):
    hidden, weight, _ = tensors()
    ids = torch.randint(V, (N, C))

    def run(chunk_bytes):
        head = OutputHead(weight, softcap=softcap)
        got = differentiable_head_statistics(hidden, head, top_k=K, ids=ids, chunk_bytes=chunk_bytes)
        loss = (got.topk_logprobs.exp() * torch.arange(K)).sum() + got.logprobs.sum()
        return got.topk_ids, got.log_z, got.entropy, got.logprobs, *torch.autograd.grad(loss, (hidden, weight))

    for found, expected in zip(run(chunk_of(rows)), run(2**30), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_ids_beyond_the_shared_vocabulary_do_not_exist():
    hidden, weight, bias = tensors(bias=True)
    with torch.no_grad():
        bias[-7:] += 100  # padding rows that would win every top-k
    short = V - 7
    ids = torch.randint(short, (N, C))

    def run(weight, bias, vocab_size):
        got = differentiable_head_statistics(hidden, OutputHead(weight, bias), top_k=K, ids=ids, vocab_size=vocab_size)
        loss = got.topk_logprobs.exp().sum() + got.logprobs.sum()
        grads = torch.autograd.grad(loss, (hidden, weight, bias))
        return got, grads

    got, grads = run(weight, bias, short)
    cut = [t[:short].detach().requires_grad_() for t in (weight, bias)]
    expected, expected_grads = run(*cut, None)
    assert torch.equal(got.topk_ids, expected.topk_ids)
    assert torch.equal(got.log_z, expected.log_z)
    assert torch.equal(grads[0], expected_grads[0])
    for full, part in zip(grads[1:], expected_grads[1:], strict=True):
        assert torch.equal(full[:short], part)
        assert full[short:].count_nonzero() == 0


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_bf16_hidden_states_keep_a_float32_normaliser(softcap):
    """A bf16 normaliser is off by 1e-2; ours differs from float64 on the same bf16 logits by float32 rounding."""
    hidden, weight, _ = tensors(torch.bfloat16, n=8, v=4000, h=16)
    head = OutputHead(weight, softcap=softcap)
    got = differentiable_head_statistics(hidden, head, top_k=K, ids=torch.zeros(8, 1, dtype=torch.long))
    logits = (hidden @ weight.t()).double()
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    assert got.log_z.dtype == got.topk_logprobs.dtype == got.entropy.dtype == torch.float32
    torch.testing.assert_close(got.log_z.double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.topk_logprobs.double(), logits.log_softmax(-1).topk(K).values, rtol=1e-5, atol=1e-5)

    loss = (got.topk_logprobs * torch.rand(8, K)).sum()
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert [g.dtype for g in grads] == [torch.bfloat16] * 2


@pytest.mark.parametrize("settings", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_gradients_in_bf16_are_as_exact_as_those_of_the_full_logits(settings):
    weights = torch.rand(N, K)
    ids = torch.stack([torch.randperm(V)[:K] for _ in range(N)])
    inputs = tensors(torch.bfloat16, bias=True)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    plain = [t.detach().requires_grad_() for t in inputs]

    ours = candidate_logprobs(inputs[0], OutputHead(*inputs[1:], **settings), ids, chunk_bytes=chunk_of(2))
    theirs = full_logits(*plain, **settings).float().log_softmax(-1).gather(-1, ids)
    truth = full_logits(*exact, **settings).log_softmax(-1).gather(-1, ids)
    grads = [
        torch.autograd.grad((weights * values).sum(), variables)
        for values, variables in [(ours, inputs), (theirs, plain), (truth, exact)]
    ]
    for got, reference, expected in zip(*grads, strict=True):
        assert relative_error(got, expected) < max(2 * relative_error(reference, expected), 2e-3)


def test_the_gradient_of_a_bf16_weight_is_summed_over_chunks_in_float32():
    """Added up in bf16, four hundred chunks would lose what is small beside the sum; one chunk loses nothing."""
    hidden, weight, _ = tensors(torch.bfloat16, n=400)
    ids = torch.randint(V, (400, C))

    def gradient(hidden, weight, chunk_bytes):
        loss = candidate_logprobs(hidden, OutputHead(weight), ids, chunk_bytes=chunk_bytes).sum()
        return torch.autograd.grad(loss, weight)[0]

    truth = gradient(hidden.double(), weight.detach().double().requires_grad_(), 2**30)
    in_one, in_many = (relative_error(gradient(hidden, weight, size), truth) for size in (2**30, 1))
    assert in_many < 1.5 * in_one


def test_autocast_runs_the_matrix_product_in_bf16_and_the_master_weights_get_float32_gradients():
    hidden, weight, _ = tensors(torch.float32)
    ids = torch.randint(V, (N, C))
    with torch.autocast("cpu", torch.bfloat16):
        got = differentiable_head_statistics(hidden, OutputHead(weight), top_k=K, ids=ids)
    rounded = (hidden.bfloat16() @ weight.bfloat16().t()).double()
    torch.testing.assert_close(got.log_z.double(), rounded.logsumexp(-1), rtol=1e-6, atol=1e-6)

    grads = torch.autograd.grad(got.logprobs.sum(), (hidden, weight))
    assert [g.dtype for g in grads] == [torch.float32] * 2
    exact = full_logits(hidden.double(), weight.double()).log_softmax(-1).gather(-1, ids)
    for found, expected in zip(grads, torch.autograd.grad(exact.sum(), (hidden, weight)), strict=True):
        assert 1e-6 < relative_error(found, expected) < 2e-2  # bf16 took part, and did no more harm than it must


def test_logits_of_hundreds_overflow_nothing():
    hidden, weight, _ = tensors(torch.float32)
    hidden = (hidden * 300).detach().requires_grad_()
    got = differentiable_head_statistics(hidden, OutputHead(weight), top_k=K)
    exact = full_logits(hidden.double(), weight.double())
    torch.testing.assert_close(got.log_z.double(), exact.logsumexp(-1), rtol=1e-6, atol=0)
    assert got.entropy.isfinite().all()
    assert torch.autograd.grad(got.topk_logprobs.sum(), hidden)[0].isfinite().all()


def test_a_bias_of_minus_infinity_forbids_a_token():
    hidden, weight, _ = tensors()
    bias = torch.zeros(V, dtype=torch.float64)
    bias[5] = -math.inf
    got = differentiable_head_statistics(
        hidden, OutputHead(weight, bias), top_k=K, ids=torch.full((N, 1), 5), chunk_bytes=chunk_of(3)
    )
    rest = full_logits(hidden, torch.cat([weight[:5], weight[6:]])).log_softmax(-1)
    assert (got.logprobs == -math.inf).all()
    torch.testing.assert_close(got.entropy, torch.special.entr(rest.exp()).sum(-1))
    found = torch.autograd.grad(got.topk_logprobs.sum(), hidden)[0]
    torch.testing.assert_close(found, torch.autograd.grad(rest.topk(K).values.sum(), hidden)[0])


def test_no_positions_are_no_special_case():
    hidden, weight, bias = inputs = tensors(bias=True, n=0)
    got = differentiable_head_statistics(hidden, OutputHead(weight, bias), top_k=K, ids=torch.empty(0, C).long())
    assert got.topk_ids.shape == got.topk_logprobs.shape == (0, K)
    assert got.logprobs.shape == (0, C)
    assert got.log_z.shape == got.entropy.shape == (0,)
    grads = torch.autograd.grad(got.topk_logprobs.sum() + got.logprobs.sum(), inputs)
    assert [g.shape for g in grads] == [t.shape for t in inputs]
    assert all(g.count_nonzero() == 0 for g in grads)


def test_the_statistics_of_a_teacher_carry_no_gradient():
    hidden, weight, _ = tensors()
    got = head_statistics(hidden, OutputHead(weight), top_k=K)
    assert not (got.topk_logprobs.requires_grad or got.log_z.requires_grad)


@pytest.mark.parametrize("v, k", [(64 * 20, 4), (64 * 20 + 1, 4), (64 * 21 - 1, 4), (64 * 16, 4), (5000, 16), (40, 40)])
def test_top_k_by_blocks_is_exact(v, k):
    logits = torch.randn(50, v)
    logits[1] = torch.arange(v, dtype=torch.float32)  # all in one block, or in what is left over behind the last
    logits[2] = -torch.arange(v, dtype=torch.float32)
    logits[3] = -math.inf
    logits[3, -k:] = torch.randn(k)
    assert torch.equal(head_module._topk(logits, k), logits.topk(k).indices)


def test_top_k_of_ties_holds_distinct_ids_of_the_greatest_logits():
    logits = torch.randint(3, (30, 3000)).float()
    ids = head_module._topk(logits, 8)
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert torch.equal(logits.gather(-1, ids), logits.topk(8).values)


class Watch(TorchDispatchMode):
    """Counts the work of what runs under it.

    peak: most bytes alive at one time in storages made meanwhile · largest: bytes of the largest one · products: matrix
    products that a tensor of `vocabulary` rows or columns takes part in.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.peak, self.largest, self.products = vocabulary, 0, 0, 0
        self.bytes = WeakIdKeyDictionary()  # of each storage that is alive; 0 for those that were there before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for tensor in given:
            self.bytes.setdefault(tensor.untyped_storage(), 0)
        out = func(*args, **kwargs)
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage not in self.bytes:
                self.bytes[storage] = storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(self.bytes.values()))
        if func.overloadpacket in MATRIX_PRODUCTS:
            self.products += any(self.vocabulary in tensor.shape for tensor in given)
        return out


def watch(run, vocabulary):
    with Watch(vocabulary) as counted:
        run()
    return counted


BIG_N, BIG_V = 96, 3001
ROW = BIG_V * 4  # bytes of one position's logits in float32


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("train_head", [False, True], ids=["head frozen", "head trained"])
def test_never_more_than_a_chunk_of_logits_is_alive(train_head, softcap):
    hidden, weight, _ = tensors(torch.float32, n=BIG_N, v=BIG_V)
    weight.requires_grad_(train_head)
    budget = 12 * ROW

    def train():
        head = OutputHead(weight, softcap=softcap)
        got = differentiable_head_statistics(hidden, head, top_k=K, chunk_bytes=budget)
        got.topk_logprobs.sum().backward()

    counted = watch(train, BIG_V)
    # Beside the budget: the gradient of the head, block maxima and block members, and a few numbers a position.
    beside = (weight.nbytes if train_head else 0) + 12 * ROW
    assert budget / 2 < counted.peak <= budget + beside
    assert counted.largest <= max(budget, weight.nbytes)


def divergence(loss, student, teacher, vocab_size, chunk_bytes):
    """And the log-probs at the first ids."""
    terms, ids = partial(divergence_terms, loss=loss, beta=0.3), torch.arange(C).expand(len(student[0]), C)
    return over_vocabulary(terms, student, teacher, ids, vocab_size=vocab_size, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("rows", [1, 5, N, 2 * N])
@pytest.mark.parametrize("settings", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
@pytest.mark.parametrize("loss", VOCABULARY_LOSSES)
def test_a_divergence_over_the_vocabulary_is_that_of_the_full_logits(loss, settings, rows):
    """In chunks of any size, value and gradient; the ids beyond the shared vocabulary do not exist."""
    (hidden, weight, bias), (theirs, their_weight, _) = tensors(bias=True), tensors(h=2 * H)
    weights, at_weights, shared = torch.rand(N).double(), torch.rand(N, C).double(), V - 3
    chunk_bytes = rows * LOGIT_COPIES * shared * 8
    got, at = divergence(
        loss, (hidden, OutputHead(weight, bias, **settings)), (theirs, OutputHead(their_weight)), shared, chunk_bytes
    )
    logits, their_logits = full_logits(hidden, weight, bias, **settings), full_logits(theirs, their_weight)
    want = divergence_terms(logits[:, :shared], their_logits[:, :shared], loss=loss, beta=0.3)
    want_at = logits[:, :shared].log_softmax(-1)[:, :C]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(at, want_at)
    for ours, expected in zip(
        torch.autograd.grad((weights * got).sum() + (at_weights * at).sum(), (hidden, weight, bias)),
        torch.autograd.grad((weights * want).sum() + (at_weights * want_at).sum(), (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)
    assert not theirs.grad_fn and got.requires_grad


@pytest.mark.parametrize("loss", VOCABULARY_LOSSES)
def test_a_divergence_over_the_vocabulary_stays_within_the_budget(loss):
    (hidden, weight, _), (theirs, their_weight, _) = (tensors(torch.float32, n=BIG_N, v=BIG_V) for _ in range(2))

    def train(chunk_bytes):
        student, teacher = (hidden, OutputHead(weight)), (theirs, OutputHead(their_weight))
        return watch(lambda: divergence(loss, student, teacher, BIG_V, chunk_bytes)[0].sum().backward(), BIG_V)

    budget = 2 * LOGIT_COPIES * ROW
    chunked, whole = train(budget), train(10**9)
    heads = 2 * weight.nbytes  # its gradient, and that of a chunk
    assert chunked.peak <= budget + heads + ROW
    assert whole.peak > 0.6 * LOGIT_COPIES * BIG_N * ROW, "the bound of a chunk would be no news"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_stays_within_the_budget(dtype):
    hidden, weight, _ = tensors(dtype, n=BIG_N, v=BIG_V)
    budget = 80 * ROW  # without the bf16 product itself, 100
    scored = watch(lambda: head_statistics(hidden, OutputHead(weight), top_k=K, chunk_bytes=budget), BIG_V)
    assert budget / 2 < scored.peak <= budget + 18 * ROW  # block maxima and members


def test_the_watch_sees_what_the_plain_computation_needs():
    hidden, weight, _ = tensors(torch.float32, n=BIG_N, v=BIG_V)

    def train():
        full_logits(hidden, weight).log_softmax(-1).topk(K).values.sum().backward()

    counted = watch(train, BIG_V)
    assert counted.largest >= BIG_N * ROW
    assert counted.peak >= 2 * BIG_N * ROW


@pytest.mark.parametrize("train_head, expected", [(False, 2), (True, 4)], ids=["head frozen", "head trained"])
def test_the_logits_are_made_once_and_once_more_only_for_a_trained_head(train_head, expected):
    hidden, weight, _ = tensors(torch.float32, n=BIG_N, v=BIG_V)
    weight.requires_grad_(train_head)

    def train(chunk_bytes):
        got = differentiable_head_statistics(
            hidden, OutputHead(weight), top_k=K, ids=torch.zeros(BIG_N, 1).long(), chunk_bytes=chunk_bytes
        )
        (got.topk_logprobs.sum() + got.logprobs.sum()).backward()

    assert watch(lambda: train(2**30), BIG_V).products == expected
    # Two buffers a chunk in the forward, one in the backward: three chunks of products, then two.
    three = watch(lambda: train(2 * 32 * ROW), BIG_V).products
    assert three == (2 * 3 if not train_head else 2 * 3 + 2 * 2)
    assert watch(lambda: head_statistics(hidden, OutputHead(weight), top_k=K), BIG_V).products == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"top_k": V + 1}, "does not fit a head of 57 ids"),
        ({"top_k": -1}, "must lie in 0..57"),
        ({"vocab_size": V + 1}, "does not fit a head of 57 rows"),
        ({"vocab_size": K - 1}, "top_k = 4 does not fit a head of 3 ids"),
        ({"chunk_bytes": 0}, "at least 1"),
        ({"hidden": torch.zeros(2, 3, H)}, "flatten the positions first"),
        ({"hidden": torch.zeros(N, H + 1)}, "flatten the positions first"),
        ({"ids": torch.zeros(N + 1, 2).long()}, "13 hidden states need"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    hidden, weight, _ = tensors(torch.float32)
    arguments = {"hidden": hidden, "top_k": K} | change
    # Below the shape annotations, which only run in tests: their errors are not the user's.
    unchecked = inspect.unwrap(differentiable_head_statistics)
    with pytest.raises(ValueError, match=message):
        unchecked(arguments.pop("hidden"), OutputHead(weight), **arguments)
