"""When the vLLM sampler is refused, before the first step; what it does is in tests/engines."""

from __future__ import annotations

import importlib.util

import pytest

from prune_opd.config import load_config
from prune_opd.errors import EngineError
from prune_opd.models.loading import load_student, load_tokenizer, resolve_device
from prune_opd.training.build import build_sampler
from prune_opd.training.trainer import Trainer


def built(quickstart, **kwargs):
    config = load_config(quickstart, ["rollout.use_vllm=true"])
    student = load_student(config, resolve_device("cpu"))
    return build_sampler(
        config, student, load_tokenizer("embedded:low-student", config.model), max_model_len=400, **kwargs
    )


@pytest.fixture
def quickstart(pytestconfig):
    return pytestconfig.rootpath / "recipes" / "quickstart.toml"


def test_with_a_student_that_has_more_ids_than_the_teacher(quickstart):
    with pytest.raises(EngineError, match="the student has 149 ids and the teacher 140"):
        built(quickstart, vocab_size=140)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_nothing_is_written(quickstart, tmp_path):
    with pytest.raises(EngineError, match="make setup-vllm"):
        Trainer(load_config(quickstart, ["rollout.use_vllm=true"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
