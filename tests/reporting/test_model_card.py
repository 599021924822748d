"""The card of a real run, and its way to a Hub: a server on this machine that speaks the Hub's protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from prune_opd.errors import HubError
from prune_opd.reporting.model_card import model_card
from prune_opd.training.hub import check_repo

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
SETTINGS = ["training.steps=2", "rollout.prompts_per_step=2", "rollout.num_generations=2", "evaluation.num_problems=2"]
SETTINGS += ["evaluation.k=1", "evaluation.max_tokens=20"]
TOKEN = "hf_" + "averysecrettoken"


class Hub(BaseHTTPRequestHandler):
    """What the server of a test has seen: `calls`, `repos` with how they were made, `files` by path, `tokens`."""

    calls: list[str]
    repos: list[dict]
    files: dict[str, bytes]
    blobs: dict[str, bytes]
    tokens: set[str | None]

    def log_message(self, *arguments):
        pass

    def answer(self, content: dict | list | None = None, status: int = 200):
        body = json.dumps(content).encode() if content is not None else b""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self):
        self.calls.append(f"GET {self.path}")
        self.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/whoami-v2":
            return self.answer({"type": "user", "name": "me", "orgs": []})
        return self.answer({"id": "me/student", "sha": "0" * 40, "siblings": []})

    def do_PUT(self):
        self.blobs[self.path.split("/")[-1]] = self.body()
        self.answer()

    def do_POST(self):
        body = self.body()
        self.calls.append(f"POST {self.path}")
        address = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            self.repos.append(json.loads(body))
            return self.answer({"url": f"{address}/me/student"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            return self.answer({"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{address}/blob/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "lfsFile":
                    self.files[line["value"]["path"]] = self.blobs[line["value"]["oid"]]
            return self.answer({"commitUrl": f"{address}/me/student/commit/{'0' * 40}", "commitOid": "0" * 40})
        return self.answer({"error": f"unexpected {self.path}"}, status=500)


@pytest.fixture
def hub():
    handler = type("HubOfTest", (Hub,), {"calls": [], "repos": [], "files": {}, "blobs": {}, "tokens": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()


def train(folder: Path, *more: str, **environment: str) -> subprocess.CompletedProcess:
    program = Path(sys.executable).parent / "prune-opd"
    command = [str(program), "train", str(RECIPE), "--output-dir", str(folder), *more]
    command += [word for setting in SETTINGS for word in ("--set", setting)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_push_to_hub_uploads_the_checkpoint_with_its_card_and_no_secret(hub, tmp_path):
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }
    secret = f"data.prompt_suffix={TOKEN}"
    done = train(tmp_path / "run", "--push-to-hub", "me/student", "--set", secret, **environment)
    assert done.returncode == 0, done.stderr
    assert f"Bearer {TOKEN}" in hub.tokens
    (made,) = hub.repos
    assert made["name"] == "student" and made["organization"] == "me" and made.get("visibility", "") == "private"
    first_upload = next(i for i, call in enumerate(hub.calls) if "/preupload/" in call)
    assert hub.calls.index("POST /api/repos/create") < first_upload
    checkpoint = tmp_path / "run/checkpoints/step_2"
    ours = {"optimizer-00000.safetensors", "random_state.safetensors", "trainer_state.json", "manifest.json"}
    expected = {p.name for p in checkpoint.iterdir()} - ours
    assert set(hub.files) == expected >= {"README.md", "model.safetensors", "tokenizer.json", "config.json"}
    for name, content in hub.files.items():
        assert hashlib.sha256(content).digest() == hashlib.sha256((checkpoint / name).read_bytes()).digest(), name
        assert TOKEN.encode() not in content
    assert f"uploaded {checkpoint} to {hub.url}/me/student" in done.stdout
    assert f"report: {tmp_path / 'run/report.html'}" in done.stdout
    for name in ("README.md", "report.html"):
        assert TOKEN not in (tmp_path / "run" / name).read_text()

    card = ModelCard.load(tmp_path / "run/README.md")
    assert card.content == (checkpoint / "README.md").read_text(), "the same in both places"
    last = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()][-1]
    (result,) = card.data.eval_results
    assert result.metric_value == last["eval/accuracy"] and "step 2 of 2" in result.metric_name
    assert card.data.base_model is None, "embedded:low-student is no id of the Hub"
    assert card.data.library_name == "transformers" and "prune-opd" in card.data.tags
    text = card.text
    for expected_text in (
        "`embedded:low-student`",
        "`embedded:teacher`",
        "`task:chain_sum`",
        "2 of 2 steps",
        "γ = 0.6",
    ):
        assert expected_text in text, expected_text
    assert f"prune-opd train {RECIPE} --output-dir" in text
    assert '"learning_rate": 5e-05' in text and "torch " in text
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    saved = sum(r.get("tokens/saved", 0) for r in records)
    made_tokens = sum(r.get("tokens/generated", 0) for r in records)
    assert f"({saved:,} of {saved + made_tokens:,})" in text


def test_whoever_cannot_push_learns_it_before_training(tmp_path):
    done = train(tmp_path / "run", "--push-to-hub", "me/student", HF_TOKEN="", HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 1
    assert done.stderr.startswith("HubError: --push-to-hub needs someone who is logged in"), done.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()
    with pytest.raises(HubError, match="is no name of a repository"):
        check_repo("me/my/student")


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory as it stands after its first step, on models and data of the Hub."""
    from prune_opd.config import load_config

    config = load_config(RECIPE, SETTINGS).model_dump()
    config["model"] |= {"model_name_or_path": "Qwen/Qwen3-1.7B", "teacher_model_name_or_path": "../teacher|`x`"}
    config["data"] |= {"train": "BytedTsinghua-SIA/DAPO-Math-17k"}
    step = {"step": 1, "time/total": 3.0, "time/rollout": 1.0, "time/teacher": 0.5, "time/update": 1.0}
    step |= {"prune_opd/current_max_response_length": 9, "prune_opd/next_max_response_length": 9}
    step |= {"distillation/overlap_ratio": 0.5, "completions/eos_rate": 0.5, "loss": 1.0, "steps": 2, "eta_seconds": 3}
    step |= {f"prune_opd/effective_response_length_{of}": 9 for of in ("mean", "p90")}
    step |= {f"tokens/{name}": 100 for name in ("generated", "scored", "trained", "saved")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    return tmp_path


def test_names_of_the_hub_become_metadata_and_links(run):
    card = model_card(run)
    assert card.data.base_model == "Qwen/Qwen3-1.7B" and card.data.datasets == "BytedTsinghua-SIA/DAPO-Math-17k"
    assert "[Qwen/Qwen3-1.7B](https://huggingface.co/Qwen/Qwen3-1.7B)" in card.text
    assert "| teacher | `../teacher x ` |" in card.text, "nothing in a name ends the code span or the table's cell"
    assert "1 of 2 steps" in card.text and "Not evaluated yet" in card.text and card.data.eval_results is None
    assert "At most 50% of the tokens were not generated (100 of 200)" in card.text
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict(), "the metadata is valid YAML"


def test_the_tables_of_a_card_are_tables(run):
    """A blank line between two rows would end the table, and the Hub would show raw pipes."""
    first = {"step": 0, "eval/accuracy": 0.5, "eval/ci95": [0.4, 0.6], "eval/per_problem": [0.5, 0.5], "time/eval": 1.0}
    first |= {"eval/mean_length": 9.0, "eval/eos_rate": 1.0}
    log = run / "metrics.jsonl"
    log.write_text(json.dumps(first) + "\n" + log.read_text().strip()[:-1] + f", {json.dumps(first)[12:]}\n")
    text = model_card(run).text
    tokens = MarkdownIt().enable("table").parse(text)
    rows = [0]
    for token in tokens:
        rows += [0] * (token.type == "table_open")
        rows[-1] += token.type == "tr_open"
    assert rows[1:] == [9, 3, 5], "settings, scores, cost, each with its head"
    assert not [t for t in tokens if t.type == "inline" and t.content.startswith("|")], "raw pipes"


def test_a_long_log_takes_no_more_memory_than_a_short_one(run):
    """It is read at every checkpoint: kept whole, the log of a long run grew until it was the run's largest object."""
    log = run / "metrics.jsonl"
    step = log.read_text()

    def peak(steps: int) -> int:
        log.write_text(step * steps)
        tracemalloc.start()
        assert f"{steps} of 2 steps" in model_card(run).text
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)
    assert peak(5000) < peak(50) + 100_000
