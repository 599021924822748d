"""Everything that the plug-in takes from verl. With a new verl, begin here.

`tests/integrations/test_verl_surface.py` takes the names one by one and says which have moved, then holds each method
that our subclasses override against verl's. What those methods do is held by `tests/integrations/verl_e2e`.
"""

from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.experimental.agent_loop.agent_loop import register as register_agent_loop
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn
from verl.single_controller.base.decorator import register as register_dispatch
from verl.trainer.distillation.losses import (
    DistillationLossSettings,
    compute_forward_kl_topk,
    register_distillation_loss,
)
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, AgentLoopWorkerTQ, PPOTrainerSync, register_trainer
from verl.utils import tensordict_utils
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path
from verl.utils.metric import AggregationType, Metric
from verl.utils.profiler import simple_timer
from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.padding import no_padding_2_padding

__all__ = [
    "ActorRolloutRefWorker",
    "AgentLoopManagerTQ",
    "AgentLoopMetrics",
    "AgentLoopOutput",
    "AgentLoopWorkerTQ",
    "AggregationType",
    "Dispatch",
    "DistillationLossSettings",
    "Metric",
    "PPOTrainerSync",
    "Role",
    "SingleTurnAgentLoop",
    "compute_forward_kl_topk",
    "find_latest_ckpt_path",
    "get_ulysses_sequence_parallel_world_size",
    "make_nd_compute_dataproto_dispatch_fn",
    "no_padding_2_padding",
    "register_agent_loop",
    "register_dispatch",
    "register_distillation_loss",
    "register_trainer",
    "simple_timer",
    "slice_input_tensor",
    "tensordict_utils",
]
