"""Lines for a screen of 80 columns, whatever a text or a class's name holds. Imports no torch."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size

from fastft.training.preprocess import strip_control

if TYPE_CHECKING:
    from fastft.models.report import Report

WIDTH = 70  # of a table beside the names of the facts
LONGEST_NAME = 24  # of a class
SHOWN_CLASSES = 20  # a table of scores has no more
SHOWN_LABELS = 8  # a line of facts names no more, a confusion matrix is printed for no more
_BETWEEN_WORDS = {"break_long_words": False, "break_on_hyphens": False}


def short(text: str, longest: int = LONGEST_NAME) -> str:
    """``text`` in one line of at most so many columns, of which Chinese characters and emoji take two, and without what
    a terminal would obey."""
    text = strip_control(" ".join(text.split()))
    return text if cell_len(text) <= longest else f"{set_cell_size(text, longest - 1).rstrip()}…"


def left(text: str, width: int) -> str:
    """``text``, short, in so many columns."""
    return set_cell_size(short(text, width), width)


def width_of(texts: Sequence[str], longest: int = LONGEST_NAME) -> int:
    """Columns that the widest of ``texts`` takes when all are short."""
    return max((cell_len(short(text, longest)) for text in texts), default=0)


def fact_line(name: str, fact: str, width: int | None = None) -> str:
    """What is known, beside its name; folded between words at ``width`` columns, which only a terminal has."""
    lines = fact.split("\n")
    if width is not None:
        lines = [part for line in lines for part in textwrap.wrap(line, max(width - 10, 20), **_BETWEEN_WORDS) or [""]]
    return f"{name:<10}" + f"\n{'':10}".join(lines)


def kernels_lines(report: Report | None) -> list[str]:
    """Whose kernels run in how many modules, then for each reason in which ones PyTorch's do; None: without ours."""
    if report is None:
        return ["PyTorch's (stock=True)"]
    kinds: dict[str, Counter[str]] = {}
    for line in report.lines:
        if line.reason:
            kinds.setdefault(line.reason, Counter())[line.kind] += 1
    lines = [f"fastft's in {sum(line.reason is None for line in report.lines)} of {len(report.lines)} modules"]
    for reason, found in kinds.items():
        lines.append(f"PyTorch's in {', '.join(f'{count} {kind}' for kind, count in found.most_common())}: {reason}")
    return lines


def kernels_fact(report: Report | None) -> str:
    """The same for a screen, folded in pipes too: a model may hold many kinds of modules."""
    folded = (textwrap.wrap(line, WIDTH, subsequent_indent="  ") for line in kernels_lines(report))
    return "\n".join(part for parts in folded for part in parts)


def class_lines(metrics: dict[str, Any]) -> list[str]:
    """Precision, recall and F1 of each class and their means, then for a few classes the confusion matrix."""
    keys, names = ("precision", "recall", "f1"), list(metrics["per_class"])
    shown = names[:SHOWN_CLASSES]
    width = width_of([*shown, "weighted"])

    def row(name: str, scores: dict[str, Any], examples: object = "") -> str:
        return f"{left(name, width)}" + "".join(f"{scores[key]:11.4f}" for key in keys) + f"{examples:>11}".rstrip()

    lines = [f"{'':{width}}" + "".join(f"{key:>11}" for key in (*keys, "examples"))]
    lines += [row(name, metrics["per_class"][name], metrics["per_class"][name]["support"]) for name in shown]
    if len(names) > len(shown):
        lines.append(f"… and {len(names) - len(shown)} more classes")
    lines += [row("macro", metrics), row("weighted", metrics["weighted"])]
    if len(names) <= SHOWN_LABELS:
        lines += ["", *_matrix_lines(names, metrics["confusion_matrix"])]
    return lines


def _matrix_lines(names: Sequence[str], matrix: Sequence[Sequence[int]]) -> list[str]:
    digits = max(4, len(str(max(map(max, matrix)))))
    heads, rows = [short(name) for name in names], list(names)

    def columns() -> list[int]:
        return [max(cell_len(head), digits) + 2 for head in heads]

    if width_of(rows) + sum(columns()) > WIDTH:  # then numbers stand for the names
        heads = [f"({number})" for number in range(1, len(names) + 1)]
        rows = [f"{head} {name}" for head, name in zip(heads, names, strict=True)]
    width = width_of(rows, WIDTH - sum(columns()))

    def line(name: str, cells: Sequence[object]) -> str:
        right = (" " * (size - cell_len(str(cell))) + str(cell) for cell, size in zip(cells, columns(), strict=True))
        return left(name, width) + "".join(right)

    return [f"{'':{width}}  predicted as", line("", heads), *map(line, rows, matrix)]
