"""The HTTP client against a real server that fails in the ways servers do."""

from __future__ import annotations

import socket
import threading

import pytest

from prune_opd.errors import ServerError
from prune_opd.serving import client as serving_module
from prune_opd.serving.client import API_KEY_VARIABLE, Servers
from tests.openai_server import OpenAIServer, serving

KEY = "sk-secret-of-the-test"


@pytest.fixture
def server():
    with serving(model=None, tokenizer=None) as running:
        running.answer = lambda path, body: (200, {"echo": body})
        yield running


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(serving_module, "FIRST_PAUSE", 0.01)


def client(*servers: OpenAIServer, **settings) -> Servers:
    return Servers([server.url for server in servers], **{"deadline": 60.0, "timeout": 60.0, **settings})


def echo(answer):
    return answer["echo"]


def failing(server, *failures):
    """The first requests fail: with a status, or by closing the connection."""
    left = list(failures)

    def before(handler, body):
        if not left:
            return False
        status = left.pop(0)
        if status is None:
            handler.close_connection = True
        else:
            handler.reply(status, {"error": {"message": "not now"}}, {"Retry-After": "0"})
        return True

    server.before = before


def test_what_passes_is_tried_again(server):
    failing(server, 503, None, 429, 500, 504)
    assert client(server).post("/x", {"a": 1}, echo) == {"a": 1}
    assert len(server.seen) == 6


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_refusal_is_an_error_at_once_with_the_servers_words(server, status):
    failing(server, status)
    with pytest.raises(ServerError, match=rf"refused the request \(HTTP {status}\).*not now"):
        client(server).post("/x", {}, echo)
    assert len(server.seen) == 1


def test_a_dead_replica_is_left_out_while_another_lives(server):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}"
        servers = Servers([dead, server.url], deadline=60.0)
        assert servers.map(lambda i: servers.post("/x", {"i": i}, echo), range(12)) == [{"i": i} for i in range(12)]


def test_when_the_deadline_has_passed_the_last_failure_is_named(server):
    failing(server, *[503] * 1000)
    with pytest.raises(
        ServerError, match=r"no usable answer within 0\.3 s in \d+ attempts; last: .*HTTP 503: .*not now"
    ):
        client(server, deadline=0.3).post("/x", {}, echo)


def test_retry_after_is_kept(server):
    server.before = lambda handler, body: handler.reply(503, {}, {"Retry-After": "20"}) or True
    with pytest.raises(ServerError, match="in 1 attempts"):
        client(server, deadline=10).post("/x", {}, echo)
    assert len(server.seen) == 1


def test_a_replica_never_holds_more_requests_than_its_share(server):
    held, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(3)

    def before(handler, body):
        nonlocal held, most
        with lock:
            held, most = held + 1, max(most, held + 1)
        together.wait(timeout=60)  # three at a time get through, or none
        with lock:
            held -= 1
        return False

    server.before = before
    servers = client(server, concurrency=3)
    servers.map(lambda i: servers.post("/x", {"i": i}, echo), range(12))
    assert most == 3


def test_the_key_is_sent_and_never_said(server, monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    servers = client(server)
    servers.post("/x", {}, echo)
    assert server.seen[0][1]["authorization"] == f"Bearer {KEY}"
    failing(server, 401)
    with pytest.raises(ServerError, match=f"refused the key .*{API_KEY_VARIABLE}") as error:
        servers.post("/x", {}, echo)
    assert KEY not in str(error.value) + repr(vars(servers))


def test_a_redirect_does_not_take_the_key_elsewhere(server, monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    with serving(model=None, tokenizer=None) as elsewhere:
        server.before = lambda handler, body: handler.reply(307, {}, {"Location": elsewhere.url}) or True
        with pytest.raises(ServerError, match="redirects"):
            client(server).post("/x", {}, echo)
        assert not elsewhere.seen


def test_the_key_does_not_travel_in_the_clear(monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    with pytest.raises(ServerError, match="plain HTTP to another machine") as error:
        Servers(["http://teacher.example:8000"])
    assert KEY not in str(error.value)
    Servers(["https://teacher.example"]).close()


@pytest.mark.parametrize("url", ["teacher:8000", "ftp://teacher", "http://user:pass@teacher", "http://"])
def test_a_wrong_address_is_an_error(url):
    with pytest.raises(ServerError, match="server address") as error:
        Servers([url])
    assert "pass@" not in str(error.value)
