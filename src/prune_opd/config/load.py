"""Reading a recipe: TOML and the recipes it extends, `--set key=value`, and errors that name the line to change."""

from __future__ import annotations

import difflib
import re
import tomllib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prune_opd.config.rules import conflicts, secrets, settings_without_effect
from prune_opd.config.schema import Config
from prune_opd.config.words import Origins, explain, value_of
from prune_opd.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply ``key=value`` overrides (dotted key; see `value_of` for what a value may look like).

    Raises ConfigError with the file and line or the --set, the setting, what was expected and a value that works, or
    the nearest known name. Warns (UserWarning) of each setting that was written but has no effect.
    """
    settings, origins = _read_all(path, overrides)
    return parse_config(settings, where=str(path), origins=origins)


def placed(error: ConfigError, path: str | Path, overrides: Sequence[str]) -> ConfigError:
    """An error that was found after loading, with the place where a setting that it names was written, if any was."""
    place = _read_all(path, overrides)[1].place_of_any(str(error))
    return ConfigError(f"{place}: {error}") if place else error


def parse_config(settings: dict[str, Any], *, where: str, origins: Origins | None = None) -> Config:
    """Check a nested dict of settings; `where` names their origin in errors, and `origins` the place of each.

    Raises ConfigError, and warns of settings without effect, as `load_config` does.
    """
    origins = origins or Origins()
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(explain(error.errors(), origins, where)) from None
    for conflict in conflicts(config):
        raise ConfigError(f"{origins.place_of_any(conflict) or where}: {conflict}")
    for name in secrets(config.model_dump()):
        raise ConfigError(
            f"{origins.place(name.split('.')) or where}: {name} holds what looks like a password or key. Recipes "
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


def _read_all(path: str | Path, overrides: Sequence[str]) -> tuple[dict[str, Any], Origins]:
    """The settings of a recipe, of those that it extends and of the overrides, unchecked, and where they were said."""
    settings, files = _read(Path(path), ())
    sets: dict[str, str] = {}
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        if not equals:
            raise ConfigError(f"--set {override!r} has no '='; write it as key=value, for example training.steps=100")
        set_value(settings, key, value_of(key, text))
        sets = {key: text, **{name: earlier for name, earlier in sets.items() if name != key}}
    return settings, Origins(sets, files)


def _read(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], dict[Path, str]]:
    """The settings of a recipe and of those that it extends, and the text of each file, this one first."""
    try:
        path = path.resolve()
        text = path.read_text(encoding="utf-8-sig")  # Windows editors put a mark in front
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
            f"{path}{f':{line[1]}' if line else ''}: not valid TOML: {error}; repair the line, most often by quotes "
            "around a text"
        ) from None
    parent = settings.pop("extends", None)
    if parent is None:
        return settings, {path: text}
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends must be the path of another recipe as a string, got {parent!r}; give one")
    inherited, files = _read(path.parent / parent, (*chain, path))
    return merged(inherited, settings), {path: text, **files}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the settings of `over` in their place; a section in both keeps what `over` does not name."""
    both = dict(base)
    for key, value in over.items():
        both[key] = merged(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


def set_value(settings: dict[str, Any], name: str, value: Any) -> None:
    """Set a dotted name in nested settings, in place; makes the sections that are missing."""
    *parents, last = name.split(".")
    for key in parents:
        if not isinstance(settings.get(key), dict):
            settings[key] = {}
        settings = settings[key]
    settings[last] = value
