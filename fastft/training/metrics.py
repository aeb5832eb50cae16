"""What a classifier is judged by, on top of scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

SCORES = ("precision", "recall", "f1")


def classification(names: Sequence[str], targets: np.ndarray, predictions: np.ndarray) -> dict[str, Any]:
    """Accuracy, precision, recall and F1 of ``predictions`` (rows,) against ``targets`` (rows,), class indices.

    Precision is TP / (TP + FP), recall TP / (TP + FN), F1 their harmonic mean; 0 where the denominator is 0, as for a
    class that is never predicted.

    Returns: ``accuracy``; ``precision``, ``recall``, ``f1``, which are those of ``macro``, the averages over the
    classes; ``weighted``, weighted by the number of examples; ``per_class`` by name, with that number as ``support``;
    and ``confusion_matrix``, rows for the true class, columns for the predicted one.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

    classes = list(range(len(names)))

    def scores(average: str | None) -> list[Any]:
        return precision_recall_fscore_support(targets, predictions, labels=classes, average=average, zero_division=0)

    def mean(average: str) -> dict[str, float]:
        return dict(zip(SCORES, map(float, scores(average)[:3]), strict=True))

    per_class = zip(*(values.tolist() for values in scores(None)), strict=True)
    macro = mean("macro")
    return {
        "accuracy": float(accuracy_score(targets, predictions)),
        **macro,
        "macro": macro,
        "weighted": mean("weighted"),
        "per_class": {
            name: dict(zip((*SCORES, "support"), values, strict=True))
            for name, values in zip(names, per_class, strict=True)
        },
        "confusion_matrix": confusion_matrix(targets, predictions, labels=classes).tolist(),
    }
