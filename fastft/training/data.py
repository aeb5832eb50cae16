"""Labelled texts, from memory, from a CSV, TSV or JSONL file or from a folder, and their stratified split.

Every message names the file and the line, or the argument and the row, and the value found there.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.training import columns, readers
from fastft.training.readers import shown, shown_list

_INTEGRAL = re.compile(r"[+-]?[0-9]+(?:\.0*)?")


@dataclass(frozen=True)
class Examples:
    """Texts and the names of their labels, one each, and where they came from.

    Attributes:
        texts; labels: none if only texts were asked for.
        source: the path, or the name of the argument.
        columns: where texts and labels stood in it, for people.
        places: of each example the line or row on which it begins, or the path of its file.
        unit: what a number in ``places`` counts, "line" or "row".
    """

    texts: list[str]
    labels: list[str]
    source: str
    columns: str = ""
    places: Sequence[int | str] = ()
    unit: str = "row"

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Iterable[int]) -> Examples:
        rows = list(rows)

        def of(values: Sequence) -> list:
            return [values[row] for row in rows] if values else []

        return Examples(of(self.texts), of(self.labels), self.source, self.columns, of(self.places), self.unit)

    def place(self, row: int) -> str:
        """Where the example stands, for a message."""
        return _place(self.source, self.unit, self.places[row] if self.places else row)

    def line(self, row: int) -> str:
        """The same without the file's name, unless each example has a file of its own."""
        return self.place(row).removeprefix(f"{self.source}, ")

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


def load(
    data: Any,
    text: str | None = None,
    label: str | None = None,
    argument: str = "data",
    *,
    labels: bool = True,
    encoding: str = "utf-8",
) -> Examples:
    """Reads ``data``: a path, or a pair ``(texts, labels)``.

    Args:
        data: path of a CSV or TSV file with a header line, of a JSONL file, or of a folder with one sub-folder per
            class and one text in each file; or two equally long sequences: strings, and labels that are strings,
            integers or booleans; where all are whole numbers, 1.0 is the label 1.
        text, label: the columns (or keys) to read; None finds them by their names, else by what is in them.
        argument: what the messages call a pair.
        labels: whether to read labels; if not, ``data`` may also be a sequence of texts, or a folder of any shape.
        encoding: of the files.
    Raises: ValueError, TypeError, OSError: one sentence with the place and the value.
    """
    if isinstance(data, (str, Path)):
        if not str(data):
            raise ValueError(f"{argument} is {data!r}, which names no file or folder")
        path = Path(data)
        source = str(path)
        where, unit, rows = _from_path(path, text, label, labels, encoding)
    else:
        source, where, unit, rows = argument, "", "row", _from_memory(data, text, label, labels, argument)
    texts: list[str] = []
    names: list[str] = []
    places: list[int | str] = []
    for place, one_text, one_label in rows:
        if not isinstance(one_text, str):
            kind = type(one_text).__name__
            raise TypeError(f"{_place(source, unit, place)}: the text is {shown(one_text)} ({kind}), not a string")
        texts.append(one_text)
        places.append(place)
        if labels:
            names.append(sys.intern(_label_name(one_label, source, unit, place)))  # one string, not one for each row
    if not texts:
        raise ValueError(f"{source}: there are no examples in it")
    if not any(map(str.strip, texts)):
        raise ValueError(f"{source}: all of its {len(texts)} texts are empty" + (f" ({where})" if where else ""))
    return Examples(texts, whole_numbers(names), source, where, places, unit)


def whole_numbers(labels: list[str]) -> list[str]:
    """``labels``, where all of them are integers as pandas writes them, 1.0, as everybody else does, 1."""
    if not all(map(_INTEGRAL.fullmatch, set(labels))):
        return labels
    names = {label: label.partition(".")[0] for label in set(labels)}
    return [names[label] for label in labels]


def label_names(labels: Iterable[str]) -> list[str]:
    """The distinct labels, sorted: as numbers when all of them are integers, else as words."""
    names = set(labels)
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)


def check_classes(examples: Examples) -> None:
    """Raises: ValueError: the labels of ``examples`` are not such that a classifier could be trained on them."""
    counts = examples.counts()
    if len(examples) == 1:
        raise ValueError(f"{examples.place(0)} is the only example, two of each of two labels are needed")
    if len(counts) == 1:
        raise ValueError(f"{examples.source}: every label is {next(iter(counts))!r}, two different ones are needed")
    if len(counts) == len(examples) > 2:
        where = f" ({examples.columns})" if examples.columns else ""
        raise ValueError(
            f"{examples.source}: each of the {len(examples)} examples has a label of its own, {shown_list(counts)}: "
            f"that is no class, name the column with the labels with label=COLUMN{where}"
        )


def require_known(examples: Examples, names: Iterable[str], owner: str) -> None:
    """Raises: ValueError: a label of ``examples`` is none of ``names``, those that ``owner`` has."""
    known = dict.fromkeys(names)
    for row, name in enumerate(examples.labels):
        if name not in known:
            raise ValueError(
                f"{examples.place(row)}: the label {shown(name)} is none that {owner} has: {shown_list(known)}"
            )


def refuse_columns(source: str, text: str | None, label: str | None, why: str) -> None:
    """Raises: ValueError: a column is named where there are none."""
    for name, column in (("text", text), ("label", label)):
        if column is not None:
            raise ValueError(f"{source}: {name}={column!r} names a column of a file, but {why}")


def split(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Splits into (training, validation) with the same share of every label; the same seed gives the same split.

    Raises: ValueError: as :func:`check_classes`; a label has one example only; ``share`` leaves either part fewer rows
        than labels, or training none of one label.
    """
    check_classes(examples)
    counts = examples.counts()
    for name, count in counts.items():
        if count < 2:
            place = examples.place(examples.labels.index(name))
            raise ValueError(
                f"{examples.source}: the label {name!r} has one example, a split needs at least two ({place})"
            )
    rows = math.ceil(share * len(examples))
    if not len(counts) <= rows <= len(examples) - len(counts):
        raise ValueError(
            f"validation_share={share} puts {rows} of {len(examples)} examples aside, but each part needs one of "
            f"each of the {len(counts)} labels"
        )
    from sklearn.model_selection import train_test_split  # takes a second, and a wrong file should be told at once

    train, validation = train_test_split(
        range(len(examples)), test_size=rows, stratify=examples.labels, random_state=seed
    )
    left = {examples.labels[row] for row in train}
    for name in counts:
        if name not in left:
            raise ValueError(f"validation_share={share} leaves no example of the label {shown(name)} to train on")
    return examples.take(train), examples.take(validation)


def _place(source: str, unit: str, place: int | str) -> str:
    return place if isinstance(place, str) else f"{source}, {unit} {place}"


def _label_name(value: Any, source: str, unit: str, place: int | str) -> str:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, str):
        value = value.strip()
    if isinstance(value, float) and value.is_integer():  # a column of integers that pandas turned into floats
        value = int(value)
    if value is None or value == "" or value != value:
        raise ValueError(f"{_place(source, unit, place)}: the label is missing")
    if not isinstance(value, (str, int)):
        kind = type(value).__name__
        raise TypeError(
            f"{_place(source, unit, place)}: the label is {shown(value)} ({kind}), not a string, integer or boolean"
        )
    name = str(value)
    if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError(f"{_place(source, unit, place)}: the label {shown(name)} holds half a character")
    return name


def _from_memory(
    data: Any, text: str | None, label: str | None, labels: bool, argument: str
) -> Iterator[tuple[int, Any, Any]]:
    refuse_columns(argument, text, label, "this is none")
    if not labels:
        if not isinstance(data, Iterable) or isinstance(data, (bytes, dict)):
            raise TypeError(f"{argument} is a {type(data).__name__}; a path or a sequence of texts is needed")
        for row, one_text in enumerate(data):
            yield row, one_text, None
        return
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise TypeError(f"{argument} is a {type(data).__name__}; a path or a pair (texts, labels) is needed")
    texts, names = (list(part) for part in data)
    if len(texts) != len(names):
        raise ValueError(f"{argument}: {len(texts)} texts, but {len(names)} labels")
    for row, (one_text, name) in enumerate(zip(texts, names, strict=True)):
        yield row, one_text, name


def _from_path(
    path: Path, text: str | None, label: str | None, labels: bool, encoding: str
) -> tuple[str, str, Iterator[tuple[int | str, Any, Any]]]:
    """(where texts and labels stand, what a place counts, the rows)."""
    if path.is_dir():
        refuse_columns(str(path), text, label, "this is a folder")
        if labels:
            return "one sub-folder per class, one text per file", "file", readers.folder(path, encoding)
        texts = readers.folder_texts(path, encoding)
        return "one text per file", "file", ((place, content, None) for place, content in texts)
    readers.check_file(path)
    if next(readers.records(path, encoding), None) is None:  # nothing in which columns could be found
        raise ValueError(f"{path}: there are no examples in it")
    names = readers.columns(path, encoding)
    text, label = columns.find(
        str(path), names, lambda: columns.survey(names, readers.records(path, encoding)), text, label, labels
    )
    where = f"text column {text!r}" + (f", label column {label!r}" if labels else "")
    return where, "line", _records(path, encoding, text, label)


def _records(path: Path, encoding: str, text: str, label: str | None) -> Iterator[tuple[int, Any, Any]]:
    for line, record in readers.records(path, encoding):
        for key in filter(None, (text, label)):
            if key not in record:  # in JSONL only
                raise ValueError(f"{path}, line {line}: no key {key!r}, its keys are {shown_list(record)}")
        yield line, record[text], None if label is None else record[label]
