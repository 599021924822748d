"""Rows of files, folders and data sets, each with the place where it stands, for messages."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from prune_opd.errors import DataError

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
NO_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
SPLIT_WORDS = {"train", "training", "test", "validation", "valid", "val", "dev", "eval"}

Row = tuple[str, Mapping[str, Any]]  # where it stands, and its columns


def first_row(source: str, split: str) -> Mapping[str, Any]:
    """The columns of the first row; DataError where the source cannot be read or has none."""
    for _, row in rows_of(source, split):
        return row
    raise DataError(f"{source}: there is no row in it; expected one prompt a row")


def rows_of(source: str, split: str) -> Iterable[Row]:
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
            got = kind_of(row)
            raise DataError(
                f'{where}: expected a JSON object such as {{"prompt": ...}}, got {got}; write one object a line'
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
                f'{path}[{i}]: expected a JSON object such as {{"prompt": ...}}, got {kind_of(row)}; '
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


def kind_of(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "true/false"}.get(
        type(value), f"{type(value).__name__} {value!r}"
    )
