"""Two mistakes seen in public code (method.md, section 1): both train nothing, and nothing crashes.

Each test has a check that the objective must pass, and shows that the check fails on the mistaken form.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prune_opd.core.objective import reverse_kl, sampled_token_loss, topk_reverse_kl

from . import reference

B, T, V = 2, 3, 7
MASK = torch.ones(B, T, dtype=torch.bool)


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    student = 1.5 * rng.normal(size=(B, T, V))
    return torch.from_numpy(student).requires_grad_(), torch.from_numpy(student + rng.normal(size=(B, T, V)))


def gradient(loss, student):
    (grad,) = torch.autograd.grad(loss, student)
    return grad.numpy()


def expected_gradient(loss_of, student, teacher) -> np.ndarray:
    """Exact expectation over the sampled token: each token's gradient times its student probability."""
    total = np.zeros((B, T, V))
    for token in range(V):
        log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
        grad = gradient(loss_of(log_p, log_q, torch.full((B, T), token)), student)
        total += log_p[..., token, None].exp().detach().numpy() * grad
    return total


def at(logprobs, tokens):
    return logprobs.gather(-1, tokens[..., None]).squeeze(-1)


def ours_sampled(log_p, log_q, tokens):
    return sampled_token_loss(at(log_p, tokens), at(log_q, tokens), MASK)[1].loss


def scalar_kl_as_advantage(log_p, log_q, tokens):
    """The mistake: one KL value per position, detached, times the ratio of the sampled token."""
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).detach()
    ratio = (at(log_p, tokens) - at(log_p, tokens).detach()).exp()
    return (kl * ratio).sum()


def check_expected_gradient_is_that_of_reverse_kl(loss_of, student, teacher):
    want = reference.reverse_kl_gradient(student.detach().numpy(), teacher.numpy())
    assert np.abs(want).max() > 0.05
    np.testing.assert_allclose(expected_gradient(loss_of, student, teacher), want, atol=1e-12)


def test_the_sampled_token_form_descends_the_reverse_kl(logits):
    check_expected_gradient_is_that_of_reverse_kl(ours_sampled, *logits)


def test_a_scalar_kl_as_advantage_has_zero_expected_gradient(logits):
    np.testing.assert_allclose(expected_gradient(scalar_kl_as_advantage, *logits), 0, atol=1e-12)
    with pytest.raises(AssertionError):
        check_expected_gradient_is_that_of_reverse_kl(scalar_kl_as_advantage, *logits)


def ours_topk(log_p, log_q):
    return topk_reverse_kl(log_p, log_q, MASK)[1].loss


def renormalised_kl(log_p, log_q):
    """The mistake: both sides renormalised over the candidates before the KL is taken."""
    log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def on_top(k, student, teacher):
    ids = student.topk(k, -1).indices
    return student.log_softmax(-1).gather(-1, ids), teacher.log_softmax(-1).gather(-1, ids), ids


def check_top1_gradient(loss_of, student, teacher):
    """With one candidate the renormalised probability is 1, and (log p - log q) grad log p remains."""
    log_p, log_q, ids = on_top(1, student, teacher)
    gap = (log_p - log_q).detach().numpy()
    want = reference.chain_to_logits(gap, ids.numpy(), student.detach().numpy())
    assert (np.abs(want).max(-1) > 1e-3).all()
    np.testing.assert_allclose(gradient(loss_of(log_p, log_q), student), want, atol=1e-12)


def test_one_candidate_still_teaches(logits):
    check_top1_gradient(ours_topk, *logits)


def test_a_renormalised_kl_with_one_candidate_is_identically_zero(logits):
    student, teacher = logits
    log_p, log_q, _ = on_top(1, student, teacher)
    loss = renormalised_kl(log_p, log_q)
    assert float(loss.detach()) == 0
    assert (gradient(loss, student) == 0).all()
    with pytest.raises(AssertionError):
        check_top1_gradient(renormalised_kl, student, teacher)


def test_with_every_token_a_candidate_it_is_the_reverse_kl(logits):
    """Two roads to one gradient: the surrogate over the vocabulary, and autograd through the divergence."""
    student, teacher = logits
    log_p, log_q, _ = on_top(V, student, teacher)
    surrogate = gradient(ours_topk(log_p, log_q), student)
    true = gradient(reverse_kl(student, teacher, MASK)[1].loss, student)
    want = reference.reverse_kl_gradient(student.detach().numpy(), teacher.numpy())
    np.testing.assert_allclose(surrogate, want, atol=1e-12)
    np.testing.assert_allclose(true, want, atol=1e-12)
    # and the loss that is logged is the KL itself
    assert float(ours_topk(log_p, log_q).detach()) == pytest.approx(
        float(reverse_kl(student, teacher, MASK)[1].loss.detach()), rel=1e-12
    )
