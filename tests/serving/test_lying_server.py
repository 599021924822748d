"""A server that lies in every way at hand: what comes of it is the right answer, or an error of ours that says so.

Lies of content are an answer that was honest until hypothesis changed it: another value, a field that is missing,
doubled or of another type, numbers that no float32 holds, ids that no vocabulary has. Lies of the wire are bytes.
`PRUNE_OPD_LIES=10000 pytest tests/serving/test_lying_server.py` tells more of them (of the wire, a tenth).
"""

from __future__ import annotations

import base64
import copy
import io
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd.errors import PruneOPDError, ServerError
from prune_opd.rollout.served import parse_tokens
from prune_opd.serving import client as client_module
from prune_opd.serving.client import Servers
from prune_opd.serving.exchange import API_KEY_VARIABLE, BadAnswer, Key
from prune_opd.teachers.served import Asked, ServedTeacher, named_logprobs, parse_scores
from tests.families import EOS, VOCAB, tiny_model
from tests.openai_server import serving

KEY = "sk-secret-of-the-test"
IDS = [5, 6, 7, 8]
N = 3  # candidates
ASKED = Asked(IDS, torch.tensor([[1, 2], [3, 4], [5, 6]]))
LIES = int(os.environ.get("PRUNE_OPD_LIES", "300"))
many = settings(max_examples=LIES, deadline=None)

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(10**400),
    st.floats(),
    st.sampled_from([1000.0, 0.5, 2e-3, -1e300, -1e39, -100.0, math.inf, -math.inf, math.nan, -0.0]),
    st.sampled_from(["-0.5", "high", "", KEY, f"\x1b[31m{KEY}", "\x1b]0;you\x07", "5", "٣", "-1", f"{VOCAB}", "005"]),
    st.text(max_size=8),
    st.builds(list),
    st.builds(dict),
    st.builds(lambda: [[5], 6]),
    st.builds(lambda: {"logprob": -0.1}),
)


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


@st.composite
def lies(draw, honest):
    """The honest answer, changed at one to three places."""
    told = copy.deepcopy(honest)
    for _ in range(draw(st.integers(1, 3))):
        all_places = list(places(told))
        path = draw(st.sampled_from(all_places[1:] or all_places))
        if not path:
            return draw(VALUES)
        holder = told
        for key in path[:-1]:
            holder = holder[key]
        match draw(st.sampled_from(["value", "value", "drop", "key", "double", "all"])):
            case "drop":
                del holder[path[-1]]
            case "key" if isinstance(holder, dict):
                holder[draw(st.sampled_from(["-1", "token_id:-1", "99999", "token_id:99999", "5", "1_0"]))] = (
                    holder.pop(path[-1])
                )
            case "double" if isinstance(holder, list):
                holder.append(copy.deepcopy(holder[path[-1]]))
            case "all" if isinstance(holder, dict):  # every candidate says the same
                value = draw(VALUES)
                for key in holder:
                    holder[key] = copy.deepcopy(value)
            case _:
                holder[path[-1]] = draw(VALUES)
    return told


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3", seed=4)


@pytest.fixture(scope="module")
def server(model):
    with serving(model, None, max_logprobs=VOCAB) as running:
        yield running


@pytest.fixture(scope="module")
def scored(model):
    with serving(model, None, max_logprobs=VOCAB) as running:
        body = {"model": "teacher", "prompt": IDS, "prompt_logprobs": N, "return_token_ids": True}
        return json.loads(json.dumps(running.completion(body)[1]))


@pytest.fixture(scope="module")
def sampled(model):
    body = {"model": "teacher", "prompt": [5], "max_tokens": 4, "seed": 1, "temperature": 1.0, "stop_token_ids": []}
    body |= {"ignore_eos": True, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "logprobs": N}
    with serving(model, None) as running:
        return json.loads(json.dumps(running.sample(body)[1]))


def believable(logprobs: torch.Tensor, ids: torch.Tensor):
    """Of a distribution over the vocabulary, in the type that they are stored in."""
    listed = ids >= 0
    assert torch.isfinite(logprobs[listed]).all() and (ids < VOCAB).all()
    assert (logprobs.double().exp().where(listed, 0).sum(-1) <= 1 + 2e-3).all()


@many
@given(data=st.data())
def test_scores_are_of_a_distribution_or_not_believed(scored, data):
    told = data.draw(lies(scored))
    teacher = ServedTeacher.__new__(ServedTeacher)
    teacher.model, teacher.top_logprobs, teacher.vocab_size, teacher.ends = "teacher", N, VOCAB, ()
    teacher.servers = SimpleNamespace(key=Key(None))
    try:
        found = teacher._read(told, IDS)
    except (BadAnswer, ServerError) as error:
        assert str(error).isprintable()
        return
    believable(found.logprobs, found.ids)
    for values in (found.unlisted, found.entropy, found.sampled):
        assert torch.isfinite(values).all() and len(values) == len(IDS) - 1
    assert (found.unlisted <= found.logprobs[:, N - 1] + 1e-6).all()
    reach = found.logprobs[:, :N].exp().sum(-1) + VOCAB * found.logprobs[:, N - 1].exp()
    assert (reach >= 0.24).all(), "no distribution has so little in its likeliest"


@many
@given(data=st.data())
def test_tokens_and_candidates_are_of_the_vocabulary_or_not_believed(sampled, data):
    told = data.draw(lies(sampled))
    try:
        found = parse_tokens(told, [5], 4, [EOS], top_k=N, vocab_size=VOCAB)
    except BadAnswer as error:
        assert str(error).isprintable()
        return
    ids, logprobs = torch.tensor(found.ids).view(-1, N + 1), torch.tensor(found.logprobs).view(-1, N + 1)
    assert (ids >= 0).all() and all(type(token) is int and 0 <= token < VOCAB for token in found.tokens)
    assert torch.equal(ids[:, 0], torch.tensor(found.tokens))
    believable(logprobs[:, 1:], ids[:, 1:])
    assert (logprobs[:, 1] >= logprobs[:, 0] - 1e-6).all(), "the likeliest is likelier than the sampled"


def minus_hundred(choice):
    for entry in choice["prompt_logprobs"][1:]:
        for value in entry.values():
            value["logprob"] = -100.0


def minus_infinite_in_float32(choice):
    for entry in choice["prompt_logprobs"][1:]:
        for value in entry.values():
            value["logprob"] = -1e300


def a_thousand(choice):
    next(iter(choice["prompt_logprobs"][1].values()))["logprob"] = 1000


def twice_the_same(choice):
    entry = choice["prompt_logprobs"][1]
    entry["0" + next(iter(entry))] = {"logprob": -30.0}


def a_negative_id(choice):
    choice["prompt_logprobs"][1]["-1"] = {"logprob": -30.0}


def an_id_that_only_the_teacher_has(choice):
    """Hypothesis found it: the sampled token, whatever its rank, took its place among the likeliest."""
    entry = choice["prompt_logprobs"][2]
    entry["99"] = entry.pop(next(iter(set(entry) - {"7"})))


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (minus_hundred, "position 1: all .* ids together can have no more than .* of the probability"),
        (minus_infinite_in_float32, "not finite in float32"),
        (a_thousand, "or above 0"),
        (twice_the_same, "stands there twice"),
        (a_negative_id, "no token id"),
        (an_id_that_only_the_teacher_has, "id 99 is beyond the 67 that student and server share"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_lies_of_which_hypothesis_may_not_think(scored, lie, words):
    choice = copy.deepcopy(scored["choices"][0])
    parse_scores(choice, IDS, N, VOCAB)
    lie(choice)
    with pytest.raises(BadAnswer, match=words):
        parse_scores(choice, IDS, N, VOCAB)


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({f"token_id:{VOCAB}": -30.0}, "beyond the 67"),
        ({"token_id:-1": -30.0}, "no token id"),
        ({"token_id:1_0": -30.0}, "no token id"),
        ({"token_id:1": -0.7, "token_id:2": -0.7, "token_id:3": -0.7}, "their mass is"),
        ({"token_id:1": -1e39}, "not finite in float32"),
        ({"token_id:1": True}, "no number"),
        (None, "lack the token itself"),
    ],
)
def test_lies_about_candidates(sampled, lie, words):
    told = copy.deepcopy(sampled)
    entry = told["choices"][0]["logprobs"]["top_logprobs"][1]
    if lie:
        entry |= lie
    else:
        del entry[f"token_id:{told['choices'][0]['token_ids'][1]}"]
    with pytest.raises(BadAnswer, match=words):
        parse_tokens(told, [5], 4, [EOS], top_k=N, vocab_size=VOCAB)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 20.0])
def test_true_distributions_are_believed_flat_ones_too(spread):
    """Also of a server with twice as many ids as are shared."""
    for seed in range(20):
        row = (torch.randn(2 * VOCAB, generator=torch.Generator().manual_seed(seed)) * spread).log_softmax(-1)
        row[:VOCAB], _ = row[:VOCAB].sort()
        top = row[:VOCAB].topk(N)
        entry = {str(int(i)): {"logprob": float(v)} for i, v in zip(top.indices, top.values, strict=True)}
        entry.setdefault("3", {"logprob": float(row[3])})
        if row[VOCAB:].max() <= row[VOCAB - N]:  # else they would have been listed
            parse_scores({"prompt_logprobs": [None, entry]}, [1, 3], N, VOCAB)


# ---- over the wire ----

STATUSES = [100, 204, 300, 307, 400, 401, 403, 404, 418, 422, 429, 500, 503, 999]
RETRIES = ["0", "\xb2", "-1", "x", "Wed, 21 Oct 99999 07:28:00 GMT", "1e9"]
LENGTHS = ["-1", "1e3", "99999999999999999999", "5, 6", "x", "0", "3"]


def wire_lies(models, scores):
    """(handler, body) -> None, each of them a lie that is drawn before the server tells it."""

    def raw(data):
        def tell(handler, body):
            handler.close_connection = True
            handler.wfile.write(data)

        return tell

    def reply(code, content, headers):
        def tell(handler, body):
            handler.reply(code, content, headers)
            handler.close_connection = True

        return tell

    def contents(of_models, of_scores):
        def tell(handler, body):
            told = of_models if handler.path == "/v1/models" else of_scores
            handler.reply(200, told if isinstance(told, bytes) else json.dumps(told).encode())

        return tell

    rude = f"\x1b[31m{KEY}\n".encode()
    return st.one_of(
        st.builds(raw, st.binary(max_size=200)),
        st.builds(
            reply, st.sampled_from(STATUSES), st.just(rude), st.sampled_from([{"Retry-After": r} for r in RETRIES])
        ),
        st.builds(reply, st.just(200), st.just(b"{}"), st.sampled_from([{"Content-Length": n} for n in LENGTHS])),
        st.builds(reply, st.just(200), st.just(b"{}"), st.sampled_from([{"X": KEY}, {"X": "a" * 70_000}])),
        st.builds(contents, lies(models) | st.binary(max_size=50), lies(scores)),
        st.builds(contents, st.builds(copy.deepcopy, st.just(models)), lies(scores) | st.binary(max_size=50)),
    )


@settings(max_examples=max(60, LIES // 10), deadline=None)
@given(data=st.data())
def test_over_the_wire_a_lie_is_an_error_of_ours_without_the_key(server, scored, data):
    tell = data.draw(wire_lies(server.answer("/v1/models", None)[1], scored))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(API_KEY_VARIABLE, KEY)
        patch.setattr(client_module, "FIRST_PAUSE", 0.001)
        patch.setattr(client_module, "LONGEST_PAUSE", 0.002)
        servers = Servers([server.url], timeout=0.5, deadline=0.05, concurrency=1)
        server.before = lambda handler, body: tell(handler, body) or True
        try:
            servers.check_model("teacher", 1, whose="teacher", setting="s")
            found = ServedTeacher(servers, model="teacher", vocab_size=VOCAB, top_logprobs=N).ask(ASKED)
            believable(found.logprobs, found.ids)
        except PruneOPDError as error:
            assert KEY not in str(error) and str(error).isprintable()
        finally:
            servers.close()
            server.before = lambda handler, body: False


SCORES = np.log(np.full((4, 3), 0.2, dtype=np.float32))


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@many
@given(data=st.data())
def test_a_file_of_named_scores_is_what_it_should_be_or_refused(data):
    whole = npy(SCORES)
    at, new = data.draw(st.integers(0, len(whole))), data.draw(st.binary(max_size=12))
    told = data.draw(
        st.one_of(
            st.just(whole[:at] + new + whole[at + len(new) :]).map(base64.b64encode),
            st.just(whole[:at]).map(base64.b64encode),
            st.sampled_from([npy(SCORES.T), npy(SCORES.astype(int)), npy(SCORES + 5), npy(SCORES[:3]), b"PK"]).map(
                base64.b64encode
            ),
            st.text(max_size=9),
            VALUES,
        )
    )
    try:
        found = named_logprobs(told.decode() if isinstance(told, bytes) else told, SCORES.shape)
    except BadAnswer as error:
        assert str(error).isprintable()
    else:
        assert found.shape == SCORES.shape and found.dtype == torch.float32
        assert found.isfinite().all() and (found <= 1e-3).all()


def test_honest_scores_of_named_ids_are_read():
    assert torch.equal(named_logprobs(base64.b64encode(npy(SCORES)).decode(), (4, 3)), torch.from_numpy(SCORES))


def test_an_honest_server_is_believed(server):
    servers = Servers([server.url])
    servers.check_model("teacher", 1, whose="teacher", setting="s")
    found = ServedTeacher(servers, model="teacher", vocab_size=VOCAB, top_logprobs=N).ask(ASKED)
    assert len(found.sampled) == len(IDS) - 1
    servers.close()
