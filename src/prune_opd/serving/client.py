"""A client of OpenAI-compatible inference servers: several replicas, retries, a deadline, back-pressure, a key.

What a server answers is only ever handed on after the caller's own `check` took it apart. A broken connection, a busy
server (429) or a failing one (5xx) is tried again, on another replica where there is one, after a pause that doubles
and is drawn at random (full jitter), until the deadline. An answer that fails its check is asked for again a few times,
since a proxy may have cut it; then it is an error. A refusal (any other 4xx) is an error at once.

The key comes from the environment alone, goes to the configured hosts alone (redirects are not followed, and it never
travels over plain HTTP to another machine), and stands in no message.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

from prune_opd.errors import ModelError, ServerError

Answer = TypeVar("Answer")
Item = TypeVar("Item")

API_KEY_VARIABLE = "PRUNE_OPD_SERVER_API_KEY"
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds
BAD_ANSWERS = 3  # answers to one request that may fail their check before it is given up
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


class BadAnswer(ValueError):
    """Raised by a `check`: the server answered, but not what was asked. Never leaves this package as it is."""


class Unanswered(Exception):
    """A failure that may pass; `post` and `patiently` try again.

    pause: seconds that the server asked for · broken: it may have been restarted.
    """

    def __init__(self, reason: str, *, pause: float = 0.0, broken: bool) -> None:
        super().__init__(reason)
        self.pause, self.broken = pause, broken


class Replica:
    """One server: its address, how many of our requests it holds, and until when it asked to be left alone.

    suspect: it must be probed before its next request · vouched: it was, so its answers count.
    """

    def __init__(self, url: str) -> None:
        self.url, self.outstanding, self.rest_until = url, 0, 0.0
        self.suspect, self.vouched = True, False
        self.probing = threading.Lock()


class Servers:
    """Replicas that serve the same model, behind base URLs such as http://host:8000 (a trailing /v1 is dropped).

    timeout: seconds of silence after which a request counts as lost · deadline: seconds within which a request must
    have its answer, retries included · concurrency: requests that one replica holds at a time. Raises ServerError for a
    URL that is none.

    `probe(replica)`, when set, returns whether a replica is still what it was at its last probe; it may repair the
    replica, or raise. It runs before a replica's first request, after each time its connection broke, and at the end of
    each `map`: a server may be restarted, with another model, while nobody is connected to it.
    """

    def __init__(
        self, urls: Sequence[str], *, timeout: float = 60.0, deadline: float = 600.0, concurrency: int = 8
    ) -> None:
        self.replicas = [Replica(_base_url(url)) for url in urls]
        self.deadline, self.concurrency = deadline, concurrency
        self.probe: Callable[[Replica], bool] | None = None
        self._voided = 0  # how often a probe found that a replica had changed
        self._free = threading.Condition()
        limit = concurrency * len(self.replicas)
        self._client = httpx2.Client(
            timeout=httpx2.Timeout(timeout, pool=None),
            limits=httpx2.Limits(max_connections=limit + 1, max_keepalive_connections=limit + 1),
            headers=_authorization(self.replicas),
            follow_redirects=False,
        )
        self._pool = ThreadPoolExecutor(limit, thread_name_prefix="prune-opd-server")

    def close(self) -> None:
        """Let go of threads and connections; requests that still wait are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def map(self, ask: Callable[[Item], Answer], items: Sequence[Item]) -> list[Answer]:
        """`ask` of every item, as many at a time as the replicas take; the first error ends it and is raised.

        All of them once more if a replica was restarted meanwhile, since some of the answers may come from before the
        restart. Raises ServerError when that happens again and again.
        """
        for _ in range(BAD_ANSWERS):
            voided = self._voided
            futures = [self._pool.submit(ask, item) for item in items]
            try:
                answers = [future.result() for future in futures]
            finally:
                for future in futures:
                    future.cancel()
            self._confirm()
            if self._voided == voided:
                return answers
        raise ServerError(
            f"a server was restarted, or went away, while it answered, {BAD_ANSWERS} times in a row. Nothing was "
            "trained on its answers; see its log. A run continues with --resume auto"
        )

    def doubt(self) -> None:
        """Every replica is probed again before its next request."""
        for replica in self.replicas:
            replica.suspect, replica.vouched = True, False

    def post(self, path: str, body: dict[str, Any], check: Callable[[Any], Answer]) -> Answer:
        """POST `body` as JSON to whichever replica is least busy; returns what `check` makes of the decoded answer.

        Raises ServerError when the request is refused, when it has no usable answer within the deadline, or when
        answers keep failing their check.
        """
        patience = _Patience(self.deadline)
        while True:
            replica = self._take(patience)
            try:
                if replica.suspect and self.probe is not None:
                    self._probe(replica)
                return check(self.ask(replica, "POST", path, body))
            except (BadAnswer, Unanswered) as error:
                replica.suspect = replica.suspect or (isinstance(error, Unanswered) and error.broken)
                replica.rest_until = time.monotonic() + patience.pause_after(error, replica.url + path)
            finally:
                self._give_back(replica)

    def patiently(self, replica: Replica, action: Callable[[Replica], object]) -> None:
        """Run `action` on this replica, and again as `post` does: for checks that each replica must pass."""
        patience = _Patience(self.deadline)
        while True:
            try:
                action(replica)
                return
            except (BadAnswer, Unanswered) as error:
                time.sleep(patience.pause_after(error, replica.url))

    def check_model(self, model: str, positions: int, *, whose: str, setting: str) -> None:
        """ModelError unless every replica serves `model` with at least that many positions.

        whose: "teacher" or "student", and setting: where the served name is set, for the message.
        """

        def check(replica: Replica) -> None:
            answer = self.ask(replica, "GET", "/v1/models")
            entries = answer.get("data") if isinstance(answer, dict) else None
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise BadAnswer("/v1/models lists no models")
            served = {entry.get("id"): entry.get("max_model_len") for entry in entries}
            if model not in served:
                raise ModelError(
                    f"{replica.url} serves {', '.join(map(repr, served)) or 'nothing'}, but the {whose} of this recipe "
                    f"is {model!r}; start it with that model, or set {setting} to the served name"
                )
            has = served[model]
            if isinstance(has, int) and positions > has:
                raise ModelError(
                    f"{replica.url} has {has} positions, but the longest prompt and response that the recipe allows "
                    f"need {positions}; start the server with --max-model-len {positions}, or lower "
                    "rollout.max_completion_length"
                )

        for replica in self.replicas:
            self.patiently(replica, check)

    def ask(self, replica: Replica, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One request to one replica, once; returns the decoded JSON, or None for an empty body.

        Raises ServerError for a refusal, BadAnswer for what is no JSON, Unanswered for what may pass.
        """
        try:
            response = self._client.request(method, replica.url + path, json=body)
        except httpx2.HTTPError as error:
            raise Unanswered(f"{type(error).__name__}: {error}", broken=True) from None
        status = response.status_code
        if status in TRANSIENT:
            # A proxy answers 502 and 503 while the server behind it restarts.
            raise Unanswered(f"HTTP {status}: {_words(response)}", pause=_retry_after(response), broken=status != 429)
        if status in (401, 403):
            raise ServerError(
                f"{replica.url}{path} refused the key (HTTP {status}); set the environment variable {API_KEY_VARIABLE}"
            )
        if response.is_redirect:
            raise ServerError(
                f"{replica.url}{path} redirects (HTTP {status}), which is not followed, so that the key stays with the "
                "configured host; give the final address"
            )
        if not response.is_success:
            raise ServerError(f"{replica.url}{path} refused the request (HTTP {status}): {_words(response)}")
        if not response.content:
            return None
        try:
            return response.json()
        except ValueError:
            raise BadAnswer(f"{len(response.content)} bytes that are no JSON") from None

    # ---- replicas ----

    def _take(self, patience: _Patience) -> Replica:
        """The least busy replica that takes another request and does not rest, waited for up to the deadline."""
        with self._free:
            while True:
                now = time.monotonic()
                open_ = [r for r in self.replicas if r.outstanding < self.concurrency]
                ready = [r for r in open_ if r.rest_until <= now]
                if ready:
                    replica = min(ready, key=lambda r: r.outstanding)
                    replica.outstanding += 1
                    return replica
                if now >= patience.give_up:
                    raise patience.spent()
                self._free.wait(max(0.001, min([patience.give_up, *(r.rest_until for r in open_)]) - now))

    def _give_back(self, replica: Replica) -> None:
        with self._free:
            replica.outstanding -= 1
            self._free.notify()

    def _probe(self, replica: Replica) -> None:
        """Probe a replica once for all threads that wait for it."""
        with replica.probing:
            if replica.suspect and self.probe is not None:
                same = self.probe(replica)
                self._voided += replica.vouched and not same
                replica.suspect, replica.vouched = False, True

    def _confirm(self) -> None:
        """Probe those whose answers count once more; one that does not answer now may have been restarted before.

        Its answers are then void, once: the others go on without it, and it is probed anew when it is back.
        """
        for replica in self.replicas if self.probe is not None else ():
            if replica.vouched:
                replica.suspect = True
                try:
                    self._probe(replica)
                except (BadAnswer, Unanswered):
                    replica.vouched = False
                    self._voided += 1


def only_choice(answer: Any) -> dict[str, Any]:
    """The one choice of a completion in OpenAI's format; BadAnswer unless there is exactly one."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadAnswer("expected an object with one choice")
    return choices[0]


class _Patience:
    """How long one request is tried: until the deadline, and through a few unusable answers."""

    def __init__(self, deadline: float) -> None:
        self.deadline, self.give_up = deadline, time.monotonic() + deadline
        self.attempts = self.bad = 0
        self.last = "every replica stayed busy"

    def pause_after(self, error: BadAnswer | Unanswered, where: str) -> float:
        """Seconds to leave the server alone; raises ServerError when there is no more patience."""
        self.attempts, self.last = self.attempts + 1, f"{where}: {error}"
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2**self.attempts)
        pause = random.uniform(0, longest)
        if isinstance(error, BadAnswer):
            self.bad += 1
            if self.bad == BAD_ANSWERS:
                raise ServerError(
                    f"{where} gave {self.bad} unusable answers in a row: {error}. Nothing was trained on them; check "
                    "that the server is what the recipe expects, and its log"
                ) from None
        else:
            pause = max(pause, error.pause)
        if time.monotonic() + pause >= self.give_up:
            raise self.spent() from None
        return pause

    def spent(self) -> ServerError:
        """The error of a deadline that has passed."""
        return ServerError(
            f"no usable answer within {self.deadline:g} s in {self.attempts} attempts; last: {self.last}. Check that "
            "the servers run and are reachable, or raise the deadline; a run continues with --resume auto"
        )


def _base_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise ServerError(
            f"server address {_without_user(url)!r} is not usable; expected http://host:port or https://host, without "
            f"user, password or query (a key goes into the environment variable {API_KEY_VARIABLE})"
        )
    return url.rstrip("/").removesuffix("/v1")


def _without_user(url: str) -> str:
    scheme, at, host = url.rpartition("@")
    return f"{scheme.partition('//')[0]}//…@{host}" if at else url


def _authorization(replicas: Sequence[Replica]) -> dict[str, str]:
    key = os.environ.get(API_KEY_VARIABLE)
    if not key:
        return {}
    for replica in replicas:
        parts = urlsplit(replica.url)
        if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise ServerError(
                f"{API_KEY_VARIABLE} is set, but {replica.url} is plain HTTP to another machine, where anyone on the "
                "way could read it; use https://, or unset the variable if the server needs no key"
            )
    return {"Authorization": f"Bearer {key}"}


def _retry_after(response: httpx2.Response) -> float:
    """Seconds of the Retry-After header, which holds a number or a date; at most two longest pauses."""
    text = response.headers.get("retry-after", "")
    try:
        seconds = (
            float(text) if text.replace(".", "", 1).isdigit() else parsedate_to_datetime(text).timestamp() - time.time()
        )
    except (ValueError, TypeError):
        return 0.0
    return min(max(seconds, 0.0), 2 * LONGEST_PAUSE)


def _words(response: httpx2.Response) -> str:
    """The first words of an error answer, on one line."""
    return " ".join(response.text.split())[:300] or "no explanation"
