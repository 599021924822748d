"""A real HTTP server on this machine that answers in vLLM's OpenAI format with the numbers of a model held in process.

What it says is that model's; how it says it was taken down from vllm 0.32 (tests/engines/test_vllm.py asks a real
one). Tests make it fail by `before`, which is called with each request and may answer in its place.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file


class OpenAIServer(ThreadingHTTPServer):
    """Serves `model` with `tokenizer` under `name`, at `url`. `seen` holds (path, headers, body) of every request."""

    daemon_threads = True

    def __init__(
        self,
        model,
        tokenizer,
        *,
        name="teacher",
        max_model_len=512,
        max_logprobs=20,
        dev_mode=True,
        scale_out=False,
        port=0,
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.max_model_len, self.max_logprobs, self.dev_mode = max_model_len, max_logprobs, dev_mode
        self.scale_out = scale_out
        self.weight_version = "default"
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        self.before: Callable[[_Handler, Any], bool] = lambda handler, body: False
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.forward = threading.Lock()
        self.sent, self.gone = 0, threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is what some tests are about; anything else is printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """(status, JSON) as vLLM gives them."""
        match path:
            case "/v1/models":
                return 200, {"data": [{"id": self.name, "max_model_len": self.max_model_len}]}
            case "/detokenize":
                return 200, {"prompt": self.tokenizer.decode(body["tokens"])}
            case "/v1/completions":
                return self.completion(body)
            case "/inference/v1/generate" if self.scale_out:
                return self.generate(body)
            case "/inference/v1/generate":
                return 403, {"error": {"message": "Scale-out endpoints are disabled."}}
            case "/collective_rpc" if self.dev_mode:
                return self.reload(body)
            case "/weight_info" if self.dev_mode:
                return 200, {"weight_version": self.weight_version}
            case "/update_weight_version" if self.dev_mode:
                self.weight_version = body["new_version"]
                return 200, {"success": True}
        return 404, {"error": {"message": "Not Found"}}

    def completion(self, body: Any) -> tuple[int, Any]:
        """Scores of the prompt, and one greedy token."""
        ids, count = body["prompt"], body.get("prompt_logprobs", 0)
        if body["model"] != self.name:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if count > self.max_logprobs:
            message = f"Requested prompt logprobs of {count}, which is greater than max allowed: {self.max_logprobs}"
            return 400, {"error": {"message": message}}
        if "prompt_logprobs" not in body:
            return self.sample(body)
        with self.forward, torch.no_grad():
            logprobs = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        scores: list[Any] = [None]
        for row, token in zip(logprobs[:-1], ids[1:], strict=True):
            top = row.topk(count)
            entry = {token: int((row >= row[token]).sum())}
            entry |= {int(t): rank for rank, t in enumerate(top.indices, start=1)}
            scores.append({str(t): {"logprob": float(row[t]), "rank": rank} for t, rank in entry.items()})
        choice = {"index": 0, "text": "", "prompt_logprobs": scores, "token_ids": [int(logprobs[-1].argmax())]}
        if body.get("return_token_ids"):
            choice["prompt_token_ids"] = ids
        return 200, {"model": self.name, "choices": [choice]}

    def generate(self, body: Any) -> tuple[int, Any]:
        """Scores of the prompt, and of the ids that are named for its last positions."""
        ids, params = body["token_ids"], body["sampling_params"]
        start, rows = params["prompt_logprob_start"], params["prompt_logprob_token_ids"]
        if len(rows) != len(ids) - 1 - start or len(rows[0]) > self.max_logprobs:
            return 400, {"error": {"message": f"{len(rows)} rows of {len(rows[0])} ids do not fit"}}
        plain = {"model": body["model"], "prompt": ids, "prompt_logprobs": params["prompt_logprobs"]}
        status, answer = self.completion(plain | {"return_token_ids": True})
        if status != 200:
            return status, answer
        with self.forward, torch.no_grad():
            logprobs = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        file = io.BytesIO()
        np.save(file, logprobs[start:-1].gather(-1, torch.tensor(rows)).numpy())
        (choice,) = answer["choices"]
        return 200, {
            "model": answer["model"],
            "choices": [{"index": 0, "token_ids": choice["token_ids"]}],
            "prompt_token_ids": ids,
            "prompt_logprobs": choice["prompt_logprobs"],
            "prompt_token_id_logprobs": base64.b64encode(file.getvalue()).decode(),
        }

    def sample(self, body: Any) -> tuple[int, Any]:
        """At most max_tokens after the prompt; the log-probs are those before the temperature."""
        assert body["ignore_eos"] and (body["top_p"], body["top_k"], body["min_p"]) == (1.0, 0, 0.0)
        draw, tokens = torch.Generator().manual_seed(body["seed"]), []
        own, top = [], []
        while len(tokens) < body["max_tokens"] and not (tokens and tokens[-1] in body["stop_token_ids"]):
            with self.forward, torch.no_grad():
                logits = self.model(torch.tensor([[*body["prompt"], *tokens]])).logits[0, -1].float()
            scale = body["temperature"]
            token = int(
                torch.multinomial((logits / scale).softmax(-1), 1, generator=draw) if scale else logits.argmax()
            )
            tokens.append(token)
            if body["logprobs"]:
                row = logits.log_softmax(-1)
                own.append(float(row[token]))
                listed = {token, *row.topk(body["logprobs"]).indices.tolist()}
                top.append({f"token_id:{t}": float(row[t]) for t in listed})
        ended = tokens[-1] in body["stop_token_ids"]
        choice = {"index": 0, "text": "", "token_ids": tokens, "prompt_token_ids": body["prompt"]}
        choice |= {"finish_reason": "stop" if ended else "length"}
        choice["logprobs"] = {"token_logprobs": own, "top_logprobs": top} if body["logprobs"] else None
        return 200, {"model": self.name, "choices": [choice]}

    def reload(self, body: Any) -> tuple[int, Any]:
        """Take the weights that lie in a folder."""
        if body["method"] == "update_config":
            return 200, {"results": [None]}
        assert body["method"] == "reload_weights"
        found = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
        with self.forward:
            self.model.load_state_dict(found)
        return 200, {"results": [None]}


class _Handler(BaseHTTPRequestHandler):
    server: OpenAIServer
    protocol_version = "HTTP/1.1"  # connections stay open, as those of a real server do

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        if not self.server.before(self, body):
            self.reply(*self.server.answer(self.path, body))

    def reply(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def endless(self, status: int = 200, *, chunk: bytes = b" ", pause: float = 0.0, length: int = 10**12) -> None:
        """Announce `length` bytes, and send `chunk` until the client goes away; `server.sent` counts the bytes."""
        self.close_connection = True
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.drip(b"", chunk, pause)
        except OSError:
            self.server.gone.set()

    def drip(self, head: bytes, chunk: bytes, pause: float) -> None:
        self.wfile.write(head)
        while True:
            self.wfile.write(chunk)
            self.wfile.flush()
            self.server.sent += len(chunk)
            time.sleep(pause)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(model, tokenizer, **settings) -> Iterator[OpenAIServer]:
    """A server that runs while the block does."""
    server = OpenAIServer(model, tokenizer, **settings)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
