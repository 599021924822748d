"""Prune-OPD on a real language model: the pair is what it claims to be, and the recipe trains on it."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from prune_opd import Trainer, load_config

ROOT = Path(__file__).parents[2]


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_smollm_pair", ROOT / "scripts" / "make_smollm_pair.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = _script()
missing = script.missing_packages()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed: make setup-smollm"),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder with teacher, student and prompts; a gigabyte, so it goes when the tests are done."""
    folder = tmp_path_factory.mktemp("smollm")
    script.make_pair(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def teacher(pair) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(pair / "teacher").eval()


@pytest.fixture(scope="module")
def tokenizer(pair):
    return AutoTokenizer.from_pretrained(pair / "teacher")


@torch.inference_mode()
def logits(model, tokenizer, text="The capital of France is Paris.\n\n1. It has 37 bridges."):
    return model(**tokenizer(text, return_tensors="pt"), use_cache=False).logits


def test_teacher_is_the_network_of_the_gguf_file(teacher, tokenizer):
    loaded = script.load_gguf(script.gguf_file())
    torch.testing.assert_close(logits(teacher, tokenizer), logits(loaded, tokenizer), rtol=0, atol=0)


@pytest.mark.parametrize(("question", "answer"), [("What is the capital of France?", "Paris"), ("What is 2 + 3?", "5")])
def test_teacher_answers_and_ends_its_turn(teacher, tokenizer, question, answer):
    """Wrongly read weights (say, rotary dimensions in llama.cpp's order) would answer nothing of sense."""
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = teacher.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    text = tokenizer.decode(said)
    assert answer in text
    assert text.endswith("<|im_end|>")
    assert said[-1] == tokenizer.eos_token_id == teacher.generation_config.eos_token_id


def test_student_is_the_teacher_without_ten_layers(pair, teacher, tokenizer):
    student = LlamaForCausalLM.from_pretrained(pair / "student").eval()
    assert len(student.model.layers) == student.config.num_hidden_layers == 20
    removed, layers = set(range(10, 20)), teacher.model.layers
    whole = logits(teacher, tokenizer)
    teacher.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i not in removed)
    try:
        cut = logits(teacher, tokenizer)
    finally:
        teacher.model.layers = layers
    torch.testing.assert_close(logits(student, tokenizer), cut, rtol=0, atol=0)
    assert not torch.allclose(cut, whole, atol=1.0)


def test_tokenizer_gives_every_text_back_and_cuts_out_digits(pair, tokenizer):
    for text in (
        "Let's see:\n\n1. 12 + 345 = 357,  so \\boxed{357}.\n\n\n\tDone ",
        "naïve 漢字 🙂\u00a0 ٣ \r\n  x",
        "<|im_start|>user\nhi<|im_end|>\n",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # As SmolLM was trained; GPT-2's rule, which transformers assumes of a GGUF file, gives two line breaks and a digit.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a:\n\n12")["input_ids"]) == ["a", ":", "ĊĊ", "1", "2"]
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(pair / "student").get_vocab()
    assert tokenizer.pad_token_id is not None


def test_prompts_have_right_answers_and_held_out_ones_are_new(pair):
    train, held_out = (
        [json.loads(line) for line in (pair / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out")
    )
    for rows in (train, held_out):
        assert len({row["prompt"] for row in rows}) == len(rows)
        tasks = [row["task"] for row in rows]
        assert min(tasks.count("gsm_symbolic"), tasks.count("chain_sum")) > len(rows) / 3
        for row in rows:
            float(row["answer"])
            if row["task"] == "chain_sum":
                (problem,) = re.findall(r": ([\d +-]+) =$", row["prompt"])
                terms = re.findall(r"([+-]?)(\d+)", problem.replace(" ", ""))
                assert int(row["answer"]) == sum(int(sign + digits) for sign, digits in terms)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


def test_the_recipe_trains_and_drift_steers_its_window(pair, tmp_path):
    config = load_config(
        ROOT / "recipes" / "smollm.toml",
        [
            f'model.model_name_or_path="{pair / "student"}"',
            f'model.teacher_model_name_or_path="{pair / "teacher"}"',
            f'data.train="{pair / "train.jsonl"}"',
            "rollout.prompts_per_step=1",
        ],
    )
    trainer = Trainer(config, tmp_path / "run")
    before = {
        name: weight.detach().clone() for name, weight in trainer.parts.student.named_parameters() if ".5." in name
    }
    trainer.train()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        assert math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])
        assert 0 < record["distillation/overlap_ratio"] <= 1
    windows = [record["prune_opd/current_max_response_length"] for record in records]
    assert windows[0] < windows[1]  # fewer tokens than it takes to drift away: it grows
    # Twenty events end a rollout's reliability, and this student drifts at nearly every token.
    assert records[-1]["prune_opd/effective_response_length_min"] < windows[-1]
    assert records[-1]["prune_opd/loss_weight_mean"] < records[0]["prune_opd/loss_weight_mean"]
    for name, weight in trainer.parts.student.named_parameters():
        if name in before:
            assert not torch.equal(weight, before[name]), name
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # over a gigabyte
