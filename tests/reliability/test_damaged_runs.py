"""Real run directories that something damaged: every command ends well or with an error of ours.

`PRUNE_OPD_FUZZ=50` multiplies the cases, and takes other ones each time.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from prune_opd.config import EvaluationSection, load_config
from prune_opd.errors import CheckpointError, ConfigError, PruneOPDError, RunLogError, StorageError
from prune_opd.experiments.compare import compare
from prune_opd.experiments.evaluate_model import evaluate_model
from prune_opd.experiments.replay import replay
from prune_opd.reporting.model_card import model_card
from prune_opd.reporting.report import write_report
from prune_opd.training.trainer import Trainer

from .kills import RECIPE, SMALL

TIMES = int(os.environ.get("PRUNE_OPD_FUZZ", "0"))
SETTINGS = [*SMALL, "training.keep_last=2", "evaluation.num_problems=1", "rollout.max_completion_length=24"]
QUIET = Console(quiet=True)
ODD = [None, True, -1, 0, 3, 2.5, 1e300, float("nan"), 10**30, "", "x", "auto", [], [1], ["x"], {}, {"a": 1}, [[]]]
LOGS = ["metrics.jsonl", "drift.jsonl", "rollouts.jsonl"]


def cases(count):
    return settings(
        max_examples=count * max(TIMES, 1),
        derandomize=not TIMES,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


seeds = st.integers(0, 2**32 - 1)


def changed_value(value, rng):
    """`value` with an entry, somewhere in it, dropped or replaced by one of another type."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(ODD)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if rng.random() < 0.3:
        del value[key]
    else:
        value[key] = changed_value(value[key], rng)
    return value


def damaged(content: bytes, name: str, rng: random.Random) -> bytes | None:
    """What a bad disk, an editor or another program makes of a file; None where it is gone."""
    how = rng.choice(["gone", "cut", "byte", "retype", "retype", "retype", "lines", "empty"])
    if how == "gone":
        return None
    if how == "empty" or not content:
        return b""
    if how == "cut":
        return content[: rng.randrange(len(content))]
    if how == "byte":
        at = rng.randrange(len(content))
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    lines = content.splitlines(keepends=True) if name.endswith(".jsonl") else [content]
    at = rng.randrange(len(lines))
    if how == "lines":
        return b"".join(rng.choice([lines[:at] + lines[at + 1 :], [*lines, lines[at]], lines[::-1]]))
    with contextlib.suppress(ValueError):  # it may be damaged already
        lines[at] = json.dumps(changed_value(json.loads(lines[at]), rng)).encode() + b"\n"
    return b"".join(lines)


def damage(folder: Path, names: list[str], seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(rng.choice([1, 1, 2])):
        path = folder / rng.choice(names)
        if path.is_file():
            content = damaged(path.read_bytes(), path.name, rng)
            path.unlink() if content is None else path.write_bytes(content)


def copied(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(folder, to))


def ends_well(action) -> bool:
    """Whether it ended without an error; any error but one of ours fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            action()
        except PruneOPDError as error:
            assert 20 < len(str(error)) < 2000, error
            return False
    return True


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    Trainer(load_config(RECIPE, [*SETTINGS, "training.steps=2"]), folder, console=QUIET).train()
    return folder


@pytest.fixture(scope="module")
def logs(run, tmp_path_factory):
    """The run without its checkpoints, which reports do not read."""
    folder = tmp_path_factory.mktemp("logs") / "run"
    return Path(shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints", "*.html", "README.md")))


ARMS = ["opd", "prune"]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison") / "both"
    compare(
        load_config(RECIPE, [*SETTINGS, "training.steps=1"]), arms=ARMS, seeds=[0], output_dir=folder, console=QUIET
    )
    return folder


@cases(150)
@given(seed=seeds)
def test_a_report_and_a_card_of_a_damaged_run(logs, tmp_path, seed):
    folder = copied(logs, tmp_path / "run")
    damage(folder, ["config.json", "env.json", *LOGS], seed)
    ends_well(lambda: write_report([folder], tmp_path / "report.html"))
    ends_well(lambda: model_card(folder))


@cases(40)
@given(seed=seeds)
def test_a_report_of_a_damaged_comparison(comparison, tmp_path, seed):
    if not (tmp_path / "whole").exists():
        shutil.copytree(comparison, tmp_path / "whole", ignore=shutil.ignore_patterns("checkpoints", "*.html", "*.svg"))
    folder = copied(tmp_path / "whole", tmp_path / "both")
    names = [f"{arm}-seed0/{name}" for arm in ARMS for name in ("config.json", "env.json", *LOGS)]
    damage(folder, ["compare.json", *names], seed)
    ends_well(lambda: write_report([folder], tmp_path / "report.html"))


@cases(150)
@given(seed=seeds)
def test_a_replay_of_a_damaged_run(logs, tmp_path, seed):
    folder = copied(logs, tmp_path / "run")
    damage(folder, ["config.json", "drift.jsonl"], seed)
    ends_well(lambda: replay(folder, thresholds=[], w_drops=[], metrics=[], top_ps=[], console=QUIET))


@pytest.mark.slow
@cases(20)
@given(seed=seeds)
def test_a_damaged_run_goes_on_or_says_why_not(run, tmp_path, seed):
    folder = copied(run, tmp_path / "run")
    names = ["config.json", "env.json", *LOGS]
    names += [f"checkpoints/step_2/{name}" for name in ("manifest.json", "trainer_state.json", "config.json")]
    damage(folder, names, seed)
    config = load_config(RECIPE, [*SETTINGS, "training.steps=3"])
    panel = Console(file=io.StringIO(), force_terminal=True)  # draws what the logs hold
    if ends_well(lambda: Trainer(config, folder, resume="auto", console=panel).train()):
        assert (folder / "checkpoints/step_3").is_dir()


@pytest.mark.slow
@cases(8)
@given(seed=seeds)
def test_a_damaged_comparison_goes_on_or_says_why_not(comparison, tmp_path, seed):
    folder = copied(comparison, tmp_path / "both")
    damage(folder, ["compare.json", *(f"{arm}-seed0/{name}" for arm in ARMS for name in ("config.json", *LOGS))], seed)
    config = load_config(RECIPE, [*SETTINGS, "training.steps=1"])
    ends_well(lambda: compare(config, arms=ARMS, seeds=[0], output_dir=folder, console=QUIET, resume=True))


@cases(40)
@given(seed=seeds)
def test_a_damaged_checkpoint_is_evaluated_or_says_why_not(run, tmp_path, seed):
    folder = copied(run / "checkpoints/step_2", tmp_path / "model")
    damage(folder, ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"], seed)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    asked = EvaluationSection(k=1, max_tokens=4)
    ends_well(
        lambda: evaluate_model(
            str(folder), "task:chain_sum", asked, tmp_path / "out", console=QUIET, num_problems=2, device="cpu"
        )
    )


# ---- what the errors say ----


@pytest.mark.parametrize(
    ("name", "spoil", "says"),
    [
        ("config.json", lambda text: "{}", r"config\.json: field model: Field required"),
        ("config.json", lambda text: "[]", r"config\.json: Input should be a valid dictionary"),
        (
            "config.json",
            lambda text: text.replace('"steps": 2', '"steps": "2"'),
            r"config\.json: field training\.steps: ",
        ),
        ("metrics.jsonl", lambda text: text + "5\n", r"metrics\.jsonl:4: Input should be a valid dictionary"),
        ("metrics.jsonl", lambda text: text.replace("eval/ci95", "eval/x"), r"metrics\.jsonl:1: field eval/x"),
        ("metrics.jsonl", lambda text: text.replace("eval/ci95", "time/x"), r"metrics\.jsonl:1: field time/x"),
        (
            "metrics.jsonl",
            lambda text: text.replace('"step": 1', '"step": "1"'),
            r"metrics\.jsonl:2: field step: .*'1'",
        ),
        (
            "rollouts.jsonl",
            lambda text: text.replace('"prompt": ', '"prompts": ', 1),
            r"rollouts\.jsonl:1: field prompt",
        ),
        (
            "drift.jsonl",
            lambda text: text.replace('"shared": ["', '"shared": ["0', 1),
            r"drift\.jsonl:1: field shared\.0",
        ),
        ("env.json", lambda text: "\udcff", r"env\.json: no JSON \(.*\); restore or remove it"),
    ],
)
def test_an_error_has_the_file_the_line_and_the_field(logs, tmp_path, name, spoil, says):
    folder = copied(logs, tmp_path / "run")
    text = (folder / name).read_text()
    (folder / name).write_text(spoil(text), errors="surrogateescape")
    with pytest.raises(RunLogError, match=says):
        write_report([folder], tmp_path / "report.html")


def test_logs_that_are_gone_are_said(run, tmp_path):
    folder = copied(run, tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    config = load_config(RECIPE, [*SETTINGS, "training.steps=3"])
    said = Console(record=True, file=io.StringIO())
    Trainer(config, folder, resume="auto", console=said)
    assert "metrics.jsonl is gone or empty, though the checkpoint is of step 2" in said.export_text().replace("\n", "")
    with pytest.raises(CheckpointError):
        (folder / "drift.jsonl").write_text("{}\n")
        Trainer(config, folder, resume="auto", console=QUIET)


@pytest.mark.parametrize(("steps", "says"), [(1, "training.steps = 1, but "), (2, None)])
def test_fewer_steps_than_a_run_has_are_refused_and_as_many_are_said(run, tmp_path, steps, says):
    folder = copied(run, tmp_path / "run")
    config, before = load_config(RECIPE, [*SETTINGS, f"training.steps={steps}"]), (folder / "config.json").read_bytes()
    said = Console(record=True, file=io.StringIO())
    if says:
        with pytest.raises(ConfigError, match=says):
            Trainer(config, folder, resume="auto", console=said).train()
        assert (folder / "config.json").read_bytes() == before
    else:
        Trainer(config, folder, resume="auto", console=said).train()
        assert "the run is finished, raise training.steps to go on" in said.export_text().replace("\n", " ")


def test_a_run_directory_is_evaluated_by_its_last_checkpoint(run, tmp_path):
    said = Console(record=True, file=io.StringIO())
    asked = EvaluationSection(k=1, max_tokens=4)
    evaluate_model(str(run), "task:chain_sum", asked, tmp_path / "out", console=said, num_problems=2, device="cpu")
    assert json.loads((tmp_path / "out/eval.json").read_text())["model"] == str(run / "checkpoints/step_2")
    assert f"{run} is a run directory; this is its last checkpoint" in said.export_text().replace("\n", "")
    empty = copied(run, tmp_path / "empty")
    shutil.rmtree(empty / "checkpoints")
    with pytest.raises(CheckpointError, match="is a run directory without a whole checkpoint"):
        evaluate_model(str(empty), "task:chain_sum", asked, tmp_path / "other", console=said, device="cpu")


@pytest.mark.parametrize("write", ["report", "replay"])
def test_an_output_in_a_folder_that_is_not_there(logs, tmp_path, write):
    nowhere = tmp_path / "nowhere" / "x"
    with pytest.raises(StorageError, match=f"^{nowhere} could not be written"):
        if write == "report":
            write_report([logs], nowhere)
        else:
            replay(logs, thresholds=[], w_drops=[], metrics=[], top_ps=[], console=QUIET, json_path=nowhere)


@pytest.mark.parametrize("command", ["train", "compare", "eval"])
def test_an_output_path_that_no_folder_can_have(tmp_path, command):
    long, config = tmp_path / ("x" * 300), load_config(RECIPE, SETTINGS)
    with pytest.raises(StorageError, match="no folder has a name of more than 255 bytes"):
        if command == "train":
            Trainer(config, long, console=QUIET)
        elif command == "compare":
            compare(config, arms=ARMS, seeds=[0], output_dir=long, console=QUIET)
        else:
            evaluate_model("nobody/nothing", "task:chain_sum", EvaluationSection(), long, console=QUIET)
