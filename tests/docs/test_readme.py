"""What the README tells people to type works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prune_opd.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
SHORT = {  # the same command, over in seconds
    "doctor": "--prompts 2",
    "train": "--set training.steps=1 --set rollout.prompts_per_step=2 --set evaluation.num_problems=2",
    "compare": "--set training.steps=1 --set rollout.prompts_per_step=2 --set evaluation.num_problems=2 --seeds 1",
    "eval": "--num-problems 2 --k 1 --max-tokens 322",
}


def test_the_two_commands_come_first_and_are_make_targets():
    assert COMMANDS[:2] == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    for command in COMMANDS:
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:.*##", makefile, re.MULTILINE), command


@pytest.mark.parametrize("command", [c for c in COMMANDS if "prune-opd" in c])
def test_commands_run(command, tmp_path, monkeypatch):
    _, name, *arguments = shlex.split(command)
    arguments = [str(ROOT / a) if a.startswith("recipes/") else a for a in arguments]
    monkeypatch.chdir(tmp_path)
    short = [] if "--dry-run" in arguments else shlex.split(SHORT[name])
    done = CliRunner().invoke(app, [name, *arguments, *short], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_the_python_example_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs/two-steps/checkpoints/step_2/model.safetensors").is_file()


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link
