"""One request over HTTP and its answer, within a deadline by the clock and a number of bytes.

`Wire` is the only place that talks to a network. What comes back is bytes. What is said of it, in errors and logs, goes
through `Key.quote` first, which takes out the API key, terminal escapes and whatever else does not print.

The clock runs over everything: looking the name up, connecting, sending, and each byte of the answer. A timeout of
silence alone would never end a server that sends a byte now and then. asyncio's timeout does this, so the requests run
in an event loop of their own thread, and callers wait for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import re
import socket
import ssl
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2

from prune_opd.errors import ServerError

API_KEY_VARIABLE = "PRUNE_OPD_SERVER_API_KEY"
CONNECT_SECONDS = 3.5  # for one attempt; so a server that is not there is said within 5 s
SMALL_ANSWER = 2**20  # bytes of an answer that has nothing to do with tokens
ERROR_BYTES = 2**16  # so much of a refusal is read
QUOTED_CHARS = 300
# CSI (colours, cursor), OSC (titles, links) and the other sequences of ECMA-48
_ESCAPES = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b\]|\x9d).*?(?:\x07|\x1b\\|\x9c|$)|\x1b.?", re.DOTALL)


class BadAnswer(ValueError):
    """The server answered, but not what was asked. Never leaves this package as it is."""


class Unanswered(Exception):
    """There was no answer; it may pass.

    pause: seconds that the server asked for · broken: it may have been restarted · unreachable: there was no
    connection · mistake: likely an error in the address (no such host, a wrong certificate), unless it worked before.
    """

    def __init__(
        self, reason: str, *, pause: float = 0.0, broken: bool, unreachable: bool = False, mistake: bool = False
    ) -> None:
        super().__init__(reason)
        self.pause, self.broken, self.unreachable, self.mistake = pause, broken, unreachable, mistake


@dataclass(frozen=True)
class Reply:
    """What came back. body: of a refusal, the first `ERROR_BYTES`."""

    status: int
    headers: httpx2.Headers
    body: bytes


class Key:
    """The API key of the environment, or none. White space around it (a secret's file ends with a newline) is dropped.

    ServerError, without the key, where it has a character that no header may have.
    """

    def __init__(self, text: str | None) -> None:
        self._text = (text or "").strip()
        bad = next((i for i, c in enumerate(self._text) if not "!" <= c <= "~"), None)
        if bad is not None:
            raise ServerError(
                f"{API_KEY_VARIABLE} cannot be sent: character {bad + 1} of {len(self._text)} is a space, a line break "
                "or not ASCII, which no header may have; set it to the key alone"
            )
        forms = {self._text, json.dumps(self._text)[1:-1], quote(self._text, safe="")} - {""}
        # White space between any two characters, since a server may wrap the lines of its message.
        self._pattern = re.compile("|".join(r"\s*".join(map(re.escape, form)) for form in forms), re.IGNORECASE)

    def __bool__(self) -> bool:
        return bool(self._text)

    def __repr__(self) -> str:
        return "Key(set)" if self else "Key(unset)"

    def header(self) -> dict[str, str]:
        """The header that carries it; none without a key."""
        return {"Authorization": f"Bearer {self._text}"} if self else {}

    def quote(self, said: Any, most: int = QUOTED_CHARS) -> str:
        """What a server said, for a message: one line of at most `most` characters that all print, without the key."""
        text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
        text = _ESCAPES.sub("", text[:ERROR_BYTES])
        text = " ".join("".join(c for c in text if c.isprintable() or c.isspace()).split())
        if self:
            text = self._pattern.sub("[the API key]", text)
        return text if len(text) <= most else f"{text[: most - 1]}…"


class Wire:
    """Sends requests. silence: seconds without a byte after which one counts as lost · connections: at most so many.

    Proxies of the environment are used, except for this machine, where they would see what never had to leave it.
    """

    def __init__(self, key: Key, *, silence: float, connections: int) -> None:
        self.key = key
        timeout = httpx2.Timeout(silence, connect=min(silence, CONNECT_SECONDS), pool=None)
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        # Not compressed: a few bytes may stand for gigabytes.
        headers = {"Accept-Encoding": "identity", **key.header()}
        try:
            self._clients = {
                local: httpx2.AsyncClient(
                    timeout=timeout, limits=limits, headers=headers, follow_redirects=False, trust_env=not local
                )
                for local in (True, False)
            }
        except (ValueError, httpx2.InvalidURL, ImportError) as error:  # ImportError: SOCKS without its package
            raise ServerError(
                f"a proxy of the environment cannot be used ({key.quote(error)}); correct HTTP_PROXY, HTTPS_PROXY or "
                "ALL_PROXY, or unset it"
            ) from None
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="prune-opd-wire", daemon=True)
        thread.start()
        self._closing, self._closed = threading.Lock(), False
        self._stop = weakref.finalize(self, _stop, self._loop, thread, list(self._clients.values()))

    def close(self) -> None:
        """End what is under way, with a ServerError for those who wait for it."""
        with self._closing:  # what was begun before is seen by the end, and nothing begins after
            self._closed = True
        self._stop()

    def send(self, method: str, url: str, body: dict[str, Any] | None, *, seconds: float, most: int) -> Reply:
        """One request and its answer, in at most `seconds` and `most` bytes.

        Raises Unanswered where there was none in time, BadAnswer for one that is too long or compressed, ServerError
        for a request that can never be sent.
        """
        with self._closing:
            if self._closed:
                raise ServerError(f"{url}: asked after the connections were closed")
            coroutine = self._exchange(method, url, body, seconds, most)
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except TimeoutError:
            raise Unanswered(f"no whole answer within {max(seconds, 0):.3g} s", broken=True) from None
        except CancelledError:
            raise ServerError(f"{url}: the connections were closed while it was asked") from None
        except (httpx2.LocalProtocolError, httpx2.UnsupportedProtocol, httpx2.InvalidURL, UnicodeError) as error:
            raise ServerError(
                f"{url}: this request cannot be sent: {self.key.quote(error)}; correct the address"
            ) from None
        except httpx2.HTTPError as error:
            raise self._unanswered(error) from None

    async def _exchange(self, method: str, url: str, body: dict[str, Any] | None, seconds: float, most: int) -> Reply:
        client = self._clients[is_local(urlsplit(url).hostname or "")]
        async with asyncio.timeout(seconds), client.stream(method, url, json=body) as response:
            if not response.is_success:
                return Reply(response.status_code, response.headers, await _read(response, ERROR_BYTES))
            if response.headers.get("content-encoding", "identity") != "identity":
                raise BadAnswer("a compressed answer, which was not asked for")
            # The length is a number, or there is no response.
            too_long = int(response.headers.get("content-length", 0)) > most
            content = b"" if too_long else await _read(response, most + 1)
            if too_long or len(content) > most:
                raise BadAnswer(f"an answer of more than {most:,} bytes, which is more than was asked for")
            return Reply(response.status_code, response.headers, content)

    def _unanswered(self, error: httpx2.HTTPError) -> Unanswered:
        causes = list(_causes(error))
        name = next((cause for cause in causes if isinstance(cause, socket.gaierror)), None)
        certificate = next((cause for cause in causes if isinstance(cause, ssl.SSLCertVerificationError)), None)
        if name is not None:
            reason = f"the name of the host is not known here ({name.strerror})"
        elif certificate is not None:
            reason = f"its certificate is not trusted ({certificate.verify_message})"
        elif isinstance(error, httpx2.ConnectTimeout):
            reason = f"no connection within {CONNECT_SECONDS:g} s"
        else:
            errno = next((c.errno for c in reversed(causes) if isinstance(c, OSError) and c.errno), None)
            reason = os.strerror(errno).lower() if errno else f"{type(error).__name__}: {error}"
        return Unanswered(
            self.key.quote(reason),
            broken=True,
            unreachable=isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout),
            mistake=bool(name or certificate),
        )


def is_local(host: str) -> bool:
    """Whether requests to this host stay on this machine."""
    host = host.rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def proxy_of(url: str) -> str | None:
    """The proxy that sees requests to this URL in the clear, without its password; None where none does."""
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if parts.scheme != "http" or proxy is None or is_local(parts.hostname or "") or proxy_bypass(parts.netloc):
        return None  # https goes through a proxy as a tunnel
    return proxy.rpartition("@")[2]


async def _read(response: httpx2.Response, most: int) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) >= most:
            break
    return bytes(body[:most])


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, those in groups too."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop(0)
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            left += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, clients: list[httpx2.AsyncClient]) -> None:
    """End what is under way, close the connections and end the thread."""

    async def shut() -> None:
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:  # one that is cancelled may begin others
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for client in clients:
            await client.aclose()

    if threading.current_thread() is thread:  # collected there, so nobody waits for anything
        loop.stop()
        return
    with contextlib.suppress(TimeoutError, RuntimeError):
        asyncio.run_coroutine_threadsafe(shut(), loop).result(timeout=5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=5)
    if not thread.is_alive():
        loop.close()
