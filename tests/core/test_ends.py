"""Several ids that end a response as one action, against distributions that are added up by hand in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_opd.core.ends import as_one_end, merge_ends, merge_ends_, merge_listed
from prune_opd.core.head import OutputHead, candidate_logprobs, head_statistics, over_vocabulary
from prune_opd.core.objective import divergence_terms

V, H, K = 23, 5, 6
ENDS = (7, 2, 19)
ALONE = [v for v in range(V) if v not in ENDS]  # ids that are no end


def added_up(logits):
    """log p' (N, V - 2): of the ids in ALONE, and last of the one end."""
    p = torch.as_tensor(logits, dtype=torch.float64).softmax(-1)
    return torch.cat([p[:, ALONE], p[:, list(ENDS)].sum(-1, keepdim=True)], dim=-1).log()


def column_of(ids):
    """Where `added_up` has these ids."""
    place = {v: i for i, v in enumerate([*ALONE, ENDS[0]])}
    return torch.tensor([[place[v] for v in row] for row in ids.tolist()])


def parts(n=9, *, bias=False):
    torch.manual_seed(0)
    hidden = torch.randn(n, H, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.randn(V, dtype=torch.float64, requires_grad=True) if bias else None


def test_the_merged_distribution_is_the_one_added_up_and_the_normaliser_stays():
    logits = torch.randn(4, 3, V, dtype=torch.float64)
    merged = merge_ends(logits, ENDS)
    torch.testing.assert_close(merged.logsumexp(-1), logits.logsumexp(-1))
    want = added_up(logits.flatten(0, 1))
    got = merged.log_softmax(-1).flatten(0, 1)[:, [*ALONE, ENDS[0]]]
    torch.testing.assert_close(got, want)
    assert (merged[..., list(ENDS[1:])] == -torch.inf).all()
    assert torch.equal(merge_ends_(logits.clone(), ENDS), merged)


@pytest.mark.parametrize("ends", [(), (7,)])
def test_with_fewer_than_two_ends_nothing_changes(ends):
    hidden, weight, _ = parts()
    ids = torch.randint(V, (len(hidden), 3))
    assert torch.equal(merge_ends(hidden @ weight.t(), ends), hidden @ weight.t())
    head = OutputHead(weight)
    plain, merged = (head_statistics(hidden, head, top_k=K, ids=ids, ends=e) for e in ((), ends))
    for a, b in zip(vars(plain).values(), vars(merged).values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(candidate_logprobs(hidden, head, ids), candidate_logprobs(hidden, head, ids, ends=ends))


@pytest.mark.parametrize("settings", [{}, {"scale": 0.7, "softcap": 3.0}], ids=["plain", "scale and softcap"])
@pytest.mark.parametrize("bias", [False, True])
def test_statistics_of_the_head_are_those_of_the_distribution_added_up(bias, settings):
    hidden, weight, b = parts(bias=bias)
    head = OutputHead(weight, b, **settings)
    ids = torch.tensor([[ENDS[0], ALONE[i]] for i in range(len(hidden))])
    got = head_statistics(hidden, head, top_k=K, ids=ids, ends=ENDS, chunk_bytes=2 * V * 8 * 3)
    want = added_up(head.logits(hidden).detach())
    values, order = want.topk(K)
    torch.testing.assert_close(got.topk_logprobs, values)
    assert torch.equal(column_of(got.topk_ids), order)
    torch.testing.assert_close(got.logprobs, want.gather(-1, column_of(ids)))
    torch.testing.assert_close(got.entropy, -(want.exp() * want).sum(-1))


def test_gradients_at_candidates_are_those_of_finite_differences_and_of_the_sum():
    hidden, weight, bias = parts(4, bias=True)
    ids = torch.tensor([[ENDS[0], 0, ENDS[0]], [1, 3, 4], [5, ENDS[0], 6], [0, 1, ENDS[0]]])

    def of(hidden, weight, bias):
        return candidate_logprobs(hidden, OutputHead(weight, bias), ids, ends=ENDS)

    assert torch.autograd.gradcheck(of, (hidden, weight, bias))
    p = (hidden @ weight.t() + bias).softmax(-1)
    want = torch.where(ids == ENDS[0], p[:, list(ENDS)].sum(-1, keepdim=True), p.gather(-1, ids)).log()
    torch.testing.assert_close(of(hidden, weight, bias), want)
    coefficients = torch.randn(4, 3, dtype=torch.float64)
    found, wanted = (
        torch.autograd.grad((coefficients * x).sum(), (hidden, weight, bias)) for x in (of(hidden, weight, bias), want)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_divergences_are_those_of_the_distributions_added_up(loss, chunk_bytes):
    hidden, weight, _ = parts()
    torch.manual_seed(1)
    teacher_hidden, teacher_weight = torch.randn(9, 3, dtype=torch.float64), torch.randn(V, 3, dtype=torch.float64)
    ids = torch.full((9, 1), ENDS[0])
    function = partial(divergence_terms, loss=loss)

    def of(hidden, weight):
        pair = (hidden, OutputHead(weight)), (teacher_hidden, OutputHead(teacher_weight))
        return over_vocabulary(function, *pair, ids, vocab_size=V, ends=ENDS, chunk_bytes=chunk_bytes)

    got, sampled = of(hidden, weight)
    p = (hidden @ weight.t()).softmax(-1)
    own = torch.cat([p[:, ALONE], p[:, list(ENDS)].sum(-1, keepdim=True)], dim=-1).log()
    want = function(own, added_up(teacher_hidden @ teacher_weight.t()))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(sampled, own[:, -1:])
    found, wanted = (torch.autograd.grad(x.sum(), (hidden, weight), retain_graph=True) for x in (got, want))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(lambda *x: of(*x)[0], (hidden, weight))


def test_ends_that_are_all_forbidden_have_no_gradient_that_is_nan():
    hidden, weight, _ = parts(2)
    bias = torch.zeros(V, dtype=torch.float64).index_fill(0, torch.tensor(ENDS), -torch.inf)
    ids = torch.tensor([[ENDS[0], 0], [1, 3]])
    found = candidate_logprobs(hidden, OutputHead(weight, bias), ids, ends=ENDS)
    found[:, 1].sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    assert found[0, 0] < -1e30


@given(seed=st.integers(0, 10**6), spread=st.floats(0.1, 8))
def test_lists_of_an_engine_give_the_likeliest_after_merging(seed, spread):
    torch.manual_seed(seed)
    logprobs = (spread * torch.randn(5, V, dtype=torch.float64)).log_softmax(-1)
    best = logprobs.topk(V)
    ids, values = merge_listed(best.indices, best.values, ENDS, K)
    want = merge_ends(logprobs, ENDS).topk(K)
    torch.testing.assert_close(values, want.values)
    assert torch.equal(ids, want.indices)
    assert torch.equal(
        torch.cat(merge_listed(best.indices, best.values, (), K)), torch.cat([best.indices[:, :K], best.values[:, :K]])
    )
    # A shorter list lacks nothing but what ends that are not listed would add.
    ids, values = merge_listed(best.indices[:, : K + 2], best.values[:, : K + 2], ENDS, K)
    alone = ids != ENDS[0]
    torch.testing.assert_close(values[alone], logprobs.gather(-1, ids)[alone])
    assert all(len(set(row)) == K for row in ids.tolist())


def test_one_id_stands_for_all():
    assert as_one_end(torch.tensor([2, 7, 19, 4]), ENDS).tolist() == [7, 7, 7, 4]
