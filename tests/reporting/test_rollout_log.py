"""What rollouts.jsonl says of a rollout, against the step that made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prune_opd.config import TrackingSection, load_config
from prune_opd.reporting.rollout_log import rollout_record, token_text
from prune_opd.training import trainer as trainer_module
from prune_opd.training.trainer import Trainer

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
SETTINGS = [
    "training.steps=1",
    "rollout.prompts_per_step=2",
    "rollout.num_generations=2",
    "evaluation.data=task:chain_sum",
]
SETTINGS += ["evaluation.num_problems=1", "evaluation.k=1", "evaluation.max_tokens=8"]


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """(trainer, StepResult) of one real step."""
    results = []
    patch = pytest.MonkeyPatch()
    real = trainer_module.prune_opd_step

    def spy(*arguments):
        results.append(real(*arguments))
        return results[-1]

    patch.setattr(trainer_module, "prune_opd_step", spy)
    trainer = Trainer(load_config(RECIPE, SETTINGS), tmp_path_factory.mktemp("step") / "run")
    trainer.train()
    patch.undo()
    return trainer, results[0]


def record_of(step, row, **tracking):
    trainer, result = step
    prompt = trainer.parts.prompts.batch(0, 2)[row // 2]
    return rollout_record(result, row, prompt, trainer.parts.tokenizer, TrackingSection(**tracking))


def test_a_record_is_what_the_step_saw(step):
    _, result = step
    record = record_of(step, 3, rollout_candidates=4)
    n = record["length"]
    assert record["token_ids"] == result.rollouts.response_ids[3, :n].tolist()
    assert record["weight"] == pytest.approx(result.weight[3, :n].tolist(), abs=5e-4)
    assert record["events"] == [t for t in range(n) if result.events[3, t]]
    assert record["teacher_logprob"] == pytest.approx(result.scores.sampled_logprobs[3, :n].tolist(), abs=5e-3)
    for name, topk in (("student", result.rollouts.student), ("teacher", result.scores.topk)):
        assert record[name]["ids"] == topk.ids[3, :n, :4].tolist()
        assert torch.allclose(torch.tensor(record[name]["logprobs"]), topk.logprobs[3, :n, :4], atol=5.1e-3)
    t = record["events"][0]
    both = set(result.rollouts.student.ids[3, t].tolist()) & set(result.scores.topk.ids[3, t].tolist())
    assert record["shared"][t] == len(both)
    assert record == json.loads(json.dumps(record, allow_nan=False))


def test_its_size_is_bounded_by_the_settings(step):
    record = record_of(step, 0, rollout_tokens=7, rollout_candidates=2)
    for values in (record["token_ids"], record["weight"], record["shared"], record["student"]["ids"]):
        assert len(values) == 7 < record["length"]
    assert all(len(ids) == 2 for ids in record["teacher"]["ids"]) and len(record["texts"]) <= 7 * 5
    assert record_of(step, 0, rollout_tokens=0)["token_ids"] == []


def test_texts_of_the_tokens_make_the_response(step):
    record = record_of(step, 1)
    assert "".join(record["texts"][str(v)] for v in record["token_ids"]).split() == record["response"].split()


@pytest.mark.parametrize(
    ("decoder", "vocabulary", "token", "text"),
    [
        (decoders.Metaspace(), {"▁the": 0, "re": 1}, "▁the", " the"),
        (decoders.Metaspace(), {"▁the": 0, "re": 1}, "re", "re"),
        (decoders.ByteLevel(), {"Ġthe": 0, "re": 1}, "Ġthe", " the"),
        (decoders.ByteLevel(), {"Ċ": 0, "ä": 1}, "Ċ", "\n"),
        (decoders.ByteLevel(), {"Ċ": 0, "ä": 1}, "ä", "\ufffd"),
    ],
)
def test_the_text_of_a_token_keeps_its_space(decoder, vocabulary, token, text):
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoder
    assert token_text(PreTrainedTokenizerFast(tokenizer_object=tokenizer), vocabulary[token]) == text
