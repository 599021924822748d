"""A peft adapter wherever a model is named (teacher, student, under a new adapter, over another one), and attention."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prune_opd.config import ModelSection, load_config, with_settings
from prune_opd.errors import ModelError
from prune_opd.models.loading import (
    adapters_of,
    find_adapter,
    load_model,
    load_student,
    load_tokenizer,
    plain_model,
    read_model_config,
    resolve_model,
)
from prune_opd.training.trainer import Trainer
from tests.families import tiny_model

BASE = "embedded:low-student"
CPU = torch.device("cpu")
IDS = torch.tensor([[3, 9, 11, 4, 8, 17]])


def settings(name) -> ModelSection:
    return ModelSection(model_name_or_path=str(name), teacher_model_name_or_path=str(name))


def load(name):
    return load_model(str(name), settings(name), dtype="float32", device=CPU)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


def make_adapter(folder, *, base=BASE, seed=0, settings=None):
    """An adapter that is not zero, as peft saves it, with `base` as its base."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(resolve_model(BASE), dtype=torch.float32)
    settings = settings or LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, settings)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path):
    return make_adapter(tmp_path / "adapter")


def by_hand(folder):
    """Logits of the base with W + alpha/r · B A, from the file alone."""
    model = AutoModelForCausalLM.from_pretrained(resolve_model(BASE), dtype=torch.float32)
    weights, scale = load_file(folder / "adapter_model.safetensors"), 8 / 2
    for name, a in weights.items():
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_submodule(module).weight.data += scale * weights[name.replace("lora_A", "lora_B")] @ a
    return logits(model)


def test_an_adapter_is_loaded_as_its_base_with_it_merged(adapter):
    model = load(adapter)
    assert type(model) is type(load(BASE)) and not hasattr(model, "peft_config")
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in load(BASE).named_parameters()]
    torch.testing.assert_close(logits(model), by_hand(adapter))
    assert not torch.allclose(logits(model), logits(load(BASE)), atol=0.1)
    assert model.generation_config.eos_token_id == load(BASE).generation_config.eos_token_id


def test_what_is_not_an_adapter_is_none():
    assert find_adapter(BASE) is None
    assert adapters_of(BASE) == (BASE, [])
    assert plain_model(BASE) == resolve_model(BASE)


def test_tokenizer_and_config_are_those_of_the_base_unless_the_adapter_has_a_tokenizer(adapter):
    of_base = load_tokenizer(BASE, settings(BASE))
    assert load_tokenizer(str(adapter), settings(adapter)).get_vocab() == of_base.get_vocab()
    assert read_model_config(str(adapter), settings(adapter)).hidden_size == load(BASE).config.hidden_size
    of_base.add_special_tokens({"eos_token": "so"})
    of_base.save_pretrained(adapter)
    assert load_tokenizer(str(adapter), settings(adapter)).eos_token == "so"


def recipe(pytestconfig, adapter, *more):
    return load_config(
        pytestconfig.rootpath / "recipes" / "quickstart.toml",
        [
            f'model.model_name_or_path="{adapter}"',
            f'model.teacher_model_name_or_path="{adapter}"',
            "training.steps=1",
            "rollout.prompts_per_step=1",
            "rollout.num_generations=2",
            "rollout.max_completion_length=12",
            "pruning.enable=false",
            "evaluation.num_problems=1",
            "evaluation.k=1",
            "evaluation.max_tokens=4",
            *more,
        ],
    )


def test_student_and_teacher_that_are_the_same_adapter_agree_and_all_weights_train(pytestconfig, adapter, tmp_path):
    trainer = Trainer(recipe(pytestconfig, adapter), tmp_path / "run")
    assert all(p.requires_grad for p in trainer.parts.student.parameters())
    torch.testing.assert_close(logits(trainer.parts.student), by_hand(adapter))
    torch.testing.assert_close(logits(trainer.run.teacher.model), by_hand(adapter))
    trainer.train()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["distillation/overlap_ratio"] for r in records if "distillation/overlap_ratio" in r] == [1]
    checkpoint = tmp_path / "run" / "checkpoints" / "step_1"
    assert find_adapter(str(checkpoint)) is None  # a model on its own
    torch.testing.assert_close(logits(load(checkpoint)), logits(trainer.parts.student))


def test_a_new_adapter_over_a_student_that_is_one(pytestconfig, adapter, tmp_path):
    """The first is merged and frozen, the second trains; its checkpoint names the first, so that both are found."""
    config = recipe(pytestconfig, adapter, "model.lora={r=2}", "training.learning_rate=0.1")
    student = load_student(config, CPU)
    assert isinstance(student, PeftModel)
    assert {name.split(".")[-3] for name, p in student.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    torch.testing.assert_close(logits(student), by_hand(adapter))  # the new one is zero

    other = make_adapter(tmp_path / "other", seed=1)
    config = with_settings(config, **{"model.teacher_model_name_or_path": str(other)})
    trainer = Trainer(config, tmp_path / "run")
    trainer.train()
    trained = logits(trainer.parts.student)
    assert not torch.allclose(trained, by_hand(adapter), atol=1e-3)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_1"
    assert [a.folder for a in adapters_of(str(checkpoint))[1]] == [adapter, checkpoint]
    torch.testing.assert_close(logits(load(checkpoint)), trained, rtol=1e-4, atol=1e-4)


def change(adapter, **entries):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_a_base_that_is_not_there(adapter):
    change(adapter, base_model_name_or_path="build/no/where")
    with pytest.raises(ModelError, match=r"is an adapter, and its base model 'build/no/where' cannot be loaded"):
        load(adapter)


def test_no_base_named(adapter):
    change(adapter, base_model_name_or_path=None)
    with pytest.raises(ModelError, match="does not say which model it belongs to"):
        load(adapter)


def test_adapters_in_a_circle(adapter):
    change(adapter, base_model_name_or_path=str(adapter))
    with pytest.raises(ModelError, match="name one another"):
        load(adapter)


def test_a_base_of_another_shape(adapter):
    change(adapter, r=3)
    with pytest.raises(ModelError, match="does not fit its base model"):
        load(adapter)


def test_an_adapter_config_that_is_none(adapter):
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"')
    with pytest.raises(ModelError, match="peft cannot read"):
        load(adapter)


def test_a_pickle_is_not_read(adapter):
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match="safetensors only"):
        load(adapter)


def test_a_kind_that_cannot_be_merged(tmp_path):
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ModelError, match="PROMPT_TUNING, which cannot be merged"):
        load(make_adapter(tmp_path / "prompts", settings=prompts))


def test_without_peft(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match="peft cannot be imported"):
        load(adapter)


def test_a_model_that_caps_its_scores_is_loaded_with_them(tmp_path):
    """transformers' sdpa leaves the caps out, and says nothing."""
    model = tiny_model("gemma2", attn_logit_softcapping=0.5)
    model.save_pretrained(tmp_path)
    settings = ModelSection(model_name_or_path=str(tmp_path), teacher_model_name_or_path=str(tmp_path))
    loaded = load_model(str(tmp_path), settings, dtype="float32", device=torch.device("cpu"))
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits)
        model.set_attn_implementation("sdpa")
        assert (loaded(ids).logits - model(ids).logits).abs().max() > 0.1, "nothing was capped"


def test_a_dense_mask_off_the_cpu_is_named_with_its_bytes(tmp_path, caplog):
    """`meta` stands for any device that is no CPU."""
    tiny_model("qwen3").save_pretrained(tmp_path)
    settings = ModelSection(model_name_or_path=str(tmp_path), teacher_model_name_or_path=str(tmp_path))
    for device, warnings in (("cpu", 0), ("meta", 1)):
        caplog.clear()
        load_model(str(tmp_path), settings, dtype="float32", device=torch.device(device), longest=13_312)
        assert len(caplog.messages) == warnings
    assert "a dense mask of 177,209,344 bytes for a row of 13,312 tokens" in caplog.text
