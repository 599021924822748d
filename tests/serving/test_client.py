"""The HTTP client against a real server that fails in the ways servers do."""

from __future__ import annotations

import gzip
import re
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_opd.errors import ModelError, PruneOPDError, ServerError
from prune_opd.serving import client as serving_module
from prune_opd.serving.client import Servers
from prune_opd.serving.exchange import API_KEY_VARIABLE, CONNECT_SECONDS, Key
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


# ---- the clock, the size, the key, the address ----


def closed_port() -> int:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return closed.getsockname()[1]


def drip_the_head(handler, body):
    """Not even the headers end."""
    try:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        handler.drip(b"X-Slow: ", b"a", 0.02)
    except OSError:
        handler.server.gone.set()
    handler.close_connection = True
    return True


def drip_the_body(handler, body):
    handler.endless(pause=0.02, length=2**19)
    return True


def drip_a_refusal(handler, body):
    handler.endless(500, pause=0.02, length=2**16)
    return True


@pytest.mark.parametrize("fault", [drip_the_head, drip_the_body, drip_a_refusal], ids=lambda f: f.__name__)
def test_a_server_that_drips_is_cut_at_the_deadline(server, fault):
    """It would go on for ever, and is never silent: a test that does not end has found the clock missing."""
    server.before = fault
    with pytest.raises(ServerError, match=r"no usable answer within 0\.5 s .*no whole answer within 0\.[0-5]"):
        client(server, deadline=0.5).post("/x", {}, echo)
    assert server.gone.wait(60), "the connection is still open"


def test_a_probe_counts_towards_the_deadline_of_the_request_it_is_for(server):
    servers = client(server, deadline=0.5)
    servers.probe = lambda replica: servers.ask(replica, "GET", "/probe") is None
    server.before = drip_the_body
    with pytest.raises(ServerError, match=r"within 0\.5 s in 1 attempts; last: .*no whole answer within 0\.[0-5]"):
        servers.post("/x", {}, echo)


@pytest.mark.parametrize("status", [200, 400, 500])
@pytest.mark.parametrize("announced", [True, False])
def test_no_more_is_read_than_the_request_has_room_for(server, status, announced):
    """Of a body of a terabyte, announced or in chunks."""
    megabyte = b"x" * 2**20

    def flood(handler, body):
        if announced:
            handler.endless(status, chunk=megabyte)
            return True
        handler.close_connection = True
        try:
            handler.send_response(status)
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            handler.drip(b"", b"100000\r\n" + megabyte + b"\r\n", 0)
        except OSError:
            server.gone.set()
        return True

    server.before = flood
    with pytest.raises(ServerError, match="more than 1,000 bytes" if status == 200 else f"HTTP {status}"):
        client(server, deadline=0.5 if status == 500 else 60).post("/x", {}, echo, most=1000)
    assert server.gone.wait(60)
    assert server.sent < 100 * 2**20, "buffers of the network hold a few MiB, no hundred"


def test_an_answer_as_long_as_it_may_be_is_taken(server):
    server.answer = lambda path, body: (200, b'{"echo": "' + b"y" * 988 + b'"}')
    assert client(server).post("/x", {}, echo, most=1000) == "y" * 988


def test_a_compressed_answer_is_refused(server):
    packed = gzip.compress(b"0" * 10**7)
    server.before = lambda handler, body: handler.reply(200, packed, {"Content-Encoding": "gzip"}) or True
    with pytest.raises(ServerError, match="compressed"):
        client(server).post("/x", {}, echo)
    assert server.seen[0][1]["accept-encoding"] == "identity"


def test_json_that_is_nested_too_deeply_is_a_bad_answer(server):
    server.answer = lambda path, body: (200, b"[" * 200_000 + b"]" * 200_000)
    with pytest.raises(ServerError, match="3 unusable answers in a row: .*nested too deeply"):
        client(server).post("/x", {}, echo)


@pytest.mark.parametrize("entry", [{"id": ["teacher"]}, {"id": None}, {"id": {}}, {}, [], "teacher"])
def test_a_model_whose_name_is_no_text_is_a_bad_answer(server, entry):
    server.answer = lambda path, body: (200, {"data": [{"id": "other"}, entry]})
    with pytest.raises(ServerError, match="lists no models"):
        client(server).check_model("teacher", 1, whose="teacher", setting="s")


def test_white_space_around_a_key_is_dropped_and_any_inside_refused_at_once(server, monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, f" {KEY}\n")
    client(server).post("/x", {}, echo)
    assert server.seen[0][1]["authorization"] == f"Bearer {KEY}"
    for bad in (f"{KEY}\n{KEY}", f"{KEY} x", f"{KEY}é", f"{KEY}\x07"):
        monkeypatch.setenv(API_KEY_VARIABLE, bad)
        with pytest.raises(ServerError, match=f"{API_KEY_VARIABLE} cannot be sent: character 22") as error:
            client(server)
        assert KEY not in str(error.value)


@pytest.mark.parametrize("status", [400, 403, 404, 500, 200])
@pytest.mark.parametrize("form", ["{}", "Bearer {}", '"{}"', "a\x1b[31m{}", "{}" * 100])
def test_a_server_that_echoes_the_key_gets_it_into_no_message(server, monkeypatch, caplog, status, form):
    said = form.format(*[KEY] * 100)
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    server.before = lambda handler, body: handler.reply(status, {"data": [{"id": said}], "error": said}) or True
    with pytest.raises(PruneOPDError) as error:
        client(server, deadline=0.3).check_model("teacher", 1, whose="teacher", setting="s")
    assert KEY not in str(error.value) + caplog.text + repr(error.value.__cause__)


def test_a_key_that_is_broken_up_is_hidden_too(monkeypatch):
    key = Key(KEY)
    for form in ("\n".join(KEY), KEY[:5] + "\x1b[1m" + KEY[5:], KEY[:5] + "\u200b" + KEY[5:], KEY.upper()):
        assert key.quote(f"no {form} here") == "no [the API key] here"
    assert key.quote("x" * 290 + KEY) == "x" * 290 + "[the API …", "cut only after the key is out"


def test_nothing_that_a_terminal_obeys_is_quoted():
    said = "a\x1b[2Jb\x1b]0;title\x07c\x9b31md\x1bce\r\nf\u202eg\x08h\ud800"
    assert Key(None).quote(said) == "abcde fgh"


@given(st.text(st.characters(), max_size=200) | st.binary(max_size=200))
def test_whatever_is_said_a_quotation_is_one_line_that_prints(said):
    quoted = Key("k3y").quote(said, 50)
    assert quoted.isprintable() and len(quoted) <= 50 and "k3y" not in quoted.lower()


def test_requests_to_this_machine_use_no_proxy(server, monkeypatch):
    with serving(model=None, tokenizer=None) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(API_KEY_VARIABLE, KEY)
        assert client(server).post("/x", {"a": 1}, echo) == {"a": 1}
        assert not proxy.seen


def test_a_proxy_that_sees_the_requests_is_named(monkeypatch, caplog):
    monkeypatch.setenv("http_proxy", "http://user:pass@proxy.example:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    Servers(["http://teacher.example:8000", "https://other.example", "http://localhost:1"]).close()
    (record,) = caplog.records
    assert "through the proxy proxy.example:3128" in record.getMessage() and "NO_PROXY=teacher.example" in caplog.text
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    with pytest.raises(ServerError, match="plain HTTP to another machine and through the proxy proxy.example"):
        Servers(["http://teacher.example:8000"])


@pytest.mark.parametrize(
    "url",
    [
        "http://host:99999",
        "http://host:0",
        "http://[bad",
        "http://host:port",
        "http://ho st",
        "http://host\n",
        "http://host#part",
        "http://host?key=s3cret",
        "http://" + "a" * 300 + "é\ud800",
        "",
    ],
)
def test_an_address_that_no_server_can_have_is_an_error_before_anything_is_sent(url):
    with pytest.raises(ServerError, match="is not usable; expected http://host:port") as error:
        Servers([url])
    assert "s3cret" not in str(error.value)


def failing_name(*_, **__):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_a_name_that_no_host_has_is_an_error_at_once(monkeypatch):
    """The deadline is a day."""
    monkeypatch.setattr(socket, "getaddrinfo", failing_name)
    with pytest.raises(ServerError, match=r"cannot reach teacher\.example:8000: the name of the host is not known"):
        Servers(["http://teacher.example:8000"], deadline=86400).post("/x", {}, echo)


def test_a_name_that_was_known_before_is_waited_for(server, monkeypatch):
    """As while a service restarts under Kubernetes."""
    servers = Servers([server.url.replace("127.0.0.1", "localhost")], deadline=60)
    find = socket.getaddrinfo
    assert servers.post("/x", {}, echo) == {}
    server.before = lambda handler, body: reset_connection(handler)
    times = iter([failing_name, failing_name])

    def back(*arguments, **more):
        server.before = lambda handler, body: False
        return next(times, find)(*arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", back)
    assert servers.post("/x", {"b": 1}, echo) == {"b": 1}
    assert next(times, None) is None, "the name was not asked for: tests nothing"


def reset_connection(handler) -> bool:
    handler.close_connection = True
    return True


def test_a_server_that_is_not_there_is_said_at_the_first_attempt_with_the_time(caplog, monkeypatch):
    """In the log of a request that is given up at its second attempt."""
    monkeypatch.setattr(serving_module, "FIRST_PAUSE", 0.0)
    said: list[int] = []
    monkeypatch.setattr(
        serving_module._Patience,
        "pause_after",
        lambda patience, error, where: said.append(len(caplog.records)) or (_ for _ in ()).throw(patience.spent()),
    )
    port = closed_port()
    with pytest.raises(ServerError, match="no usable answer"):
        Servers([f"http://127.0.0.1:{port}"], deadline=3600).post("/x", {}, echo)
    assert said == [1], "the first failure says it"
    assert re.search(rf"cannot reach 127\.0\.0\.1:{port} \(connection refused\), trying until \d\d:\d\d", caplog.text)


def test_an_outage_is_said_once_and_its_end_too(server, monkeypatch, caplog):
    monkeypatch.setattr(serving_module, "SAY_AFTER", 0.0)
    failing(server, 503, 503, None, 503)
    servers = client(server)
    assert servers.post("/x", {}, echo) == {}
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        f"no answer from {servers.replicas[0].where}",
        f"{servers.replicas[0].where} answers again",
    ]


def test_a_connection_is_tried_for_less_than_the_five_seconds_in_which_it_must_be_said(server):
    timeouts = {client._timeout.connect for client in Servers([server.url], timeout=1800)._wire._clients.values()}
    assert timeouts == {CONNECT_SECONDS} and CONNECT_SECONDS < 5


def test_replicas_are_checked_side_by_side_and_an_error_does_not_wait_for_the_others(server):
    """The first is not there and would be tried for a day."""
    urls = [f"http://127.0.0.1:{closed_port()}", server.url]
    server.answer = lambda path, body: (200, {"data": [{"id": "other"}]})
    with pytest.raises(ModelError, match="serves 'other', but the teacher"):
        Servers(urls, deadline=86400).check_model("teacher", 1, whose="teacher", setting="s")


def test_nothing_is_asked_after_the_end(server):
    servers = client(server)
    servers.close()
    with pytest.raises(ServerError, match="after the connections were closed"):
        servers.post("/x", {}, echo)


@pytest.mark.filterwarnings("error")
def test_requests_that_wait_at_the_end_are_ended(server):
    """A request that never gets an answer, one that connects again and again, and one that waits for its turn."""
    away = Servers([f"http://127.0.0.1:{closed_port()}"], deadline=86400)
    silent = client(server, deadline=86400, concurrency=1)
    asked, release = threading.Event(), threading.Event()
    server.before = lambda handler, body: asked.set() or release.wait(60)
    failed = []

    def ask(servers):
        try:
            servers.post("/x", {}, echo)
        except ServerError as error:
            failed.append(str(error))

    threads = [threading.Thread(target=ask, args=(servers,), daemon=True) for servers in (away, silent, silent)]
    for thread in threads:
        thread.start()
    assert asked.wait(60)
    away.close()
    silent.close()
    for thread in threads:
        thread.join(60)
    release.set()
    assert not any(thread.is_alive() for thread in threads)
    assert len(failed) == 3 and all("connections were closed" in text for text in failed)
