"""What `prune-opd doctor` says of recipes that are sound, and of each way in which they are not."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from prune_opd.cli import app
from prune_opd.config import load_config
from prune_opd.models.loading import resolve_model
from prune_opd.preflight import doctor
from prune_opd.preflight.doctor import examine
from tests.openai_server import serving
from tests.training.test_trainer import RECIPE, SMALL

SAME = ["model.teacher_model_name_or_path=embedded:low-student"]


def findings(*settings, prompts=0):
    """{subject: (status, text)} of the small recipe; two checks of one subject are joined by the worse."""
    told = []
    sound = examine(load_config(RECIPE, [*SMALL, *settings]), probe_prompts=prompts, tell=told.append)
    assert sound == all(finding.status != "failed" for finding in told)
    order = ("ok", "skipped", "warning", "failed")
    told.sort(key=lambda finding: order.index(finding.status))
    return {finding.subject: (finding.status, finding.text) for finding in told}


def copy_of(name, folder) -> Path:
    return Path(shutil.copytree(resolve_model(f"embedded:{name}"), folder))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_sound_recipe_loads_no_weights_without_a_probe(monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    found = findings()
    assert {status for status, _ in found.values()} == {"ok"}
    assert "149 tokens" in found["tokenizers"][1] and "'Q a " in found["prompts"][1]
    assert "probe" not in found and not any("agreement" in subject for subject in found)


def test_the_probe_tells_a_pair_that_agrees_from_one_that_does_not():
    """The student as its own teacher agrees everywhere, so there is nothing to save in flight."""
    same, low = findings(*SAME, prompts=2), findings(prompts=2)
    assert "overlap 1.000" in same["agreement, student's text"][1]
    assert "overlap 1.000" in same["agreement, teacher's text"][1]
    assert "0.0% of the student's tokens are drift events" in same["saving to expect"][1]
    assert "0% by in_flight" in same["saving to expect"][1]
    assert float(re.search(r"overlap ([\d.]+)", low["agreement, student's text"][1])[1]) < 0.9
    assert float(re.match(r"([\d.]+)%", low["saving to expect"][1])[1]) > 5


def test_a_probe_compiles_nothing(monkeypatch):
    for module in ("rollout.local", "teachers.local"):
        monkeypatch.setattr(f"prune_opd.{module}.compiled", lambda _: pytest.fail("compiled"))
    assert "agreement, student's text" in findings("model.compile=true", prompts=1)


def test_a_threshold_that_cuts_the_teachers_own_text_is_named():
    status, text = findings("pruning.threshold=1.0", "pruning.w_drop=0.5", prompts=2)["threshold"]
    assert status == "warning" and "leaves 0% of the teacher's own" in text
    assert "would be" in findings("pruning.threshold=auto", prompts=2)["threshold"][1]


@pytest.mark.filterwarnings("ignore:.*no effect")
def test_without_pruning_there_is_nothing_to_save():
    found = findings("pruning.enable=false", prompts=2)
    assert "saving to expect" not in found and "agreement, student's text" in found


def test_another_token_map_fails_and_what_needs_it_is_skipped(tmp_path):
    folder = copy_of("teacher", tmp_path / "teacher")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    found = findings(f"model.teacher_model_name_or_path={folder}", prompts=2)
    assert found["tokenizers"][0] == "failed" and "different token maps" in found["tokenizers"][1]
    assert found["probe"][0] == found["prompts"][0] == "skipped" and found["positions"][0] == "ok"


def test_ends_and_chat_templates_that_differ_are_worth_a_look(tmp_path):
    folder = copy_of("teacher", tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    other = next(t for t in tokenizer.get_vocab() if t != tokenizer.eos_token)
    edit(folder / "tokenizer_config.json", eos_token=other)
    edit(folder / "generation_config.json", eos_token_id=tokenizer.convert_tokens_to_ids(other))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    found = findings(f"model.teacher_model_name_or_path={folder}")
    assert found["end of a response"][0] == "ok" and "count as one action" in found["end of a response"][1]
    apart = findings(f"model.teacher_model_name_or_path={folder}", "data.end_tokens=distinct")["end of a response"]
    assert apart[0] == "warning" and repr(other) in apart[1] and "unlearns to end" in apart[1]
    assert found["chat template"][0] == "warning" and "the student has none" in found["chat template"][1]


def test_too_few_positions_and_too_little_memory_fail_before_anything_is_loaded(monkeypatch):
    found = findings("evaluation.max_tokens=600", prompts=2)
    assert found["positions"][0] == "failed" and "has 512 positions" in found["positions"][1]
    assert found["probe"][0] == "skipped"
    monkeypatch.setattr(doctor, "_device_bytes", lambda device: 2**20)
    found = findings(prompts=2)
    assert found["memory"][0] == "failed" and "cpu has 1.0 MiB" in found["memory"][1]
    assert found["probe"][0] == "skipped"
    assert findings("training.parallel=fsdp2", prompts=2)["memory"][0] == "warning", "a share of it may fit"


def test_on_a_gpu_the_memory_that_vllm_takes_is_counted(monkeypatch):
    """Its share is of the device, so this small recipe fits or not by `vllm_gpu_memory_utilization` alone."""
    monkeypatch.setattr(doctor.models, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(doctor, "_device_bytes", lambda device: 80 * 10**9)
    vllm = ["rollout.use_vllm=true", "rollout.vllm_gpu_memory_utilization"]
    status, text = findings(vllm[0], f"{vllm[1]}=0.5")["memory"]
    assert status == "ok" and "about 39.3 GiB" in text, "half of 74.5 GiB, 2 GiB for CUDA and the small models"
    assert findings(vllm[0], f"{vllm[1]}=1.0")["memory"][0] == "failed"


def test_the_limits_of_a_server_are_found():
    folder = resolve_model("embedded:teacher")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with serving(model, tokenizer, name="embedded:teacher", max_logprobs=10) as server:
        served = [f"model.teacher_model_server_url={server.url}", "model.teacher_server.top_logprobs=10"]
        found = findings(*served, prompts=2)
        assert "list their 10 likeliest tokens" in found["teacher's answers"][1]
        assert "agreement, student's text" in found and "threshold" not in found
        found = findings(*served, "model.teacher_server.top_logprobs=12", prompts=2)
        assert found["probe"][0] == "failed" and "greater than max allowed: 10" in found["probe"][1]


def test_the_exit_code_says_whether_it_can_run():
    settings = [part for setting in SMALL for part in ("--set", setting)]
    good = CliRunner().invoke(app, ["doctor", str(RECIPE), *settings, "--prompts", "0"])
    assert good.exit_code == 0 and "ok tokenizers: 149 tokens" in good.output
    too_long = ["--set", "evaluation.max_tokens=600"]
    bad = CliRunner().invoke(app, ["doctor", str(RECIPE), *settings, *too_long, "--prompts", "0"])
    assert bad.exit_code == 1 and "FAILED positions" in bad.output


@pytest.mark.parametrize(
    ("settings", "subject"),
    [
        (["model.teacher_model_server_url"], "teacher's servers"),
        (["rollout.use_vllm=true", "rollout.vllm_server_url"], "student's servers"),
    ],
)
def test_a_server_that_is_not_there_fails_without_the_recipes_patience(monkeypatch, settings, subject):
    """The recipe would wait for 100,000 seconds; the test ends long before."""
    monkeypatch.setattr(doctor, "SERVER_SECONDS", 0.5)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        *more, url = settings
        patience = ["model.teacher_server.deadline=1e5", "rollout.vllm_server.deadline=1e5"]
        found = findings(*more, f"{url}={address}", *patience, prompts=2)
    assert found[subject][0] == "failed" and "connection refused" in found[subject][1]
    assert found["probe"][0] == "skipped"
