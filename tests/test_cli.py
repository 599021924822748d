"""The command line as a person meets it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import typer.main

from prune_opd.cli import app, main
from prune_opd.config import setting_names

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
RECIPE = """
[model]
model_name_or_path = "someone/Student-1B"
teacher_model_name_or_path = "someone/Teacher-7B"
[data]
train = "prompts.jsonl"
[training]
steps = 40
"""
COLUMNS = ["--prompt-column", "Question", "--answer-column", "Key"]


class Done(NamedTuple):
    """How a run of the program ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def prune_opd(recipe, monkeypatch, capsys):
    """Run the program's entry point in the folder of `recipe`, as the shell would."""
    monkeypatch.chdir(recipe.parent)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back what the program sets

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["prune-opd", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return Done(end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_examples_that_it_accepts(command):
    """Every example is parsed by the command itself: its options exist and its arguments are complete."""
    group = typer.main.get_command(app)
    found = group.commands[command]  # type: ignore[attr-defined]
    examples = re.findall(r"^prune-opd (\S+) (.+)$", found.epilog or "", re.MULTILINE)
    assert examples, f"prune-opd {command} --help shows no example"
    for name, arguments in examples:
        assert name == command
        found.make_context(name, arguments.split())


def test_help_answers(prune_opd):
    done = prune_opd("--help")
    assert done.code == 0
    assert all(command in done.out for command in COMMANDS)


def test_help_does_not_load_torch(tmp_path):
    code = "import sys, prune_opd.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.toml"], "no such recipe"),
        (["recipe.toml", "--set", "training.stepps=3"], "did you mean training.steps?"),
        (["recipe.toml", "--set", "pruning.threshold=7"], "pruning.threshold = 7"),
        (["recipe.toml", "--set", "training.steps"], "has no '='"),
    ],
)
def test_an_error_is_one_message_without_a_traceback(prune_opd, command, arguments, message):
    done = prune_opd(command, *arguments)
    assert done.code == 1
    assert done.err.startswith("ConfigError: ")
    assert message in done.err
    assert "Traceback" not in done.err + done.out


def test_a_wrong_option_is_a_usage_error(prune_opd):
    done = prune_opd("train", "recipe.toml", "--dryrun")
    assert done.code == 2
    assert "--dry-run" in done.err  # the nearest option


def test_a_run_directory_that_exists_is_refused_before_anything_is_loaded(prune_opd, recipe):
    (recipe.parent / "mine").mkdir()
    (recipe.parent / "mine" / "metrics.jsonl").write_text("{}\n")
    done = prune_opd("train", "recipe.toml", "--output-dir", "mine")
    assert done.code == 1
    assert done.err.startswith("RunDirectoryError: mine exists")
    assert (recipe.parent / "mine" / "metrics.jsonl").read_text() == "{}\n"


def test_dry_run_prints_the_plan_and_writes_nothing(prune_opd, recipe):
    done = prune_opd("train", "recipe.toml", "--dry-run", "--set", "training.steps=30")
    assert done.code == 0, done.err
    assert re.search(r"^ +steps +30, each of 64 prompts x 4 = 256 rollouts$", done.out, re.MULTILINE)
    assert re.search(r"^ +training.steps +30$", done.out, re.MULTILINE)
    assert re.search(r"^ +tracking.report_to +\[\]$", done.out, re.MULTILINE)  # not taken for markup
    assert done.err == ""
    assert [path.name for path in recipe.parent.iterdir()] == ["recipe.toml"]


def test_a_setting_without_effect_warns_on_the_error_stream(prune_opd, recipe):
    done = prune_opd("train", "recipe.toml", "--dry-run", "--set", "evaluation.k=3")
    assert done.code == 0
    assert done.err.startswith("warning: ")
    assert "evaluation.k has no effect" in done.err
    assert "Traceback" not in done.err


def test_auto_resume_wants_the_run_to_go_on_with(prune_opd, recipe):
    done = prune_opd("train", "recipe.toml", "--resume", "auto")
    assert done.code == 1 and done.err.startswith("ConfigError: --resume auto needs --output-dir"), done.err
    for name in ("recipe-20260101-000000", "recipe-20260102-000000", "other-20260103-000000"):
        (recipe.parent / "runs" / name).mkdir(parents=True)
        (recipe.parent / "runs" / name / "config.json").write_text("{}")
    done = prune_opd("train", "recipe.toml", "--resume", "auto")
    assert "runs/recipe-20260102-000000 is the newest of this recipe" in done.err


def test_a_device_that_is_not_here_is_placed_by_every_command(prune_opd):
    for command, *more in (["train", "--dry-run"], ["train"], ["compare"]):
        done = prune_opd(command, "recipe.toml", *more, "--set", "training.device=gpu7", "--set", "evaluation.data=x")
        assert done.code == 1 and "Traceback" not in done.err, (command, done.err)
        place = "ConfigError: --set training.device=gpu7: training.device = 'gpu7' is no device of this machine"
        assert done.err.startswith(place), (command, done.err)
    pair = [f"model.{name}model_name_or_path=embedded:teacher" for name in ("", "teacher_")]
    settings = [word for setting in [*pair, "data.train=task:chain_sum"] for word in ("--set", setting)]
    done = prune_opd("doctor", "recipe.toml", "--prompts", "0", *settings, "--set", "training.device=gpu7")
    assert done.code == 1 and "FAILED device: training.device = 'gpu7' is no device" in done.out
    done = prune_opd("eval", "nobody/nothing", "--benchmark", "task:chain_sum", "--device", "gpu7")
    assert done.code == 1 and done.err.startswith("ConfigError: --device = 'gpu7' is no device of this machine")


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([{"Question": "1+1=", "Key": "2"}], [], "Then set --prompt-column"),
        ([{"Question": "1+1=", "Key": "2"}], ["--prompt-column", "Question"], "--answer-column"),
        ([{"Question": "1+1=", "Key": "2"}], ["--prompt-column", "question"], "'question' (--prompt-column)"),
        (
            [{"Question": "1+1=", "Key": [2]}],
            COLUMNS,
            "--answer-column",
        ),
        ([{"Question": "1+1=", "Key": "2"}], COLUMNS, None),
        ([], [], "no row"),
    ],
)
def test_eval_reads_any_columns_and_speaks_of_its_own_options(prune_opd, recipe, rows, options, says):
    (recipe.parent / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "embedded:low-student",
        "--benchmark",
        "exam.jsonl",
        "--k",
        "1",
        "--max-tokens",
        "4",
        "--device",
        "cpu",
    ]
    done = prune_opd("eval", *arguments, *options)
    assert done.code == (1 if says else 0), done.err
    assert (says or "") in done.err
    assert not [name for name in setting_names() if re.search(rf"\b{re.escape(name)}\b", done.err)]
