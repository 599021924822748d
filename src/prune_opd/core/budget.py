"""The tokens of a step as its budget: what stops and a short window save pays for rollouts of further prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

MOST_TIMES = 8
"""A step has at most this many times the prompts of the first one, however short its rollouts become."""


class TokenBudget:
    """How many prompts the next step has, with G rollouts each, so that they take about `tokens` tokens together.

        n ← clip(round(tokens / (G · mean length)), 1, MOST_TIMES · n_0)

    The mean is over the kept tokens of the step before, so n depends neither on slots nor on chunks nor on ranks. A
    step is off by as much as its mean length differs from that of the step before.

    prompts: n_0, of the first step. `first`: prompts that all steps before had, where those of the next one begin.
    Raises ValueError for numbers below 1. Ours; the paper's abstract speaks of reallocating the budget.
    """

    def __init__(self, tokens: int, *, prompts: int, num_generations: int) -> None:
        if min(tokens, prompts, num_generations) < 1:
            raise ValueError(f"a token budget needs numbers of at least 1, got {tokens}, {prompts}, {num_generations}")
        self.tokens, self.most, self.num_generations = tokens, MOST_TIMES * prompts, num_generations
        self.prompts, self.first = prompts, 0

    def skip(self) -> None:
        """Go on to the next step's prompts without having learnt a length."""
        self.first += self.prompts

    def update(self, lengths: Int[Tensor, " B"]) -> None:
        """Take the kept lengths of the rollouts of a step, all ranks together."""
        self.skip()
        per_prompt = self.num_generations * lengths.double().mean().item()
        self.prompts = min(max(round(self.tokens / max(per_prompt, 1.0)), 1), self.most)

    def state_dict(self) -> dict[str, Any]:
        """What changes over time; the budget comes from the recipe."""
        return {"prompts": self.prompts, "first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; ValueError where it is of another budget."""
        if not 1 <= state["prompts"] <= self.most:
            raise ValueError(
                f"{state['prompts']} prompts lie outside [1, {self.most}]; this state is of another recipe"
            )
        self.prompts, self.first = int(state["prompts"]), int(state["first"])
