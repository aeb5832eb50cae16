"""Files of texts as a stream of records: CSV, TSV, JSONL, and a folder with one sub-folder per class.

Every message names the file, the line on which the record begins, and what is wrong there. No file is held in memory.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*DELIMITERS, ".jsonl")
LONGEST_FIELD = (
    2**28
)  # characters; csv's own limit of 2**17 is less than a long document, none lets a lost quote eat all
SHOWN = 60  # characters of a value in a message


def check_file(path: Path) -> None:
    """Raises: OSError: there is no such file. ValueError: its name does not end as one of :data:`SUFFIXES`."""
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path} is a link that leads to no file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():
        raise OSError(f"{path} is not a regular file")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path} ends in {path.suffix!r}, a file ending in {', '.join(SUFFIXES)} or a folder is needed"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")


def columns(path: Path, encoding: str) -> list[str]:
    """The names in the header of a table, or the keys of the first object of a JSONL file."""
    if path.suffix.lower() == ".jsonl":
        return list(next(_objects(path, encoding), (0, {}))[1])
    return _table(path, encoding)[0]


def records(path: Path, encoding: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line, values by column) for every record of a table or JSONL file."""
    if path.suffix.lower() == ".jsonl":
        yield from _objects(path, encoding)
        return
    header, rows = _table(path, encoding)
    for line, fields in rows:
        if len(fields) != len(header):
            lost = ": a field that holds a delimiter or a quote must be quoted" if len(fields) > len(header) else ""
            found = f"{len(fields)} field{'s' * (len(fields) != 1)}"
            raise ValueError(f"{path}, line {line}: {found}, but the header has {len(header)}{lost}")
        yield line, dict(zip(header, fields, strict=True))


def folder(path: Path, encoding: str) -> Iterator[tuple[str, str, str]]:
    """Yields (file, text, class) of a folder with one sub-folder per class and one text per file, in sorted order.

    Hidden files and folders, and files beside the sub-folders, are left out.
    """
    classes = [entry for entry in _entries(path) if entry.is_dir()]
    if not classes:
        raise ValueError(f"{path} has no sub-folders: one per class is needed, with one text in each of its files")
    for group in classes:
        files = _entries(group)
        if not files:
            raise ValueError(f"{group} is empty: the folder of a class holds its texts, one in each file")
        for file in files:
            if not file.is_file():
                raise ValueError(f"{group} holds {file.name!r}, which is no file: it must hold texts, one in each file")
            yield str(file), read_text(file, encoding), group.name


def folder_texts(path: Path, encoding: str) -> Iterator[tuple[str, str]]:
    """Yields (file, text) for every file at any depth of a folder that is not hidden, in sorted order."""
    for entry in _entries(path):
        if entry.is_dir():
            yield from folder_texts(entry, encoding)
        else:
            yield str(entry), read_text(entry, encoding)


def read_text(path: Path, encoding: str) -> str:
    """A whole file, its lines ending in a newline character."""
    return "".join(_lines(path, encoding, newline=None))


def first_line(error: Exception) -> str:
    """What libraries say in paragraphs, cut to the first line that says something; "" if none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def shown(value: Any) -> str:
    """``value`` as Python writes it, cut short for a message."""
    if isinstance(value, str):
        return repr(value if len(value) <= SHOWN else f"{value[: SHOWN - 1]}…")
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def shown_list(values: Iterable[Any]) -> str:
    values = list(values)
    more = [f"{len(values) - 10} more"] if len(values) > 10 else []
    return ", ".join([*map(shown, values[:10]), *more])


def _entries(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))


def _table(path: Path, encoding: str) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The header's names, and an iterator over (line, fields) of the rows after it."""
    lines = _lines(path, encoding, newline="")
    head: list[str] = []
    while not "".join(head).strip():
        line = next(lines, None)
        if line is None:
            raise ValueError(f"{path} is empty")
        head.append(line)
    delimiter = DELIMITERS[path.suffix.lower()]
    if delimiter not in head[-1]:  # a spreadsheet writes semicolons where the comma is the decimal point
        delimiter = next((other for other in ";\t|" if other in head[-1]), delimiter)
    rows = _rows(path, itertools.chain(head, lines), delimiter)
    return [name.strip() for name in next(rows)[1]], rows


def _rows(path: Path, lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields (first line, fields) of every row that is no empty line."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    line = 1
    try:
        while (fields := _next(reader)) is not None:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        reason = str(error)
        if reason.startswith("unexpected end"):
            reason = "a quote is opened here and never closed"
        elif reason.startswith("field larger"):
            reason = f"a field is longer than {LONGEST_FIELD:,} characters: is a quote opened here and never closed?"
        elif "expected after" in reason:
            reason = "a quote inside a quoted field is not doubled, or one is opened and never closed"
        raise ValueError(f"{path}, line {line}: {reason}") from error


def _next(reader: Iterator[list[str]]) -> list[str] | None:
    limit = csv.field_size_limit(LONGEST_FIELD)  # everybody's: changed for no longer than it takes to read a row
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


def _objects(path: Path, encoding: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(_lines(path, encoding, newline="\n"), start=1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {line}: not JSON: {error.msg} at column {error.colno} (each line must be one object)"
            ) from error
        except (RecursionError, ValueError) as error:  # nested too deeply; an integer of more digits than Python takes
            raise ValueError(f"{path}, line {line}: {str(error).splitlines()[0]}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {line}: {shown(content.strip())} is not a JSON object")
        yield line, record


def _lines(path: Path, encoding: str, newline: str | None) -> Iterator[str]:
    """The lines of a text file without a byte order mark, or one sentence about what is no text in it."""
    try:
        # "utf-8-sig" is UTF-8 with or without the mark
        file = path.open(encoding="utf-8-sig" if is_utf8(encoding) else encoding, newline=newline)
    except LookupError as error:
        raise ValueError(f"encoding={encoding!r} is none that Python knows") from error
    with file:
        try:
            for number, line in enumerate(file, start=1):
                if "\0" in line:
                    column = line.index("\0") + 1
                    raise ValueError(
                        f"{path}, line {number}: a NUL at character {column}: the file is damaged or not text"
                    )
                yield line
        except UnicodeError as error:
            raise ValueError(_undecodable(path, encoding, error)) from error


def is_utf8(encoding: str) -> bool:
    return encoding.lower().replace("_", "-") in ("utf-8", "utf8", "utf-8-sig")


def _undecodable(path: Path, encoding: str, error: UnicodeError) -> str:
    """The sentence about the first byte that is not UTF-8: the text layer decodes in blocks and knows no lines."""
    if not is_utf8(encoding):
        return f"{path} is not {encoding}: {getattr(error, 'reason', error)}"
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as wrong:
                utf16 = number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff")
                return (
                    f"{path}, line {number}: byte {wrong.start + 1} of the line is 0x{line[wrong.start]:02x}, which is "
                    f"not UTF-8: name another encoding with encoding={'utf-16' if utf16 else 'latin-1'}, "
                    "if the file is text"
                )
    return f"{path} changed while it was read"
