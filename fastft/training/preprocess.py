"""Cleaning of texts before they become tokens: markup, links, control characters, white space, duplicates.

What is not broken stays as it is: `a < b`, `AT&T`, `<3` and an unknown `<tag>` are text. A trained folder keeps in
``preprocessing.json`` how its texts were cleaned, so that evaluation and prediction do the same.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html.entities import html5
from pathlib import Path
from typing import Any

from fastft.training.data import Examples
from fastft.training.readers import shown

FILE = "preprocessing.json"
ROUNDS = 32  # of all steps: `<<b>b>` needs three; a text made to need thousands would take the square of its length
VERSION = 1  # of the steps below: a folder of another version is not read by guessing

# ---- the steps, each str -> str; each leaves a text that needs nothing unchanged

# Elements that a browser sets on their own line part words, the others do not.
_BLOCKS = (
    "address|article|aside|blockquote|body|br|button|caption|center|dd|div|dl|dt|fieldset|figcaption|figure|footer|form|"
    "frame|frameset|h[1-6]|head|header|hr|html|iframe|img|input|legend|li|link|main|menu|meta|nav|noscript|object|ol|"
    "optgroup|option|p|pre|script|section|select|style|table|tbody|td|textarea|tfoot|th|thead|title|tr|ul|video|audio"
)
_INLINE = (
    "a|abbr|acronym|b|bdi|bdo|big|cite|code|data|del|dfn|em|font|i|ins|kbd|label|mark|nobr|q|ruby|rp|rt|s|samp|small|"
    "span|strike|strong|sub|sup|time|tt|u|var|wbr"
)
_ATTRIBUTES = r"(?:\s[^<>]*)?/?>"
# Each attempt ends at the next opening one, so that a thousand of them without an end take no quadratic time.
_HIDDEN = re.compile(
    r"<!--(?:[^<]|<(?!!--))*?-->"
    rf"|<(script|style)\b{_ATTRIBUTES}(?:[^<]|<(?!\1\b))*?</\1\s*>"
    r"|<!doctype\b[^<>]*>|<!\[CDATA\[|\]\]>|<\?xml\b[^<>]*\?>",
    re.IGNORECASE,
)
_BLOCK_TAG = re.compile(rf"</?(?:{_BLOCKS}){_ATTRIBUTES}", re.IGNORECASE)
_INLINE_TAG = re.compile(rf"</?(?:{_INLINE}){_ATTRIBUTES}", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:amp;)*(?P<name>(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{0,31});)")
# Scheme and user, or "www." before a name with a dot; host; port; path without the sentence's own last punctuation.
_URL = re.compile(
    r"""\b(?:(?:https?|ftp)://(?:[^\s/@<>"']+@)?(?:www\.)*|(?:www\.)+(?=[\w-]+\.\w))"""
    r"""([\w-]+(?:\.[\w-]+)*)(?::[0-9]+)?(?:[/?\#](?:[^\s<>"]*[^\s<>"'.,;:!?)\]}*_|])?)?""",
    re.IGNORECASE,
)
# Neither white space nor what shapes emoji (U+200D), Persian (U+200C) or Indic scripts: C0, C1, soft hyphen, zero-width
# and direction marks, byte order mark, halves of characters.
_CONTROL = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff"
    "\ud800-\udfff\ufffe\uffff]"
)


def _strip_html(text: str) -> str:
    before = text
    if "<" in text:
        text = _INLINE_TAG.sub("", _BLOCK_TAG.sub(" ", _HIDDEN.sub(" ", text)))
    if "&" in text:
        text = _ENTITY.sub(_character, text)
    # The spaces that stand for tags are this step's to join, not a flaw of the text that the next one would count.
    return text if text == before or before != _join_spaces(before) else _join_spaces(text)


def _character(entity: re.Match) -> str:
    name = entity["name"]
    return html.unescape(f"&{name}") if name[0] == "#" or name in html5 else f"&{name}"


def _shorten_urls(text: str) -> str:
    # The host stays: `youtube.com` says something to a classifier. Path and query are close to unique, tens of tokens
    # of the 128 or 256 that a text may have, from which it can only learn by heart.
    return _URL.sub(r"\1", text)


def strip_control(text: str) -> str:
    return _CONTROL.sub("", text)


def _compose(text: str) -> str:
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def _join_spaces(text: str) -> str:
    return " ".join(text.split())


STEPS: dict[str, Callable[[str], str]] = {
    "control_characters": strip_control,
    "unicode": _compose,
    "html": _strip_html,
    "urls": _shorten_urls,
    "white_space": _join_spaces,
}


def clean(text: str, lower_case: bool = False) -> str:
    """``text`` without markup, links, control characters and superfluous white space, in Unicode's composed form.

    Cleaning a clean text changes nothing. Example:
        >>> clean("<b>Good</b>&nbsp;film,<br/>see https://www.example.com/watch?v=1.")
        'Good film, see example.com.'
    """
    return _clean(text, lower_case, Counter())


def _clean(text: str, lower_case: bool, changed: Counter) -> str:
    """Counts in ``changed`` every step that changed the text."""
    steps = {**STEPS, "lower_case": str.lower} if lower_case else STEPS
    by: set[str] = set()
    # Until nothing changes: `&amp;lt;b&amp;gt;` becomes a tag in the third round, and NFC may join what a step parted.
    for _ in range(ROUNDS):
        before = text
        for name, step in steps.items():
            after = step(text)
            if after != text:
                by.add(name)
                text = after
        if text == before:
            break
    changed.update(by)
    return text


# ---- whole data sets

_SAID = {
    "control_characters": "texts with control characters",
    "unicode": "texts with characters to compose (NFC)",
    "html": "texts with HTML tags or entities",
    "urls": "texts with links, cut to the host",
    "white_space": "texts with superfluous white space",
    "lower_case": "texts changed to lower case",
    "empty": "examples without text, left out",
    "duplicates": "exact duplicates, left out",
    "conflicts": "texts with different labels, all kept",
}


@dataclass(frozen=True)
class Prepared:
    """Cleaned examples and what was done to them.

    Attributes:
        counts: how many texts each step changed, ``empty`` and ``duplicates`` left out, and ``conflicts``, the texts
            that have more than one label.
        conflicts: a sentence about each of the first three of those.
    """

    examples: Examples
    counts: dict[str, int]
    conflicts: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """A line for every step, with its count, then the conflicts."""
        return [*said(self.counts), *(f"  {conflict}" for conflict in self.conflicts)]


def said(counts: dict[str, int], all: bool = True) -> list[str]:
    """A line for every step, or for those that found something: what it was, and in how many texts."""
    return [f"{_SAID[name]}: {count:,}" for name, count in counts.items() if all or count]


def prepare(examples: Examples, *, lower_case: bool = False, deduplicate: bool = True) -> Prepared:
    """Cleans every text, and leaves out those without any text and exact duplicates: the same text with the same label.

    A text that occurs with several labels stays with each of them, and is reported: which one is right is not ours to
    say. With ``deduplicate`` false, duplicates stay.

    Raises: ValueError: nothing is left of any text.
    """
    texts, counts = clean_all(examples.texts, lower_case)
    rows = [row for row, text in enumerate(texts) if text]
    if not rows:
        raise ValueError(f"{examples.source}: nothing is left of its {len(texts)} texts after cleaning")
    counts["empty"] = len(texts) - len(rows)
    if not examples.labels:
        return Prepared(_with(examples, texts).take(rows), counts)
    firsts, again = _rows_of_labels(texts, examples.labels, rows)
    if deduplicate:
        counts["duplicates"] = len(rows) - len(firsts)
        rows = firsts
    several = sorted((found for found in again if len(found) > 1), key=lambda found: next(iter(found.values())))
    counts["conflicts"] = len(several)
    conflicts = []
    for found in several[:3]:
        text = texts[next(iter(found.values()))]
        labels = " and ".join(f"{shown(name)} ({examples.line(row)})" for name, row in found.items())
        conflicts.append(f"{shown(text)} is {labels}")
    return Prepared(_with(examples, texts).take(rows), counts, conflicts)


def _rows_of_labels(
    texts: Sequence[str], labels: Sequence[str], rows: Sequence[int]
) -> tuple[list[int], Iterable[dict[str, int]]]:
    """(the first row of every text with every label; of each text that occurs again, those rows by label)."""
    firsts: list[int] = []
    first: dict[str, int] = {}  # by text: millions of them, of which few occur again
    again: dict[str, dict[str, int]] = {}
    for row in rows:
        text, label = texts[row], labels[row]
        before = first.setdefault(text, row)
        if before == row or again.setdefault(text, {labels[before]: before}).setdefault(label, row) == row:
            firsts.append(row)
    return firsts, again.values()


def clean_all(texts: Iterable[str], lower_case: bool = False) -> tuple[list[str], dict[str, int]]:
    """(the cleaned texts, how many of them each step changed)."""
    changed: Counter[str] = Counter()
    cleaned = [_clean(text, lower_case, changed) for text in texts]
    return cleaned, {name: changed[name] for name in [*STEPS, *(["lower_case"] if lower_case else [])]}


def _with(examples: Examples, texts: list[str]) -> Examples:
    return Examples(texts, examples.labels, examples.source, examples.columns, examples.places, examples.unit)


# ---- what a trained folder keeps


def options(*, lower_case: bool = False, max_length: int | None = None) -> dict[str, Any]:
    """What ``preprocessing.json`` holds: how texts were cleaned, and at how many tokens they were cut."""
    return {"version": VERSION, "steps": list(STEPS), "lower_case": lower_case, "max_length": max_length}


def read_options(folder: Path) -> dict[str, Any] | None:
    """The content of ``preprocessing.json`` in ``folder``; None where there is none: that model saw texts as they are.

    Raises: ValueError: it is damaged, or of another version.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    kinds = {"lower_case": bool, "max_length": (int, type(None))}
    if not isinstance(found, dict) or found.get("version") != VERSION or found.get("steps") != list(STEPS):
        raise ValueError(f"{path} was not written by this version of fastft: texts would be cleaned in another way")
    for key, kind in kinds.items():
        if not isinstance(found.get(key), kind):
            raise ValueError(f"{path} is damaged: {key!r} is {found.get(key)!r}")
    return found
