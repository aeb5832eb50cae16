"""Labelled texts, from memory or from a CSV, TSV or JSONL file, and their stratified split.

Every message names the file and the line, or the argument and the row, and the value found there.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import operator
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*DELIMITERS, ".jsonl")


@dataclass(frozen=True)
class Examples:
    """Texts and the names of their labels, one each, and where they came from."""

    texts: list[str]
    labels: list[str]
    source: str

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Iterable[int]) -> Examples:
        rows = list(rows)
        return Examples([self.texts[i] for i in rows], [self.labels[i] for i in rows], self.source)

    def counts(self) -> dict[str, int]:
        """How often each label occurs, in the order of :func:`label_names`."""
        counts = Counter(self.labels)
        return {name: counts[name] for name in label_names(self.labels)}

    def fingerprint(self) -> str:
        """SHA-256 over every text and label in order: two runs with the same fingerprint saw the same data."""
        digest = hashlib.sha256()
        for pair in zip(self.texts, self.labels, strict=True):
            digest.update(json.dumps(pair).encode() + b"\n")
        return digest.hexdigest()


def load(data: Any, text: str | None = None, label: str | None = None, argument: str = "data") -> Examples:
    """Reads ``data``: a path to a CSV, TSV or JSONL file, or a pair ``(texts, labels)``.

    Args:
        data: the path, or two equally long sequences: strings, and labels that are strings, integers or booleans.
        text, label: the columns (CSV, TSV, with a header line) or keys (JSONL) to read; "text" and "label" when None.
        argument: what the messages call a pair.
    Raises: ValueError, TypeError, OSError: one sentence with the place and the value.
    """
    if isinstance(data, (str, Path)):
        path = Path(data)
        rows = _file_rows(path, text or "text", label or "label")
        source = str(path)
    elif isinstance(data, (tuple, list)) and len(data) == 2:
        if text is not None or label is not None:
            raise ValueError(f"{argument}: text={text!r}, label={label!r} name columns of a file, not of a pair")
        rows = _pair_rows(*(list(part) for part in data), argument)
        source = argument
    else:
        raise TypeError(f"{argument} is a {type(data).__name__}; a path or a pair (texts, labels) is needed")
    texts, labels = [], []
    for place, one_text, one_label in rows:
        if not isinstance(one_text, str):
            raise TypeError(f"{place}: the text is {one_text!r} ({type(one_text).__name__}), not a string")
        texts.append(one_text)
        labels.append(_label_name(one_label, place))
    if not texts:
        raise ValueError(f"{source}: there are no examples in it")
    return Examples(texts, labels, source)


def label_names(labels: Iterable[str]) -> list[str]:
    """The distinct labels, sorted: as numbers when all of them are integers, else as words."""
    names = set(labels)
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)


def split(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Splits into (training, validation) with the same share of every label; the same seed gives the same split.

    Raises: ValueError: when a label has one example only, or ``share`` leaves either part fewer rows than labels.
    """
    from sklearn.model_selection import train_test_split

    counts = examples.counts()
    for name, count in counts.items():
        if count < 2:
            raise ValueError(f"{examples.source}: the label {name!r} has one example, a split needs at least two")
    rows = math.ceil(share * len(examples))
    if not len(counts) <= rows <= len(examples) - len(counts):
        raise ValueError(
            f"validation_share={share} puts {rows} of {len(examples)} examples aside, but each part needs one of "
            f"each of the {len(counts)} labels"
        )
    train, validation = train_test_split(
        range(len(examples)), test_size=rows, stratify=examples.labels, random_state=seed
    )
    return examples.take(train), examples.take(validation)


def _label_name(value: Any, place: str) -> str:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, str):
        value = value.strip()
    if isinstance(value, float) and value.is_integer():  # a column of integers that pandas turned into floats
        value = int(value)
    if value is None or value == "" or value != value:
        raise ValueError(f"{place}: the label is missing")
    if not isinstance(value, (str, int)):
        raise TypeError(f"{place}: the label is {value!r} ({type(value).__name__}), not a string, integer or boolean")
    return str(value)


def _pair_rows(texts: list, labels: list, argument: str) -> Iterator[tuple[str, Any, Any]]:
    if len(texts) != len(labels):
        raise ValueError(f"{argument}: {len(texts)} texts, but {len(labels)} labels")
    for row, pair in enumerate(zip(texts, labels, strict=True)):
        yield f"{argument}, row {row}", *pair


def _file_rows(path: Path, text: str, label: str) -> Iterator[tuple[str, Any, Any]]:
    suffix = path.suffix.lower()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, a file ending in {', '.join(SUFFIXES)} is needed")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} ends in {suffix!r}, a file ending in {', '.join(SUFFIXES)} is needed")
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            if suffix == ".jsonl":
                yield from _json_rows(path, lines, text, label)
            else:
                yield from _table_rows(path, lines, DELIMITERS[suffix], text, label)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path} is not UTF-8: it holds the byte 0x{byte:02x}") from error


def _table_rows(path: Path, lines: Iterable[str], delimiter: str, text: str, label: str) -> Iterator[tuple]:
    limit = csv.field_size_limit(sys.maxsize)  # texts longer than the default of 128 KiB are fine
    try:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header = next(reader, None)
        if header is None:
            raise ValueError(f"{path} is empty")
        for column in (text, label):
            if header.count(column) != 1:
                found = "no column" if column not in header else f"{header.count(column)} columns"
                raise ValueError(f"{path} has {found} {column!r}, its header is {header}: name it with text= or label=")
        pick = operator.itemgetter(header.index(text), header.index(label))
        for fields in filter(None, reader):  # an empty line is no row
            if len(fields) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields, but the header has {len(header)}"
                )
            yield f"{path}, line {reader.line_num}", *pick(fields)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _json_rows(path: Path, lines: Iterable[str], text: str, label: str) -> Iterator[tuple]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place}: {line.strip()[:40]!r} is not a JSON object")
        for key in (text, label):
            if key not in row:
                raise ValueError(f"{place}: no key {key!r}, its keys are {list(row)}: name it with text= or label=")
        yield place, row[text], row[label]
