"""Write docs/licences.md: every pinned package that is installed, its version and its licence as it states it.

python scripts/make_licences.py
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licences.md"
HEAD = """# Licences

prune-opd is under Apache-2.0 (LICENSE). It ships no code of the packages below: pip installs them, the first table
always, the second with the extras of pyproject.toml or because another package needs it. Versions are those of
constraints.txt, licences as each package states them. Written by scripts/make_licences.py.
"""


def licence_of(package: metadata.Distribution) -> str:
    """SPDX expression, else the classifiers, else the first line of the free text."""
    fields = package.metadata
    if expression := fields.get("License-Expression"):
        return expression
    classifiers = [c.rsplit(" :: ", 1)[-1] for c in fields.get_all("Classifier") or [] if c.startswith("License :: ")]
    classifiers = [c for c in classifiers if c != "OSI Approved"]
    text = (fields.get("License") or "").strip().splitlines()
    stated = ", ".join(dict.fromkeys(classifiers)) or (text[0][:60] if text else "")
    return stated or "not stated in its metadata"


def page() -> str:
    """The text of docs/licences.md."""
    project = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert project is not None
    direct = {Requirement(name).name.lower() for name in re.findall(r'"([^"]+)"', project[1])}
    rows: dict[bool, list[str]] = {True: [], False: []}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name = Requirement(line).name
            try:
                package = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                stated = "not installed where this page was made"
            else:
                stated = licence_of(package)
            rows[name.lower() in direct].append(f"| {name} | {line.partition('==')[2]} | {stated} |")
    tables = ["\n".join(["| package | version | licence |", "|---|---|---|", *rows[kind]]) for kind in (True, False)]
    return f"{HEAD}\n## Always\n\n{tables[0]}\n\n## With extras, or needed by others\n\n{tables[1]}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
