"""Which columns of a file hold the texts and the labels: by their names, else by what is in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastft.training.readers import shown, shown_list

# The first of each wins where several are there.
TEXT_NAMES = ("text", "sentence", "review", "content", "body", "comment", "message", "document", "tweet", "utterance")
LABEL_NAMES = ("label", "labels", "class", "category", "sentiment", "target", "intent", "emotion", "topic")
LONGEST_LABEL, MOST_CLASSES = 64, 1000
LONGER = 3  # so many times as long as any other text is the text: a review beside its title

# Two words, or two characters of a script that is written without spaces.
_WORDS = re.compile(r"[^\W\d_]\s+[^\W\d_]|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff]{2}")
_FRACTION = re.compile(r"[+-]?\d*[.,]0*[1-9]\d*")


class Column:
    """What the values of a column look like, seen one by one.

    Attributes:
        values: the distinct ones; None once there are too many, or one is missing, long or no name of a class.
    """

    def __init__(self):
        self.rows = self.characters = self.wordy = 0
        self.values: set[str] | None = set()

    def add(self, value: Any) -> None:
        self.rows += 1
        if not isinstance(value, (str, int)):
            self.values = None
            return
        value = str(value).strip()
        self.characters += len(value)
        self.wordy += bool(_WORDS.search(value[:1000]))
        if self.values is not None:
            self.values.add(value)
            if not 0 < len(value) <= LONGEST_LABEL or len(self.values) > MOST_CLASSES or _FRACTION.fullmatch(value):
                self.values = None

    def is_label(self) -> bool:
        """Short values, at least two different ones, each twice on average."""
        return self.values is not None and 2 <= len(self.values) <= self.rows / 2

    def is_text(self) -> bool:
        return not self.is_label() and self.wordy > self.rows / 2


def survey(names: Sequence[str], records: Any) -> dict[str, Column]:
    """Looks at every record, a (line, values by column) each."""
    found = {name: Column() for name in names}
    for _, record in records:
        for name, column in found.items():
            column.add(record.get(name))
    return found


def find(
    source: str,
    names: Sequence[str],
    look: Callable[[], Mapping[str, Column]],
    text: str | None,
    label: str | None,
    labels: bool = True,
) -> tuple[str, str | None]:
    """The columns of the texts and of the labels (None if ``labels`` is false).

    Args:
        source: what messages call the file; names: its columns.
        look: makes the survey; called at most once, and only when the names do not decide.
        text, label: the columns to take, None to find them.
    Raises: ValueError: one sentence that lists the columns to choose from.
    """
    text = _by_name(source, names, "text", text, TEXT_NAMES)
    label = _by_name(source, names, "label", label, LABEL_NAMES) if labels else None
    if labels and text is not None and text == label:
        raise ValueError(f"{source}: text={text!r} and label={label!r} are the same column")
    if labels and len(names) == 2:  # one of two leaves the other
        text = text or next((name for name in names if label is not None and name != label), None)
        label = label or next((name for name in names if text is not None and name != text), None)
    elif not labels and len(names) == 1:
        text = names[0]
    if text is None or (labels and label is None):
        if number := next(filter(_FRACTION.fullmatch, names), None):
            raise ValueError(_no_header(source, f"{shown(number)} names no column"))
        seen = look()
        text = text or _by_content(source, seen, "text", _texts(seen, label), exclude=label)
        if labels and label is None:
            others = [name for name in names if name != text]
            found = [name for name in others if seen[name].is_label()]
            label = _by_content(source, seen, "label", others if len(others) == 1 else found, exclude=text)
            if label in (seen[label].values or ()):
                raise ValueError(_no_header(source, f"for {shown(label)} is a value of the column too"))
    for name in filter(None, (text, label)):
        if names.count(name) > 1:
            raise ValueError(f"{source} has {names.count(name)} columns {name!r}: give each a name of its own")
    return text, label


def _no_header(source: str, why: str) -> str:
    return (
        f"{source}: its first line is no header, {why}: put a line with the columns' names, such as text and label, "
        "above it"
    )


def _by_name(source: str, names: Sequence[str], role: str, given: str | None, known: Sequence[str]) -> str | None:
    if given is not None:
        if given not in names:
            raise ValueError(
                f"{source} has no column {given!r}, its columns are {shown_list(names)}: "
                f"name the one with the {role}s with {role}=COLUMN"
            )
        return given
    found = [name for name in names if name.lower() in known]
    if len(set(found)) > 1:
        found = [name for name in found if name.lower() == role]
    return found[0] if found else None


def _texts(seen: Mapping[str, Column], label: str | None) -> list[str]:
    """The columns that hold texts, or of those the one that is much longer than the others."""
    found = [name for name, column in seen.items() if name != label and column.is_text()]
    found.sort(key=lambda name: seen[name].characters, reverse=True)
    if len(found) > 1 and seen[found[0]].characters >= LONGER * seen[found[1]].characters:
        return found[:1]
    return found


def _by_content(source: str, seen: Mapping[str, Column], role: str, found: Sequence[str], exclude: str | None) -> str:
    if len(found) == 1:
        return found[0]
    others = [name for name in seen if name != exclude]
    if found:
        said = f"the {role}s may be in {shown_list(found)}"
    elif others:
        said = f"no column looks like {role}s, there are {shown_list(others)}"
    else:
        said = f"there is no column for the {role}s, only {shown_list(seen)}"
    raise ValueError(f"{source}: {said}: name the column with {role}=COLUMN")
