"""The rollout's part: at most M tokens, and stopping in flight."""

from __future__ import annotations

import asyncio
import functools
import zlib
from collections.abc import Sequence
from itertools import chain
from typing import Any
from uuid import uuid4

import ray
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from prune_opd.errors import ConfigError
from prune_opd.integrations.verl.settings import MAX_TOKENS, recipe_of
from prune_opd.integrations.verl.surface import (
    AgentLoopManagerTQ,
    AgentLoopMetrics,
    AgentLoopOutput,
    AgentLoopWorkerTQ,
    SingleTurnAgentLoop,
    register_agent_loop,
    simple_timer,
)
from prune_opd.models.loading import end_ids
from prune_opd.rollout.in_flight import InFlightStop
from prune_opd.timing import Stopwatch
from prune_opd.types import Span, TeacherScores, TopK


@register_agent_loop("prune_opd")
class PruneAgentLoop(SingleTurnAgentLoop):
    """One answer of at most M tokens, where M comes with each training prompt; validation runs to `response_length`.

    With `pruning.in_flight`, training answers are generated in chunks. After each, the teacher scores the whole prefix
    and the rollout ends at the event that spends its reliability, as `InFlightStop` has it. Every chunk is a request on
    the same prefix: the student's server finds it in its prefix cache, but scores by `prompt_logprobs` do not use that
    cache. n chunks score (n + 1) / 2 times the tokens, so chunks should be long: a sixth of M scores 3.5 times.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = recipe_of(self.config)

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        """See `AgentLoopBase.run`; kwargs are the prompt's fields, with M where the prompt is one to train on."""
        limit = kwargs.get(MAX_TOKENS)
        if limit is None:
            return await super().run(sampling_params, priority=priority, **kwargs)
        if not self.recipe.stops_in_flight:
            return await super().run({**sampling_params, "max_tokens": int(limit)}, priority=priority, **kwargs)
        return await self._run_in_flight(sampling_params, int(limit), int(priority), **kwargs)

    async def _run_in_flight(
        self, sampling_params: dict[str, Any], limit: int, priority: int, **kwargs: Any
    ) -> AgentLoopOutput:
        messages = list(kwargs["raw_prompt"])
        if await self.process_multi_modal_info(messages):
            raise ConfigError("pruning.in_flight is for text prompts only; this one has images, video or audio")
        prompt_ids = await self.ct_build_initial_tokens(messages)
        routing = kwargs.get(self.config.distillation.teacher_key)
        # From the uid, which is random: verl's sampling has no seed for each rollout.
        draw = zlib.crc32(f"{kwargs['uid']}-{kwargs['session_id']}".encode()) / 2**32
        audit = torch.tensor([draw < self.recipe.pruning.in_flight.audit_share])
        reader = _Reader()
        watcher = InFlightStop(reader, self.recipe.pruning, audit, Stopwatch(torch.device("cpu")))
        request_id = uuid4().hex  # the same for all chunks: verl sends them to one server, whose cache has the prefix
        response: list[int] = []
        logprobs: list[float] = []
        fields: dict[str, Any] = {}
        metrics: dict[str, Any] = {"num_preempted": -1}
        stop, ended, raw = None, False, None
        with simple_timer("generate_sequences", metrics):
            while stop is None and not ended:
                start, size = len(response), min(self.recipe.pruning.in_flight.chunk, limit - len(response))
                output = await self.server_manager.generate(
                    request_id=request_id,
                    prompt_ids=prompt_ids + response,
                    sampling_params={**sampling_params, "max_tokens": size},
                    priority=priority,
                )
                response += output.token_ids
                logprobs += output.log_probs or []
                fields = {**output.extra_fields, **{k: v for k, v in fields.items() if k == "min_global_steps"}}
                # verl gives no reason why a request ended: fewer tokens than asked for, or the last of them ends it.
                ended = len(output.token_ids) < size or len(response) == limit or response[-1] in self._end_ids()
                if len(response) > start:
                    student, reader.scores, raw = await self._score(prompt_ids, response, routing)
                    span = Span(0, start, len(response), ended)
                    stop = watcher.watch(torch.tensor([response]), student, [span]).get(0)
        kept = len(response) if stop is None else stop
        fields |= {"turn_scores": [], "tool_rewards": []}
        if raw is not None:  # what verl's worker would ask for again
            fields |= {name: scores[: len(prompt_ids) + kept] for name, scores in raw.items()}
        return AgentLoopOutput(
            prompt_ids=prompt_ids,
            response_ids=response[:kept],
            response_mask=[1] * kept,
            response_logprobs=logprobs[:kept] if logprobs else None,
            num_turns=2,
            metrics=AgentLoopMetrics(**metrics),
            extra_fields=fields,
        )

    async def _score(
        self, prompt_ids: list[int], response: list[int], routing: Any
    ) -> tuple[TopK, TeacherScores, dict[str, Tensor]]:
        """Top-k of student and teacher at the response positions (1, T, K), and the teacher's answer as verl keeps it.

        Row i of an answer predicts token i + 1 of the sequence, so the rows of the response begin one before it.
        """
        sequence, top_k = prompt_ids + response, self.recipe.objective.top_k
        routing = routing.item() if hasattr(routing, "item") else routing
        asked = [self.server_manager.teacher.compute_teacher_logprobs_single(sequence, routing_key=routing)]
        if self.recipe.pruning.metric != "teacher_top_p_accept":
            asked.append(self._student_topk(sequence, top_k))
        (teacher_ids, teacher_logprobs), *rest = await asyncio.gather(*asked)
        rows = slice(len(prompt_ids) - 1, -1)
        nothing = torch.zeros(1, len(response))
        teacher = TopK(teacher_ids[None, rows, :top_k].long(), teacher_logprobs[None, rows, :top_k].float(), nothing)
        student = TopK(rest[0][0][None, rows], rest[0][1][None, rows], nothing) if rest else teacher
        # The watcher looks at the teacher's top-k only; the actor takes log q at the student's candidates.
        scores = TeacherScores(teacher, candidate_logprobs=teacher.logprobs, sampled_logprobs=nothing)
        return student, scores, {"teacher_ids": teacher_ids, "teacher_logprobs": teacher_logprobs}

    async def _student_topk(self, sequence: list[int], top_k: int) -> tuple[Tensor, Tensor]:
        """ids and log-probabilities (S, K) of the student's most likely tokens after each token of a sequence."""
        output = await self.server_manager.generate(
            request_id=uuid4().hex,
            prompt_ids=sequence,
            sampling_params={"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": top_k, "detokenize": False},
        )
        found = output.extra_fields
        return torch.tensor(found["prompt_ids"]), torch.tensor(found["prompt_logprobs"])

    def _end_ids(self) -> frozenset[int]:
        if self.rollout_config.ignore_eos:
            return frozenset()
        return _end_ids(str(self.config.actor_rollout_ref.model.path), self.tokenizer)


class _Reader:
    """A `TeacherStream` that hands on what was fetched before: verl's servers are asynchronous, the watcher is not."""

    growth = 1.0  # every look uses the scores that were fetched
    scores: TeacherScores | None = None

    def score(self, response_ids: Tensor, student: TopK, spans: Sequence[Span]) -> TeacherScores:
        assert self.scores is not None
        return self.scores

    def drop(self, rollout: int) -> None:
        """Nothing is kept of a rollout."""


@functools.lru_cache
def _end_ids(model_path: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends a response: the tokenizer's, and those that the model's generation settings name."""
    try:
        settings = GenerationConfig.from_pretrained(model_path)
    except OSError:  # the model has no generation_config.json; verl's servers then use the tokenizer's id alone, too
        settings = None
    return frozenset(end_ids(settings, tokenizer))


class PruneAgentLoopWorker(AgentLoopWorkerTQ.__ray_metadata__.modified_class):  # the class that verl made an actor of
    """verl's worker, whose agent loops reach the teacher, which scores nothing twice, and which says why it failed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.llm_client.teacher = self.teacher_server_manager
        self.errors: list[str] = []

    async def failures(self) -> list[str]:
        """What went wrong with each training rollout that failed; verl logs it here, and tells the trainer nothing."""
        return self.errors

    async def _run_agent_loop(self, sampling_params: Any, trajectory: dict[str, Any], **kwargs: Any) -> Any:
        try:
            return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)
        except Exception as error:
            if not trajectory["validate"]:
                cause = getattr(error, "cause", None) or error  # Ray wraps what a server raised, with its traceback
                self.errors.append(f"{type(cause).__name__}: {cause}")
            raise

    async def _compute_teacher_logprobs(self, output: AgentLoopOutput, *args: Any, **kwargs: Any) -> None:
        if "teacher_ids" not in output.extra_fields:
            await super()._compute_teacher_logprobs(output, *args, **kwargs)


class PruneAgentLoopManager(AgentLoopManagerTQ):
    """Starts `PruneAgentLoopWorker`s; the trainer sets it in verl's configuration."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(PruneAgentLoopWorker)

    def failures(self) -> list[str]:
        """What went wrong with each training rollout that failed, of all workers."""
        return list(chain.from_iterable(ray.get([worker.failures.remote() for worker in self.agent_loop_workers])))
