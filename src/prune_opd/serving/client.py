"""A client of OpenAI-compatible inference servers: several replicas, retries, a deadline, back-pressure, a key.

What a server answers is only ever handed on after the caller's own `check` took it apart. A broken connection, a busy
server (429) or a failing one (5xx) is tried again, on another replica where there is one, after a pause that doubles
and is drawn at random (full jitter), until the deadline. An answer that fails its check is asked for again a few times,
since a proxy may have cut it; then it is an error. What no repetition mends is an error at once: any other 4xx, an
address that is none, a name that no host has or a certificate that is not trusted (unless they worked before).

That a server cannot be reached is logged when it is first seen, with the time until which it will be tried.

The key comes from the environment alone, goes to the configured hosts alone (redirects are not followed, and it never
travels over plain HTTP to another machine), and stands in no message.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

from prune_opd.errors import ModelError, ServerError
from prune_opd.serving.exchange import (
    API_KEY_VARIABLE,
    SMALL_ANSWER,
    BadAnswer,
    Key,
    Reply,
    Unanswered,
    Wire,
    is_local,
    proxy_of,
)

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Item = TypeVar("Item")

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds
SAY_AFTER = 5.0  # seconds of failures after which one is said, where there is a connection
BAD_ANSWERS = 3  # answers to one request that may fail their check before it is given up
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})

_give_up: ContextVar[float | None] = ContextVar("give_up", default=None)  # of the request that this thread works on


class Replica:
    """One server: its address, how many of our requests it holds, and until when it asked to be left alone.

    suspect: it must be probed before its next request · vouched: it was, so its answers count · known: it answered
    once · failing_since: of its first failure after an answer · said: that failure was logged.
    """

    def __init__(self, url: str) -> None:
        self.url, self.outstanding, self.rest_until = url, 0, 0.0
        self.suspect, self.vouched = True, False
        self.known, self.said = False, False
        self.failing_since: float | None = None
        self.probing = threading.Lock()

    @property
    def where(self) -> str:
        """host:port."""
        parts = urlsplit(self.url)
        return f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


class Servers:
    """Replicas that serve the same model, behind one base URL or several, as http://host:8000 (a trailing /v1 goes).

    timeout: seconds of silence after which a request counts as lost · deadline: seconds by the clock within which a
    request must have its whole answer, retries included · concurrency: requests that one replica holds at a time.
    Raises ServerError for a URL that is none and a key that cannot be sent.

    `probe(replica)`, when set, returns whether a replica is still what it was at its last probe; it may repair the
    replica, or raise. It runs before a replica's first request, after each time its connection broke, and at the end of
    each `map`: a server may be restarted, with another model, while nobody is connected to it.
    """

    def __init__(
        self, urls: str | Sequence[str], *, timeout: float = 60.0, deadline: float = 600.0, concurrency: int = 8
    ) -> None:
        self.key = Key(os.environ.get(API_KEY_VARIABLE))
        self.replicas = [Replica(_base_url(url, self.key)) for url in ([urls] if isinstance(urls, str) else urls)]
        _check_ways(self.replicas, self.key)
        self.deadline, self.concurrency = deadline, concurrency
        self.probe: Callable[[Replica], bool] | None = None
        self._voided = 0  # how often a probe found that a replica had changed
        self._free = threading.Condition()
        limit = concurrency * len(self.replicas)
        self._wire = Wire(self.key, silence=timeout, connections=limit + 1)
        self._pool = ThreadPoolExecutor(limit, thread_name_prefix="prune-opd-server")

    def close(self) -> None:
        """Let go of threads and connections; requests that still wait are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._wire.close()

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

    def post(
        self, path: str, body: dict[str, Any], check: Callable[[Any], Answer], *, most: int = SMALL_ANSWER
    ) -> Answer:
        """POST `body` as JSON to whichever replica is least busy; returns what `check` makes of the decoded answer.

        most: bytes that the answer may have. Raises ServerError when the request is refused, when it has no usable
        answer within the deadline, or when answers keep failing their check.
        """
        patience = _Patience(self.deadline)
        while True:
            replica = self._take(patience)
            try:
                with patience.counting():
                    if replica.suspect and self.probe is not None:
                        self._probe(replica)
                    return check(self.ask(replica, "POST", path, body, most=most))
            except (BadAnswer, Unanswered) as error:
                replica.suspect = replica.suspect or (isinstance(error, Unanswered) and error.broken)
                pause = self._pause_after(error, replica, patience, path)
                replica.rest_until = time.monotonic() + pause
            finally:
                self._give_back(replica)

    def patiently(self, replica: Replica, action: Callable[[Replica], object]) -> None:
        """Run `action` on this replica, and again as `post` does: for checks that each replica must pass."""
        patience = _Patience(self.deadline)
        while True:
            try:
                with patience.counting():
                    action(replica)
                return
            except (BadAnswer, Unanswered) as error:
                time.sleep(self._pause_after(error, replica, patience))

    def each(self, action: Callable[[Replica], object]) -> None:
        """Run `action` on all replicas, side by side, each as `patiently` does; the first error is raised at once."""
        results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def run(replica: Replica) -> None:
            try:
                self.patiently(replica, action)
                results.put(None)
            except BaseException as error:
                results.put(error)

        for replica in self.replicas:  # daemons: those that still wait do not hold up the end of the program
            threading.Thread(target=run, args=(replica,), daemon=True).start()
        for _ in self.replicas:
            if (error := results.get()) is not None:
                raise error

    def check_model(self, model: str, positions: int, *, whose: str, setting: str) -> None:
        """ModelError unless every replica serves `model` with at least that many positions.

        whose: "teacher" or "student", and setting: where the served name is set, for the message.
        """

        def check(replica: Replica) -> None:
            answer = self.ask(replica, "GET", "/v1/models")
            entries = answer.get("data") if isinstance(answer, dict) else None
            if not isinstance(entries, list) or not all(
                isinstance(entry, dict) and isinstance(entry.get("id"), str) for entry in entries
            ):
                raise BadAnswer("/v1/models lists no models, each with its name as text")
            served = {entry["id"]: entry.get("max_model_len") for entry in entries}
            if model not in served:
                names = self.key.quote(", ".join(map(repr, served)))
                raise ModelError(
                    f"{replica.url} serves {names or 'nothing'}, but the {whose} of this recipe "
                    f"is {model!r}; start it with that model, or set {setting} to the served name"
                )
            has = served[model]
            if isinstance(has, int) and positions > has:
                raise ModelError(
                    f"{replica.url} has {has} positions, but the longest prompt and response that the recipe allows "
                    f"need {positions}; start the server with --max-model-len {positions}, or lower "
                    "rollout.max_completion_length"
                )

        self.each(check)

    def ask(
        self, replica: Replica, method: str, path: str, body: dict[str, Any] | None = None, *, most: int = SMALL_ANSWER
    ) -> Any:
        """One request to one replica, once; returns the decoded JSON, or None for an empty body.

        It ends with the deadline of the `post` or `patiently` that it belongs to, else after a deadline of its own.
        most: bytes that the answer may have. Raises ServerError for a refusal, BadAnswer for what is no JSON or too
        long, Unanswered for what may pass.
        """
        give_up = _give_up.get()
        seconds = self.deadline if give_up is None else give_up - time.monotonic()
        reply = self._wire.send(method, replica.url + path, body, seconds=seconds, most=most)
        content = self._content(replica.url + path, reply)
        if replica.said:
            logger.warning("%s answers again", replica.where)
        replica.known, replica.said, replica.failing_since = True, False, None
        return content

    def _content(self, url: str, reply: Reply) -> Any:
        status = reply.status
        words = "" if 200 <= status < 300 else self.key.quote(reply.body) or "no explanation"
        if status in TRANSIENT:
            # A proxy answers 502 and 503 while the server behind it restarts.
            raise Unanswered(f"HTTP {status}: {words}", pause=_retry_after(reply.headers), broken=status != 429)
        if status in (401, 403):
            raise ServerError(f"{url} refused the key (HTTP {status}); set the environment variable {API_KEY_VARIABLE}")
        if 300 <= status < 400:
            raise ServerError(
                f"{url} redirects (HTTP {status}), which is not followed, so that the key stays with the "
                "configured host; give the final address"
            )
        if not 200 <= status < 300:
            raise ServerError(f"{url} refused the request (HTTP {status}): {words}")
        if not reply.body:
            return None
        try:
            return json.loads(reply.body)
        except (ValueError, RecursionError) as error:
            nested = " (nested too deeply)" if isinstance(error, RecursionError) else ""
            raise BadAnswer(f"{len(reply.body)} bytes that are no JSON{nested}") from None

    def _pause_after(
        self, error: BadAnswer | Unanswered, replica: Replica, patience: _Patience, path: str = ""
    ) -> float:
        """Seconds to leave a replica alone that failed; says so once. ServerError where trying again is no use."""
        if isinstance(error, Unanswered):
            now = time.monotonic()
            with self._free:
                since = replica.failing_since = replica.failing_since or now
                first = not replica.said and (error.unreachable or now - since >= SAY_AFTER)
                replica.said |= first
            if error.mistake and not replica.known:
                raise ServerError(
                    f"cannot reach {replica.where}: {error}. Check the address {replica.url} for a slip of the pen"
                ) from None
            if first:
                until = time.strftime("%H:%M", time.localtime(time.time() + patience.give_up - now))
                what = "cannot reach" if error.unreachable else "no answer from"
                logger.warning("%s %s (%s), trying until %s", what, replica.where, error, until)
        return patience.pause_after(error, replica.url + path)

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


class _Patience:
    """How long one request is tried: until the deadline, and through a few unusable answers."""

    def __init__(self, deadline: float) -> None:
        self.deadline, self.give_up = deadline, time.monotonic() + deadline
        self.attempts = self.bad = 0
        self.last = "every replica stayed busy"

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Requests that this thread sends meanwhile end with this deadline."""
        token = _give_up.set(self.give_up)
        try:
            yield
        finally:
            _give_up.reset(token)

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


def _base_url(url: str, key: Key) -> str:
    try:
        parts = urlsplit(url)
        httpx2.URL(url)  # a host whose name cannot be encoded
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        usable = usable and url.isprintable() and not (set(url) & set(" ?#") or "@" in parts.netloc)
    except (ValueError, httpx2.InvalidURL):  # a port above 65535, half a bracket
        usable = False
    if not usable:
        raise ServerError(
            f"server address {key.quote(_without_secrets(url))!r} is not usable; expected http://host:port (a port "
            "from 1 to 65535) or https://host, without user, password or query (a key goes into the environment "
            f"variable {API_KEY_VARIABLE})"
        )
    return url.rstrip("/").removesuffix("/v1")


def _without_secrets(url: str) -> str:
    url, query, _ = url.partition("?")
    scheme, at, host = url.rpartition("@")
    return (f"{scheme.partition('//')[0]}//…@{host}" if at else url) + ("?…" if query else "")


def _check_ways(replicas: Sequence[Replica], key: Key) -> None:
    """ServerError where the key would travel in the clear; a warning where a proxy sees what is sent."""
    for replica in replicas:
        parts, proxy = urlsplit(replica.url), proxy_of(replica.url)
        if key and parts.scheme == "http" and not is_local(parts.hostname or ""):
            through = f" and through the proxy {proxy}" if proxy else ""
            raise ServerError(
                f"{API_KEY_VARIABLE} is set, but {replica.url} is plain HTTP to another machine{through}, where anyone "
                "on the way could read it; use https://, or unset the variable if the server needs no key"
            )
        if proxy:
            logger.warning(
                "%s is asked through the proxy %s of the environment, which sees prompts and answers; if it should "
                "not, set NO_PROXY=%s",
                replica.url,
                proxy,
                parts.hostname,
            )


def _retry_after(headers: httpx2.Headers) -> float:
    """Seconds of the Retry-After header, which holds a number or a date; at most two longest pauses."""
    text = headers.get("retry-after", "")
    try:
        seconds = (
            float(text) if text.replace(".", "", 1).isdigit() else parsedate_to_datetime(text).timestamp() - time.time()
        )
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), 2 * LONGEST_PAUSE)
