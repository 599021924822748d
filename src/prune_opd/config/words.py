"""Settings as people write them: what they meant by `--set`, where they said it, and what they could have said."""

from __future__ import annotations

import difflib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from prune_opd.config.rules import SECRET
from prune_opd.config.schema import Config
from prune_opd.config.section import Section


def section_of(setting: FieldInfo) -> type[Section] | None:
    """The section that a setting is, optional or not; None for a value, and for a list of sections."""
    if get_origin(setting.annotation) is list:
        return None
    types = get_args(setting.annotation) or (setting.annotation,)
    return next((t for t in types if isinstance(t, type) and issubclass(t, Section)), None)


def setting_names(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings."""
    for name, setting in section.model_fields.items():
        inner = section_of(setting)
        if inner is not None:
            yield from setting_names(inner, f"{prefix}{name}.")
        if inner is None or type(None) in get_args(setting.annotation):
            yield f"{prefix}{name}"


def setting_of(keys: Sequence[Any]) -> tuple[FieldInfo | None, int]:
    """The setting or section that some keys lead to, None for one that there is not, and how many keys it took."""
    section: type[Section] | None = Config
    setting, taken = None, 0
    for key in keys:
        if section is None or key not in section.model_fields:
            break
        setting, taken = section.model_fields[key], taken + 1
        section = section_of(setting)
    return setting, taken


# ---- what was meant ----


def value_of(name: str, text: str) -> Any:
    """What `--set name=text` means: `text` as TOML, or the first other way to read it that the setting takes.

    A number, date or word is a text to a setting that holds text; 1e3 is a whole number, True is true; `a` or `a,b` is
    a list to a setting that holds one; nothing unsets a setting that can be unset.
    """
    keys = name.split(".")
    setting, taken = setting_of(keys)
    readings = list(_readings(text))
    if setting is None or taken < len(keys) or section_of(setting):
        return readings[0]
    takes: TypeAdapter[Any] = TypeAdapter(
        cast(Any, Annotated[setting.annotation, setting]), config=ConfigDict(strict=True, allow_inf_nan=False)
    )
    for reading in readings:
        try:
            takes.validate_python(reading)
        except ValidationError:
            continue
        return reading
    return readings[0]


def _readings(text: str) -> Iterator[Any]:
    first = _toml_value(text) if text else None  # nothing unsets what may be unset
    yield first
    if isinstance(first, float) and first.is_integer():
        yield int(first)
    yield text
    if text.lower() in ("true", "false"):
        yield text.lower() == "true"
    items = [part.strip() for part in text.removeprefix("[").removesuffix("]").split(",")]
    yield [_toml_value(item) for item in items]
    yield items


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


# ---- where it was said ----


@dataclass(frozen=True)
class Origins:
    """Where settings were written. sets: what each `--set` gave, by its key · files: the text of each recipe.

    The one that has the last word comes first.
    """

    sets: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[Path, str] = field(default_factory=dict)

    def place(self, keys: Sequence[Any], *, missing: bool = False) -> str | None:
        """`--set KEY=VALUE`, or file:line as far as reading line by line can tell; None where neither has it.

        missing: take the line of the section that should have it.
        """
        wanted = [str(key) for key in keys]
        found: list[tuple[int, str]] = []  # how many of the keys it shares, and the place
        for name, text in self.sets.items():
            shared = min(name.count(".") + 1, len(wanted))
            if name.split(".")[:shared] == wanted[:shared]:
                found.append((shared, f"--set {shown(f'{name}={text}')}"))
        for path, text in self.files.items():
            table: list[str] = []
            for number, line in enumerate(text.splitlines(), start=1):
                assigned_here = False
                if heading := re.match(r"\s*\[+([^\[\]]+)\]+", line):
                    table = [part.strip(" \"'") for part in heading[1].split(".")]
                    name_here = table
                elif assigned := re.match(r"\s*([\w.\"' -]+?)\s*=", line):
                    name_here, assigned_here = table + [part.strip(" \"'") for part in assigned[1].split(".")], True
                else:
                    continue
                shared = min(len(name_here), len(wanted))
                # A heading alone does not say that the setting is below it: it may have come by --set.
                if name_here[:shared] == wanted[:shared] and (assigned_here or shared == len(wanted) or missing):
                    found.append((shared, f"{path}:{number}"))
        return max(found, key=lambda pair: pair[0])[1] if found else None

    def place_of_any(self, text: str) -> str | None:
        """The place of the first setting that `text` names and that was written; of those from `--set` first."""
        places = []
        for name in re.findall(r"[a-z]\w*(?:\.[a-z]\w*)+", text):
            setting, taken = setting_of(keys := name.split("."))
            if setting is not None and taken == len(keys):
                section = section_of(setting)
                parts = [[*keys, word] for word in re.findall(r"\w+", text) if section and word in section.model_fields]
                places += [place for part in parts or [keys] if (place := self.place(part))]
        return min(places, key=lambda place: not place.startswith("--set"), default=None)


def shown(text: str) -> str:
    """A text as a message may repeat it: short, on one line, without secrets."""
    text = repr(SECRET.sub("…", text))[1:-1]
    return text if len(text) <= 200 else f"{text[:100]}…"


# ---- what could have been said ----


def explain(errors: Sequence[ErrorDetails], origins: Origins, where: str) -> str:
    """What pydantic found wrong, a line for each setting: its place, its value, what it takes, and one that works."""
    lines: dict[str, tuple[list[str], str]] = {}  # place and value: what is wrong with it, and what to do
    for error in errors:
        keys, missing = error["loc"], error["type"] == "missing"
        setting, taken = setting_of(keys)
        if error["type"] != "extra_forbidden" and not missing:  # pydantic adds which member of a union it tried
            keys = (*keys[:taken], *(key for key in keys[taken:] if isinstance(key, int)))
        name = ".".join(map(str, keys))
        place = origins.place(keys, missing=missing) or where
        subject, reason, advice = _mistake(name, error, setting, place)
        lines.setdefault(f"{place}: {subject}", ([], advice))[0].append(reason)
    return "\n".join(
        f"{subject}{' or '.join(dict.fromkeys(reasons))}; {advice}" for subject, (reasons, advice) in lines.items()
    )


def _mistake(name: str, error: ErrorDetails, setting: FieldInfo | None, place: str) -> tuple[str, str, str]:
    """(what, what is wrong with it, what to do)."""
    if error["type"] == "extra_forbidden":
        near = nearest(name)
        hint = f"did you mean {near}?" if near else "see docs/configuration.md for the settings there are"
        return f"unknown setting {shown(name)}", "", hint
    example = example_of(setting)
    if error["type"] == "missing":
        section, _, last = name.rpartition(".")
        line = f", for example {last} = {example} below [{section}]" if example else ""
        return f"setting {name} is required and missing", "", f"add it to the recipe{line}"
    message = error["msg"][0].lower() + error["msg"][1:]
    if example is None:
        own = next(n for n in setting_names() if n.startswith(f"{name}."))
        advice = f"it has settings of its own, write one of them, as {own}"
    elif place.startswith("--set"):
        setting_name = re.sub(r"(\.\d+)+\Z", "", name)  # of an entry of a list, the list
        advice = f"write for example --set {shlex.quote(f'{setting_name}={example}')}"
    else:
        advice = f"write for example {example}"
    return f"setting {name} = {shown(repr(error['input']))} is not usable: ", message, advice


def example_of(setting: FieldInfo | None) -> str | None:
    """A value that a setting takes, as TOML; None for a section."""
    if setting is None or section_of(setting):
        return None
    value = setting.examples[0] if setting.examples else setting.default
    assert value is not PydanticUndefined
    return _toml(value)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def nearest(name: str) -> str | None:
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
