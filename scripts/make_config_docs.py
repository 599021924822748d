"""Write docs/configuration.md from the settings themselves: `make docs`. A test holds that the two agree."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prune_opd.config import Config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

HEAD = """\
# Settings

A recipe is a TOML file with the sections below. Only `model` and `data` need settings; everything else has a default,
which is the paper's where the paper has one. `prune-opd train RECIPE --dry-run` prints all settings as a run would use
them.

- `extends = "other.toml"` at the top takes the settings of another recipe first; the path is relative to the recipe.
- `--set key=value` changes one setting on the command line: `--set pruning.threshold=0.8`. The value is TOML, or what
  people type: `1e3` for a whole number, `True`, a word, a path or `2024` for a text, `wandb` or `a,b` for a list,
  nothing to unset.
- An unknown setting is an error that names the nearest known one. A setting that has no effect in a recipe warns.

This page is written by `make docs`; the words are those of `src/prune_opd/config`.
"""


def page() -> str:
    """The whole page."""
    schema = Config.model_json_schema()
    return "\n".join([HEAD, *_sections(schema, schema["$defs"], "")])


def _sections(section: dict[str, Any], sections: dict[str, Any], prefix: str) -> Iterator[str]:
    """The table of a section, then those of the sections in it."""
    settings, inner = {}, {}
    for name, setting in section["properties"].items():
        found = _reference(setting)
        (settings if found is None else inner)[name] = setting if found is None else sections[found]
        if "items" in setting and found:
            settings[name] = setting
    if settings:
        yield "| setting | value | default | |\n|---|---|---|---|"
        for name, setting in settings.items():
            cells = (f"`{name}`", _values(setting), _default(setting, name in section.get("required", ())))
            yield f"| {' | '.join(cells)} | {setting['description'].replace('|', '&#124;')} |"
        yield ""
    for name, found in inner.items():
        yield f"## `{prefix}{name}`\n\n{found['description']}\n"
        yield from _sections(found, sections, f"{prefix}{name}.")


def _reference(setting: dict[str, Any]) -> str | None:
    """The section that a setting is, or is a list of; optional ones included."""
    for choice in (setting, setting.get("items", {}), *setting.get("anyOf", ())):
        if "$ref" in choice:
            return choice["$ref"].rsplit("/", 1)[-1]
    return None


def _values(setting: dict[str, Any]) -> str:
    """What a setting may be, in words."""
    choices = [choice for choice in setting.get("anyOf", ()) if choice.get("type") != "null"]
    if choices:
        return " or ".join(_values(choice) for choice in choices)
    if "enum" in setting or "const" in setting:
        return ", ".join(f"`{value}`" for value in setting.get("enum", [setting.get("const")]))
    if setting["type"] == "array":
        return "list of tables" if "$ref" in setting["items"] else f"list of {_values(setting['items'])}"
    words = {"string": "text", "integer": "integer", "number": "number", "boolean": "true, false", "object": "table"}
    marks = {"exclusiveMinimum": "> ", "minimum": "≥ ", "exclusiveMaximum": "< ", "maximum": "≤ "}
    limits = [f"{sign}{setting[mark]:g}" for mark, sign in marks.items() if mark in setting]
    return " ".join([words[setting["type"]], ", ".join(limits)]).strip()


def _default(setting: dict[str, Any], required: bool) -> str:
    if required:
        return "required"
    value = setting["default"]
    return "not set" if value is None else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
