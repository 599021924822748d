"""Wheel, source archive, SBOM and provenance in dist/: `make release`, from a clean commit.

The archives are built twice and must be equal byte for byte, so that anyone can build them again and compare. The SBOM
lists what the lock files pin (CycloneDX, made by cyclonedx-py). The provenance is an unsigned in-toto statement with a
SLSA v1 predicate (https://slsa.dev/spec/v1.0/provenance): from which commit and lock files, with which tools.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LOCKS = ("requirements.lock", "torch-cpu.lock", "torch-cuda.lock", "constraints.txt")
TOOLS = ("build", "cyclonedx-bom")


def run(*command: str, **settings: Any) -> str:
    """What a command prints; its error ends the program."""
    return subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE, **settings).stdout.strip()


def build(folder: Path, epoch: str) -> list[Path]:
    """Build wheel and source archive into `folder`, with the commit's time in place of now."""
    run(sys.executable, "-m", "build", "--outdir", str(folder), env=os.environ | {"SOURCE_DATE_EPOCH": epoch})
    return sorted(folder.iterdir())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def provenance(products: Sequence[Path], *, commit: str, began: str, ended: str) -> dict[str, Any]:
    """The in-toto statement about `products`."""
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": path.name, "digest": {"sha256": sha256(path)}} for path in products],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "https://pypa-build.readthedocs.io",
                "externalParameters": {"command": "make release", "commit": commit},
                "internalParameters": {
                    "python": platform.python_version(),
                    "platform": platform.platform(),
                    **{tool: version(tool) for tool in TOOLS},
                },
                "resolvedDependencies": [
                    {"uri": "git+prune-opd", "digest": {"gitCommit": commit}},
                    *({"uri": name, "digest": {"sha256": sha256(ROOT / name)}} for name in LOCKS),
                ],
            },
            "runDetails": {
                "builder": {"id": "scripts/make_release.py"},
                "metadata": {"startedOn": began, "finishedOn": ended},
            },
        },
    }


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "dist")
    output = parser.parse_args().output_dir
    if changed := run("git", "status", "--porcelain"):
        sys.exit(f"a release is of a commit, and these files are not in one:\n{changed}\nCommit or stash them first")
    if output.exists() and any(output.iterdir()):
        sys.exit(f"{output} is not empty; delete it first (make clean), so that no old file is taken for a new one")
    began, commit, epoch = now(), run("git", "rev-parse", "HEAD"), run("git", "log", "-1", "--format=%ct")
    output.mkdir(parents=True, exist_ok=True)
    products = build(output, epoch)
    with tempfile.TemporaryDirectory() as again:
        for first, second in zip(products, build(Path(again), epoch), strict=True):
            if sha256(first) != sha256(second):
                sys.exit(f"two builds of {first.name} differ: it cannot be made again from its commit")
    sbom = output / "sbom.cdx.json"
    run(
        *(sys.executable, "-m", "cyclonedx_py", "requirements", "--output-reproducible"),
        *("--pyproject", "pyproject.toml", "--output-file", str(sbom), "requirements.lock"),
    )
    products.append(sbom)
    statement = provenance(products, commit=commit, began=began, ended=now())
    (output / "provenance.intoto.json").write_text(json.dumps(statement, indent=1) + "\n")
    for path in sorted(output.iterdir()):
        print(f"{path.stat().st_size:>10,}  {path}")


if __name__ == "__main__":
    main()
