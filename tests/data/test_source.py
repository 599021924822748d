from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prune_opd.config import DataSection
from prune_opd.data.source import held_out_prompts, training_prompts
from prune_opd.errors import DataError


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; the template writes `quiet` when thinking is switched off."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found = PreTrainedTokenizerFast(tokenizer_object=made)
    found.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking is false %} quiet{% endif %}"
    )
    return found


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"1+{i}", "answer": str(1 + i)}) + "\n" for i in range(3))
    )
    return str(tmp_path / "prompts.jsonl")


def test_variables_of_the_chat_template_reach_training_and_validation(tokenizer, file):
    plain = DataSection(train=file)
    quiet = DataSection(train=file, chat_template_kwargs={"enable_thinking": False})
    for data, ending in ((plain, {"1+0", "1+1", "1+2"}), (quiet, {"1+0 quiet", "1+1 quiet", "1+2 quiet"})):
        assert {p.text for p in training_prompts(data, tokenizer, seed=0).batch(0, 3)} == ending
        assert {p.text for p in held_out_prompts(file, data, tokenizer, count=3)} == ending


def test_each_epoch_has_every_prompt_once_and_an_order_of_its_own(tokenizer, file):
    def order(seed: int, step: int, count: int = 3) -> list[str]:
        return [p.text for p in training_prompts(DataSection(train=file), tokenizer, seed=seed).batch(step, count)]

    epochs = [order(0, step) for step in range(8)]
    assert all(sorted(epoch) == ["1+0", "1+1", "1+2"] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [text for step in range(12) for text in order(0, step, 2)] == sum(epochs, [])  # whatever the step's size
    assert [order(1, step) for step in range(8)] != epochs


def test_validation_has_a_split_of_its_own(tokenizer, tmp_path):
    """As on the Hub: problems to train on in one split, a benchmark that has a test split only in another data set."""
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "7+7", "answer": "14"}) + "\n")
    data = DataSection(train="elsewhere")  # whose split is "train"
    with pytest.raises(DataError, match="no file of split 'train'"):
        held_out_prompts(str(tmp_path), data, tokenizer, count=3)
    assert [p.text for p in held_out_prompts(str(tmp_path), data, tokenizer, count=3, split="test")] == ["7+7"]
