"""The method once more, in float64 numpy, position by position, written from its rules and not from the code.

Slow and plain on purpose: a second opinion for `prune_opd.core`. Shapes as there: B rollouts, T positions,
K candidates, V vocabulary; log-probabilities in nats over the full vocabulary.
"""

from __future__ import annotations

import numpy as np


def f64(x) -> np.ndarray:
    return np.asarray(x, dtype=np.float64)


def log_softmax(logits) -> np.ndarray:
    logits = f64(logits)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# ---- compatibility ----


def topk_overlap(student_ids, teacher_ids) -> np.ndarray:
    B, T, K = student_ids.shape
    out = np.zeros((B, T))
    for b, t in np.ndindex(B, T):
        out[b, t] = len(set(student_ids[b, t].tolist()) & set(teacher_ids[b, t].tolist())) / K
    return out


def overlap_mass(student_ids, student_logprobs, teacher_ids) -> np.ndarray:
    B, T, K = student_ids.shape
    out = np.zeros((B, T))
    for b, t in np.ndindex(B, T):
        for k in range(K):
            if int(student_ids[b, t, k]) in teacher_ids[b, t].tolist():
                out[b, t] += np.exp(f64(student_logprobs[b, t, k]))
    return out


def nucleus(ids, logprobs, top_p: float) -> set[int]:
    """The smallest set of most likely tokens with mass >= top_p; all of them when their mass falls short."""
    kept, mass = set(), 0.0
    for k in np.argsort(-f64(logprobs), kind="stable"):
        kept.add(int(ids[k]))
        mass += np.exp(f64(logprobs[k]))
        if mass >= top_p:
            break
    return kept


def nucleus_accept(response_ids, teacher_ids, teacher_logprobs, top_p: float) -> np.ndarray:
    out = np.zeros(response_ids.shape, dtype=bool)
    for b, t in np.ndindex(*response_ids.shape):
        out[b, t] = int(response_ids[b, t]) in nucleus(teacher_ids[b, t], teacher_logprobs[b, t], top_p)
    return out


# ---- drift ----


def drift(events, mask, w_drop=0.01, w_base=0.5, eps=1e-8):
    """reliability (B, T), weight (B, T), effective_length (B,), onset (B,)"""
    B, T = events.shape
    reliability, weight = np.zeros((B, T)), np.zeros((B, T))
    effective_length, onset = np.zeros(B, dtype=int), np.full(B, -1)
    for b in range(B):
        count = 0
        for t in range(T):
            if not mask[b, t]:
                continue
            if events[b, t]:
                count += 1
                if onset[b] < 0:
                    onset[b] = t
            r = min(max(1 - w_drop * count, 0.0), 1.0)
            reliability[b, t] = r
            weight[b, t] = r + w_base
            effective_length[b] += r > eps
    return reliability, weight, effective_length, onset


# ---- training window ----


def window_trace(batches, *, init_len, min_len, max_len, step, hit_ratio, margin, shrink_patience):
    """[(previous length, length, hit ratio, misses)] after each batch of effective lengths."""
    length, misses, trace = init_len, 0, []
    for batch in batches:
        previous = length
        bar = max(min_len, length - margin)
        hit = sum(1 for e in batch if e >= bar) / len(batch)
        if hit >= hit_ratio:
            length, misses = min(length + step, max_len), 0
        else:
            misses += 1
            if misses >= shrink_patience:
                length, misses = max(length - step, min_len), 0
        trace.append((previous, length, hit, misses))
    return trace


# ---- objectives: each returns (un-normalised sum, valid tokens, sum of weights, gradient of the sum) ----


def _weights(mask, weight) -> np.ndarray:
    out = np.zeros(mask.shape)
    for b, t in np.ndindex(*mask.shape):
        if mask[b, t]:
            out[b, t] = 1.0 if weight is None else float(weight[b, t])
    return out


def topk_reverse_kl(student_logprobs, teacher_logprobs, mask, weight=None, valid=None, mode="student_p"):
    """Gradient with respect to the candidates' student log-probabilities (B, T, K)."""
    w = _weights(mask, weight)
    loss, grad = 0.0, np.zeros(student_logprobs.shape)
    for b, t in np.ndindex(*mask.shape):
        ks = [k for k in range(student_logprobs.shape[-1]) if valid is None or valid[b, t, k]]
        if not mask[b, t] or not ks:
            continue
        log_p, log_q = f64(student_logprobs[b, t, ks]), f64(teacher_logprobs[b, t, ks])
        prefactor = {
            "student_p": np.exp(log_p) / np.exp(log_p).sum(),
            "teacher_p": np.exp(log_q) / np.exp(log_q).sum(),
            "none": np.ones(len(ks)),
        }[mode]
        advantage = w[b, t] * prefactor * (log_q - log_p)
        loss -= advantage.sum()
        grad[b, t, ks] = -advantage
    return loss, int(np.sum(mask)), w.sum(), grad


def topk_surrogate(student_logits, student_ids, frozen_gradient, logits_at) -> float:
    """Sum over candidates of -A * p(v) / p_at(v), the advantage A = -frozen_gradient and p_at held fixed."""
    ratio = np.exp(log_softmax(student_logits) - log_softmax(logits_at))
    return float((frozen_gradient * np.take_along_axis(ratio, student_ids, -1)).sum())


def chain_to_logits(grad_logprobs, ids, logits) -> np.ndarray:
    """From d/d log p(v) at the gathered ids to d/d logits: the derivative of log p(v) is onehot(v) - p."""
    p = np.exp(log_softmax(logits))
    out = np.zeros(p.shape)
    for b, t in np.ndindex(*p.shape[:2]):
        for g, v in zip(grad_logprobs[b, t], ids[b, t], strict=True):
            out[b, t] += g * (np.eye(p.shape[-1])[v] - p[b, t])
    return out


def sampled_token(student_logprobs, teacher_logprobs, mask, weight=None):
    """Gradient with respect to the sampled tokens' student log-probabilities (B, T)."""
    w = _weights(mask, weight)
    loss, grad = 0.0, np.zeros(mask.shape)
    for b, t in np.ndindex(*mask.shape):
        if mask[b, t]:
            grad[b, t] = w[b, t] * (f64(student_logprobs[b, t]) - f64(teacher_logprobs[b, t]))
            loss += grad[b, t]
    return loss, int(np.sum(mask)), w.sum(), grad


def kl(log_a, log_b) -> float:
    """KL(a || b); what a forbids contributes nothing."""
    possible = log_a > -np.inf
    return float((np.exp(log_a[possible]) * (log_a[possible] - log_b[possible])).sum())


def divergence(kind, student_logits, teacher_logits, mask, weight=None, beta=0.5):
    """Sum of w * forward_kl | reverse_kl | jsd over the full vocabulary, valid tokens, sum of weights."""
    w = _weights(mask, weight)
    loss = 0.0
    for b, t in np.ndindex(*mask.shape):
        if not mask[b, t]:
            continue
        log_p, log_q = log_softmax(student_logits[b, t]), log_softmax(teacher_logits[b, t])
        log_m = np.logaddexp(np.log(beta) + log_q, np.log1p(-beta) + log_p)
        value = {
            "forward_kl": kl(log_q, log_p),
            "reverse_kl": kl(log_p, log_q),
            "jsd": beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m),
        }[kind]
        loss += w[b, t] * value
    return loss, int(np.sum(mask)), w.sum()


def reverse_kl_gradient(student_logits, teacher_logits) -> np.ndarray:
    """d KL(p || q) / d student logits, per position: p * (log p - log q - KL)."""
    log_p, log_q = log_softmax(student_logits), log_softmax(teacher_logits)
    p = np.exp(log_p)
    return p * (log_p - log_q - (p * (log_p - log_q)).sum(-1, keepdims=True))


def central_difference(function, x, step=1e-6) -> np.ndarray:
    """Zero where x is infinite: moving it changes nothing."""
    x = f64(x).copy()
    out = np.zeros(x.shape)
    for index in zip(*np.nonzero(np.isfinite(x)), strict=True):
        here = x[index]
        x[index] = here + step
        above = function(x)
        x[index] = here - step
        out[index] = (above - function(x)) / (2 * step)
        x[index] = here
    return out


def group_advantage(rewards, group_size):
    """(r - mean) / (std + 1e-6) within each group, NaN rewards left out; plain Python."""
    out = []
    for start in range(0, len(rewards), group_size):
        group = [float(r) for r in rewards[start : start + group_size]]
        given = [r for r in group if not np.isnan(r)]
        if len(set(given)) < 2:
            out += [0.0] * group_size
            continue
        mean = sum(given) / len(given)
        std = (sum((r - mean) ** 2 for r in given) / (len(given) - 1)) ** 0.5
        out += [0.0 if np.isnan(r) else (r - mean) / (std + 1e-6) for r in group]
    return np.array(out)
