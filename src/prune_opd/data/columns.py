"""What the columns of a row hold: the prompt, the gold answer, and what stands where it should be."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from prune_opd.data.rows import kind_of
from prune_opd.errors import DataError, MissingColumnError

PROMPT_COLUMNS = ("prompt", "messages", "problem", "question")
ANSWER_COLUMNS = ("reward_model.ground_truth", "answer")


def prompt_of(where: str, row: Mapping[str, Any], column: str | None) -> tuple[str, Any]:
    if column is not None:
        return column, named(where, row, column, "data.prompt_column")
    known = [name for name in PROMPT_COLUMNS if name in row]
    if known:
        name = next((name for name in known if row[name] is not None), known[0])
        return name, row[name]
    near = [name for name in row if difflib.get_close_matches(str(name).lower(), PROMPT_COLUMNS, n=1)]
    hint = f"is it {near[0]!r}? Then set" if near else "name the right one with"
    raise MissingColumnError(
        f"{where}: no prompt; expected one of the columns {', '.join(PROMPT_COLUMNS)}; "
        f"there are: {columns_text(row)}; {hint} data.prompt_column"
    )


def answer_of(where: str, row: Mapping[str, Any], column: str | None) -> str | None:
    if column is not None:
        value = named(where, row, column, "data.answer_column")
        if value is not None and not _is_scalar(value):
            raise DataError(
                f"{where}, column {column!r}: expected the gold as text or a number, got {kind_of(value)}; "
                "set data.answer_column to another column (a dot reaches into a struct)"
            )
    else:
        value = next((v for v in (lookup(row, name)[1] for name in ANSWER_COLUMNS) if _is_scalar(v)), None)
    if value is None or value != value:  # NaN is what a data frame has where there is nothing
        return None
    text = f"{value:f}" if isinstance(value, Decimal) else str(value).strip()
    check_characters(f"{where}, the gold answer", text)
    if worked := re.search(r"####[ \t]*(\S.*)\Z", text):
        return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", worked[1])
    return text or None


def lack_of(row: Mapping[str, Any], column: str | None) -> str:
    """What stands where the gold answer should."""
    for name in [column] if column else ANSWER_COLUMNS:
        there, value = lookup(row, name)
        if there:
            what = "empty" if isinstance(value, str) else "NaN" if isinstance(value, float) else kind_of(value)
            return f"column {name!r} holds {what}" if what != "empty" else f"column {name!r} is empty"
    return f"no column {' or '.join(map(repr, ANSWER_COLUMNS))}"


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float | Decimal) and not isinstance(value, bool)


def lookup(row: Mapping[str, Any], name: str) -> tuple[bool, Any]:
    """(whether it is there, its value); `a.b` is field b of struct a unless there is a column `a.b`."""
    if name in row:
        return True, row[name]
    head, dot, rest = name.partition(".")
    return lookup(row[head], rest) if dot and isinstance(row.get(head), Mapping) else (False, None)


def named(where: str, row: Mapping[str, Any], column: str, setting: str) -> Any:
    there, value = lookup(row, column)
    if not there:
        nearest = difflib.get_close_matches(column, map(str, row), n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"set {setting} to one of them"
        raise MissingColumnError(f"{where}: no column {column!r} ({setting}); there are: {columns_text(row)}; {hint}")
    return value


def columns_text(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


def check_characters(where: str, text: str) -> None:
    """DataError at what no text holds and no tokenizer takes: half of a surrogate pair, or NUL."""
    found = re.search("[\0\ud800-\udfff]", text)
    if found:
        raise DataError(
            f"{where}: character {found.start()} is U+{ord(found[0]):04X}, "
            f"{'NUL' if found[0] == chr(0) else 'half of a surrogate pair'}; expected text; repair or remove the row"
        )
