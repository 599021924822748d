from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from prune_opd.config import Config, load_config, parse_config, setting_names, settings_without_effect, with_settings
from prune_opd.errors import ConfigError

MODELS = '[model]\nmodel_name_or_path = "a"\nteacher_model_name_or_path = "b"\n'
DATA = '[data]\ntrain = "c.jsonl"\n'
NESTED = {"model": {"model_name_or_path": "a", "teacher_model_name_or_path": "b"}, "data": {"train": "c.jsonl"}}


@pytest.fixture
def write(tmp_path):
    """Write a recipe of the required settings and `more`; returns its path."""

    def recipe(more: str = "", *, name: str = "recipe.toml", head: str = "", required: str = MODELS + DATA) -> Path:
        path = tmp_path / name
        path.write_text(head + required + more, encoding="utf-8")
        return path

    return recipe


def without_warnings(path: Path, *overrides: str) -> Config:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_config(path, overrides)


def config(**settings: Any) -> Config:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return with_settings(parse_config(NESTED, where="a test"), **settings)


# ---- names ----


@pytest.mark.parametrize(
    ("override", "wrong", "meant"),
    [
        ("pruning.treshold=0.5", "pruning.treshold", "pruning.threshold"),
        ("prunning.threshold=0.5", "prunning", "pruning"),
        ("threshold=0.5", "threshold", "pruning.threshold"),  # the section is missing
        ("rollout.learning_rate=1e-5", "rollout.learning_rate", "training.learning_rate"),  # the wrong section
        ("training.lora.r=8", "training.lora", "model.lora"),
        ("training.step=8", "training.step", "training.steps"),  # not the window's step
        ("training.learning-rate=1", "training.learning-rate", "training.learning_rate"),
        (
            "pruning.dynamic_response_length.max_length=9",
            "pruning.dynamic_response_length.max_length",
            "pruning.dynamic_response_length.max_len",
        ),
        ("model.lora.rank=8", "model.lora.rank", "model.lora.r"),
    ],
)
def test_a_misspelt_setting_names_the_nearest_one(write, override, wrong, meant):
    with pytest.raises(ConfigError) as error:
        load_config(write(), [override])
    assert str(error.value) == f"--set {override}: unknown setting {wrong}; did you mean {meant}?"


def test_a_setting_like_no_other_points_to_the_list(write):
    with pytest.raises(ConfigError, match=r"unknown setting xyzzy; see docs/configuration.md"):
        load_config(write(), ["xyzzy=1"])


def test_every_mistake_of_a_recipe_is_told_at_once(write):
    path = write("[training]\nstep = 3\nseed = -1\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    first = path.read_text().splitlines().index("[training]") + 1
    assert str(error.value).splitlines() == [
        f"{path}:{first + 2}: setting training.seed = -1 is not usable: input should be greater than or equal to 0; "
        "write for example 0",
        f"{path}:{first + 1}: unknown setting training.step; did you mean training.steps?",
    ]


@pytest.mark.parametrize(("required", "missing"), [(MODELS, "data"), (MODELS + "[data]\n", "data.train")])
def test_a_missing_setting_is_named(write, required, missing):
    with pytest.raises(ConfigError, match=f"setting {missing} is required and missing; add it"):
        load_config(write(required=required))


def test_setting_names_are_those_of_the_sections():
    names = list(setting_names())
    assert len(names) == len(set(names))
    assert {"training.steps", "model.lora", "model.lora.r", "pruning.dynamic_response_length.step"} <= set(names)
    assert not {"training", "pruning", "pruning.dynamic_response_length"} & set(names)


# ---- values ----


@pytest.mark.parametrize(
    "override",
    [
        "pruning.threshold=1.01",
        "pruning.threshold=-0.01",
        "pruning.w_drop=1.5",
        "pruning.teacher_top_p=0",
        "objective.top_k=0",
        "objective.jsd_beta=1",
        "objective.loss=kl",
        "rollout.temperature=0",
        "rollout.top_p=1.2",
        "rollout.num_generations=2.5",
        "training.steps=many",
        "training.learning_rate=0",
        "training.learning_rate=inf",
        "training.learning_rate=nan",
        "training.weight_decay=inf",
        "training.seed=-1",
        "model.dtype=float16",
        'tracking.report_to=["mlflow"]',
        "pruning.dynamic_response_length.step=0",
        "data=text",
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name_and_value(write, override):
    name, _, value = override.partition("=")
    with pytest.raises(ConfigError) as error:
        load_config(write(), [override])
    assert f"setting {name}" in str(error.value)
    assert value.strip('[]"') in str(error.value)


@pytest.mark.parametrize(
    "override", ["pruning.threshold=0", "pruning.threshold=1", "rollout.top_p=1", "pruning.w_drop=0", "training.seed=0"]
)
def test_the_ends_of_a_range_belong_to_it(write, override):
    name, _, value = override.partition("=")
    section, _, key = name.partition(".")
    assert getattr(getattr(load_config(write(), [override]), section), key) == float(value)


def test_the_name_in_an_error_is_the_setting_even_where_several_types_would_do(write):
    with pytest.raises(ConfigError) as error:
        load_config(write("[model.lora]\ntarget_modules = 3\n"))
    assert "setting model.lora.target_modules = 3" in str(error.value)
    assert "list[str] =" not in str(error.value)


# ---- conflicts ----


@pytest.mark.parametrize(
    "lengths", [{"init_len": 10}, {"init_len": 99999}, {"max_len": 512}, {"min_len": 4000, "max_len": 3000}]
)
def test_a_window_out_of_order_is_refused(lengths):
    prefix = "pruning.dynamic_response_length"
    with pytest.raises(ConfigError, match="needs min_len <= init_len <= max_len"):
        config(**{f"{prefix}.{name}": value for name, value in lengths.items()})


def test_a_window_above_the_budget_is_refused():
    with pytest.raises(ConfigError, match=r"max_len = 12288 is above rollout.max_completion_length = 4000"):
        config(**{"rollout.max_completion_length": 4000})


@pytest.mark.parametrize("off", ["pruning.enable", "pruning.dynamic_response_length.enable"])
def test_the_window_may_be_anything_when_nothing_steers_it(off):
    assert not config(**{off: False, "rollout.max_completion_length": 50}).window_is_dynamic


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model.attn_implementation": "varlen", "model.compile": True}, "not built for model.compile"),
        ({"model.attn_implementation": "flash_attention_2", "model.teacher_dtype": "bfloat16"}, "training.bf16"),
        ({"model.attn_implementation": "flash_attention_3", "training.bf16": True}, "model.teacher_dtype"),
        ({"model.teacher_placement": "sharded", "pruning.in_flight.enable": True}, "pruning.in_flight.enable = true"),
        ({"model.teacher_placement": "sharded", "pruning.threshold": "auto"}, "pruning.threshold"),
        ({"model.teacher_placement": "sharded", "model.compile": True}, "model.compile = true was not built"),
    ],
    ids=str,
)
def test_attention_and_placement_that_cannot_go_together_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        config(**settings)


def test_warm_up_must_leave_steps():
    assert config(**{"training.steps": 5, "training.warmup_steps": 4}).training.warmup_steps == 4
    with pytest.raises(ConfigError, match=r"training.warmup_steps = 5 leaves none of training.steps = 5"):
        config(**{"training.steps": 5, "training.warmup_steps": 5})


def test_a_reward_needs_siblings_to_compare_with():
    with pytest.raises(ConfigError, match=r"needs rollout.num_generations >= 2, got 1"):
        config(**{"reward.function": "grade", "rollout.num_generations": 1})


@pytest.mark.parametrize("name", ["grad", "package.module", "package/module.py:f", "a:b:c", "a: b", ""])
def test_a_reward_is_an_import_path(name):
    with pytest.raises(ConfigError, match=r"is no import path; write package.module:name, or grade"):
        config(**{"reward.function": name})
    assert config(**{"reward.function": "package.module:name"}).reward.function == "package.module:name"


# ---- files ----


def test_extends_takes_the_other_recipe_first(write):
    write(
        "[training]\nsteps = 7\nlearning_rate = 1e-3\n[pruning.dynamic_response_length]\nstep = 5\n", name="base.toml"
    )
    path = write(
        "[training]\nsteps = 9\n[pruning.dynamic_response_length]\nmargin = 3\n",
        head='extends = "base.toml"\n',
        required="",
        name="child.toml",
    )
    found = without_warnings(path)
    assert (found.training.steps, found.training.learning_rate) == (9, 1e-3)
    window = found.pruning.dynamic_response_length
    assert (window.step, window.margin) == (5, 3)  # nested sections merge as well
    assert found.model.model_name_or_path == "a"


def test_adapters_of_the_extended_recipe_can_be_taken_out_again(write):
    write("[model.lora]\nr = 4\n", name="base.toml")
    path = write(head='extends = "base.toml"\n', required="", name="child.toml")
    assert without_warnings(path).model.lora.r == 4
    assert load_config(path, ["model.lora=false"]).model.lora is None
    with pytest.raises(ConfigError, match="lora"):
        load_config(path, ["model.lora=true"])


def test_extends_is_relative_to_the_recipe_that_says_it(tmp_path, write, monkeypatch):
    write("[training]\nsteps = 7\n", name="base.toml")
    (tmp_path / "more").mkdir()
    middle = write(head='extends = "../base.toml"\n', required="", name="more/middle.toml")
    path = write(head=f'extends = "{middle}"\n', required="", name="child.toml")
    monkeypatch.chdir("/")
    assert load_config(path).training.steps == 7


def test_recipes_in_a_circle_are_refused(write):
    path = write(head='extends = "b.toml"\n', name="a.toml")
    write(head='extends = "a.toml"\n', name="b.toml")
    with pytest.raises(ConfigError, match=r"a\.toml: recipes extend each other in a circle"):
        load_config(path)


def test_extends_must_be_a_path(write):
    with pytest.raises(ConfigError, match=r"extends must be the path .* got \['b'\]"):
        load_config(write(head='extends = ["b"]\n'))


def test_a_recipe_that_is_not_there_names_one_that_is(write):
    path = write(name="quickstart.toml")
    with pytest.raises(ConfigError) as error:
        load_config(path.with_name("quikstart.toml"))
    assert "quikstart.toml: no such recipe; did you mean" in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"[model\n", "not valid TOML.*line 1"), (b"name = '\xff'\n", "cannot be read as a UTF-8 text file")],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, message):
    (tmp_path / "recipe.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "recipe.toml")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


# ---- overrides ----


def test_overrides_are_toml_values_and_bare_words_are_text(write):
    found = load_config(
        write(),
        [
            "training.steps = 12",
            "training.bf16=true",
            "model.model_name_or_path=embedded:low-student",
            'data.prompt_suffix=" a=b"',
            'tracking.report_to=["wandb"]',
            "data.chat_template_kwargs.enable_thinking=false",
            "training.steps=13",
        ],
    )
    assert (found.training.steps, found.training.bf16) == (13, True)  # the last one wins
    assert found.model.model_name_or_path == "embedded:low-student"
    assert found.data.prompt_suffix == " a=b"
    assert found.tracking.report_to == ["wandb"]
    assert found.data.chat_template_kwargs == {"enable_thinking": False}


def test_an_override_without_an_equals_sign_says_how(write):
    with pytest.raises(ConfigError, match=r"--set 'training.steps' has no '='; write it as key=value"):
        load_config(write(), ["training.steps"])


def test_an_override_keeps_its_neighbours(write):
    path = write("[pruning.dynamic_response_length]\nstep = 5\nmargin = 6\n")
    window = load_config(path, ["pruning.dynamic_response_length.step=7"]).pruning.dynamic_response_length
    assert (window.step, window.margin) == (7, 6)


# ---- settings without effect ----


@pytest.mark.parametrize(
    ("more", "useless"),
    [
        ("[pruning]\nenable = false\nthreshold = 0.5\n", ["pruning.threshold"]),
        ("[pruning]\nmetric = 'teacher_top_p_accept'\nthreshold = 0.5\n", ["pruning.threshold"]),
        ("[pruning]\nteacher_top_p = 0.9\n", ["pruning.teacher_top_p"]),
        (
            "[pruning.dynamic_response_length]\nenable = false\nstep = 5\n",
            ["pruning.dynamic_response_length.step"],
        ),
        ("[objective]\nloss = 'jsd'\ntop_k_strategy = 'union'\n", ["objective.top_k_strategy"]),
        ("[objective]\njsd_beta = 0.1\n", ["objective.jsd_beta"]),
        ("[rollout]\nimportance_sampling_cap = 2.0\n", ["rollout.importance_sampling_cap"]),
        ("[rollout]\nimportance_sampling_cap = 2.0\ndtype = 'bfloat16'\n", []),
        (
            "[rollout]\nimportance_sampling_cap = 2.0\ndtype = 'float32'\n",
            ["rollout.importance_sampling_cap", "rollout.dtype"],
        ),
        ("[evaluation]\nk = 4\n", ["evaluation.k"]),
        ("[reward]\nopd_kl_coef = 0.5\n", ["reward.opd_kl_coef"]),
        ("[reward]\nfunction = 'grade'\nopd_kl_coef = 0.5\nafter_drift = 'task_only'\n", []),
        (
            "[reward]\nfunction = 'grade'\nafter_drift = 'task_only'\n[pruning]\nenable = false\n",
            ["reward.after_drift"],
        ),
        (
            "[reward]\nfunction = 'grade'\nafter_drift = 'task_only'\n[pruning.in_flight]\nenable = true\n",
            ["reward.after_drift"],
        ),
        ("[training]\nsteps = 5\n[evaluation]\ndata = 'd.jsonl'\nk = 4\n", []),
        ("[objective]\nloss = 'jsd'\njsd_beta = 0.1\n", []),
        ("[pruning]\nmetric = 'teacher_top_p_accept'\nteacher_top_p = 0.9\n", []),
    ],
)
def test_a_setting_without_effect_warns(write, more, useless):
    path = write(more)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_config(path)
    assert [str(w.message).split(" has no effect")[0] for w in caught] == [f"{path}: {name}" for name in useless]


def test_a_fused_head_has_no_effect_on_a_loss_that_needs_all_logits(write):
    with pytest.warns(UserWarning, match=r"model\.liger_head has no effect: loss is jsd"):
        load_config(write("[objective]\nloss = 'jsd'\n"), ["model.liger_head=true"])


def test_the_embedded_task_has_no_use_for_columns(write):
    path = write("[data]\ntrain = 'task:chain_sum'\nsplit = 'test'\nmax_prompt_length = 64\n", required=MODELS)
    with pytest.warns(UserWarning, match=r"data\.split has no effect: the embedded task makes its own prompts"):
        load_config(path)


def test_a_default_that_was_not_written_down_never_warns(write):
    assert list(settings_without_effect(without_warnings(write()))) == []


# ---- copies ----


def test_with_settings_changes_what_it_names_and_nothing_else():
    before = config(**{"training.steps": 5, "pruning.dynamic_response_length.step": 7})
    after = with_settings(before, **{"pruning.dynamic_response_length.margin": 9, "training.seed": 3})
    assert before.training.seed == 0
    changed = after.model_dump()
    assert changed["training"].pop("seed") == 3
    assert changed["pruning"]["dynamic_response_length"].pop("margin") == 9
    expected = before.model_dump()
    del expected["training"]["seed"], expected["pruning"]["dynamic_response_length"]["margin"]
    assert changed == expected
    assert with_settings(before) == before


def test_with_settings_checks_like_a_recipe():
    with pytest.raises(ConfigError, match=r"changed settings: unknown setting training.step; did you mean"):
        with_settings(config(), **{"training.step": 1})
    with pytest.raises(ConfigError, match="max_len = 12288 is above"):
        with_settings(config(), **{"rollout.max_completion_length": 2000})


def test_a_dumped_config_is_a_recipe_of_the_same_run():
    """`config.json` of a run directory holds everything that is needed to repeat it."""
    before = config(**{"model.lora.r": 4, "data.chat_template_kwargs.enable_thinking": False})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a dump writes every default down, so it warns of those without a use
        assert parse_config(before.model_dump(), where="a dump") == before


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(Exception, match="frozen"):
        config().training.steps = 5  # type: ignore[misc]


def test_a_recipe_is_checked_without_torch(write):
    code = f"import sys, prune_opd.config as c; c.load_config({str(write())!r}); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
