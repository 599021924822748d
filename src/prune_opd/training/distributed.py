"""Several processes, as torchrun starts them: replicated weights (ddp) or sharded ones (fsdp2). No second trainer.

The step asks its `World` for sums (world.py). Here is the rest: starting the processes, sharding the student, giving
the sampler whole weights, putting a step's results together for the one process that writes, and the optimiser's
state as shards that load at any number of ranks.

The teacher is whole on every rank: it is frozen, and in flight each rank asks it at times of its own.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.errors import ModelError
from prune_opd.modeling import output_head
from prune_opd.sampling.base import Watcher
from prune_opd.sampling.local import LocalSampler
from prune_opd.step import StepResult
from prune_opd.types import Rollouts
from prune_opd.world import ALONE, World, whole


@contextmanager
def launched() -> Iterator[World]:
    """The world that torchrun started this process in; a process that torchrun did not start is alone.

    Objects travel over gloo, gradients over NCCL where the accelerator is CUDA. Rank r of a node has its r-th device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


# ---- sharded weights ----


def shard(student: Any) -> None:
    """Shard every parameter of a causal LM over all ranks (FSDP2), in place; build the optimiser after this.

    Each decoder layer is gathered when its forward and backward need it, so all ranks must run as many of them
    (`World.even`). Embeddings and final norm belong to the body. The head is used outside of any forward
    (core/head.py): it stays a DTensor that `whole` puts together. Gradients are summed, not averaged, since the loss
    has a global denominator.
    Raises ModelError for a model whose layers transformers does not name.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    output_head(student)  # held against the model's own logits while it can still run by itself
    causal_lm = student.get_base_model() if hasattr(student, "get_base_model") else student
    body, head = causal_lm.base_model, causal_lm.get_output_embeddings()
    names = set(causal_lm._no_split_modules or ())
    layers = [module for module in body.modules() if type(module).__name__ in names]
    if not layers:
        raise ModelError(
            f"{type(causal_lm).__name__} does not name its layers (_no_split_modules), so it cannot be sharded; "
            'set training.parallel = "ddp"'
        )
    mesh = init_device_mesh(causal_lm.device.type, (dist.get_world_size(),))
    tied = head.weight is causal_lm.get_input_embeddings().weight
    for module in [*layers, body] if tied else [*layers, body, head]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    if tied:
        head.weight = causal_lm.get_input_embeddings().weight
    for module in causal_lm.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else a multiplying sum, which gloo does not have


class WholeWeightsSampler:
    """A `Sampler` over a copy of a sharded student that holds the whole weights while it samples, and nothing between.

    Token by token a sharded model would gather all its weights for each token, and ranks whose rollouts end earlier
    would have to go on. So they are gathered once a call; then each rank samples by itself, without collectives. All
    ranks must call `sample` equally often, with prompts or without.
    """

    def __init__(self, sampler: LocalSampler, student: torch.nn.Module) -> None:
        """Make a copy of `student`, which is not sharded yet, the model of `sampler`; its parameters have no memory."""
        hollow = {id(p): torch.nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in student.parameters()}
        self.sampler, self.student = sampler, student
        self.model = sampler.model = copy.deepcopy(student, hollow)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: Tensor,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        watcher: Watcher | None = None,
    ) -> Rollouts:
        """See `Sampler.sample`."""
        with torch.no_grad():
            gathered = {id(p): whole(p.detach()) for p in self.student.parameters()}
        self._assign(gathered)
        try:
            return self.sampler.sample(
                prompts, uniforms, temperature=temperature, top_p=top_p, top_k=top_k, watcher=watcher
            )
        finally:
            self._assign({key: value.to("meta") for key, value in gathered.items()})

    def _assign(self, values: dict[int, Tensor]) -> None:
        named = self.student.named_parameters(remove_duplicate=False)  # tied weights have several names and one value
        self.model.load_state_dict({name: values[id(p)] for name, p in named}, assign=True, strict=False)


# ---- one result of all ranks ----


def merged(result: StepResult, world: World) -> StepResult | None:
    """On rank 0 the step's result over all rollouts, in the order of one process; None on the others.

    So what is logged and written needs no word about ranks. Seconds are those of rank 0, waiting included.
    """
    if world.size == 1:
        return result
    found: list[StepResult] | None = [result] * world.size if world.rank == 0 else None
    dist.gather_object(_to(result, "cpu"), found)
    if found is None:
        return None
    order = torch.tensor([number for one in found for number in one.numbers]).argsort()
    together = _together([one for one in found if one.numbers], order)
    of_the_step = {name: getattr(result, name) for name in ("window", "loss", "grad_norm", "seconds")}
    fed = {name: sum(getattr(one, name) for one in found) for name in ("packed_tokens", "padding")}  # by idle ranks too
    return _to(replace(together, **fed, **of_the_step), result.weight.device)


def _together(parts: Sequence[Any], order: Tensor) -> Any:
    """The same field of several results as one: rollouts side by side, right-padded to one length; counts added up."""
    first = parts[0]
    if is_dataclass(first) and not isinstance(first, type):
        return replace(first, **{f.name: _together([getattr(p, f.name) for p in parts], order) for f in fields(first)})
    if isinstance(first, Tensor):
        width = max(part.shape[1] for part in parts) if first.dim() > 1 else 0
        padded = [_widened(part, width) if part.dim() > 1 else part for part in parts]
        return torch.cat(padded)[order]
    if isinstance(first, int) and not isinstance(first, bool):
        return sum(parts)
    if isinstance(first, list | tuple):
        everyone = [item for part in parts for item in part]
        return [everyone[i] for i in order.tolist()]
    return first


def _widened(tensor: Tensor, width: int) -> Tensor:
    """(B, T, ...) to (B, width, ...): padding repeats nothing real and is masked everywhere."""
    padding = tensor.new_zeros(len(tensor), width - tensor.shape[1], *tensor.shape[2:])
    return torch.cat([tensor, padding], dim=1)


def _to(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _to(getattr(value, f.name), device) for f in fields(value)})
    return value


# ---- checkpoints of sharded weights ----


def whole_weights(student: torch.nn.Module, world: World) -> dict[str, Tensor]:
    """All weights on rank 0's CPU, for a folder that transformers loads; empty on the other ranks."""
    named = student.state_dict(keep_vars=True)
    found: dict[int, Tensor] = {}  # by identity: tied weights have several names and one value
    with torch.no_grad():
        for value in named.values():
            if id(value) not in found:
                gathered = whole(value.detach())
                found[id(value)] = gathered.cpu() if world.rank == 0 else gathered.new_empty(0)
    return {name: found[id(value)] for name, value in named.items()} if world.rank == 0 else {}


def is_sharded(student: torch.nn.Module) -> bool:
    """Whether `shard` was applied to it."""
    return any(hasattr(p, "full_tensor") for p in student.parameters())


def load_whole_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Read a state that one process wrote; each rank keeps its shard of it where the parameters are sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, of_parameter in state["state"].items():
        parameter = parameters[index]
        if isinstance(parameter, DTensor):
            for name, value in of_parameter.items():
                if value.shape == parameter.shape:
                    of_parameter[name] = distribute_tensor(
                        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
                    )
    optimizer.load_state_dict(state)


def save_optimizer_shards(folder: Path, student: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Each rank writes its shard of the optimiser's state (torch.distributed.checkpoint)."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    dcp.save({"optimizer": get_optimizer_state_dict(student, optimizer)}, checkpoint_id=folder)


def load_optimizer_shards(folder: Path, student: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read what this rank needs, however many ranks wrote it and however many there are now, sharded or not."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    state = get_optimizer_state_dict(student, optimizer)
    dcp.load({"optimizer": state}, checkpoint_id=folder)
    set_optimizer_state_dict(student, optimizer, state)
