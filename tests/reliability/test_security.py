"""No code from files unless the recipe asks for it, no path out of where it belongs, no key in what a run writes."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prune_opd.config import ModelSection, load_config
from prune_opd.errors import ConfigError, ModelError, PruneOPDError
from prune_opd.models.loading import load_model, load_tokenizer, resolve_device, resolve_model

from .kills import RECIPE, SMALL
from .test_malformed import Hostile

SRC = Path(__file__).parents[2] / "src"


def copy_of_student(folder: Path) -> Path:
    shutil.copytree(resolve_model("embedded:low-student"), folder)
    return folder


def settings(name, **more) -> ModelSection:
    return ModelSection(model_name_or_path=str(name), teacher_model_name_or_path=str(name), **more)


def load(name, **more):
    return load_model(str(name), settings(name, **more), dtype="float32", device=resolve_device("cpu"))


def test_weights_as_a_pickle_are_not_loaded(tmp_path):
    student = copy_of_student(tmp_path / "student")
    (student / "model.safetensors").unlink()
    (student / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(str(tmp_path / "trap"))))
    with pytest.raises(ModelError, match="safetensors"):
        load(student)
    assert not (tmp_path / "trap").exists()


@pytest.fixture
def with_code(tmp_path):
    """A model whose config names code of its own, which makes a file when it is imported."""
    student = copy_of_student(tmp_path / "student")
    config = json.loads((student / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (student / "config.json").write_text(json.dumps(config))
    (student / "own.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return student


def test_code_of_a_model_does_not_run_unless_asked_for(tmp_path, with_code):
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(with_code)
    assert not (tmp_path / "ran").exists()


def test_code_that_was_asked_for_is_named_in_the_log_before_it_runs(tmp_path, with_code, caplog, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    seen = []
    monkeypatch.setattr(
        "prune_opd.models.loading.log.warning",
        lambda text, name: seen.append((text, name, (tmp_path / "ran").exists())),
    )
    with contextlib.suppress(PruneOPDError):  # what it does is its own affair
        load(with_code, trust_remote_code=True)
    assert (tmp_path / "ran").exists(), "the test's code must run for the test to mean anything"
    ((text, name, ran),) = seen
    assert "trust_remote_code is on" in text and name == str(with_code) and not ran


def test_code_of_a_tokenizer_is_named_too(caplog):
    name = resolve_model("embedded:low-student")
    load_tokenizer(name, settings(name))
    assert not caplog.records
    load_tokenizer(name, settings(name, trust_remote_code=True))
    assert [name in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("name", ["../../..", "../assets/teacher", "/etc", "teacher/../teacher", "", ".", "x\0y"])
def test_an_embedded_name_stays_among_the_assets(name):
    with pytest.raises(ModelError, match="no embedded model"):
        resolve_model(f"embedded:{name}")


SECRETS = {
    "Hub token": "hf_" + "aB3" * 10,
    "key": "sk-" + "aB3" * 10,
    "project key": "sk-proj-" + "aB3" * 10,
    "GitHub token": "ghp_" + "aB3" * 12,
    "URL with a password": "https://me:p4ss@host/v1",
    "URL with a token": "https://:tok3n@host/v1",
    "cloud key": "AKIA" + "A1B2" * 4,
    "bearer": "Bearer abcdefghijkl",
}


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("name", ["data.train", "model.model_name_or_path", "data.chat_template_kwargs.x"])
def test_a_recipe_holds_no_secret(kind, name):
    with pytest.raises(ConfigError, match="environment variable") as caught:
        load_config(RECIPE, [f"{name}={SECRETS[kind]}"])
    assert SECRETS[kind] not in str(caught.value)


def test_ordinary_names_are_no_secrets():
    for text in (
        "org/sk-model",
        "https://host:8000/v1",
        "hf_small",
        "s3://bucket/x",
        "a@b",
        "C:/x@y",
        "sk-learn/digits",
    ):
        assert load_config(RECIPE, [f"model.model_name_or_path={text}"]).model.model_name_or_path == text


def test_nothing_of_the_environment_is_written_by_a_run(tmp_path):
    """Keys of the services that a run may talk to, in the environment as they should be, in none of its files."""
    keys = {name: f"{name.lower()}-s3cr3t-value" for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY")}
    code = "from prune_opd.cli import main; main()"
    few = [*SMALL, "training.steps=1", "evaluation.num_problems=1"]
    command = [sys.executable, "-c", code, "train", str(RECIPE), "--output-dir", str(tmp_path / "run")]
    command += [part for setting in few for part in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | keys)
    assert done.returncode == 0, done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    for text in (done.stdout.encode(), done.stderr.encode(), *(path.read_bytes() for path in files)):
        assert b"s3cr3t" not in text


def test_no_pickle_is_loaded_anywhere_in_the_package():
    """Nor anything of torch that reads by pickle."""
    for path in SRC.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"torch\.load\(|distributed\.checkpoint|torch\.hub|jit\.load", text), path
        assert not re.search(r"\b(pickle|dill|joblib|cloudpickle)\.loads?\(|allow_pickle=True|\byaml\.load\(", text), (
            path
        )
        assert not re.search(r"(?<![\w.])(eval|exec)\(|shell=True|os\.system\(", text.replace(".eval()", "")), path
