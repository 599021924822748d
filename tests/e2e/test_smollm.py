"""Prune-OPD on a real language model: the pair is what it claims to be, and the recipe trains on it."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from prune_opd import Trainer, load_config
from prune_opd.config import ModelSection
from prune_opd.data.worked import worked_problems
from prune_opd.evaluation.graders import grade
from prune_opd.models.loading import end_ids, load_model, load_student, resolve_model
from prune_opd.models.loading import load_tokenizer as load_tokenizer_of
from prune_opd.rollout.base import rollout_uniforms
from prune_opd.rollout.local import LocalSampler
from prune_opd.training.calibration import candidates_along
from prune_opd.types import Rollouts

ROOT = Path(__file__).parents[2]
ADAPTERS = ("teacher", "student", "student-high")


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_smollm_pair", ROOT / "scripts" / "make_smollm_pair.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = _script()
missing = script.missing_packages()
with_base = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed: make setup-smollm"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A working directory in which the base was made: half a gigabyte, so it goes when the tests are done."""
    folder = tmp_path_factory.mktemp("smollm")
    script.make_base(folder / "build" / "smollm")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def here(root, monkeypatch):
    """As after `make setup-smollm`, in the root of a repository."""
    monkeypatch.chdir(root)


@pytest.fixture(scope="module")
def base(root) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(root / script.BASE).eval()


@pytest.fixture(scope="module")
def tokenizer(root):
    return AutoTokenizer.from_pretrained(root / script.BASE)


def adapted(name: str):
    section = ModelSection(model_name_or_path=name, teacher_model_name_or_path=name)
    return load_model(name, section, dtype="float32", device=torch.device("cpu")).eval()


def respond(model, tokenizer, questions, *, max_tokens, eos_ids=None, temperature=1.0) -> Rollouts:
    sampler = LocalSampler(
        model,
        pad_id=tokenizer.pad_token_id,
        eos_ids=eos_ids or end_ids(model.generation_config, tokenizer),
    )
    prompts = [script.encode_chat(tokenizer, question) for question in questions]
    uniforms = rollout_uniforms(0, 0, range(len(prompts)), max_tokens)
    with torch.no_grad():
        return sampler.sample(prompts, uniforms, temperature=temperature, top_k=16)


@torch.inference_mode()
def logits(model, tokenizer, text="The capital of France is Paris.\n\n1. It has 37 bridges."):
    return model(**tokenizer(text, return_tensors="pt"), use_cache=False).logits


@pytest.fixture(scope="module")
def problems():
    return list(islice(worked_problems("running_sum", "held_out", 7), 4))


@pytest.fixture(scope="module")
def by_teacher(root, tokenizer, problems):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        teacher = adapted("embedded:smollm/teacher")
    return respond(teacher, tokenizer, [p.question for p in problems], max_tokens=160)


# ---- what is committed ----


def test_the_adapters_are_small_and_name_the_base_that_everyone_makes():
    folders = [Path(resolve_model(f"embedded:smollm/{name}")) for name in ADAPTERS]
    assert sum(file.stat().st_size for folder in folders for file in folder.iterdir()) <= 8e6
    for folder in folders:
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == script.BASE
        with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
            assert {weights.get_tensor(key).dtype for key in weights.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_the_facts_are_printed_again(capsys):
    script.print_facts(json.loads((script.ASSETS / "facts.json").read_text()))
    printed = capsys.readouterr().out
    assert printed.strip() in (ROOT / "docs" / "smollm-pair.md").read_text()


# ---- the base ----


class TestBase:
    pytestmark = with_base

    def test_it_is_the_network_of_the_gguf_file(self, base, tokenizer):
        loaded = script.load_gguf(script.gguf_file())
        torch.testing.assert_close(logits(base, tokenizer), logits(loaded, tokenizer), rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("question", "answer"), [("What is the capital of France?", "Paris"), ("What is 2 + 3?", "5")]
    )
    def test_it_answers_and_ends_its_turn(self, base, tokenizer, question, answer):
        """Wrongly read weights (say, rotary dimensions in llama.cpp's order) would answer nothing of sense."""
        said = respond(base, tokenizer, [question], max_tokens=24, temperature=0)
        ids = said.response_ids[0, : said.lengths[0]].tolist()
        assert answer in tokenizer.decode(ids)
        assert ids[-1] == tokenizer.eos_token_id == base.generation_config.eos_token_id

    def test_its_tokenizer_gives_every_text_back_and_cuts_out_digits(self, tokenizer):
        for text in (
            "Let's see:\n\n1. 12 + 345 = 357,  so \\boxed{357}.\n\n\n\tDone ",
            "naïve 漢字 🙂\u00a0 ٣ \r\n  x",
            "<|im_start|>user\nhi<|im_end|>\n",
        ):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        # As SmolLM was trained; GPT-2's rule, which transformers assumes of a GGUF file, gives two line breaks and a
        # digit.
        assert tokenizer.convert_ids_to_tokens(tokenizer("a:\n\n12")["input_ids"]) == ["a", ":", "ĊĊ", "1", "2"]


# ---- the pair ----


class TestPair:
    pytestmark = with_base

    def test_the_teacher_solves_and_ends_and_the_compatible_student_agrees(self, here, tokenizer, problems, by_teacher):
        texts = tokenizer.batch_decode(by_teacher.response_ids, skip_special_tokens=True)
        assert sum(grade(text, p.answer) for text, p in zip(texts, problems, strict=True)) >= 3
        assert by_teacher.finished.all()
        seen = candidates_along(adapted("embedded:smollm/student-high"), by_teacher, 16, 49_152)
        assert by_teacher.student is not None
        same = (seen.ids[..., 0] == by_teacher.student.ids[..., 0])[by_teacher.response_mask]
        assert same.double().mean() > 0.9

    def test_the_student_goes_on_where_the_teacher_has_ended(self, here, tokenizer, problems, by_teacher):
        student = adapted("embedded:smollm/student")
        longest = int(by_teacher.lengths[0]) + 20
        assert not respond(student, tokenizer, [problems[0].question], max_tokens=longest).finished.any()

    def test_a_rollout_decoded_and_encoded_again_is_the_same_ids(self, tokenizer, by_teacher):
        """With the prompt in front, as a server or a second tokenizer would read it."""
        for prompt, ids, length in zip(by_teacher.prompts, by_teacher.response_ids, by_teacher.lengths, strict=True):
            whole = [*prompt, *ids[:length].tolist()]
            assert tokenizer(tokenizer.decode(whole))["input_ids"] == whole

    def test_the_end_token_is_learnt_and_padding_with_it_is_not(self, tokenizer, by_teacher):
        """<|im_end|> ends a turn, pads, and stands in every prompt: only places tell which it is."""
        end = tokenizer.eos_token_id
        assert tokenizer.pad_token_id == end
        lengths = by_teacher.lengths
        assert lengths.unique().numel() > 1, "rows of one length would need no padding"
        for prompt, ids, mask, length in zip(
            by_teacher.prompts, by_teacher.response_ids, by_teacher.response_mask, lengths, strict=True
        ):
            assert end in prompt
            assert ids[mask].tolist().index(end) == length - 1  # the last target, and no target before it
            assert set(ids[~mask].tolist()) <= {end}

    def test_all_end_tokens_of_the_generation_config_end_a_response(self, here, tokenizer, problems, by_teacher):
        """Say, a full stop: responses are those of before up to their first one, which is kept."""
        teacher = adapted("embedded:smollm/teacher")
        (stop,) = tokenizer(".")["input_ids"]
        teacher.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, stop])
        assert end_ids(teacher.generation_config, tokenizer) == sorted([tokenizer.eos_token_id, stop])
        shorter = respond(teacher, tokenizer, [p.question for p in problems], max_tokens=160)
        assert shorter.finished.all()
        for ids, length, before in zip(shorter.response_ids, shorter.lengths, by_teacher.response_ids, strict=True):
            first = before.tolist().index(stop) + 1
            assert ids[:length].tolist() == before[:first].tolist()


class TestRecipes:
    pytestmark = with_base

    @pytest.mark.parametrize("name", ["smollm", "smollm-high"])
    def test_two_steps(self, here, tmp_path, name):
        config = load_config(
            ROOT / "recipes" / f"{name}.toml",
            [
                "rollout.prompts_per_step=1",
                "rollout.num_generations=2",
                "training.steps=1" if name == "smollm-high" else "training.steps=2",
                "training.save_every=2",
                "rollout.max_completion_length=24",
                "pruning.dynamic_response_length.init_len=16",
                "pruning.dynamic_response_length.min_len=16",
                "pruning.dynamic_response_length.max_len=24",
                "evaluation.num_problems=1",
                "evaluation.k=1",
                "evaluation.max_tokens=4",
            ],
        )
        trainer = Trainer(config, tmp_path / "run")
        trainer.train()
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if "loss" in record]
        assert len(records) == config.training.steps
        for record in records:
            assert math.isfinite(record["loss"]) and record["grad_norm"] > 0
            assert 0.3 < record["distillation/overlap_ratio"] <= 1

    def test_all_weights_instead_of_an_adapter(self, here):
        config = load_config(ROOT / "recipes" / "smollm.toml", ["model.lora=false"])
        student = load_student(config, torch.device("cpu"))
        assert sum(p.numel() for p in student.parameters() if p.requires_grad) > 130e6
        assert load_tokenizer_of(config.model.model_name_or_path, config.model).chat_template
