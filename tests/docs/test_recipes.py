"""Every recipe in the repository loads without a warning and passes the dry run, which no network can help."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import prune_opd
from prune_opd.config import Config, load_config, with_settings
from prune_opd.preflight.memory import parameters_in_name
from prune_opd.preflight.plan import describe_plan

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))
PAPER = {path.stem: path for path in (ROOT / "recipes" / "paper").glob("*.toml")}
ASSETS = Path(prune_opd.__file__).parent / "assets"


def load(path: Path) -> Config:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_config(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT / "recipes")))
def test_a_recipe_passes_the_dry_run(path, monkeypatch):
    config = load(path)
    if "embedded:" in str(config.model) and not ASSETS.is_dir():
        pytest.skip("this checkout has no embedded models: `make assets`")

    def refuse(*args, **kwargs):
        raise AssertionError("the dry run opened a connection")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    text = describe_plan(config)
    assert config.model.teacher_model_name_or_path in text
    assert f"{config.training.steps:,}, each of {config.rollout.prompts_per_step} prompts" in text


def pairs() -> dict[str, tuple[str, str]]:
    configs = {name: load(path) for name, path in PAPER.items()}
    return {
        name: (c.model.model_name_or_path.split("/")[1], c.model.teacher_model_name_or_path.split("/")[1])
        for name, c in configs.items()
    }


def test_the_five_pairs_of_the_paper_are_there():
    assert set(pairs().values()) == {
        ("DeepSeek-R1-Distill-Qwen-1.5B", "JustRL-DeepSeek-1.5B"),
        ("DeepSeek-R1-Distill-Qwen-1.5B", "DeepSeek-R1-Distill-Qwen-7B"),
        ("Qwen3-1.7B-Base", "Qwen3-4B"),
        ("Qwen3-4B-Base", "Qwen3-4B"),
        ("DeepSeek-R1-Distill-Qwen-7B", "Skywork-OR1-7B"),
    }


def test_the_sweep_changes_the_threshold_and_nothing_else():
    main = load(PAPER["justrl-1.5b"])
    sweep = {load(path).pruning.threshold: load(path) for name, path in PAPER.items() if name.startswith("justrl")}
    assert sorted(sweep) == [0.6, 0.7, 0.8, 0.9]
    for config in sweep.values():
        assert with_settings(config, **{"pruning.threshold": 0.7}) == main


@pytest.mark.parametrize("name", PAPER)
def test_the_settings_are_those_of_the_paper(name):
    """Section 4 of the paper and its appendix; where it contradicts itself, the choice that the recipe's head names."""
    c = load(PAPER[name])
    window, held_out = c.pruning.dynamic_response_length, c.evaluation
    assert (c.objective.loss, c.objective.top_k, c.objective.top_k_strategy) == ("topk_reverse_kl", 16, "only_stu")
    assert (c.pruning.enable, c.pruning.metric) == (True, "overlap_ratio")
    assert (c.pruning.w_drop, c.pruning.w_base, c.pruning.positive_eps) == (0.01, 0.5, 1e-8)
    assert (window.step, window.margin, window.hit_ratio, window.shrink_patience) == (100, 100, 0.1, 3)
    assert (window.min_len, window.max_len, c.rollout.max_completion_length) == (1024, 12288, 12288)
    assert window.init_len == (6144 if name == "skywork-7b" else 1024)
    assert (c.rollout.prompts_per_step, c.rollout.num_generations, c.training.steps) == (64, 4, 203)
    assert (c.training.learning_rate, c.training.lr_scheduler_type, c.training.warmup_steps) == (1e-6, "constant", 0)
    assert (c.rollout.temperature, c.rollout.top_p) == (1.0, 1.0)
    assert (c.data.max_prompt_length, held_out.max_tokens) == (1024, 31744)
    assert (held_out.k, held_out.temperature, held_out.top_p, held_out.every) == (16, 1.0, 0.95, 20)
    assert "DAPO-Math-17k" in c.data.train
    assert r"\boxed{}" in c.data.prompt_suffix
    # In bfloat16 weights a step of 1e-6 would round to nothing.
    assert (c.model.dtype, c.training.bf16) == ("float32", True)


@pytest.mark.parametrize("name", PAPER)
def test_only_the_qwen3_pairs_switch_thinking_off(name):
    expected = {"enable_thinking": False} if name.startswith("qwen3") else {}
    assert load(PAPER[name]).data.chat_template_kwargs == expected


@pytest.mark.parametrize("name", PAPER)
def test_weights_can_be_estimated_without_the_hub(name):
    model = load(PAPER[name]).model
    assert parameters_in_name(model.model_name_or_path)
    assert parameters_in_name(model.teacher_model_name_or_path)
