"""How well a trained classifier does on labelled texts. Imports no torch: wrong data and folders are told at once."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastft.training import data as readable
from fastft.training import metrics, preprocess, trained
from fastft.training.lines import class_lines, fact_line
from fastft.training.options import numbers, whole
from fastft.training.waiting import waiting


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What :func:`fastft.evaluate` found. Prints as a table.

    Attributes:
        labels: names of the classes in the order of their indices.
        metrics: ``loss`` and what :func:`fastft.training.metrics.classification` returns.
        predictions: (examples,) int64, the predicted class of each example, in their order.
        facts: what was evaluated on what, by name, one line each.
    """

    labels: list[str]
    metrics: dict[str, Any]
    predictions: np.ndarray
    facts: dict[str, str]

    def __str__(self) -> str:
        scores = "  ".join(f"{key} {self.metrics[key]:.4f}" for key in ("accuracy", *metrics.SCORES))
        told = {**self.facts, "loss": f"{self.metrics['loss']:.4f}", "scores": f"{scores} (macro)"}
        return "\n".join([*(fact_line(*fact) for fact in told.items()), "", *class_lines(self.metrics)])

    __repr__ = __str__

    def as_dict(self) -> dict[str, Any]:
        return {**self.metrics, "examples": len(self.predictions), "facts": self.facts}


def evaluate(
    folder: str | os.PathLike,
    data: Any,
    *,
    text: str | None = None,
    label: str | None = None,
    encoding: str = "utf-8",
    batch_size: int = 32,
    max_length: int | None = None,
    stock: bool = False,
    quiet: bool = False,
) -> Evaluation:
    """Classifies labelled texts with a trained model and compares; every example counts, duplicates and empty ones too.

    Args:
        folder: of a model that ``fastft.finetune`` trained, or of any other text classifier of transformers.
        data: path of a CSV, TSV or JSONL file or of a folder with one sub-folder per class, or a pair ``(texts,
            labels)``. Labels are the names of the model's classes in any case, or else their indices.
        text, label: columns or keys in ``data``; None finds them by their names, else by what is in them.
        encoding: of the files.
        batch_size: texts at a time.
        max_length: tokens per text, the rest is cut; None takes what the model was trained with, else what it can take.
        stock: without our kernels.
        quiet: no progress bar.
    Raises: ValueError, TypeError, OSError: one sentence that names the argument or place and the value.
    """
    numbers("evaluate", locals(), {"batch_size": whole(1), "max_length": whole(3, optional=True)})
    known = trained.describe(folder)
    with waiting("reading", quiet=quiet):
        examples = readable.load(data, text, label, encoding=encoding)
        targets, by_index = _targets(examples, known.names)
        texts, cleaned = known.clean(examples.texts)

    import torch

    classifier = trained.load(known, max_length, stock)
    started = time.perf_counter()
    predictions, loss = np.zeros(len(texts), dtype=np.int64), 0.0
    with waiting("evaluating", len(texts), quiet) as advance:
        for rows, logits in classifier.logits(texts, batch_size, advance):
            predictions[rows] = logits.argmax(-1)
            wanted = torch.from_numpy(targets[rows])
            loss += torch.nn.functional.cross_entropy(logits.double(), wanted, reduction="sum").item()
    seconds = time.perf_counter() - started
    facts = {
        "model": f"{type(classifier.model).__name__} from {folder}",
        "kernels": classifier.kernels(),
        "data": f"{len(texts):,} examples from {examples.source}",
        "columns": examples.columns,
        "labels": "taken as indices of the model's classes" if by_index else "",
        "cleaned": "\n".join(preprocess.said(cleaned, all=False)),
        "tokens": f"{classifier.cut:,} texts cut to {classifier.length}",
        "time": f"{seconds:.1f} s, {len(texts) / seconds:,.0f} texts/s",
    }
    scores = {"loss": loss / len(texts), **metrics.classification(known.names, targets, predictions)}
    return Evaluation(known.names, scores, predictions, {name: fact for name, fact in facts.items() if fact})


def _targets(examples: readable.Examples, names: list[str]) -> tuple[np.ndarray, bool]:
    """(indices of the examples' classes, whether the labels are indices themselves)."""
    indices = {name.casefold(): index for index, name in enumerate(names)}
    if len(indices) < len(names):  # names that differ in nothing but their case
        indices = {}
    indices |= {name: index for plain in (readable.whole_numbers(names), names) for index, name in enumerate(plain)}
    labels = set(examples.labels)
    found = {label: indices.get(label, indices.get(label.casefold())) for label in labels}
    by_index = all(index is None for index in found.values()) and all(
        label.isdecimal() and int(label) < len(names) for label in labels
    )
    if by_index:
        found = {label: int(label) for label in labels}
    unknown = {label for label, index in found.items() if index is None}
    if unknown:
        readable.require_known(examples, [*names, *(labels - unknown)], "the model")
    return np.array([found[label] for label in examples.labels], dtype=np.int64), by_index
