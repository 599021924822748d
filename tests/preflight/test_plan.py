"""The dry run's numbers against the things that they are numbers of: small networks, and the schedule's own rules."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prune_opd.config import Config, parse_config, setting_names, with_settings
from prune_opd.core.drift import drift_report
from prune_opd.core.window import TrainingWindow
from prune_opd.errors import ModelError
from prune_opd.models.loading import add_adapters
from prune_opd.preflight.memory import activation_bytes, estimate_memory, micro_batch_shape, parameters_in_name
from prune_opd.preflight.plan import (
    describe_plan,
    evaluations,
    events_until_unreliable,
    most_response_tokens,
)
from prune_opd.preflight.topology import GPUs

NETWORK = AutoConfig.for_model(
    "qwen3",
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=96,
    vocab_size=200,
    tie_word_embeddings=True,
)


@pytest.fixture
def folder(tmp_path) -> str:
    """A model folder that has no weights: whoever tries to load them fails."""
    NETWORK.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def config(student: str = "org/Some-1.5B", teacher: str = "org/Other-7B-Base", **settings: Any) -> Config:
    nested = {
        "model": {"model_name_or_path": student, "teacher_model_name_or_path": teacher},
        "data": {"train": "prompts.jsonl"},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return with_settings(parse_config(nested, where="a test"), **settings)


def network(**kwargs: Any) -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(NETWORK, **kwargs)


def size_of(parameters) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


# ---- memory ----


def test_weights_gradients_and_optimizer_are_those_of_the_network(folder):
    memory = estimate_memory(config(folder, folder, **{"model.teacher_dtype": "bfloat16"}))
    student = network()
    assert memory.student == size_of(student.parameters())  # tied embeddings once
    assert memory.teacher == size_of(student.parameters()) / 2
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert memory.gradients == size_of(p.grad for p in student.parameters())
    optimizer = torch.optim.AdamW(student.parameters())
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert memory.optimizer == size_of(moments)


def test_adapters_are_all_that_is_trained(folder):
    memory = estimate_memory(config(folder, folder, **{"model.lora.r": 4, "model.dtype": "bfloat16"}))
    recipe = config(folder, folder, **{"model.lora.r": 4})
    student = add_adapters(network(dtype=torch.bfloat16), recipe.model.lora)
    assert memory.student == size_of(student.parameters())
    assert memory.gradients == size_of(p for p in student.parameters() if p.requires_grad) < memory.student / 4


@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_what_a_real_forward_keeps(folder, bf16):
    settings = config(folder).model
    estimate = activation_bytes(NETWORK, settings, 3, 40, bf16=bf16, recompute=False)
    student = network(attn_implementation="sdpa").train()
    weights = {p.untyped_storage().data_ptr() for p in student.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        tokens, mask = torch.zeros(3, 40, dtype=torch.long), torch.ones(3, 1, 40, 40, dtype=torch.bool)
        student(input_ids=tokens, attention_mask=mask, use_cache=False, logits_to_keep=1)
    assert estimate == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.1)


def test_activations_grow_with_tokens_and_shrink_when_layers_are_made_again(folder):
    settings = config(folder).model

    def estimate(rows: int, width: int, recompute: bool = False) -> int:
        return activation_bytes(NETWORK, settings, rows, width, bf16=False, recompute=recompute)

    assert estimate(2, 64) == pytest.approx(2 * estimate(1, 64), rel=0.02)
    assert estimate(1, 128) > 2 * estimate(1, 64)  # the mask is (T, T)
    one_layer = estimate(1, 64) / NETWORK.num_hidden_layers
    assert one_layer < estimate(1, 64, recompute=True) < 1.5 * one_layer


def test_key_value_cache_is_that_of_a_real_forward(folder):
    recipe = config(
        folder,
        folder,
        **{
            "data.max_prompt_length": 6,
            "rollout.max_completion_length": 4,
            "rollout.slots": 3,
            "pruning.dynamic_response_length.enable": False,
            "evaluation.data": "held_out.jsonl",
            "evaluation.num_problems": 1,
            "evaluation.k": 2,
            "evaluation.max_tokens": 9,
        },
    )

    def cache(rows: int, tokens: int) -> int:
        found = network()(input_ids=torch.zeros(rows, tokens, dtype=torch.long), use_cache=True).past_key_values
        return size_of(part for layer in found.layers for part in (layer.keys, layer.values))

    memory = estimate_memory(recipe)
    assert memory.cache_training == cache(3, 10)
    assert memory.cache_evaluation == cache(2, 15)  # one problem with two samples fills two of the three places
    assert estimate_memory(config(folder, folder)).cache_evaluation == 0


def test_the_largest_micro_batch_keeps_to_the_budget():
    lengths = {
        "data.max_prompt_length": 10,
        "pruning.dynamic_response_length.enable": False,
        "rollout.max_completion_length": 90,
        "rollout.prompts_per_step": 4,
        "rollout.num_generations": 2,
    }

    def shape(budget: int, attention: str) -> tuple[int, int]:
        recipe = config(**lengths, **{"training.micro_batch_tokens": budget})
        return micro_batch_shape(recipe, torch.device("cpu"), attention)

    assert [shape(budget, "sdpa") for budget in (399, 50, 9999)] == [(3, 100), (1, 100), (8, 100)]
    assert [shape(budget, "varlen") for budget in (399, 50, 9999)] == [(1, 399), (1, 100), (1, 800)]


def test_attention_without_a_dense_mask_is_planned_for_a_gpu_that_is_not_here(folder):
    """A mask of (L, L), which sdpa copies in each layer, or none; what could not run there is refused."""
    long = {"data.max_prompt_length": 200, "rollout.max_completion_length": 1800, "model.teacher_dtype": "bfloat16"}
    recipe = config(folder, folder, **long, **{"training.bf16": True, "pruning.dynamic_response_length.max_len": 1800})
    here, there = estimate_memory(recipe), estimate_memory(recipe, torch.device("cuda"))
    assert (here.attention, there.attention) == ("sdpa", "varlen")
    assert here.micro_batch == (1, 2000) and there.micro_batch == (1, 16384), "rows of many rollouts"
    assert "varlen, no dense mask" in describe_plan(recipe, GPUs(8, 80 * 10**9))
    text = describe_plan(recipe)
    assert "sdpa, a dense mask of 3.8 MiB" in text and "varlen" not in text
    by_sdpa = with_settings(recipe, **{"model.attn_implementation": "sdpa", "training.micro_batch_tokens": 2000})
    by_varlen = with_settings(by_sdpa, **{"model.attn_implementation": "varlen"})
    dense, segments = (estimate_memory(r, torch.device("cuda")) for r in (by_sdpa, by_varlen))
    assert dense.activations > segments.activations + 2 * 2000**2 * NETWORK.num_hidden_layers
    with pytest.raises(ModelError, match="half precision"):
        estimate_memory(with_settings(by_varlen, **{"training.bf16": False}), torch.device("cuda"))


def test_the_peak_is_what_stays_and_the_larger_of_sampling_and_update(folder):
    memory = estimate_memory(config(folder, folder))
    stays = memory.student + memory.gradients + memory.optimizer + memory.teacher
    assert memory.peak == stays + max(memory.activations + memory.logits, memory.cache_training)


def test_rollouts_ahead_need_a_copy_of_the_student_and_take_no_turn(folder):
    """They are sampled while the student is updated, and go on while it is evaluated."""
    settings = {"evaluation.data": "held_out.jsonl", "pruning.in_flight.enable": True}
    usual = estimate_memory(config(folder, folder, **settings))
    ahead = estimate_memory(config(folder, folder, **settings, **{"rollout.ahead": True}))
    assert usual.student_copy == 0 and ahead.student_copy == size_of(network().parameters())
    stays = usual.student + usual.gradients + usual.optimizer + usual.teacher
    rollout, update = usual.cache_training + usual.cache_teacher, usual.activations + usual.logits
    assert usual.peak == stays + max(rollout, update, usual.cache_evaluation)
    assert ahead.peak == stays + ahead.student + rollout + max(update, usual.cache_evaluation)
    text = describe_plan(config(folder, folder, **{"rollout.ahead": True}))
    assert re.search(r"^  student's copy +\d+\.\d KiB", text, re.MULTILINE)
    assert "student's copy" not in describe_plan(config(folder, folder))


@pytest.mark.parametrize("more", [{}, {"model.lora.r": 4}, {"rollout.ahead": True}])
def test_rollouts_in_another_type_need_a_copy_of_the_student_in_it(folder, more):
    usual = estimate_memory(config(folder, folder, **more))
    other = estimate_memory(config(folder, folder, **more, **{"rollout.dtype": "bfloat16"}))
    assert other.student_copy == usual.student / 2, "one copy, with ahead too"
    assert other.cache_training == usual.cache_training / 2 and other.cache_evaluation == usual.cache_evaluation
    ahead = "rollout.ahead" in more
    on_top = usual.activations + usual.logits + ahead * other.cache_training
    assert other.peak == usual.student * 1.5 + usual.gradients + usual.optimizer + usual.teacher + on_top
    text = describe_plan(config(folder, folder, **more, **{"rollout.dtype": "bfloat16"}))
    assert "in float32, rollouts in bfloat16" in text and "student's copy" in text
    same = estimate_memory(config(folder, folder, **{"rollout.dtype": "float32"}))
    assert same == estimate_memory(config(folder, folder))
    assert estimate_memory(config(**{"rollout.dtype": "bfloat16"})).student_copy == 3e9, "from the name alone"


# ---- models that are not here ----


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1_500_000_000),
        ("Qwen/Qwen3-1.7B-Base", 1_700_000_000),
        ("Qwen/Qwen3-30B-A3B", 30_000_000_000),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 135_000_000),
        ("org-7B/model", None),
        ("meta/Llama-2x4Bits", None),
        ("openai/gpt2", None),
    ],
)
def test_the_parameter_count_in_a_name(name, count):
    assert parameters_in_name(name) == count


def test_without_config_json_the_name_has_to_do_and_the_rest_is_unknown():
    memory = estimate_memory(config(**{"model.teacher_dtype": "bfloat16"}))
    assert (memory.student, memory.gradients, memory.optimizer, memory.teacher) == (6e9, 6e9, 12e9, 14e9)
    assert memory.activations is memory.logits is memory.cache_training is memory.peak is None
    assert estimate_memory(config(**{"rollout.ahead": True})).student_copy == 6e9
    text = describe_plan(config())
    assert "from the names of the models, because config.json of org/Some-1.5B and org/Other-7B-Base is not" in text
    assert re.search(r"^  activations +unknown$", text, re.MULTILINE)


def test_a_name_without_a_count_is_unknown(folder):
    memory = estimate_memory(config(folder, "org/teacher"))
    assert memory.teacher is memory.peak is None
    assert "because config.json of org/teacher is not on this machine" in describe_plan(config(folder, "org/teacher"))


def test_no_network_is_used(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the dry run opened a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    assert "unknown" in describe_plan(config())


def test_a_wrong_embedded_name_is_an_error():
    with pytest.raises(ModelError, match="no embedded model 'embedded:low-studnt'"):
        describe_plan(config("embedded:low-studnt"))


def test_a_config_json_of_no_known_model_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="names no model that transformers knows"):
        describe_plan(config(str(tmp_path)))


# ---- the plan ----


def windows(recipe: Config) -> Iterator[int]:
    """Windows of a run whose every rollout is reliable to its end, from the controller itself."""
    settings = recipe.pruning.dynamic_response_length.model_dump(exclude={"enable"})
    window = TrainingWindow(**settings)
    for _ in range(recipe.training.steps):
        yield window.length
        window.update(torch.tensor([window.length]))


@pytest.mark.parametrize("steps", [1, 9, 30])
@pytest.mark.parametrize("steered", [True, False])
def test_the_bound_on_tokens_is_what_the_window_allows_at_most(steps, steered):
    recipe = config(
        **{
            "training.steps": steps,
            "rollout.prompts_per_step": 3,
            "rollout.num_generations": 2,
            "rollout.max_completion_length": 120,
            "pruning.dynamic_response_length": {
                "init_len": 20,
                "min_len": 10,
                "max_len": 100,
                "step": 7,
                "enable": steered,
            },
        }
    )
    assert most_response_tokens(recipe) == 6 * (sum(windows(recipe)) if steered else steps * 120)


@pytest.mark.parametrize(
    ("w_drop", "eps"),
    [(0.01, 1e-8), (0.02, 1e-8), (0.03, 1e-8), (0.1, 0), (1 / 3, 1e-8), (1, 0), (0.07, 0.2), (0.5, 0.5)],
)
def test_events_that_spend_reliability_agree_with_the_drift_report(w_drop, eps):
    count = events_until_unreliable(config(**{"pruning.w_drop": w_drop, "pruning.positive_eps": eps}))
    events = torch.ones(1, 200, dtype=torch.bool)
    report = drift_report(events, events, w_drop=w_drop, w_base=0.5, eps=eps)
    assert count == int(report.effective_length) + 1  # the event that takes the last of it is no longer counted in


def test_events_without_a_drop_never_spend_it():
    assert events_until_unreliable(config(**{"pruning.w_drop": 0})) is None
    assert "events never spend all reliability" in describe_plan(config(**{"pruning.w_drop": 0}))


@pytest.mark.parametrize(
    ("threshold", "words"), [(0.7, "fewer than 12 of their 16"), (0.75, "fewer than 12 of"), (0.76, "fewer than 13 of")]
)
def test_the_overlap_rule_in_words(threshold, words):
    assert words in describe_plan(config(**{"pruning.threshold": threshold}))


def test_evaluations_come_at_the_start_at_every_period_and_at_the_end():
    held_out = {"evaluation.data": "held_out.jsonl", "evaluation.every": 20}
    assert evaluations(config(**held_out, **{"training.steps": 50})) == 4  # 0, 20, 40, 50
    assert evaluations(config(**held_out, **{"training.steps": 40})) == 3
    assert evaluations(config(**held_out, **{"training.steps": 3})) == 2
    assert evaluations(config()) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pruning.enable": False}, "off: plain on-policy distillation"),
        ({"pruning.metric": "overlap_mass"}, "less than 0.7 of the student's probability"),
        ({"pruning.metric": "teacher_top_p_accept"}, "outside the teacher's 0.95 nucleus"),
        ({"pruning.dynamic_response_length.enable": False}, "every response may use 12,288 tokens"),
        ({"model.lora.r": 8}, "LoRA adapters of rank 8 on all-linear"),
        ({"training.save_every": 100}, "3, every 100 steps and after the last, of which 2 are kept"),
        ({"tracking.report_to": ["wandb"]}, "metrics.jsonl and wandb"),
        ({"objective.loss": "jsd"}, "jsd, token_mean"),
    ],
)
def test_the_plan_says_what_a_setting_does(settings, words):
    assert words in describe_plan(config(**settings))
    assert words not in describe_plan(config())


def test_every_setting_is_printed_with_its_value():
    recipe = config(**{"model.lora.r": 5, "data.chat_template_kwargs.enable_thinking": False})
    printed = dict(line.split(maxsplit=1) for line in describe_plan(recipe).split("\nSettings\n")[1].splitlines())
    expected = (set(setting_names()) - {"model.lora", "data.chat_template_kwargs"}) | {
        "data.chat_template_kwargs.enable_thinking"
    }
    assert set(printed) == expected
    assert printed["model.lora.r"] == "5"
    assert printed["data.chat_template_kwargs.enable_thinking"] == "false"
    assert printed["training.learning_rate"] == "1e-06"
    assert printed["evaluation.data"] == "not set"
