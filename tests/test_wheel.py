"""The wheel, installed where nothing of the repository is: it brings recipes, models, templates and kernels with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from itertools import islice
from pathlib import Path

import pytest

from prune_opd.data.tasks import problems

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "prune_opd"


def call(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_every_file_of_the_package_and_every_recipe(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = [name for name in tracked.stdout.splitlines() if (ROOT / name).is_file()]
    expected = {name.removeprefix("src/") for name in names if name.startswith("src/prune_opd/")}
    assert held == expected | {f"prune_opd/{name}" for name in names if name.startswith("recipes/")}


@pytest.mark.slow
def test_a_stranger_gets_from_the_wheel_to_a_report(wheel, tmp_path):
    """In a virtual environment that borrows our dependencies, but not this package, since .pth files do not chain."""
    call(sys.executable, "-m", "venv", "--without-pip", "env", cwd=tmp_path)
    site = tmp_path / "env/lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"])
    installed = ["install", "--no-deps", "--no-index", "--quiet", wheel]
    call(sys.executable, "-m", "pip", "--python", tmp_path / "env/bin/python", *installed, cwd=tmp_path)
    away, program = tmp_path / "away", tmp_path / "env/bin/prune-opd"
    away.mkdir()
    where = call(tmp_path / "env/bin/python", "-c", "import prune_opd; print(prune_opd.__file__)", cwd=away)
    assert Path(where.strip()).is_relative_to(site)

    assert "quickstart" in call(program, "recipes", cwd=away)
    call(program, "recipes", "quickstart", cwd=away)
    assert (away / "quickstart.toml").read_text() == (ROOT / "recipes/quickstart.toml").read_text()

    rows = [{"question": p.prompt, "answer": p.answer} for p in islice(problems("train", 0), 8)]
    (away / "mine.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    pair = ["--student", "embedded:low-student", "--teacher", "embedded:teacher"]
    call(program, "init", *pair, "--data", "mine.jsonl", cwd=away)
    assert "mine.jsonl" in call(program, "train", "recipe.toml", "--dry-run", cwd=away)

    small = ("training.steps=1", "rollout.prompts_per_step=2", "evaluation.num_problems=2")
    call(program, "demo", "--output-dir", "demo", *(word for text in small for word in ("--set", text)), cwd=away)
    assert "</html>" in (away / "demo/report.html").read_text()
