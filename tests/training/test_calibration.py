"""`threshold = "auto"`: what it measures, the rule, and that a run keeps what it found."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prune_opd.config import PruningSection, load_config
from prune_opd.errors import CheckpointError, ConfigError, ModelError
from prune_opd.models.loading import resolve_model
from prune_opd.rollout.base import rollout_uniforms
from prune_opd.rollout.local import LocalSampler
from prune_opd.training.calibration import candidates_along, largest_safe_threshold
from prune_opd.training.trainer import Trainer
from tests.families import EOS, PAD, tiny_model, tiny_prompts
from tests.training.test_trainer import RECIPE, SMALL, quiet, records, run

AUTO = ["pruning.threshold=auto", "pruning.w_drop=0.1"]


def test_candidates_along_a_response_are_those_of_the_model_that_wrote_it():
    model, prompts = tiny_model("qwen3"), tiny_prompts()
    rollouts = LocalSampler(model, pad_id=PAD, eos_ids=[EOS]).sample(
        prompts, rollout_uniforms(0, 0, range(len(prompts)), 9), top_k=4
    )
    seen, mask = candidates_along(model, rollouts, 4, model.config.vocab_size, token_budget=30), rollouts.response_mask
    assert torch.equal(seen.ids[mask], rollouts.student.ids[mask])
    torch.testing.assert_close(seen.logprobs[mask], rollouts.student.logprobs[mask], rtol=1e-4, atol=1e-4)


def test_the_largest_threshold_that_leaves_nine_in_ten_whole():
    """Ten responses of five tokens, K = 4, two events spend reliability: by hand."""
    compatible, mask = torch.ones(10, 5), torch.ones(10, 5, dtype=torch.bool)
    pruning = PruningSection(w_drop=0.5)
    assert largest_safe_threshold(compatible, mask, pruning, 4) == 1.0
    compatible[:2, :2] = 0.5  # two of ten would be cut by a threshold above 0.5
    assert largest_safe_threshold(compatible, mask, pruning, 4) == 0.5
    compatible[0, 0] = 1.0  # one of ten may be cut, and one event spends nothing
    assert largest_safe_threshold(compatible, mask, pruning, 4) == 1.0
    mask[:, 1:] = False
    compatible[:] = 0
    assert largest_safe_threshold(compatible, mask, pruning, 4) == 1.0, "padding is no event"
    assert largest_safe_threshold(compatible, mask, PruningSection(w_drop=1.0), 4) is None


def test_a_run_keeps_the_threshold_that_it_found(tmp_path):
    trainer = run(tmp_path / "whole", *AUTO)
    found = json.loads((tmp_path / "whole/calibration.json").read_text())
    assert json.loads((tmp_path / "whole/config.json").read_text())["pruning"]["threshold"] == found["threshold"]
    assert trainer.config.pruning.threshold == found["threshold"] and found["threshold"] * 8 % 1 == 0
    assert found["teacher_written"]["responses"] == 2 and found["teacher_written"]["whole"] >= 0.9
    first = records(tmp_path / "whole")[1]
    extra = found["student_written"]["tokens"], found["teacher_written"]["tokens"]
    trained = sum(row["tokens/generated"] for row in records(tmp_path / "whole") if row["step"] > 0)
    assert trainer.totals.student_tokens == trained + extra[0]
    assert trainer.totals.teacher_tokens == trained + sum(extra)
    run(tmp_path / "cut", *AUTO, "training.steps=2")
    run(tmp_path / "cut", *AUTO, resume="auto")
    run(tmp_path / "explicit", f"pruning.threshold={found['threshold']}", "pruning.w_drop=0.1")
    for other in ("cut", "explicit"):
        assert records(tmp_path / other, "drift.jsonl") == records(tmp_path / "whole", "drift.jsonl")
    shutil.rmtree(tmp_path / "cut/checkpoints")  # as if it had died before the first one
    (tmp_path / "cut/drift.jsonl").unlink()
    kept = (tmp_path / "cut/calibration.json").read_text()
    run(tmp_path / "cut", *AUTO, resume="auto")
    assert (tmp_path / "cut/calibration.json").read_text() == kept, "it is not measured again"
    assert records(tmp_path / "cut", "drift.jsonl") == records(tmp_path / "whole", "drift.jsonl")
    assert first["prune_opd/loss_weight_mean"] > 0
    with pytest.raises(CheckpointError, match="pruning.threshold was .*, is now 'auto'"):
        run(tmp_path / "explicit", *AUTO, "training.steps=5", resume="auto")


def test_the_student_itself_as_teacher_agrees_everywhere(tmp_path):
    same = "model.teacher_model_name_or_path=embedded:low-student"
    run(tmp_path / "run", *AUTO, same, "training.steps=1")
    found = json.loads((tmp_path / "run/calibration.json").read_text())
    assert found["threshold"] == 1.0 and found["teacher_written"]["compatibility"] == 1.0


def test_a_pair_that_never_agrees_is_an_error(tmp_path):
    """A teacher whose likeliest tokens are those that it was trained to find least likely."""
    folder = Path(shutil.copytree(resolve_model("embedded:teacher"), tmp_path / "teacher"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.neg_()
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match="found none"):
        run(
            tmp_path / "run",
            "pruning.threshold=auto",
            "pruning.w_drop=1.0",
            f"model.teacher_model_name_or_path={folder}",
        )
    assert not (tmp_path / "run").exists()


def test_a_served_teacher_is_not_asked_to_write():
    with pytest.raises(ConfigError, match="a served one is not asked to"):
        load_config(RECIPE, ["pruning.threshold=auto", "model.teacher_model_server_url=http://localhost:8000"])


def test_plain_opd_calibrates_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = load_config(RECIPE, [*SMALL, "pruning.threshold=auto", "pruning.enable=false"])
    trainer = Trainer(config, tmp_path, console=quiet())
    assert trainer.config.pruning.threshold == 0.7 and not (tmp_path / "calibration.json").exists()
