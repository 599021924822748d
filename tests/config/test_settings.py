"""Every setting of the schema with what people, scripts and editors write into it: a plan, or an error that helps."""

from __future__ import annotations

import json
import re
import shlex
import warnings

import pytest

from prune_opd.config import load_config, placed, setting_names
from prune_opd.config.words import example_of, setting_of
from prune_opd.errors import ConfigError
from prune_opd.preflight import memory
from prune_opd.preflight.plan import describe_plan

NAMES = sorted(setting_names())
PAIR = {"model_name_or_path": "embedded:low-student", "teacher_model_name_or_path": "embedded:teacher"}
HEAD = {"model": PAIR, "data": {"train": "task:chain_sum"}}
VALUES = {
    "a word": '"perhaps"',
    "nothing": '""',
    "white space": '" "',
    "a truth value": "true",
    "zero": "0",
    "minus one": "-1",
    "a fraction": "0.5",
    "tiny": "1e-320",
    "large": "4294967295",
    "huge": "1" + "0" * 23,
    "a huge float": "1e308",
    "beyond any float": "1e999",
    "not a number": "nan",
    "minus infinity": "-inf",
    "an empty list": "[]",
    "a list": '["a", "b"]',
    "a list of numbers": "[1, 2]",
    "a nested list": "[[1]]",
    "a table": "{a = 1}",
    "a date": "2026-11-29",
    "a time": "07:32:00",
    "NUL": '"a\\u0000b"',
    "an escape": '"\\u001b[31m"',
    "odd letters": '"\u202e\ufeff𝔘é中\u200b"',
    "a long text": f'"{"x" * 300}"',
    "a path": '"../nowhere/x.jsonl"',
    "an address without its end": '"http://[bad"',
    "an address without a port": '"http://a:99999"',
}
OURS = "http://127.0.0.1:8000"


def recipe_of(folder, name, value):
    """A recipe with one more setting, in the last line of its file; and the number of that line."""
    section, _, last = name.rpartition(".")
    lines = []
    for table, settings in HEAD.items():
        lines.append(f"[{table}]")
        lines += [f"{key} = {json.dumps(v)}" for key, v in settings.items() if f"{table}.{key}" != name]
        if table == section:
            lines.append(f"{last} = {value}")
            line = len(lines)
    if section not in HEAD:
        lines += [f"[{section}]", f"{last} = {value}"]
        line = len(lines)
    (folder / "recipe.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "recipe.toml", line


def planned(recipe, overrides=()):
    """None where a plan is shown; else the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = load_config(recipe, overrides)
        except ConfigError as error:
            return str(error)
        try:
            assert "Settings" in describe_plan(config)
        except ConfigError as error:
            return str(placed(error, recipe, overrides))
    return None


@pytest.fixture(scope="module", autouse=True)
def _activations_are_counted_once():
    """Counting them takes a tenth of a second, and most settings do not change them."""
    known, count = {}, memory._saved_bytes

    def remembered(model_config, settings, *shape, **how):
        key = (settings.model_dump_json(), shape, *how.values())
        if key not in known:
            known[key] = count(model_config, settings, *shape, **how)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_saved_bytes", remembered)
        yield


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_or_an_error_with_its_place_and_a_value_that_works(tmp_path, name):
    plain = recipe_of(tmp_path, "training.seed", 0)[0].rename(tmp_path / "plain.toml")
    examples, refused = set(), 0
    for value in VALUES.values():
        recipe, line = recipe_of(tmp_path, name, value)
        for message, place in (
            (planned(recipe), f"{recipe}:{line}: "),
            (planned(plain, [f"{name}={value}"]), f"--set {name}="),
        ):
            if message is None:
                continue
            refused += 1
            for mistake in message.splitlines():
                assert mistake.startswith(place) and len(mistake) < 1000 and mistake.isprintable(), (value, mistake)
                if example := re.search(r"; write for example (--set )?(.+)\Z", mistake):
                    assert bool(example[1]) == place.startswith("--set")
                    examples.add(shlex.split(example[2])[0] if example[1] else f"{name}={example[2]}")
                else:
                    assert "is not usable" not in mistake or "settings of its own" in mistake, mistake
    assert refused, "nothing is wrong for this setting?"
    for example in examples:
        assert example.startswith(f"{name}=")
        again = planned(plain, [example])
        assert again is None or "is not usable" not in again, again


def test_a_setting_shows_its_own_example():
    for name in NAMES:
        setting, taken = setting_of(name.split("."))
        assert taken == name.count(".") + 1
        assert name == "model.lora" or example_of(setting) not in (None, "null"), name


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.steps=1e3", 1000),
        ("training.steps=1_000", 1000),
        ("training.learning_rate=1", 1.0),
        ("training.bf16=True", True),
        ("tracking.report_to=wandb", ["wandb"]),
        ("tracking.report_to=wandb,tensorboard", ["wandb", "tensorboard"]),
        ("tracking.report_to=[wandb, trackio]", ["wandb", "trackio"]),
        ("model.lora.target_modules=q_proj", ["q_proj"]),
        ("model.lora.target_modules=all-linear", "all-linear"),
        ("data.train=2024", "2024"),
        ("data.train=2026-01-01", "2026-01-01"),
        ("data.train=./my data/x.jsonl", "./my data/x.jsonl"),
        ("data.train=C:\\data\\x.jsonl", "C:\\data\\x.jsonl"),
        ("data.train='2024'", "2024"),
        ("data.prompt_column=1e3", "1e3"),
        ("data.split=true", "true"),
        (f"model.teacher_model_server_url={OURS}", OURS),
        (f"model.teacher_model_server_url={OURS},{OURS}", [OURS, OURS]),
        ("pruning.threshold=auto", "auto"),
        ("evaluation.data=", None),
        ("data.prompt_suffix=", ""),
        ("data.chat_template_kwargs.n=1e3", 1000.0),  # nobody knows what it should be
    ],
)
def test_set_takes_what_people_type(tmp_path, override, expected):
    recipe, _ = recipe_of(tmp_path, "training.steps", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_config(recipe, [override]).model_dump()
    for key in override.partition("=")[0].split("."):
        found = found[key]
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("override", ["training.steps=1.5", "training.steps=1e999", "training.bf16=yes"])
def test_set_does_not_guess(tmp_path, override):
    recipe, _ = recipe_of(tmp_path, "data.split", '"test"')
    name = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^--set {override}: setting {name} = .*; write for example --set {name}="):
        load_config(recipe, [override])


def test_the_last_set_has_the_blame_and_a_secret_in_it_is_not_repeated(tmp_path):
    recipe, _ = recipe_of(tmp_path, "data.split", '"test"')
    with pytest.raises(ConfigError, match=r"^--set training\.steps=0: "):
        load_config(recipe, ["training.steps=3", "training.steps=0"])
    secret = "hf_" + "a1B2" * 9
    for override in (f"data.split={secret}", f"model.teacher_model_server_url=ftp://me:{secret}@host"):
        with pytest.raises(ConfigError, match=rf"^--set {override.partition('=')[0]}=") as error:
            load_config(recipe, [override])
        assert secret not in str(error.value)


def test_a_conflict_is_placed_at_one_of_its_settings(tmp_path):
    recipe, line = recipe_of(tmp_path, "training.warmup_steps", 9)
    with pytest.raises(ConfigError, match=r"^--set training\.steps=9: training\.warmup_steps = 9 leaves none"):
        load_config(recipe, ["training.steps=9"])
    recipe, line = recipe_of(tmp_path, "rollout.max_completion_length", 9)
    with pytest.raises(
        ConfigError, match=rf"^{re.escape(str(recipe))}:{line}: pruning\.dynamic_response_length\.max_len"
    ):
        load_config(recipe)


@pytest.mark.parametrize(("mark", "end"), [("\ufeff", "\n"), ("", "\r\n"), ("\ufeff", "\r\n")])
def test_a_recipe_as_windows_writes_it(tmp_path, mark, end):
    recipe, _ = recipe_of(tmp_path, "training.steps", 7)
    recipe.write_bytes((mark + recipe.read_text()).replace("\n", end).encode())
    assert load_config(recipe).training.steps == 7


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps", "cpu:3", "meta", "gpu", "CUDA", "cuda:-1"])
def test_a_device_that_is_not_here_is_placed(tmp_path, device, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    recipe, line = recipe_of(tmp_path, "training.device", json.dumps(device))
    message = planned(recipe)
    assert message.startswith(f"{recipe}:{line}: training.device = {device!r} is no device of this machine")
    assert message.endswith("there are auto, cpu")
    assert planned(recipe, ["training.device=cpu"]) is None
