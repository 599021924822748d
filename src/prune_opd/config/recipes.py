"""The recipes that ship with the package: what there is, and a copy of one to change."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from prune_opd.errors import ConfigError, StorageError


def shipped() -> dict[str, Path]:
    """The files by name, as in `scale/1x8`: those in the wheel, or in a checkout those of its folder recipes/."""
    package = Path(str(files("prune_opd")))
    folder = next((f for f in (package / "recipes", package.parents[1] / "recipes") if f.is_dir()), package)
    paths = sorted(folder.rglob("*.toml"), key=lambda path: (len(path.relative_to(folder).parts), path))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def recipe_path(name: str) -> Path:
    """The file of a recipe that ships with the package; ConfigError for another name, with the nearest."""
    known = shipped()
    wanted = name.removesuffix(".toml").removeprefix("recipes/")
    if wanted not in known:
        ends = [other for other in known if other.rsplit("/", 1)[-1] == wanted]
        near = ends or difflib.get_close_matches(wanted, known, 1)
        hint = f"did you mean {near[0]}?" if near else "`prune-opd recipes` lists them"
        raise ConfigError(f"no recipe {name!r} ships with prune-opd; {hint}")
    return known[wanted]


def about(path: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    paragraph, _, _ = path.read_text(encoding="utf-8").partition("\n#\n")
    words = " ".join(line.removeprefix("# ") for line in paragraph.splitlines() if line.startswith("# "))
    return re.split(r"(?<=\.)\s", words, maxsplit=1)[0].rstrip(":.")


def copy_recipe(name: str, target: Path) -> list[Path]:
    """Copy a recipe to `target`, a folder or a file to be, and those that it extends beside it; returns what it wrote.

    Raises ConfigError where a file of that name is there and says something else, or there is no such recipe.
    """
    source = recipe_path(name)
    file = target if target.suffix == ".toml" else target / source.name
    copies = dict(_copies(source, file))
    for path, text in copies.items():
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise ConfigError(f"{path} exists and is another file; give another path: prune-opd recipes {name} PATH")
    try:
        for path, text in copies.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{error.filename}: cannot be written ({error.strerror}); give another path") from error
    return list(copies)


def _copies(source: Path, file: Path) -> Iterator[tuple[Path, str]]:
    """(path, text) of a recipe and of those that it extends, which lie beside it and are named so."""
    text = source.read_text(encoding="utf-8")
    parent = tomllib.loads(text).get("extends")
    if parent is None:
        yield file, text
        return
    beside = file.with_name(Path(parent).name)
    yield file, text.replace(f'extends = "{parent}"', f'extends = "{beside.name}"')
    yield from _copies(source.parent / parent, beside)
