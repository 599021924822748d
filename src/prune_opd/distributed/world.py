"""The processes that train together, as the step sees them. A process alone is a world of size 1: nothing is exchanged.

Every rank holds its share of a step's rollouts and the same window. The method needs little of all of them: the
denominator of the loss, the sum of the gradients, and the effective lengths. All of it is gathered and then summed, so
that each process computes the same number from the same parts in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """rank in 0..size-1; more than one process needs torch.distributed to be up (`sharding.launched`)."""

    rank: int = 0
    size: int = 1

    def gather(self, value: T) -> list[T]:
        """The value of each rank, in the order of ranks, on every rank. For small things: it is pickled."""
        if self.size == 1:
            return [value]
        found: list[T] = [value] * self.size
        dist.all_gather_object(found, value)
        return found

    def sum(self, value: float) -> float:
        """Over the ranks, in their order."""
        return sum(self.gather(value))

    def first(self, value: T | None) -> T | None:
        """The first value that is not None, by rank; so that what one rank met, all of them raise."""
        return next((found for found in self.gather(value) if found is not None), None)

    @contextmanager
    def raising_together(self, *kinds: type[Exception]) -> Iterator[None]:
        """What one rank raises of these kinds in the block, all raise at its end; so that they can still save together.

        Every rank must come to it. A rank that raised has left the block early: what follows the place where it may
        must not wait for other ranks.
        """
        failed: Exception | None = None
        try:
            yield
        except kinds as error:
            failed = error
        if (failed := self.first(failed)) is not None:
            raise failed

    def gather_rollouts(self, numbers: Sequence[int], values: Tensor) -> Tensor:
        """What the ranks have of a step's rollouts (B, ...), on the CPU, as one process would: in ascending order."""
        if self.size == 1:
            return values
        parts = self.gather((list(numbers), values))
        order = torch.tensor([number for of_rank, _ in parts for number in of_rank]).argsort()
        return torch.cat([of_rank for _, of_rank in parts])[order]

    def partition(self, costs: Sequence[float]) -> list[int]:
        """Which items are this rank's, in ascending order: every rank gets about the same cost.

        The costliest first, each to the rank that has least so far (Graham's LPT rule: at most 4/3 of the best).
        """
        loads, mine = [0.0] * self.size, []
        for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
            rank = loads.index(min(loads))
            loads[rank] += costs[item]
            if rank == self.rank:
                mine.append(item)
        return sorted(mine)

    def equal_count(self, items: Iterable[T], filler: T) -> Iterator[T]:
        """These items, and `filler` behind them until every rank has had as many.

        Weights that are sharded are gathered in each forward and backward, which all ranks have to take part in.
        """
        if self.size == 1:
            yield from items
            return
        items = list(items)
        count = max(self.gather(len(items)))
        yield from items
        yield from [filler] * (count - len(items))

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Add up the gradients of replicated parameters over the ranks, in place; sharded ones hold sums already.

        One all-reduce after the last micro-batch. DistributedDataParallel is not used: it averages where a sum over a
        global token count is wanted, needs as many backwards on every rank, and acts in the forward of its wrapper,
        while the step runs body and head apart.
        """
        if self.size > 1:
            for parameter in parameters:
                if not hasattr(parameter.grad, "full_tensor"):
                    dist.all_reduce(parameter.grad)


ALONE = World()


def from_another_rank(error: BaseException) -> bool:
    """Whether this is what torch raises when another rank ended or cannot be reached; gloo has no class for it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor (DTensor) put together on every rank, any other as it is.

    The gradients that arrive at the whole tensor on the ranks add up, and each rank keeps its shard of the sum.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial()])
