"""A real HTTP server on this machine that answers in vLLM's OpenAI format with the numbers of a model held in process.

What it says is that model's; how it says it was taken down from vllm 0.32 (tests/teachers/test_vllm_engine.py asks a
real one). Tests make it fail by `before`, which is called with each request and may answer in its place.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class OpenAIServer(ThreadingHTTPServer):
    """Serves `model` with `tokenizer` under `name`, at `url`. `seen` holds (path, headers, body) of every request."""

    daemon_threads = True

    def __init__(self, model, tokenizer, *, name="teacher", max_model_len=512, max_logprobs=20) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.max_model_len, self.max_logprobs = max_model_len, max_logprobs
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        self.before: Callable[[_Handler, Any], bool] = lambda handler, body: False
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.forward = threading.Lock()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """(status, JSON) as vLLM gives them."""
        match path:
            case "/v1/models":
                return 200, {"data": [{"id": self.name, "max_model_len": self.max_model_len}]}
            case "/detokenize":
                return 200, {"prompt": self.tokenizer.decode(body["tokens"])}
            case "/v1/completions":
                return self.completion(body)
        return 404, {"error": {"message": "Not Found"}}

    def completion(self, body: Any) -> tuple[int, Any]:
        """Scores of the prompt, and one greedy token."""
        ids, count = body["prompt"], body["prompt_logprobs"]
        if body["model"] != self.name:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if count > self.max_logprobs:
            message = f"Requested prompt logprobs of {count}, which is greater than max allowed: {self.max_logprobs}"
            return 400, {"error": {"message": message}}
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
