"""Several processes, as torchrun starts them: replicated weights (ddp) or sharded ones (fsdp2). No second trainer.

The step asks its `World` for sums (world.py). Here is the rest: starting the processes, sharding the student, giving
the sampler whole weights, putting a step's results together for the one process that writes, and the optimiser's
state as shards that load at any number of ranks.

The teacher is whole on every rank, as stops in flight need it, since each rank asks it at times of its own; or sharded
as the student is (`model.teacher_placement`), and asked in lock-step.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.distributed.world import ALONE, World, from_another_rank, full_tensor
from prune_opd.errors import ModelError, RankError

LAUNCHER_ANSWERS = 60.0  # seconds


@contextmanager
def launched() -> Iterator[World]:
    """The world that torchrun started this process in; a process that torchrun did not start is alone.

    Objects travel over gloo, gradients over NCCL where the accelerator is CUDA. Rank r of a node has its r-th device.
    Raises RankError when the launcher is gone, and in place of what gloo and NCCL say when another rank is.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    _check_launcher()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size())
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves early closes connections that others still use
    except RuntimeError as error:
        if not from_another_rank(error):
            raise
        why = re.sub(r"^\[\S+\] ", "", str(error).partition(". This is typically")[0].splitlines()[0])
        raise RankError(
            f"rank {os.environ['RANK']} lost another rank of this run ({why}). What ended that one stands above or in "
            "its own log; the run goes on from its last checkpoint with --resume auto"
        ) from error
    finally:
        if dist.is_initialized():  # vLLM, when it is shut down, ends it too
            dist.destroy_process_group()


def _check_launcher() -> None:
    """RankError when torchrun, through which the ranks find each other, ended while this process started.

    Else torch would ask for it during half an hour.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection((host, port), timeout=LAUNCHER_ANSWERS).close()
    except OSError as error:
        raise RankError(
            f"torchrun does not answer at {host}:{port}, where the ranks of a run find each other ({error}): it has "
            "ended, or the network is cut; start the run again with --resume auto"
        ) from error


# ---- sharded weights ----


def shard(student: Any, *, bf16: bool = False, device: torch.device | None = None) -> None:
    """Shard every parameter of a causal LM over all ranks (FSDP2), in place; build the optimiser after this.

    device: where the shards go, if not where the model is; no more than a layer of it is whole there at a time.

    Call `output_head` before: it compares the head with the model's own logits, which a sharded model cannot compute
    outside of lock-step.

    Each decoder layer is gathered when its forward and backward need it, so all ranks must run as many of them
    (`World.even`). Embeddings and final norm belong to the body. The head is used outside of any forward
    (core/head.py): it stays a DTensor that `full_tensor` gathers. Gradients are summed, not averaged, since the loss
    has a global denominator.

    bf16: layers are gathered in bfloat16, which is what autocast would make of their matrices: half of what travels and
    of what is whole at a time, and no copies of autocast's beside it. Masters, sums of gradients, and what goes from
    layer to layer keep the student's type.
    Raises ModelError for a model whose layers transformers does not name.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    causal_lm = student.get_base_model() if hasattr(student, "get_base_model") else student
    body, head = causal_lm.base_model, causal_lm.get_output_embeddings()
    names = set(causal_lm._no_split_modules or ())
    layers = [module for module in body.modules() if type(module).__name__ in names]
    if not layers:
        raise ModelError(
            f"{type(causal_lm).__name__} does not name its layers (_no_split_modules), so it cannot be sharded; "
            'set training.parallel = "ddp"'
        )
    mesh = init_device_mesh((device or causal_lm.device).type, (dist.get_world_size(),))
    tied = head.weight is causal_lm.get_input_embeddings().weight
    half = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    whole = MixedPrecisionPolicy()
    for module in [*layers, body] if tied else [*layers, body, head]:
        policy = half if bf16 and module in layers else whole
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    if tied:
        head.weight = causal_lm.get_input_embeddings().weight
    for module in causal_lm.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else a multiplying sum, which gloo does not have


# ---- checkpoints of sharded weights ----


def whole_weights(student: torch.nn.Module, world: World) -> dict[str, Tensor]:
    """All weights on rank 0's CPU, for a folder that transformers loads; empty on the other ranks."""
    named = student.state_dict(keep_vars=True)
    found: dict[int, Tensor] = {}  # by identity: tied weights have several names and one value
    with torch.no_grad():
        for value in named.values():
            if id(value) not in found:
                gathered = full_tensor(value.detach())
                found[id(value)] = gathered.cpu() if world.rank == 0 else gathered.new_empty(0)
    return {name: found[id(value)] for name, value in named.items()} if world.rank == 0 else {}


def is_sharded(student: torch.nn.Module) -> bool:
    """Whether `shard` was applied to it."""
    return any(hasattr(p, "full_tensor") for p in student.parameters())
