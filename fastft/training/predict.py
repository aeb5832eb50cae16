"""The classes of new texts. Imports no torch: wrong files and folders are told at once."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len

from fastft.training import data as readable
from fastft.training import output, trained
from fastft.training.lines import left, short, width_of
from fastft.training.options import numbers, whole
from fastft.training.waiting import waiting

SUFFIXES = (".csv", ".jsonl")
SHOWN = 20  # texts, when it is printed


@dataclass(frozen=True, repr=False)
class Predictions:
    """What :func:`fastft.predict` returns: for each text, in their order, the most probable classes. Prints as a list.

    Attributes:
        texts: as they were given.
        top: for each text the pairs (label, score), the best first; scores are probabilities.
    """

    texts: Sequence[str]
    top: list[list[tuple[str, float]]]

    @property
    def labels(self) -> list[str]:
        return [found[0][0] for found in self.top]

    @property
    def scores(self) -> list[float]:
        return [found[0][1] for found in self.top]

    def __len__(self) -> int:
        return len(self.texts)

    def records(self) -> Iterator[dict[str, Any]]:
        """For each text ``text``, ``label``, ``score``, and where more were asked for ``top``, labels and scores."""
        for text, found in zip(self.texts, self.top, strict=True):
            record: dict[str, Any] = {"text": text, "label": found[0][0], "score": found[0][1]}
            if len(found) > 1:
                record["top"] = [{"label": label, "score": score} for label, score in found]
            yield record

    def as_dict(self) -> dict[str, Any]:
        return {"predictions": list(self.records())}

    def lines(self, width: int = 80) -> Iterator[str]:
        """A line for each text: labels, scores, and as much of the text as there is room for."""
        longest = width_of([label for found in self.top for label, _ in found])
        for text, found in zip(self.texts, self.top, strict=True):
            names = "  ".join(f"{left(label, longest)} {score:.4f}" for label, score in found)
            yield f"{names}  {short(text, max(width - cell_len(names) - 2, 8))}".rstrip()

    def __str__(self) -> str:
        shown = Predictions(self.texts[:SHOWN], self.top[:SHOWN])
        more = [f"… and {len(self) - SHOWN:,} more"] if len(self) > SHOWN else []
        return "\n".join([*shown.lines(), *more])

    __repr__ = __str__

    def write(self, path: str | os.PathLike) -> None:
        """Writes a CSV file (text, label, score, label_2, score_2, …) or JSON lines as :meth:`records`, all or nothing.

        Raises: ValueError, OSError: the file's name ends otherwise, or it cannot be written.
        """
        path = output.check(path, SUFFIXES)
        with (
            output.writing(path) as unfinished,
            unfinished.open("w", encoding="utf-8", errors="replace", newline="") as file,
        ):
            # half a character, which JSON can hold, becomes a question mark
            if path.suffix.lower() == ".jsonl":
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in self.records())
                return
            table = csv.writer(file, lineterminator="\n")
            ranks = ["", *(f"_{rank}" for rank in range(2, len(self.top[0]) + 1))]
            table.writerow(["text", *(f"{name}{rank}" for rank in ranks for name in ("label", "score"))])
            table.writerows(
                [text, *(part for pair in found for part in pair)]
                for text, found in zip(self.texts, self.top, strict=True)
            )


def predict(
    folder: str | os.PathLike,
    texts: Any,
    *,
    text: str | None = None,
    encoding: str = "utf-8",
    top: int = 1,
    batch_size: int = 32,
    max_length: int | None = None,
    stock: bool = False,
    quiet: bool = False,
) -> Predictions:
    """Classifies texts with a trained model.

    Args:
        folder: of a model that ``fastft.finetune`` trained, or of any other text classifier of transformers.
        texts: a sequence of strings; or the path of a CSV, TSV or JSONL file, or of a folder with a text in each file.
        text: column or key of the texts; None finds it by its name, else by what is in it.
        encoding: of the files.
        top: how many classes to tell for each text.
        batch_size: texts at a time.
        max_length: tokens per text, the rest is cut; None takes what the model was trained with, else what it can take.
        stock: without our kernels.
        quiet: no progress bar.
    Raises: ValueError, TypeError, OSError: one sentence that names the argument or place and the value.
    """
    numbers("predict", locals(), {"batch_size": whole(1), "top": whole(1), "max_length": whole(3, optional=True)})
    known = trained.describe(folder)
    if top > len(known.names):
        raise ValueError(f"predict: top={top}; the model has {len(known.names)} classes: {', '.join(known.names)}")
    with waiting("reading", quiet=quiet):
        given = readable.load(texts, text, argument="texts", labels=False, encoding=encoding).texts
        cleaned, _ = known.clean(given)
    classifier = trained.load(known, max_length, stock)
    found: list[list[tuple[str, float]]] = [[]] * len(given)
    with waiting("predicting", len(given), quiet) as advance:
        for rows, logits in classifier.logits(cleaned, batch_size, advance):
            best = logits.softmax(-1).topk(top)
            for row, scores, classes in zip(rows, best.values.tolist(), best.indices.tolist(), strict=True):
                found[row] = [(known.names[index], score) for index, score in zip(classes, scores, strict=True)]
    return Predictions(given, found)
