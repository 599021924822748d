"""Packed rows: which tokens are fed, what each of them sees, and how many columns that takes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_opd.models.packed_attention import seen_columns
from prune_opd.models.packing import Packed, default_token_budget, pack
from prune_opd.types import Rollouts
from tests.families import PAD, VOCAB


def rollouts_of(prompts: list[list[int]], lengths: list[int]) -> Rollouts:
    """Random responses of these lengths."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(max([1, *lengths])) < torch.tensor(lengths)[:, None]
    ids = torch.randint(2, VOCAB, mask.shape, generator=generator).masked_fill(~mask, PAD)
    ended = torch.ones(len(lengths), dtype=torch.bool)
    return Rollouts(prompts, ids, mask, ended, ~ended)


def shapes(parts: list[Packed]) -> list[tuple[int, ...]]:
    return [tuple(part.input_ids.shape) for part in parts]


PROMPTS = [[5], [6, 7, 8], [6, 7, 9], [10] * 6]


@given(
    answers=st.lists(st.tuples(st.sampled_from(PROMPTS), st.integers(0, 12)), min_size=1, max_size=12),
    budget=st.integers(1, 80),
    long_rows=st.booleans(),
)
def test_each_kept_token_is_predicted_once_from_its_prompt_and_what_was_said_before(answers, budget, long_rows):
    rollouts = rollouts_of([prompt for prompt, _ in answers], [length for _, length in answers])
    longest = max((len(prompt) + length - 1 for prompt, length in answers if length), default=0)
    predicted = []
    for part in pack(rollouts, budget, long_rows=long_rows):
        rows, width = part.input_ids.shape
        assert width <= max(longest, budget if long_rows else 0) and (rows == 1 or rows * width <= budget)
        seen = seen_columns(part.key_ranges)
        assert seen.diagonal(dim1=1, dim2=2).all()
        for r, c, b, t in zip(*(x.tolist() for x in (part.row, part.column, part.rollout, part.position)), strict=True):
            before = [*rollouts.prompts[b], *rollouts.response_ids[b, :t].tolist()]
            assert part.input_ids[r, seen[r, c]].tolist() == before
            assert part.position_ids[r, seen[r, c]].tolist() == list(range(len(before)))
            predicted.append((b, t))
        fed = {(r, tuple(rollouts.prompts[b])) for r, b in zip(part.row.tolist(), part.rollout.tolist(), strict=True)}
        responses = sum(answers[b][1] - 1 for b in set(part.rollout.tolist()))
        assert part.padding == rows * width - responses - sum(len(prompt) for _, prompt in fed)
    assert sorted(predicted) == [(b, t) for b, (_, length) in enumerate(answers) for t in range(length)]


def test_rollouts_of_a_prompt_share_it_where_a_row_is_long_enough():
    """Four of 30 tokens each, of two prompts of 20, in rows of 140: 2 · 20 + 8 · 29 columns instead of 8 · 49."""
    prompts = [[2] * 20] * 4 + [[3] * 20] * 4
    assert shapes(list(pack(rollouts_of(prompts, [30] * 8), 140, long_rows=True))) == [(1, 136), (1, 136)]
    assert shapes(list(pack(rollouts_of(prompts, [30] * 8), 140))) == [(2, 49)] * 4


def test_a_long_row_is_as_full_as_the_budget_and_no_shorter_than_the_longest_rollout():
    prompts = [[2], [3], [4]]
    assert shapes(list(pack(rollouts_of(prompts, [60, 20, 20]), 45, long_rows=True))) == [(1, 60), (1, 40)]


def test_without_a_setting_a_micro_batch_on_a_cpu_holds_2048_tokens():
    """As many rows of 102 tokens as fit, and the last ones."""
    rollouts = rollouts_of([[2 + b, 2, 2] for b in range(45)], [100] * 45)
    assert shapes(list(pack(rollouts))) == [(20, 102), (20, 102), (5, 102)]
    assert default_token_budget(torch.device("cuda")) == 16384
