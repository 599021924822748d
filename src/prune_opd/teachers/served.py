"""A teacher behind vLLM's OpenAI-compatible HTTP API, on as many replicas as the recipe lists.

A rollout is scored by sending prompt and response as token ids and asking for `prompt_logprobs`: at each position the
server's N most likely tokens and the token that stands there, with full-vocabulary log-probabilities. Three things
follow from what that API can do:

  * **Candidates outside the top N.** A server that can score given ids (below) is asked for all candidates, and nothing
    is estimated. Else the student's candidates S_t are looked up in the list. One that is not in it has
    a log-probability of at most the lowest listed, and all that are not listed share the mass that is left. It gets an
    even share of that mass, log((1 - Σ listed) / (V - N)), which is never above the lowest listed. So overlap, drift
    and the sampled token's score are exact at any N >= K, and the candidates' log-probabilities are exact where
    listed. The entropy is the one of the same completed distribution, an upper bound.
  * **max_logprobs.** N above the server's `--max-logprobs` (20 unless set) is refused: before step 1, by the probe.
  * **No prefix reuse.** A request with `prompt_logprobs` reads every token anew. So `ServedStream` asks for a rollout
    again only once it has grown by `GROWTH`: the total stays linear in its length, while a rollout may run on past its
    stop by at most that factor, which costs tokens and changes nothing else.

vLLM from 0.32 on scores ids that a request names for each position, on its V2 model runner (GPUs with Triton) and at
/inference/v1/generate, which it has when started with `--enable-scale-out`. Whether a server can is found out by asking
it; the console says which of the two ways is used. The likeliest N are asked for in both, for the overlap.

Log-probabilities are normalised over the vocabulary that the server's model has, padding rows included; their mass is
nothing in trained models. An incomplete answer is refused as a whole: see `parse_scores`.
"""

from __future__ import annotations

import base64
import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prune_opd.core.ends import merge_asked, with_ends
from prune_opd.core.head import OutputHead
from prune_opd.errors import ModelError, ServerError, TokenizerError
from prune_opd.models.packing import Packed
from prune_opd.serving.answers import LOWEST, answer_bytes, check_mass, distribution, only_choice
from prune_opd.serving.client import Replica, Servers
from prune_opd.serving.exchange import BadAnswer, Unanswered
from prune_opd.serving.probe import probe_ids
from prune_opd.teachers.local import empty_scores
from prune_opd.types import Rollouts, Span, TeacherPrompt, TeacherScores, TopK

GROWTH = 1.5
"""A rollout is scored again once it is this many times as long. The looks on the way read at most GROWTH / (GROWTH - 1)
= 3 times its tokens and the last look reads them once more; a stop throws away at most half of what it keeps."""

PROBE_TOLERANCE = 0.05
"""Median difference of the probe's log-probabilities, in nats, from which on two servers serve different models. Noise
of bfloat16 and of batching stays below it; two checkpoints of one family are further apart by an order of magnitude."""

GENERATE = "/inference/v1/generate"
NAMED_TOLERANCE = 1e-2  # nats between two roundings of one log-probability

VOCABULARY_PART = 4096  # ids in one request of the comparison of tokenizers

ROUNDING = 1e-7  # least mass that is taken to be left outside a list: float32 sums do not show less


logger = logging.getLogger(__name__)


class ServedTeacher:
    """Implements `Teacher`, except for the losses that need full-vocabulary logits.

    model: the name that the servers serve it under · vocab_size: ids that student and teacher share · top_logprobs: N
    above · `ends` count as one action (core/ends.py), to which those that are not listed add nothing. Nothing is asked
    of a server before `check`, or the first score.
    """

    def __init__(
        self, servers: Servers, *, model: str, vocab_size: int, top_logprobs: int, ends: Sequence[int] = ()
    ) -> None:
        self.ends = tuple(ends)
        self.servers, self.model, self.vocab_size, self.top_logprobs = servers, model, vocab_size, top_logprobs
        self.fingerprint: list[float] | None = None
        self.exact = False  # whether the servers score ids that are named; `check` finds out
        servers.probe = self._probe

    def check(self, tokenizer: PreTrainedTokenizerBase, longest: int, fingerprint: list[float] | None = None) -> None:
        """Hold every replica against what the recipe expects of it, before the first step.

        Raises ModelError when it serves another model, has fewer positions than `longest`, or scores the probe unlike
        `fingerprint` (of an earlier run) or its neighbours; TokenizerError when any token id decodes differently;
        ServerError when it cannot be reached or refuses `top_logprobs`.
        """
        self.fingerprint = fingerprint
        self.servers.check_model(self.model, longest + 1, whose="teacher", setting="model.teacher_server.model")
        for replica in self.servers.replicas:
            self.servers.patiently(replica, lambda replica: self._check_tokenizer(replica, tokenizer))
            self.servers.patiently(replica, self._probe)
        self.exact = all([self._scores_named_ids(replica) for replica in self.servers.replicas])

    @property
    def way(self) -> str:
        """For the console: how the student's candidates are scored."""
        if self.exact:
            return "the teacher's servers score the student's candidates exactly"
        return (
            f"the teacher's servers list their {self.top_logprobs} likeliest tokens: candidates outside of them are "
            "estimated. vLLM from 0.32 on scores them exactly on a GPU, started with --enable-scale-out"
        )

    def score(self, rollouts: Rollouts, *, top_k: int) -> TeacherScores:
        """See `Teacher.score`. Raises ServerError; never returns partial scores."""
        assert rollouts.student is not None, "the teacher scores the student's candidates: sample with top_k > 0"
        self.servers.doubt()
        stream = ServedStream(self, rollouts.for_teacher.prompts, top_k)
        spans = [Span(b, 0, n, ended=True) for b, n in enumerate(rollouts.lengths.tolist()) if n > 0]
        return stream.score(rollouts.response_ids, rollouts.student, spans)

    def stream(self, prompts: Sequence[TeacherPrompt], length: int, *, top_k: int, slots: int) -> ServedStream:
        """See `Teacher.stream`. Replicas are probed again first: one may have been restarted since the last step."""
        self.servers.doubt()
        return ServedStream(self, [prompt.token_ids for prompt in prompts], top_k)

    def before_head(self, part: Packed) -> tuple[Tensor, OutputHead]:
        """Not to be had over this API; the configuration refuses the losses that need it."""
        raise AssertionError("full-vocabulary losses are refused with a served teacher")

    def ask(self, asked: Asked) -> PromptScores:
        """The teacher's view of the last positions of a sequence, those that have candidates."""
        token_ids, rows = asked.token_ids, slice(-len(asked.candidates), None)
        if self.exact:
            return self.servers.post(
                GENERATE, self._exact_request(asked), partial(self._read_exact, asked), most=self._most(asked)
            )

        def read(answer: Any) -> PromptScores:
            found = self._read(answer, token_ids).rows(rows)
            return replace(found, candidates=found.at(asked.candidates))

        most = answer_bytes(len(token_ids), self.top_logprobs)
        return self.servers.post("/v1/completions", self._request(token_ids), read, most=most)

    # ---- requests and answers ----

    def _request(self, token_ids: Sequence[int]) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": list(token_ids),
            "max_tokens": 1,  # the least that every version takes; the token itself is not used
            "temperature": 0,
            "prompt_logprobs": self.top_logprobs,
            "return_token_ids": True,
        }

    def _read(self, answer: Any, token_ids: Sequence[int]) -> PromptScores:
        choice = only_choice(answer)
        self._check_name(answer)
        return parse_scores(choice, token_ids, min(self.top_logprobs, self.vocab_size), self.vocab_size, self.ends)

    def _check_name(self, answer: Any) -> None:
        if not isinstance(answer, dict):
            raise BadAnswer("expected an object")
        if answer.get("model") != self.model:
            other = self.servers.key.quote(repr(answer.get("model")))
            raise ServerError(f"an answer is of the model {other}, asked was {self.model!r}")

    # ---- scores of ids that are named ----

    def _named(self, asked: Asked) -> Tensor:
        """(R, C) ids that are asked for at R positions: the ends, the candidates, the token that stands there."""
        there = torch.tensor(asked.token_ids[-len(asked.candidates) :])[:, None]
        return torch.cat([asked.candidates, there], dim=-1)

    def _exact_request(self, asked: Asked) -> dict[str, Any]:
        return {
            "model": self.model,
            "token_ids": list(asked.token_ids),
            "sampling_params": {
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": self.top_logprobs,
                "prompt_logprob_token_ids": with_ends(self._named(asked), self.ends).tolist(),
                "prompt_logprob_start": len(asked.token_ids) - 1 - len(asked.candidates),
            },
            "return_token_ids": True,
        }

    def _most(self, asked: Asked) -> int:
        return answer_bytes(len(asked.token_ids), self.top_logprobs) + answer_bytes(self._named(asked).numel())

    def _read_exact(self, asked: Asked, answer: Any) -> PromptScores:
        self._check_name(answer)
        count = min(self.top_logprobs, self.vocab_size)
        whole = parse_scores(answer, asked.token_ids, count, self.vocab_size, self.ends)
        found, ids = whole.rows(slice(-len(asked.candidates), None)), self._named(asked)
        width = with_ends(ids, self.ends).shape[-1]
        scores = named_logprobs(answer.get("prompt_token_id_logprobs"), (len(ids), width))
        exact = merge_asked(scores, ids, self.ends)
        # One forward made both. An end that is not listed is missing from what is listed, so ends are left out.
        listed = (ids[:, :, None] == found.ids[:, None, :]).any(-1)
        if self.ends:
            listed &= ids != self.ends[0]
        if ((exact - found.at(ids)).abs() > NAMED_TOLERANCE)[listed].any():
            raise BadAnswer("scores of named ids are not those of the likeliest ids")
        return replace(found, candidates=exact[:, :-1], sampled=exact[:, -1])

    def _scores_named_ids(self, replica: Replica) -> bool:
        """Whether this replica scores ids that a request names; asked once, of the probe's sequence."""
        ids = probe_ids(self.vocab_size)
        asked = Asked(ids, torch.tensor(ids[:-1])[:, None])
        try:
            answer = self.servers.ask(replica, "POST", GENERATE, self._exact_request(asked), most=self._most(asked))
            self._read_exact(asked, answer)
        except (ServerError, BadAnswer, Unanswered) as error:
            logger.info("%s scores no ids that are named (%s)", replica.url, error)
            return False
        return True

    # ---- who answers ----

    def _check_tokenizer(self, replica: Replica, tokenizer: PreTrainedTokenizerBase) -> None:
        """Every id of our vocabulary must decode to the same text there."""
        size = min(len(tokenizer), self.vocab_size)
        for start in range(0, size, VOCABULARY_PART):
            low, high = start, min(start + VOCABULARY_PART, size)
            if self._decodes_alike(replica, tokenizer, low, high):
                continue
            while high - low > 1:  # bisect, to name the token
                middle = (low + high) // 2
                low, high = (middle, high) if self._decodes_alike(replica, tokenizer, low, middle) else (low, middle)
            theirs = self.servers.key.quote(repr(self._decoded(replica, [low])))
            raise TokenizerError(
                f"student and served teacher have different token maps: id {low} is {tokenizer.decode([low])!r} for "
                f"the student and {theirs} at {replica.url}. Prune-OPD compares token ids: use a pair with the same "
                "tokenizer, and start the server with that tokenizer"
            )

    def _decodes_alike(self, replica: Replica, tokenizer: PreTrainedTokenizerBase, low: int, high: int) -> bool:
        ids = list(range(low, high))
        return self._decoded(replica, ids) == tokenizer.decode(ids)

    def _decoded(self, replica: Replica, ids: list[int]) -> str:
        body = {"model": self.model, "tokens": ids}
        answer = self.servers.ask(replica, "POST", "/detokenize", body, most=answer_bytes(len(ids)))
        if not isinstance(answer, dict) or not isinstance(answer.get("prompt"), str):
            raise BadAnswer("/detokenize gave no text")
        return answer["prompt"]

    def _probe(self, replica: Replica) -> bool:
        """Score a fixed sequence and compare with what was seen first: another model behind the same name shows."""
        ids = probe_ids(self.vocab_size)
        most = answer_bytes(len(ids), self.top_logprobs)
        answer = self.servers.ask(replica, "POST", "/v1/completions", self._request(ids), most=most)
        found = self._read(answer, ids).sampled.tolist()
        if self.fingerprint is None:
            self.fingerprint = found
        apart = median(abs(a - b) for a, b in zip(found, self.fingerprint, strict=True))
        if apart > PROBE_TOLERANCE:
            raise ModelError(
                f"{replica.url} serves another model than before under the name {self.model!r}: log-probabilities of "
                f"a fixed sequence differ by {apart:.3g} nats at the median (at most {PROBE_TOLERANCE:g} is noise). It "
                "was restarted with other weights, or replicas differ; serve one model on all of them"
            )
        return True


class ServedStream:
    """Implements `TeacherStream` without a cache: every request reads its rollout from the start."""

    growth = GROWTH

    def __init__(self, teacher: ServedTeacher, prompts: Sequence[Sequence[int]], top_k: int) -> None:
        self.teacher, self.prompts, self.top_k = teacher, prompts, top_k
        self.scores: TeacherScores | None = None

    def score(self, response_ids: Tensor, student: TopK, spans: Sequence[Span]) -> TeacherScores:
        """See `TeacherStream.score`. `scored` counts what the servers read, so a rollout counts at every request."""
        scores = self.scores or empty_scores(response_ids, student, self.top_k)
        ids, candidates = response_ids.cpu(), student.ids.cpu()
        asked = [
            Asked([*self.prompts[s.rollout], *ids[s.rollout, : s.end].tolist()], candidates[s.rollout, s.start : s.end])
            for s in spans
        ]
        for span, new in zip(spans, self.teacher.servers.map(self.teacher.ask, asked), strict=True):
            where = span.rollout, slice(span.start, span.end)
            scores.topk.ids[where] = new.ids[:, : self.top_k].to(response_ids.device)
            scores.topk.logprobs[where] = new.logprobs[:, : self.top_k].to(response_ids.device)
            scores.topk.entropy[where] = new.entropy.to(response_ids.device)
            scores.candidate_logprobs[where] = new.candidates.to(response_ids.device)
            scores.sampled_logprobs[where] = new.sampled.to(response_ids.device)
        self.scores = replace(scores, scored=scores.scored + sum(span.end for span in spans))
        return self.scores

    def drop(self, rollout: int) -> None:
        """Nothing is held for a rollout."""


@dataclass(frozen=True)
class Asked:
    """A sequence to be scored at its last R tokens, with candidates (R, K) int64 for what stands there."""

    token_ids: Sequence[int]
    candidates: Tensor


@dataclass(frozen=True)
class PromptScores:
    """A server's scores of a sequence of L tokens: row i is its prediction of token i + 1.

    ids (L-1, N + 1) int64, logprobs (L-1, N + 1) float32, most likely first, id -1 where there is none · unlisted
    (L-1,): log-probability of each id that is not listed, an even share of the mass left · entropy (L-1,) · sampled
    (L-1,): of the token that stands there · candidates (L-1, K): of the ids that were asked for, (L-1, 0) if none were.
    """

    ids: Tensor
    logprobs: Tensor
    unlisted: Tensor
    entropy: Tensor
    sampled: Tensor
    candidates: Tensor

    def rows(self, where: slice) -> PromptScores:
        """Some of the positions."""
        return PromptScores(*(values[where] for values in vars(self).values()))

    def at(self, ids: Tensor) -> Tensor:
        """Log-probabilities (L-1, K) of ids (L-1, K)."""
        same = ids[:, :, None] == self.ids[:, None, :]
        listed = (same * self.logprobs[:, None, :].clamp(min=torch.finfo(torch.float32).min)).sum(-1)
        return torch.where(same.any(-1), listed, self.unlisted[:, None])


def parse_scores(
    choice: dict[str, Any], token_ids: Sequence[int], count: int, vocab_size: int, ends: Sequence[int] = ()
) -> PromptScores:
    """Take a completion's `prompt_logprobs` apart: the first None, then for each token {id: {"logprob": float}}.

    Raises BadAnswer unless there is an entry for each token sent, with the ids sent, each with the `count` most likely
    tokens and the token itself, all of them log-probabilities of one distribution that float32 can hold, and large
    enough for the likeliest. An id from `vocab_size` on, a token that only the teacher has, is refused: without it,
    what is left would not be the likeliest. `ends` count as ends[0]; each that is merged into it leaves a place empty.
    """
    found = choice.get("prompt_logprobs")
    if not isinstance(found, list) or len(found) != len(token_ids):
        got = f"{len(found)} positions" if isinstance(found, list) else "no prompt_logprobs"
        raise BadAnswer(f"expected scores of {len(token_ids)} tokens, got {got}")
    echoed = choice.get("prompt_token_ids")
    if echoed is not None and echoed != list(token_ids):
        raise BadAnswer("the answer is of other token ids than were sent")
    ids, logprobs, sampled, unlisted, entropy = [], [], [], [], []
    for position, (token, entry) in enumerate(zip(token_ids[1:], found[1:], strict=True), start=1):
        where = f"position {position}"
        listed = distribution(entry, where, vocab_size)
        if token not in listed:
            raise BadAnswer(f"the scores at {where} lack token {token} itself")
        ranked = sorted(listed.items(), key=lambda item: -item[1])
        if len(ranked) < count:
            raise BadAnswer(f"{where} has scores of {len(ranked)} ids, asked were {count}")
        check_mass(listed, ranked[:count], vocab_size, where)
        least = ranked[count - 1][1]
        mass = math.fsum(map(math.exp, listed.values()))
        if there := [listed.pop(end) for end in ends if end in listed]:
            listed[ends[0]] = math.log(math.fsum(map(math.exp, there)))
            ranked = sorted(listed.items(), key=lambda item: -item[1])
        sampled.append(listed[ends[0] if token in ends else token])
        left, rest = max(1 - mass, ROUNDING), vocab_size - len(listed)
        share = math.log(left / rest) if rest > 0 else -math.inf
        unlisted.append(min(share, least))
        entropy.append(-sum(math.exp(value) * value for value in listed.values()) - (left * share if rest > 0 else 0))
        # The token itself rides along behind the `count` likeliest; where it is one of them, the last place is empty.
        ranked += [(-1, -math.inf)] * (count + 1 - len(ranked))
        ids.append([key for key, _ in ranked[: count + 1]])
        logprobs.append([value for _, value in ranked[: count + 1]])
    return PromptScores(
        torch.tensor(ids, dtype=torch.long).reshape(-1, count + 1),
        torch.tensor(logprobs).reshape(-1, count + 1),
        torch.tensor(unlisted),
        torch.tensor(entropy),
        torch.tensor(sampled),
        torch.empty(len(ids), 0),
    )


def named_logprobs(text: Any, shape: tuple[int, int]) -> Tensor:
    """Log-probabilities (R, C) float32 that vLLM gives for named ids: an .npy file in base64.

    Raises BadAnswer unless it has this shape and holds log-probabilities that float32 can hold.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        raise BadAnswer("the scores of named ids are no base64") from None
    file = io.BytesIO()
    np.save(file, np.zeros(shape, "<f4"))
    blank = file.getvalue()
    header = blank[: len(blank) - 4 * math.prod(shape)]  # compared, not parsed
    if len(content) != len(blank) or not content.startswith(header):
        raise BadAnswer(f"expected scores of {shape[0]} x {shape[1]} named ids, as an .npy file of float32")
    array = np.frombuffer(content, "<f4", offset=len(header)).reshape(shape)
    if not ((array >= LOWEST) & (array <= 1e-3)).all():  # also NaN
        raise BadAnswer("a score of a named id is no log-probability")
    return torch.from_numpy(array.copy())
