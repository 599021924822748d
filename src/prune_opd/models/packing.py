"""Rollouts side by side in the rows of one model input, and the micro-batches of an update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune_opd.types import Rollouts


@dataclass(frozen=True)
class Packed:
    """Several rollouts side by side in the rows of one model input, without the padding between them.

    A prompt stands once in a row, before all of its rollouts there, or once before each of them.

    input_ids, position_ids (R, L) int64; the positions of a rollout follow those of its prompt · key_ranges (R, L, 3)
    int32: the query at column c attends to columns key_ranges[0] to c, its own response, and to columns key_ranges[1]
    up to, but without, key_ranges[2], its prompt; a prompt's columns and padding have no such second range · row,
    column (N,): where the hidden state stands that predicts a kept token · rollout, position (N,): which token (b, t)
    that is · padding: columns that hold nothing.
    """

    input_ids: Tensor
    position_ids: Tensor
    key_ranges: Tensor
    row: Tensor
    column: Tensor
    rollout: Tensor
    position: Tensor
    padding: int

    @staticmethod
    def empty(device: torch.device | str = "cpu") -> Packed:
        """One column of padding and no kept token: its loss is 0, and so is the gradient of every parameter."""
        one, none = torch.zeros(1, 1, dtype=torch.long, device=device), torch.empty(0, dtype=torch.long, device=device)
        return Packed(one, one, torch.zeros(1, 1, 3, dtype=torch.int32, device=device), none, none, none, none, 1)


FULL_ENOUGH = 0.95
"""Rows that share a micro-batch are filled to at least this share of its width, so padding stays below 1 - this."""


def default_token_budget(device: torch.device) -> int:
    """Tokens of a forward where no setting says: on a CPU so few that its caches hold what layers hand on."""
    return 2048 if device.type == "cpu" else 16384


def pack(
    rollouts: Rollouts, token_budget: int | None = None, *, long_rows: bool = False, share_prompts: bool = True
) -> Iterator[Packed]:
    """Micro-batches of at most `token_budget` columns (one row at least).

    A row is as wide as the longest rollout, and shorter ones share one, by first-fit decreasing. Where attention costs
    no more in a longer row (`long_rows`), a micro-batch is one row, by first-fit in the given order, in which rollouts
    of a prompt are neighbours. Of each rollout, prompt + response without the last token are fed, since nothing is
    predicted from it, and in each row a prompt once, or with each of its rollouts (`share_prompts` is False); rollouts
    without a kept token are left out.
    """
    token_budget = token_budget or default_token_budget(rollouts.response_ids.device)
    fed = {b: n - 1 for b, n in enumerate(rollouts.lengths.tolist()) if n > 0}  # of each response
    numbers: dict[tuple[int, ...], int] = {}
    prompt_of = [
        numbers.setdefault(tuple(prompt), len(numbers)) if share_prompts else b
        for b, prompt in enumerate(rollouts.prompts)
    ]
    widest = max((len(rollouts.prompts[b]) + n for b, n in fed.items()), default=0)
    if long_rows:
        widest = max(widest, token_budget)
    rows: list[dict[int, list[int]]] = []  # the rollouts of each prompt
    filled: list[int] = []
    for b in fed if long_rows else sorted(fed, key=lambda b: -fed[b]):
        prompt, alone = prompt_of[b], len(rollouts.prompts[b]) + fed[b]
        fits = [i for i, row in enumerate(rows) if filled[i] + (fed[b] if prompt in row else alone) <= widest]
        if not fits:
            fits = [len(rows)]
            rows.append({})
            filled.append(0)
        place = next((i for i in fits if prompt in rows[i]), fits[0])
        filled[place] += fed[b] if prompt in rows[place] else alone
        rows[place].setdefault(prompt, []).append(b)
    order = sorted(range(len(rows)), key=lambda row: -filled[row])
    while order:
        width = filled[order[0]]
        alike = sum(filled[row] >= FULL_ENOUGH * width for row in order)
        count = min(alike, max(1, token_budget // width))
        yield _packed(rollouts, [list(rows[row].values()) for row in order[:count]], width, fed)
        order = order[count:]


def _packed(rollouts: Rollouts, rows: Sequence[Sequence[Sequence[int]]], width: int, fed: Mapping[int, int]) -> Packed:
    """rows: in each, groups of rollouts that answer one prompt."""
    device, responses = rollouts.response_ids.device, rollouts.response_ids.cpu()
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    position_ids = torch.zeros_like(input_ids)
    key_ranges = torch.arange(width, dtype=torch.int32)[:, None].repeat(len(rows), 1, 3)  # padding sees itself
    places: list[Tensor] = []
    padding = 0
    for r, row in enumerate(rows):
        filled = 0
        for group in row:
            prompt = rollouts.prompts[group[0]]
            start, end = filled, filled + len(prompt)
            input_ids[r, start:end] = torch.tensor(prompt)
            position_ids[r, start:end] = torch.arange(len(prompt))
            key_ranges[r, start:end] = start
            filled = end
            for b in group:
                n = fed[b]
                input_ids[r, filled : filled + n] = responses[b, :n]
                position_ids[r, filled : filled + n] = torch.arange(len(prompt), len(prompt) + n)
                key_ranges[r, filled : filled + n] = torch.tensor([filled, start, end], dtype=torch.int32)
                t = torch.arange(n + 1)
                column = torch.cat([torch.tensor([end - 1]), t[:-1] + filled])  # the prompt predicts the first token
                places.append(torch.stack([torch.full_like(t, r), column, torch.full_like(t, b), t]))
                filled += n
        padding += width - filled
    row_of, column, rollout, position = torch.cat(places, dim=-1).to(device)
    inputs = input_ids.to(device), position_ids.to(device), key_ranges.to(device)
    return Packed(*inputs, row_of, column, rollout, position, padding)
