"""verl on a CPU: a platform, and servers that are Hugging Face models. For tests alone.

verl's own processes import this module, since `VERL_USE_EXTERNAL_MODULES` names it before the plug-in:

    VERL_PLATFORM=cpu            the platform below, in place of CUDA
    VERL_ENGINE_DEVICE=cuda      verl registers its FSDP engine under this name; it trains where its tensors are

The servers go by vLLM's name, so that what verl asks of vLLM is asked of them. Sampling is a function of weights,
prefix and how often that prefix was asked for, so a run can be repeated, on one rank or on two.
"""

from __future__ import annotations

import contextlib
import os
import types
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import ray
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from verl.plugin.platform import PlatformBase, PlatformRegistry
from verl.utils.tokenizer import continuous_token_wiring as wiring
from verl.workers.rollout import base
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

RECORDS = "VERL_E2E_RECORDS"  # the folder that a run writes to, for the test to read
FAIL_AT = "VERL_E2E_FAIL_AT"  # from these weights on (the step that made them) the student's server answers nothing


def _device_module() -> types.ModuleType:
    """torch.cpu, with what verl asks of torch.cuda beyond it."""
    device = types.ModuleType("verl_cpu_device")
    vars(device).update({name: value for name, value in vars(torch.cpu).items() if not name.startswith("__")})
    for name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_device", "synchronize"):
        setattr(device, name, lambda *args, **kwargs: None)
    for name in ("manual_seed", "manual_seed_all", "set_rng_state"):
        setattr(device, name, lambda *args, **kwargs: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(device, name, lambda *args, **kwargs: 0)
    device.mem_get_info = lambda *args, **kwargs: (1 << 30, 1 << 30)
    device.get_rng_state = lambda *args, **kwargs: torch.zeros(1, dtype=torch.uint8)
    device.get_device_name = lambda *args, **kwargs: "cpu"
    device.is_available = lambda: True
    return device


@PlatformRegistry.register("cpu")
class CPU(PlatformBase):
    """Ray's GPUs are made up (`ray_init.num_gpus`); they count processes."""

    device_name = vendor_name = "cpu"
    device_module = _device_module()

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return True

    def current_device(self) -> str:  # verl hands it to `.to` and to torch.device
        return "cpu"

    def device_count(self) -> int:
        return 1

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        return {"num_gpus": num_gpus}

    def ray_noset_envvars(self) -> list[str]:
        return []

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def is_ipc_supported(self) -> bool:
        return False

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Any:
        yield

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        """There is no device to set, wait for, profile or empty."""

    set_device = synchronize = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = get_collective_module = cudart = _nothing


init_process_group = torch.distributed.init_process_group


def _init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
    """verl asks for one backend for the CPU and one for its device, which are the same here."""
    return init_process_group("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)


torch.distributed.init_process_group = _init_process_group


class Server:
    """What verl's vLLM server is to verl: token ids in, token ids out, and log-probs of the prompt where asked for."""

    def __init__(self, path: str, name: str) -> None:
        torch.set_num_threads(1)
        self.name, self.model = name, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        ends = self.model.generation_config.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])
        self.step: int | None = None
        self.asked: Counter[tuple[int, ...]] = Counter()

    # Not `torch.no_grad` on the coroutine: Ray would take it for a plain function.
    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **kwargs: Any
    ) -> TokenOutput:
        with torch.no_grad():
            return self._generate(list(prompt_ids), sampling_params)

    def _generate(self, prompt: list[int], wanted: dict[str, Any]) -> TokenOutput:
        if self.step is not None and self.step >= int(os.environ.get(FAIL_AT, 10**9)):
            raise MemoryError("the server has no memory left")
        if wanted.get("top_p", 1.0) != 1.0 or wanted.get("top_k", -1) != -1:
            raise NotImplementedError("top_p and top_k of sampling")
        fields: dict[str, Any] = {"global_steps": self.step}
        if wanted.get("prompt_logprobs") is not None:  # row i speaks of token i + 1, and the last one of nothing
            best = self._logprobs(prompt)[:-1].topk(wanted["prompt_logprobs"])
            dummy = best.values.shape[-1] * [0]
            fields["prompt_ids"] = [*best.indices.tolist(), dummy]
            fields["prompt_logprobs"] = [*best.values.tolist(), [float(zero) for zero in dummy]]
        draws, tokens, logprobs = self._draws(prompt), [], []
        past, feed = None, prompt
        while len(tokens) < wanted.get("max_tokens", 64):
            output = self.model(torch.tensor([feed]), past_key_values=past, use_cache=True)
            past, logits = output.past_key_values, output.logits[0, -1].double()
            cumulative = (logits / wanted["temperature"]).softmax(-1).cumsum(-1)
            draw = torch.rand((), generator=draws, dtype=torch.double) * cumulative[-1]
            tokens.append(int(torch.searchsorted(cumulative, draw, right=True)))
            logprobs.append(float(logits.log_softmax(-1)[tokens[-1]]))
            feed = tokens[-1:]
            if tokens[-1] in self.ends:
                break
        return TokenOutput(token_ids=tokens, log_probs=logprobs, num_preempted=0, extra_fields=fields)

    def _logprobs(self, sequence: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([sequence])).logits[0].float().log_softmax(-1)

    def _draws(self, prefix: list[int]) -> torch.Generator:
        seed = zlib.crc32(f"{self.step} {prefix} {self.asked[tuple(prefix)]}".encode())
        self.asked[tuple(prefix)] += 1
        return torch.Generator().manual_seed(seed)

    async def load(self, weights: dict[str, torch.Tensor], step: int) -> None:
        """New weights of the student, which came from a step of the trainer; what was loaded is written down."""
        self.model.load_state_dict(weights, strict=False)
        self.model.tie_weights()
        self.step = step
        self.asked.clear()
        held = {name: tensor.contiguous() for name, tensor in self.model.named_parameters()}
        save_file(held, Path(os.environ[RECORDS]) / f"{self.name}-{step}.safetensors")

    async def abort_all_requests(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {"aborted_count": 0, "request_ids": []}

    async def nothing(self, *args: Any, **kwargs: Any) -> None:
        """Weights and cache stay where they are."""

    wake_up = sleep = resume_generation = clear_kv_cache = release_kv_cache = resume_kv_cache = nothing
    start_profile = stop_profile = nothing


class Weights(BaseRollout):
    """In the training worker: hands the student's weights to its server."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any = None, replica_rank: int = -1, **kw: Any):
        super().__init__(config, model_config, device_mesh)
        size, rank = self.config.tensor_model_parallel_size, int(os.environ["RANK"])
        self.replica, self.leads, self.sleep_level = rank // size, rank % size == 0, 2

    async def resume(self, tags: list[str]) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(self, weights: Any, global_steps: int | None = None, **kwargs: Any) -> None:
        whole = {name: tensor.detach().float().clone() for name, tensor in weights}  # all ranks gather, one sends
        if self.leads:
            await ray.get_actor(f"student-{self.replica}").load.remote(whole, global_steps)


class Replica(RolloutReplica):
    """One server, whatever its size."""

    async def launch_servers(self) -> None:
        path = self.model_config["path"] if hasattr(self.model_config, "get") else self.model_config.path
        name = f"{self.name_suffix or 'teacher'}" if self.is_teacher_model else "student"
        name = f"{name}-{self.replica_rank}"
        alone = {"env_vars": {"VERL_USE_EXTERNAL_MODULES": __name__}}
        server = ray.remote(Server).options(name=name, num_cpus=0, max_concurrency=100, runtime_env=alone)
        self._server_handle, self._server_address = server.remote(path, name), name
        self.servers = [self._server_handle]
        await self._server_handle.nothing.remote()


RolloutReplicaRegistry.register("vllm", lambda: Replica)
base._ROLLOUT_REGISTRY["vllm", "async"] = f"{__name__}.Weights"

# verl's builder for Qwen wants a newline to be one token. The embedded pair's tokens are words, and none is a newline.
wiring._MODEL_TYPE_TO_FAMILY["qwen3"] = wiring.ContinuousTokenModelFamily.DEFAULT
