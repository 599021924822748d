"""The commands to begin with: recipes, init and demo, in a folder that has nothing of the repository."""

from __future__ import annotations

import json
import warnings
from itertools import islice
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prune_opd.cli import app
from prune_opd.config import load_config
from prune_opd.config.recipes import about, shipped
from prune_opd.data.tasks import problems
from prune_opd.errors import ConfigError, DataError, MissingColumnError, ModelError

PAIR = ["--student", "embedded:low-student", "--teacher", "embedded:teacher"]


def run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.output


def write(path: Path, count: int, prompt: str = "prompt", answer: str | None = "answer") -> Path:
    split = "train" if "train" in path.name else "held_out"
    rows = [
        {prompt: problem.prompt, **({answer: problem.answer} if answer else {}), "number": i}
        for i, problem in enumerate(islice(problems(split, 0), count))
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(path: str = "recipe.toml"):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a setting without effect
        return load_config(path)


# ---- recipes ----


def test_recipes_lists_each_with_a_line():
    lines = run("recipes").splitlines()
    assert [line.split()[0] for line in lines] == list(shipped())
    assert all(20 < len(about(path)) < 240 for path in shipped().values())


@pytest.mark.parametrize("name", shipped())
def test_a_copy_says_what_the_recipe_says(name, folder):
    run("recipes", name, "mine/copy.toml")
    assert load_config("mine/copy.toml") == load_config(shipped()[name])
    assert {path.parent for path in folder.rglob("*.toml")} == {folder / "mine"}  # all that it needs lies beside it


def test_a_copy_never_overwrites_what_is_another_file(folder):
    run("recipes", "high")
    run("recipes", "inflight")  # both extend quickstart.toml, which is there by now
    (folder / "high.toml").write_text("# mine\n")
    with pytest.raises(ConfigError, match=r"high\.toml exists and is another file"):
        run("recipes", "high")
    assert (folder / "high.toml").read_text() == "# mine\n"


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean quickstart\?"):
        run("recipes", "quikstart")
    with pytest.raises(ConfigError, match=r"did you mean scale/1x8\?"):
        run("recipes", "1x8")


# ---- init ----


def test_init_finds_columns_lengths_answers_and_held_out_rows(folder):
    write(folder / "train.jsonl", 40, "Question", "gold")
    write(folder / "test.jsonl", 10, "Question", "gold")
    said = run("init", *PAIR, "--data", "train.jsonl")
    config = recipe()
    assert (config.data.prompt_column, config.data.answer_column) == ("Question", "gold")
    assert (config.evaluation.data, config.evaluation.num_problems) == ("test.jsonl", 10)
    longest = max(len(problem.prompt.split()) for problem in islice(problems("train", 0), 40))
    assert config.data.max_prompt_length == -(-longest // 32) * 32
    assert config.data.max_prompt_length + config.rollout.max_completion_length == 512  # the models' positions
    window = config.pruning.dynamic_response_length
    assert window.max_len == config.rollout.max_completion_length and window.min_len == window.max_len // 12
    assert config.model.lora is None and config.training.learning_rate == 1e-5
    assert "prune-opd doctor recipe.toml\n  prune-opd train recipe.toml" in said
    assert "10 held-out problems from test.jsonl" in said
    assert "# [reward]" in (folder / "recipe.toml").read_text()  # each row has an answer


def test_what_init_writes_trains(folder):
    write(folder / "train.jsonl", 8)
    write(folder / "valid.jsonl", 2)
    run("init", *PAIR, "--data", "train.jsonl", "--output", "sums.toml")
    run("train", "sums.toml", "--dry-run")
    small = ["training.steps=1", "rollout.prompts_per_step=2", "evaluation.k=1", "evaluation.max_tokens=32"]
    run("train", "sums.toml", "--output-dir", "run", *(word for text in small for word in ("--set", text)))
    (record,) = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()][-1:]
    assert record["distillation/overlap_ratio"] > 0.3 and "eval/accuracy" in record


def test_without_answers_nothing_is_evaluated_and_the_recipe_says_how(folder):
    write(folder / "train.jsonl", 8, answer=None)
    write(folder / "test.jsonl", 8, answer=None)
    run("init", *PAIR, "--data", "train.jsonl")
    assert recipe().evaluation.data is None and recipe().data.answer_column is None
    assert "# Nothing is evaluated: no answers" in (folder / "recipe.toml").read_text()


def test_the_only_column_of_text_is_the_prompt(folder):
    write(folder / "train.jsonl", 8, prompt="Aufgabe", answer=None)
    run("init", *PAIR, "--data", "train.jsonl")
    assert recipe().data.prompt_column == "Aufgabe"


def test_text_that_the_tokenizer_does_not_know_is_said(folder):
    (folder / "train.jsonl").write_text('{"prompt": "ünknown"}\n')
    assert "1 of 1 hold text that the tokenizer does not know" in run("init", *PAIR, "--data", "train.jsonl")


def test_what_init_cannot_find_out_is_an_error_that_says_how_to_say_it(folder):
    (folder / "train.jsonl").write_text('{"left": "a", "right": "b"}\n')
    with pytest.raises(MissingColumnError, match=r"there are: left, right; .* --prompt-column NAME"):
        run("init", *PAIR, "--data", "train.jsonl")
    with pytest.raises(DataError, match="not every row has an answer"):
        held_out = write(folder / "other.jsonl", 2, prompt="left", answer=None)
        run("init", *PAIR, "--data", "train.jsonl", "--prompt-column", "left", "--held-out", str(held_out))
    with pytest.raises(ModelError, match="nowhere"):
        run("init", "--student", "embedded:nowhere", "--teacher", "embedded:teacher", "--data", "train.jsonl")
    assert not (folder / "recipe.toml").exists()


def test_init_overwrites_nothing(folder):
    (folder / "recipe.toml").write_text("# mine\n")
    with pytest.raises(ConfigError, match="recipe.toml exists"):
        run("init", *PAIR, "--data", "train.jsonl")


def test_where_all_weights_do_not_fit_there_are_adapters_and_where_these_do_not_it_is_said(folder, monkeypatch):
    write(folder / "train.jsonl", 8)
    monkeypatch.setattr("prune_opd.preflight.doctor._device_bytes", lambda device: 1)
    said = run("init", *PAIR, "--data", "train.jsonl", code=1)
    assert "FAILED memory" in said
    assert recipe().model.lora is not None and recipe().training.gradient_checkpointing
    assert recipe().training.learning_rate == 1e-4


# ---- demo ----


def test_demo_compares_the_two_arms_on_the_embedded_pair():
    small = ("training.steps=1", "rollout.prompts_per_step=2", "evaluation.num_problems=2")
    said = run("demo", "--output-dir", "demo", *(word for text in small for word in ("--set", text)))
    compared = json.loads(Path("demo/compare.json").read_text())
    assert [arm["arm"] for arm in compared["arms"]] == ["opd", "prune"]
    assert compared["recipe"]["model"]["model_name_or_path"] == "embedded:low-student"
    assert compared["recipe"]["evaluation"]["every"] == 20  # the demo's own, where --set says nothing else
    *_, verdict, last = said.rstrip().splitlines()
    assert verdict.startswith("prune trained in ") and "% right against " in verdict
    assert last == "report: demo/report.html"
