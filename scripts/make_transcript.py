"""Write docs/transcript.md: what a stranger types, what is printed, how long it takes. A real run in an empty folder.

    make wheel
    .venv/bin/python scripts/make_transcript.py

The folder has nothing but the wheel. Two of the models that come with the package stand in for the stranger's own.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "transcript.md"
HEAD = """# A stranger's transcript

From an empty folder with `python3` and the wheel to a report. Nothing is cut from what was printed but lines in the
middle, marked `[...]`. Made by `scripts/make_transcript.py`; {machine}. {load}

`my-student` and `my-teacher` are two of the models that come with the package, copied: put your own folders there.
"""
ASSETS = "env/lib/python3*/site-packages/prune_opd/assets"
DATA = """\
import itertools, json
from prune_opd.data.tasks import problems

for name, split, count in ("train", "train", 2000), ("test", "held_out", 100):
    with open(f"{name}.jsonl", "w") as file:
        for problem in itertools.islice(problems(split, 0), count):
            print(json.dumps({"question": problem.prompt, "gold": problem.answer}), file=file)
"""
STEPS = (
    (
        "Install",
        ("python3 -m venv env", "env/bin/pip install --quiet torch==2.13.0 *.whl", "source env/bin/activate"),
    ),
    ("The demo", ("prune-opd demo --output-dir runs/demo",)),
    (
        "Two models and a data file",
        (f"cp -r {ASSETS}/low-student my-student", f"cp -r {ASSETS}/teacher my-teacher", "python make_data.py"),
    ),
    ("A recipe", ("prune-opd init --student my-student --teacher my-teacher --data train.jsonl", "cat recipe.toml")),
    ("Before it costs anything", ("prune-opd doctor recipe.toml",)),
    (
        "Train",
        (
            "prune-opd train recipe.toml --output-dir runs/mine --set training.steps=10 "
            "--set training.learning_rate=5e-5 --set evaluation.k=1",
            "ls runs/mine",
        ),
    ),
    ("The report", ("prune-opd report runs/demo runs/mine --output both.html",)),
)
MOST_LINES = 70


def main() -> None:
    """See the module's text."""
    (wheel,) = (ROOT / "dist").glob("*.whl")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(wheel, folder)
        (folder / "make_data.py").write_text(DATA)
        machine = f"{os.cpu_count()} cores, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
        page = [HEAD.format(machine=machine, load=sys.argv[1] if len(sys.argv) > 1 else "")]
        for title, commands in STEPS:
            page.append(f"## {title}\n")
            if title.startswith("Two models"):
                page.append(f"`make_data.py`:\n\n```python\n{DATA}```\n")
            for command in commands:
                page.append(shown(command, folder))
        PAGE.write_text("\n".join(page), encoding="utf-8")
    print(f"wrote {PAGE}")


def shown(command: str, folder: Path) -> str:
    """A command with what it printed and its seconds; stops the script where the command fails."""
    path = f"{folder}/env/bin:{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"PATH": path, "COLUMNS": "110"}
    environment["PIP_CONFIG_FILE"] = os.devnull  # what this machine tells pip is of no interest
    started = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", command],  # noqa: S607
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{command}\n{done.stdout}")
    lines = re.sub(rf"{folder}/?", "", done.stdout).rstrip().splitlines()
    if len(lines) > MOST_LINES:
        lines = [*lines[:20], "[...]", *lines[-19:]]
    print(f"{time.monotonic() - started:.0f} s  {command}", flush=True)
    return "\n".join([f"```console\n$ {command}", *lines, f"```\n\n{time.monotonic() - started:.0f} s\n"])


if __name__ == "__main__":
    main()
