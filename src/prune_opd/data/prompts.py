"""Prompts from files and data sets, tokenised the way the student will see them.

Rows keep their order and their duplicates (DAPO-Math-17K has some): what a benchmark holds is what is
measured, and what a recipe trains on is its author's choice.
"""

from __future__ import annotations

import codecs
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from prune_opd.config import DataSection
from prune_opd.errors import DataError, MissingColumnError
from prune_opd.types import Prompt

PROMPT_COLUMNS = ("prompt", "messages", "problem", "question")
ANSWER_COLUMNS = ("reward_model.ground_truth", "answer")
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
NO_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
SPLIT_WORDS = {"train", "training", "test", "validation", "valid", "val", "dev", "eval"}

MUCH_SPACE = 1_000_000  # characters of white space in one prompt that are tokenised to see what is left of them

Row = tuple[str, Mapping[str, Any]]  # where it stands, for messages, and its columns
Chat = list[dict[str, str]]


@dataclass(frozen=True)
class PromptSet:
    """What was loaded, in the order of the source, and how many prompts were too long."""

    prompts: tuple[Prompt, ...]
    dropped_too_long: int


def load_prompts(data: DataSection, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """Read, render and tokenise the prompts of `data.train`.

    data.train: a JSONL or parquet file (taken whole, whatever `data.split` says), a folder of those or one written by
    `save_to_disk`, or a Hub id (`owner/name`, or `owner/name:config`).

    The prompt is a string or a chat list of {role, content}, in `prompt_column` or else the first of `prompt`,
    `messages`, `problem`, `question` that a row has. Assistant turns at the end of a chat are the answer and are left
    out. A chat goes through the tokenizer's chat template with a generation prompt. So does a string, as one user
    turn, when the tokenizer has a template; without one it is tokenised as it is.

    The gold answer is `answer_column` (a dot reaches into a struct), or else `reward_model.ground_truth` or
    `answer` where that is text or a number. Of worked answers that end in `#### N`, N is kept, without
    thousands separators.

    `prompt_suffix` goes after the string or the last user turn, with a space if neither brings white space, unless the
    text ends with it already. Prompts of more than `max_prompt_length` tokens are left out and counted.

    Raises DataError, or MissingColumnError, that names the file and line or row.
    """
    texts, answers, lacks, sources = [], [], [], []
    for where, row in _rows(data.train, data.split):
        name, prompt = _prompt(where, row, data.prompt_column)
        texts.append(render(f"{where}, column {name!r}", prompt, tokenizer, data))
        answers.append(_answer(where, row, data.answer_column))
        lacks.append("" if answers[-1] else _lack(row, data.answer_column))
        sources.append(where)
    if not texts:
        raise DataError(f"{data.train}: there is no row in it; expected one prompt a row")

    # No token is longer than the longest of the vocabulary: what cannot fit is not tokenised, since megabytes without a
    # space take minutes and gigabytes. White space may be dropped or joined up, so little of it counts for nothing.
    longest = data.max_prompt_length
    most = longest * max(map(len, tokenizer.get_vocab()))
    may_fit = [
        i for i, text in enumerate(texts) if len(text) <= most + MUCH_SPACE and len(" ".join(text.split())) <= most
    ]
    tokens = dict(zip(may_fit, tokenize([texts[i] for i in may_fit], tokenizer), strict=True))
    for i, ids in tokens.items():
        if not ids:
            raise DataError(f"{sources[i]}: the tokenizer makes no token of this prompt; remove the row")
    prompts = tuple(
        Prompt(texts[i], tuple(ids), answers[i], sources[i], lack=lacks[i])
        for i, ids in tokens.items()
        if len(ids) <= longest
    )
    if not prompts:
        shortest = min(map(len, tokens.values()), default=min(map(len, texts)) * longest // most)
        raise DataError(
            f"{data.train}: all {len(texts)} prompts have more than {longest} tokens, the shortest "
            f"{'' if tokens else 'at least '}{shortest}; raise data.max_prompt_length to at least that"
        )
    return PromptSet(prompts, dropped_too_long=len(texts) - len(prompts))


# ---- rows ----


def first_row(source: str, split: str) -> Mapping[str, Any]:
    """The columns of the first row; DataError where the source cannot be read or has none."""
    for _, row in _rows(source, split):
        return row
    raise DataError(f"{source}: there is no row in it; expected one prompt a row")


def _rows(source: str, split: str) -> Iterable[Row]:
    try:
        path = Path(source).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long for any file, or ~ of a user that there is not
        raise DataError(f"{source}: no file can be looked for there ({error}); check the path") from None
    if is_folder:
        return _folder_rows(path, split)
    if is_file:
        return _file_rows(path)
    looks_like_a_path = path.suffix in (*JSONL_SUFFIXES, ".parquet") or not re.fullmatch(
        r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?", source
    )
    if looks_like_a_path:
        raise DataError(f"{source}: no such file or folder (looked for {path.absolute()}); check the path")
    return _hub_rows(source, split)


def _file_rows(path: Path) -> Iterator[Row]:
    if path.suffix in JSONL_SUFFIXES:
        return _jsonl_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    raise DataError(f"{path}: expected a .jsonl or .parquet file; convert it, or correct its name")


def _jsonl_rows(path: Path) -> Iterator[Row]:
    """One object a line, or one list of objects; empty lines are skipped. `datasets` would not say what is broken."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error
    if content.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        yield from _json_rows(path, content)
        return
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig").strip()
            if not text:
                continue
            row = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: not valid JSON ({error}); expected one object a line, in UTF-8; repair the line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f'{where}: expected a JSON object such as {{"prompt": ...}}, got {_kind(row)}; write one object a line'
            )
        yield where, row


def _json_rows(path: Path, content: bytes) -> Iterator[Row]:
    """The objects of a list."""
    try:
        rows = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(
            f"{path}{line}: not valid JSON ({error}); expected a list of objects, in UTF-8; repair the file"
        ) from error
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(
                f'{path}[{i}]: expected a JSON object such as {{"prompt": ...}}, got {_kind(row)}; '
                "write a list of objects"
            )
        yield f"{path}[{i}]", row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands in it twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _parquet_rows(path: Path) -> Iterator[Row]:
    """Straight from the file: `datasets` would first copy it into its cache."""
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise ValueError(f"two of its columns have one name: {', '.join(names)}")
            rows = file.read().to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8, columns of one name
        raise DataError(
            f"{path}: not a readable parquet file ({error}); expected a whole one; download or write it again"
        ) from error
    for i, row in enumerate(rows):
        yield f"{path}[{i}]", row


def _folder_rows(folder: Path, split: str) -> Iterator[Row]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        yield from _saved_rows(folder, split)
        return
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in (*JSONL_SUFFIXES, ".parquet")
        and path.name not in NO_ROWS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise DataError(
            f"{folder}: no .jsonl, .ndjson, .json or .parquet file in this folder; expected some, or a save_to_disk "
            "folder"
        )
    words = {path: set(re.split(r"[\W_]+", str(path.relative_to(folder)).lower())) for path in files}
    if any(words[path] & SPLIT_WORDS for path in files):  # as on the Hub, file names say which split is whose
        chosen = [path for path in files if split.lower() in words[path]]
        if not chosen:
            names = ", ".join(str(path.relative_to(folder)) for path in files)
            raise DataError(
                f"{folder}: no file of split {split!r}; there are: {names}; set data.split, or name one file"
            )
        files = chosen
    for path in files:
        yield from _file_rows(path)


def _saved_rows(folder: Path, split: str) -> Iterator[Row]:
    try:
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise DataError(f"{folder}: no split {split!r}; there are: {', '.join(saved)}; set data.split")
            saved = saved[split]
        rows = saved.to_list()
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder}: this save_to_disk folder cannot be read ({error}); write it again") from error
    for i, row in enumerate(rows):
        yield f"{folder}[{i}]", row


def _hub_rows(source: str, split: str) -> Iterator[Row]:
    name, _, config = source.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # whatever the Hub, the network or a builder raises; chained
        raise DataError(
            f"{source}: no such file or folder here, and it does not load as a Hub data set either "
            f"({type(error).__name__}: {error}); check the path, the id (owner/name or owner/name:config), "
            f"data.split ({split!r}) and the network"
        ) from error
    for i, row in enumerate(rows):
        yield f"{source}[{i}]", row


# ---- columns ----


def _prompt(where: str, row: Mapping[str, Any], column: str | None) -> tuple[str, Any]:
    if column is not None:
        return column, _named(where, row, column, "data.prompt_column")
    known = [name for name in PROMPT_COLUMNS if name in row]
    if known:
        name = next((name for name in known if row[name] is not None), known[0])
        return name, row[name]
    near = [name for name in row if difflib.get_close_matches(str(name).lower(), PROMPT_COLUMNS, n=1)]
    hint = f"is it {near[0]!r}? Then set" if near else "name the right one with"
    raise MissingColumnError(
        f"{where}: no prompt; expected one of the columns {', '.join(PROMPT_COLUMNS)}; "
        f"there are: {_columns(row)}; {hint} data.prompt_column"
    )


def _answer(where: str, row: Mapping[str, Any], column: str | None) -> str | None:
    if column is not None:
        value = _named(where, row, column, "data.answer_column")
        if value is not None and not _is_scalar(value):
            raise DataError(
                f"{where}, column {column!r}: expected the gold as text or a number, got {_kind(value)}; "
                "set data.answer_column to another column (a dot reaches into a struct)"
            )
    else:
        value = next((v for v in (_lookup(row, name)[1] for name in ANSWER_COLUMNS) if _is_scalar(v)), None)
    if value is None or value != value:  # NaN is what a data frame has where there is nothing
        return None
    text = f"{value:f}" if isinstance(value, Decimal) else str(value).strip()
    _check_characters(f"{where}, the gold answer", text)
    if worked := re.search(r"####[ \t]*(\S.*)\Z", text):
        return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", worked[1])
    return text or None


def _lack(row: Mapping[str, Any], column: str | None) -> str:
    """What stands where the gold answer should."""
    for name in [column] if column else ANSWER_COLUMNS:
        there, value = _lookup(row, name)
        if there:
            what = "empty" if isinstance(value, str) else "NaN" if isinstance(value, float) else _kind(value)
            return f"column {name!r} holds {what}" if what != "empty" else f"column {name!r} is empty"
    return f"no column {' or '.join(map(repr, ANSWER_COLUMNS))}"


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float | Decimal) and not isinstance(value, bool)


def _lookup(row: Mapping[str, Any], name: str) -> tuple[bool, Any]:
    """(whether it is there, its value); `a.b` is field b of struct a unless there is a column `a.b`."""
    if name in row:
        return True, row[name]
    head, dot, rest = name.partition(".")
    return _lookup(row[head], rest) if dot and isinstance(row.get(head), Mapping) else (False, None)


def _named(where: str, row: Mapping[str, Any], column: str, setting: str) -> Any:
    there, value = _lookup(row, column)
    if not there:
        nearest = difflib.get_close_matches(column, map(str, row), n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"set {setting} to one of them"
        raise MissingColumnError(f"{where}: no column {column!r} ({setting}); there are: {_columns(row)}; {hint}")
    return value


def _columns(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "true/false"}.get(
        type(value), f"{type(value).__name__} {value!r}"
    )


# ---- text ----


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of rendered texts; a chat template has written the special tokens itself."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=not tokenizer.chat_template)["input_ids"]


def render(where: str, prompt: Any, tokenizer: PreTrainedTokenizerBase, data: DataSection) -> str:
    """The text that the model sees of `prompt`, a string or a chat (see `load_prompts`); `where` is for errors."""
    if isinstance(prompt, str):
        _check_text(where, prompt)
        text = _with_suffix(prompt, data.prompt_suffix)
        if not tokenizer.chat_template:
            return text
        chat = [{"role": "user", "content": text}]
    elif isinstance(prompt, Sequence):
        chat = _chat(where, prompt)
        chat[-1]["content"] = _with_suffix(chat[-1]["content"], data.prompt_suffix)
        if not tokenizer.chat_template:
            raise DataError(
                f"{where}: the prompt is a chat, but the tokenizer has no chat template to write it with; "
                "use a tokenizer that has one (chat_template.jinja beside it), or a column with plain strings"
            )
    else:
        raise DataError(
            f"{where}: expected text or a chat list of {{role, content}}, got {_kind(prompt)}; repair the row"
        )
    try:
        return tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, **data.chat_template_kwargs
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(turn["role"] for turn in chat)
        raise DataError(
            f"{where}: the tokenizer's chat template refuses a chat of roles {roles} ({error}); "
            "change the row, or use another chat template"
        ) from error


def _chat(where: str, turns: Sequence[Any]) -> Chat:
    """The turns up to the last user turn, which must be the one to answer."""
    chat = []
    for i, turn in enumerate(turns):
        fields = turn if isinstance(turn, Mapping) else {}
        if not (isinstance(fields.get("role"), str) and isinstance(fields.get("content"), str)):
            raise DataError(
                f"{where}, turn {i}: expected an object with role and content, both text, got "
                f"{_kind(turn) if not fields else ', '.join(f'{k}: {_kind(v)}' for k, v in fields.items())}; "
                "repair the row"
            )
        for text in (fields["role"], fields["content"]):
            _check_characters(f"{where}, turn {i}", text)
        chat.append({"role": fields["role"], "content": fields["content"]})
    while chat and chat[-1]["role"] == "assistant":
        chat.pop()
    if not chat or chat[-1]["role"] != "user":
        found = ", ".join(turn["role"] for turn in turns) or "none"
        raise DataError(
            f"{where}: expected a chat whose last turn, before any of the assistant, is the user's; "
            f"its roles: {found}; repair or remove the row"
        )
    _check_text(where, chat[-1]["content"])
    return chat


def _check_characters(where: str, text: str) -> None:
    """DataError at what no text holds and no tokenizer takes: half of a surrogate pair, or NUL."""
    found = re.search("[\0\ud800-\udfff]", text)
    if found:
        raise DataError(
            f"{where}: character {found.start()} is U+{ord(found[0]):04X}, "
            f"{'NUL' if found[0] == chr(0) else 'half of a surrogate pair'}; expected text; repair or remove the row"
        )


def _check_text(where: str, text: str) -> None:
    _check_characters(where, text)
    if not text.strip():
        raise DataError(f"{where}: the prompt is empty; expected some text; fill in or remove the row")


def _with_suffix(text: str, suffix: str) -> str:
    # In the wild a \boxed{{}} that missed its str.format is the same instruction as \boxed{}.
    plain_text, plain_suffix = (" ".join(part.replace("{{}}", "{}").split()) for part in (text, suffix))
    if text.endswith(suffix) or (plain_suffix and plain_text.endswith(plain_suffix)):
        return text
    glue = "" if text[-1].isspace() or suffix[0].isspace() else " "
    return f"{text}{glue}{suffix}"
