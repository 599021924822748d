"""docs/configuration.md and docs/errors.md against the code that they describe."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from prune_opd import errors
from prune_opd.config import TeacherSection, setting_names

ROOT = Path(__file__).resolve().parents[2]
ERRORS = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
CLASSES = {n: c for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.PruneOPDError)}
MESSAGES = re.findall(r"^\| `([^`]+)` \|", ERRORS, re.MULTILINE)


def texts_of_the_package() -> list[str]:
    """Every text literal in src/, with … for what an f-string fills in."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


TEXTS = texts_of_the_package()


def stands_in(message: str, text: str) -> bool:
    """Whether the fixed parts of the message follow one another in the text."""
    return re.search(".*".join(re.escape(part) for part in message.split("…")), text, re.DOTALL) is not None


def test_the_settings_page_is_in_step_with_the_settings():
    spec = importlib.util.spec_from_file_location("make_config_docs", ROOT / "scripts" / "make_config_docs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run `make docs`"


def test_the_settings_page_has_every_setting():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    listed, section = set(), ""
    for line in page.splitlines():
        if heading := re.match(r"## `(.+)`", line):
            section = heading[1]
        elif row := re.match(r"\| `(\w+)` \|", line):
            listed.add(f"{section}.{row[1]}")
    of_each_teacher = {f"model.teachers.{name}" for name in TeacherSection.model_fields}  # of a list, so not settings
    assert listed == set(setting_names()) - {"model.lora"} | of_each_teacher  # lora: a section that may be left out


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_class_has_its_part_with_the_built_in_that_it_is(name):
    parts = re.split(r"^## (\w+)$", ERRORS, flags=re.MULTILINE)
    text = dict(zip(parts[1::2], parts[2::2], strict=True))[name]
    for base in CLASSES[name].__bases__:
        if base is not errors.PruneOPDError:
            assert f"`{base.__name__}`" in text


def test_the_page_names_no_other_class():
    assert re.findall(r"^## (\w+)$", ERRORS, re.MULTILINE) == list(CLASSES)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_on_the_page_is_one_that_the_package_says(message):
    assert any(stands_in(message, text) for text in TEXTS)


def test_messages_are_found_and_a_wrong_one_is_not():
    assert len(MESSAGES) > 40
    assert not any(stands_in("setting … is not useable", text) for text in TEXTS)
