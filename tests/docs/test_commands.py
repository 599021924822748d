"""The commands of the documentation's pages, in their order, on each page in a folder of its own.

A page's ```bash blocks may only have commands that are known here. Ours run, shortened to seconds where they would
train, and as a dry run where they name models that are not on this machine. Those of benchmarks.md are parsed.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from itertools import islice, pairwise
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

import prune_opd
from prune_opd.cli import app
from prune_opd.config import load_config
from prune_opd.data.tasks import problems
from prune_opd.experiments.arms import check_arms

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ELSEWHERE = {"evidence.md", "scaling.md", "gpu.md"}  # test_evidence.py, tests/integrations/test_verl.py, tests/gpu
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if "```bash" in path.read_text() and path.name not in ELSEWHERE]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
OTHERS = {"vllm": "serve", "export": ""}  # not ours, and nothing to check here

SMALL = "--set training.steps=1 --set rollout.prompts_per_step=1 --set rollout.num_generations=2"
EVALUATION = " --set evaluation.num_problems=2 --set evaluation.k=1 --set evaluation.max_tokens=64"
SHORT = {  # the same command, over in seconds
    "demo": SMALL + EVALUATION,
    "train": SMALL,
    "compare": f"{SMALL}{EVALUATION} --seeds 1 --arms opd,prune",
    "doctor": "--prompts 2",
}


def commands(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def parsed(arguments: list[str]) -> None:
    """Hold a command's options and its recipe against the program, and run nothing."""
    name, recipe, *rest = arguments
    settings = typer.main.get_command(app).commands[name].make_context(name, [recipe, *rest]).params  # type: ignore[attr-defined]
    config = load_config(recipe, settings["set_"])
    if name == "compare":
        check_arms(config, settings["arms"].split(","), references=False)


def ours(arguments: list[str]) -> None:
    """Run a command of prune-opd, made short."""
    name, *rest = arguments
    more = shlex.split(SHORT.get(name, ""))
    if name in ("train", "doctor", "compare"):
        config = load_config(rest[0], [value for flag, value in pairwise(rest) if flag == "--set"])
        here = config.model.model_name_or_path
        served = config.model.teacher_model_server_url is not None
        if served or not (here.startswith("embedded:") or Path(here).is_dir()):
            if name == "doctor":  # it would ask the network
                return
            name, more = "train", [] if "--dry-run" in rest else ["--dry-run"]
        elif config.evaluation.data and name != "doctor":
            more += shlex.split(EVALUATION)
        if name == "train" and "--output-dir" in rest:
            at = rest.index("--output-dir") + 1
            rest[at] = rest[at].lstrip("/")
    done = CliRunner().invoke(app, [name, *rest, *more], catch_exceptions=False)
    assert done.exit_code == 0, f"{shlex.join(arguments)}\n{done.output}"


def in_a_container(arguments: list[str]) -> None:
    """What `docker build` reads is there; of `docker run` it is our command that is run."""
    match arguments:
        case ["build", "-f", file, "-t", _, *more, "."]:
            text = (ROOT / file).read_text(encoding="utf-8")
            given = [value for flag, value in pairwise(more) if flag == "--build-arg"]
            assert len(more) == 2 * len(given) and all(f"ARG {value.partition('=')[0]}=" in text for value in given)
        case ["run", *_]:
            at = max(
                i for i, word in enumerate(arguments) if word.startswith(("prune-opd", "/opt/prune-opd/bin/prune-opd"))
            )
            ours(arguments[at + 1 :])
        case _:
            raise AssertionError(f"docker {shlex.join(arguments)}: not known to this test")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with what the pages call the reader's own: two models, prompts; and the recipes."""
    monkeypatch.chdir(tmp_path)
    assets = Path(prune_opd.__file__).parent / "assets"
    for name, there in {"my-student": assets / "low-student", "my-teacher": assets / "teacher"}.items():
        (tmp_path / name).symlink_to(there)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    found = list(islice(problems("train", 0), 8))
    for name, prompt, answer in (("prompts", "prompt", "answer"), ("odd", "left", "right")):
        rows = [{prompt: problem.prompt, answer: problem.answer} for problem in found]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name in ("quickstart", "recipe"):
        (tmp_path / f"{name}.toml").write_text((ROOT / "recipes/quickstart.toml").read_text())
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_commands_run_in_their_order(page, folder):
    found = commands(page)
    if any("prune-opd init" in command for command in found):
        (folder / "recipe.toml").unlink()
    if any(command.startswith("prune-opd recipes quickstart") for command in found):
        (folder / "quickstart.toml").unlink()
    for command in found:
        first, *rest = shlex.split(command)
        match first:
            case "prune-opd":
                (parsed if page.name == "benchmarks.md" else ours)(rest)
            case "torchrun":
                ours(shlex.split(command.partition("$(which prune-opd)")[2]))
            case "make":
                assert re.search(rf"^{rest[0]}:.*##", MAKEFILE, re.MULTILINE), command
            case "pip":
                assert rest[0] == "install"
                for package in rest[1:]:
                    extra = re.fullmatch(r"prune-opd\[(\w+)\]", package)
                    wheel = f"dist/prune_opd-{PROJECT['version']}-py3-none-any.whl"
                    assert package in (wheel, "verl[vllm]") or extra and extra[1] in PROJECT["optional-dependencies"]
            case "docker":
                in_a_container(rest)
            case "sbatch":
                assert (ROOT / rest[0]).is_file(), command
            case "kubectl":
                assert rest[:2] in (["create", "secret"], ["apply", "-f"]), command
                assert rest[0] == "create" or (ROOT / rest[2]).is_file(), command
            case _ if first.rpartition("/")[2] == "python":
                assert (ROOT / rest[0]).is_file(), command
            case _:
                assert first in OTHERS and rest[0].startswith(OTHERS[first]), f"{command}: not known to this test"


def test_a_wrong_command_is_found(folder):
    with pytest.raises(AssertionError, match="No such option"):
        ours(["train", "quickstart.toml", "--steps", "3"])


def test_the_blocks_are_found():
    assert len(PAGES) >= 10 and sum(len(commands(page)) for page in PAGES) > 35


@pytest.mark.slow
@pytest.mark.parametrize("name", ["guides/from-trl.md", "api.md"])
def test_python_examples_run(name, folder):
    if "trl" in name:
        pytest.importorskip("trl", reason="TRL is not installed: make setup-trl")
    (code,) = re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(code, name, "exec"), {})
