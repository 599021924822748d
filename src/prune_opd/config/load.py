"""Reading a recipe: TOML and the recipes it extends, `--set key=value`, and errors that name the line to change."""

from __future__ import annotations

import difflib
import re
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from prune_opd.config.rules import conflicts, secrets, settings_without_effect
from prune_opd.config.schema import Config, Section
from prune_opd.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply ``key=value`` overrides (dotted key, TOML value; bare words are strings).

    Raises ConfigError with the file, the setting, what was expected and the nearest known name. Warns (UserWarning)
    of each setting that was written but has no effect.
    """
    settings, files = _read(Path(path), ())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override!r} has no '='; write it as key=value, for example training.steps=100")
        set_value(settings, key.strip(), _toml_value(text.strip()))
    return parse_config(settings, where=str(path), files=files)


def parse_config(settings: dict[str, Any], *, where: str, files: Mapping[Path, str] | None = None) -> Config:
    """Check a nested dict of settings; `where` names their origin in errors.

    files: the text of each recipe that they came from, the one that has the last word first. With it, errors name the
    line. Raises ConfigError, and warns of settings without effect, as `load_config` does.
    """
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(
                f"{_place(e['loc'], files or {}, missing=e['type'] == 'missing') or where}: {_explain(e)}"
                for e in error.errors()
            )
        ) from None
    for conflict in conflicts(config):
        raise ConfigError(f"{where}: {conflict}")
    for name in secrets(config.model_dump()):
        raise ConfigError(
            f"{_place(name.split('.'), files or {}) or where}: {name} holds what looks like a password or key. Recipes "
            "are copied into config.json and shared, so it must not stand there: put it into an environment variable "
            "(HF_TOKEN, WANDB_API_KEY)"
        )
    for setting, reason in settings_without_effect(config):
        warnings.warn(f"{where}: {setting} has no effect: {reason}", UserWarning, stacklevel=3)
    return config


def with_settings(config: Config, **changes: Any) -> Config:
    """A copy with dotted settings changed, checked again: ``with_settings(config, **{"training.seed": 1})``."""
    settings = config.model_dump(exclude_unset=True)
    for name, value in changes.items():
        set_value(settings, name, value)
    return parse_config(settings, where="changed settings")


def _place(keys: Sequence[Any], files: Mapping[Path, str], *, missing: bool = False) -> str | None:
    """file:line where a setting is written, as far as reading line by line can tell; None where no line has it.

    missing: take the line of the section that should have it.
    """
    wanted = [str(key) for key in keys]
    found: list[tuple[int, str]] = []  # how many of the keys the line shares, and the place
    for path, text in files.items():
        table: list[str] = []
        for number, line in enumerate(text.splitlines(), start=1):
            assigned_here = False
            if heading := re.match(r"\s*\[+([^\[\]]+)\]+", line):
                table = [part.strip(" \"'") for part in heading[1].split(".")]
                name = table
            elif assigned := re.match(r"\s*([\w.\"' -]+?)\s*=", line):
                name, assigned_here = table + [part.strip(" \"'") for part in assigned[1].split(".")], True
            else:
                continue
            shared = min(len(name), len(wanted))
            # A heading alone does not say that the setting is below it: it may have come by --set.
            if name[:shared] == wanted[:shared] and (assigned_here or shared == len(wanted) or missing):
                found.append((shared, f"{path}:{number}"))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _read(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], dict[Path, str]]:
    """The settings of a recipe and of those that it extends, and the text of each file, this one first."""
    try:
        path = path.resolve()
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; give the path of a TOML recipe"
        raise ConfigError(f"{path}: no such recipe{hint}") from None
    except (OSError, ValueError) as error:  # not UTF-8, a folder, a name that no file can have
        raise ConfigError(f"{path}: cannot be read as a UTF-8 text file: {error}; give a TOML recipe") from None
    if path in chain:
        raise ConfigError(f"{path}: recipes extend each other in a circle; remove one `extends`")
    try:
        settings = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        line = re.search(r"at line (\d+)", str(error))
        raise ConfigError(
            f"{path}{f':{line[1]}' if line else ''}: not valid TOML: {error}; repair the line, most often by quotes"
        ) from None
    parent = settings.pop("extends", None)
    if parent is None:
        return settings, {path: text}
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends must be the path of another recipe as a string, got {parent!r}; give one")
    inherited, files = _read(path.parent / parent, (*chain, path))
    return _merge(inherited, settings), {path: text, **files}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the settings of `over` in their place; a section in both keeps what `over` does not name."""
    both = dict(base)
    for key, value in over.items():
        both[key] = _merge(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


def set_value(settings: dict[str, Any], name: str, value: Any) -> None:
    """Set a dotted name in nested settings, in place; makes the sections that are missing."""
    *parents, last = name.split(".")
    for key in parents:
        if not isinstance(settings.get(key), dict):
            settings[key] = {}
        settings = settings[key]
    settings[last] = value


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def setting_names(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings."""
    for name, field in section.model_fields.items():
        types = get_args(field.annotation) or (field.annotation,)
        inner = next((t for t in types if isinstance(t, type) and issubclass(t, Section)), None)
        if inner is not None:
            yield from setting_names(inner, f"{prefix}{name}.")
        if inner is None or type(None) in types:
            yield f"{prefix}{name}"


def _explain(error: ErrorDetails) -> str:
    """One mistake that pydantic found, in words of a recipe."""
    # pydantic also names the member of a union that it tried, as in list[str] or constrained-float.
    parts = (str(part) for part in error["loc"])
    name = ".".join(part for part in parts if "[" not in part and not part.startswith("constrained-"))
    if error["type"] == "extra_forbidden":
        near = _nearest(name)
        hint = f"did you mean {near}?" if near else "see docs/configuration.md for the settings there are"
        return f"unknown setting {name}; {hint}"
    if error["type"] == "missing":
        return f"setting {name} is required and missing; add it to the recipe"
    message = error["msg"][0].lower() + error["msg"][1:]
    written = repr(error["input"])
    written = written if len(written) <= 200 else f"{written[:200]}…"
    return f"setting {name} = {written} is not usable: {message}; change it"


def _nearest(name: str) -> str | None:
    """The setting that an unknown name most likely means, if any is like it."""
    known = [*setting_names(), *Config.model_fields]
    section, _, last = name.rpartition(".")

    def like_it(names: list[str]) -> list[str]:
        ends = {n.rpartition(".")[-1]: n for n in reversed(names)}
        return [ends[end] for end in difflib.get_close_matches(last, ends, 1, cutoff=0.75)]

    found = [
        *like_it([n for n in known if n.rpartition(".")[0] == section]),  # misspelt in its own section
        *(n for n in known if n.rpartition(".")[-1] == last),  # right, but in another section
        *difflib.get_close_matches(name, known, 1, cutoff=0.75),
        *like_it(known),
    ]
    return next(iter(found), None)
