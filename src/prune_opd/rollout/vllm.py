"""Rollouts from a vLLM engine in this process, whose weights are those of the student before each call.

What is the same as in the local sampler: temperature, top-p, end tokens (kept in the response), and the student's top-k
log-probabilities, taken before temperature and top-p. What is not: vLLM draws its own random numbers. Each request has
a seed made from its rollout's first number, so a rollout depends on (seed, step, rollout) and the weights, up to
rounding in the engine, but is not the local sampler's; and the entropy is that of the top-k completed by an even share
of the mass that is left, an upper bound.

**Weights.** They are handed over as tensors and checked before every call: rollout/weights.py.

**Memory.** With `rollout.vllm_enable_sleep_mode` the engine gives its memory back after each call (vLLM's sleep level
2) and takes it again at the next. On a CPU vLLM has no sleep mode.

**Ranks.** Under torchrun each rank has an engine for its share of the rollouts.

**Stops.** A rollout that the watcher ends is aborted in the engine and its place taken at once.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prune_opd.distributed.world import ALONE, World
from prune_opd.errors import EngineError
from prune_opd.rollout.base import SamplingParams, Watcher
from prune_opd.rollout.transcript import Transcript, listed_for
from prune_opd.rollout.weights import EngineSampler, probe_logprobs, served_weights
from prune_opd.serving.probe import probe_ids

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: weights are handed over as tensors
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it takes every core for itself
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default is a share of all memory
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class VLLMSampler(EngineSampler):
    """Samples with a vLLM engine in this process; `top_k` is the most candidates that a call may ask for.

    student: the model that is trained, of which `model` is the folder or Hub id · max_model_len: prompt and response.
    Raises EngineError when vLLM is not installed, does not start, or does not take on new weights.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        *,
        model: str,
        dtype: str,
        pad_id: int,
        eos_ids: Sequence[int],
        slots: int,
        top_k: int,
        max_model_len: int,
        seed: int = 0,
        gpu_memory_utilization: float = 0.3,
        enable_sleep_mode: bool = True,
        trust_remote_code: bool = False,
        ends: Sequence[int] = (),
        world: World = ALONE,
    ) -> None:
        super().__init__(student, dtype=dtype, pad_id=pad_id, eos_ids=eos_ids, slots=slots, ends=ends, world=world)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from vllm import EngineArgs, LLMEngine
            from vllm.platforms import current_platform
        except ImportError as error:
            raise EngineError(
                f"rollout.use_vllm needs vLLM, which cannot be imported ({error}); install it (on a GPU: pip install "
                "prune-opd[vllm]; on a CPU: make setup-vllm), or set rollout.use_vllm = false"
            ) from error
        self.sleeps = enable_sleep_mode and current_platform.is_sleep_mode_available()  # not on a CPU
        try:
            self.engine = LLMEngine.from_engine_args(
                EngineArgs(
                    model=model,
                    dtype=dtype,
                    seed=seed,
                    max_model_len=max_model_len,
                    max_num_seqs=slots,
                    max_logprobs=max(1, listed_for(top_k, ends)),
                    gpu_memory_utilization=gpu_memory_utilization,
                    trust_remote_code=trust_remote_code,
                    enable_sleep_mode=self.sleeps,
                    # Takes the device of LOCAL_RANK; vLLM's default would put the engines of all ranks on the first.
                    distributed_executor_backend="external_launcher" if world.size > 1 else None,
                    generation_config="vllm",  # no sampling settings but ours
                    skip_tokenizer_init=True,
                    # On the CPU, a prompt that is read in two parts breaks requests with a seed ("CPU Generator does
                    # not use offset", 0.32), so every prompt must fit into one forward.
                    enable_chunked_prefill=not current_platform.is_cpu(),
                    max_num_batched_tokens=max(2048, max_model_len) if current_platform.is_cpu() else None,
                    enforce_eager=True,  # captured graphs would hold on to old weights' memory
                    disable_log_stats=True,
                )
            )
        except (ValueError, RuntimeError, OSError, AssertionError) as error:  # it asserts what its models can do
            raise EngineError(
                f"vLLM did not start with {model!r}: {error}\nWhere it cannot run this model, set rollout.use_vllm = "
                "false"
            ) from error
        # At each reload it warns of layers without weights of their own and of a tied head; `sync` checks them all.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        self.check_the_check(self.sync, self.parity)

    # ---- weights ----

    def sync(self) -> None:
        """Hand the student's weights over, and check that the engine answers with them; EngineError if it does not."""
        if self.sleeps:
            self.engine.wake_up(tags=["weights"])  # the cache's memory comes after them, when no whole weight is about
        # A generator cannot be copied, and the engine's side is this process: nothing is written or sent.
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": served_weights(self.student)})
        self.engine.collective_rpc(repack_cpu_weights)
        if self.sleeps:
            self.engine.wake_up(tags=["kv_cache"])
        if not self.engine.reset_prefix_cache():
            raise EngineError("vLLM kept its prefix cache, which holds states of the old weights; it has requests left")
        apart = self.parity()
        if not apart <= self.tolerance:
            raise EngineError(
                f"vLLM does not serve the weights that were handed over: {self.gap(apart)}. Nothing was sampled; set "
                "rollout.use_vllm = false, and report the model and the version of vLLM"
            )

    def parity(self) -> float:
        """Mean |log p_engine - log p_trainer| over a fixed sequence, in nats."""
        ids = probe_ids(self.vocab_size)
        answer = self.finish([ids], [{"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}])[0].prompt_logprobs
        starts = [a for a, b in zip(answer.start_indices, answer.end_indices, strict=True) if b > a]
        theirs = torch.tensor([answer.logprobs[a] for a in starts], dtype=torch.float64)
        return (theirs - probe_logprobs(self.student, ids)).abs().mean().item()

    def close(self) -> None:
        """Shut the engine down. vLLM then ends torch.distributed in this process too: nothing can be gathered after."""
        self.engine.engine_core.shutdown()

    # ---- requests ----

    def finish(self, prompts: Sequence[Sequence[int]], settings: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Run one request for each prompt to its end; `settings` are the fields of vLLM's SamplingParams."""
        from vllm import SamplingParams as RequestParams

        for i, (ids, named) in enumerate(zip(prompts, settings, strict=True)):
            request = RequestParams(detokenize=False, flat_logprobs=True, **named)
            self.engine.add_request(str(i), {"prompt_token_ids": list(ids)}, request)
        done: dict[int, Any] = {}
        while self.engine.has_unfinished_requests():
            done |= {int(output.request_id): output for output in self.engine.step() if output.finished}
        return [done[i] for i in range(len(prompts))]

    def fill(self, transcript: Transcript, seeds: Tensor, params: SamplingParams, watcher: Watcher | None) -> int:
        """See `EngineSampler.fill`."""
        from vllm import SamplingParams as RequestParams
        from vllm.sampling_params import RequestOutputKind

        engine, slot_steps = self.engine, 0
        waiting = deque(range(len(transcript.prompts)))
        running: set[int] = set()
        ended: list[int] = []
        steps_since_look = 0
        while waiting or running:
            while waiting and len(running) < self.slots:
                b = waiting.popleft()
                request = RequestParams(
                    max_tokens=transcript.cap,
                    temperature=params.temperature,
                    top_p=params.top_p,
                    seed=int(seeds[b, 0]),
                    logprobs=transcript.listed or None,
                    stop_token_ids=self.eos_ids,
                    ignore_eos=True,  # our ids alone end a rollout, and `stop_token_ids` has them
                    detokenize=False,
                    flat_logprobs=True,  # without these two, top-20 log-probs cost ten times the speed
                    output_kind=RequestOutputKind.DELTA if watcher else RequestOutputKind.FINAL_ONLY,
                )
                engine.add_request(str(b), {"prompt_token_ids": list(transcript.prompts[b])}, request)
                running.add(b)
            slot_steps += len(running)
            for output in engine.step():
                b = int(output.request_id)
                new = output.outputs[0]
                candidates = (new.logprobs.token_ids, new.logprobs.logprobs) if transcript.top_k else ((), ())
                transcript.take(b, new.token_ids, *candidates)  # the sampled token comes first at each position
                if output.finished:
                    running.discard(b)
                    ended.append(b)
            steps_since_look += 1
            if watcher and (steps_since_look >= watcher.every or not (waiting or running)):
                stops = transcript.look(watcher, ended, running)
                engine.abort_request([str(b) for b in stops if b in running])
                running -= stops.keys()
                ended, steps_since_look = [], 0
        if self.sleeps:
            engine.sleep(level=2)  # weights are handed over before each call, so neither they nor the cache are kept
        return slot_steps


def repack_cpu_weights(worker: Any) -> None:
    """Runs in vLLM's worker. Its CPU layers multiply with a packed copy that a reload leaves stale where it is tied."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        for module in worker.get_model().modules():
            if hasattr(module, "cpu_linear") and module.weight.numel():
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)
