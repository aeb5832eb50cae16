"""What a classifier is judged by, on top of scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def classification(names: Sequence[str], targets: np.ndarray, predictions: np.ndarray) -> dict[str, Any]:
    """Accuracy, precision, recall and F1 of ``predictions`` (rows,) against ``targets`` (rows,), class indices.

    Returns: ``accuracy``; ``precision``, ``recall``, ``f1``, each the macro average over the classes; ``weighted``, the
    same three weighted by the number of examples; ``per_class`` by name, with that number as ``support``; and
    ``confusion``, rows for the true class, columns for the predicted one. A class never predicted has precision 0.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    classes = list(range(len(names)))
    keys = ("precision", "recall", "f1", "support")

    def scores(average: str | None) -> dict[str, Any]:
        values = precision_recall_fscore_support(targets, predictions, labels=classes, average=average, zero_division=0)
        return dict(zip(keys, values, strict=True))

    per_class = scores(None)
    return {
        "accuracy": float(np.mean(targets == predictions)),
        **{key: float(scores("macro")[key]) for key in keys[:3]},
        "weighted": {key: float(scores("weighted")[key]) for key in keys[:3]},
        "per_class": {name: {key: per_class[key][i].item() for key in keys} for i, name in enumerate(names)},
        "confusion": confusion_matrix(targets, predictions, labels=classes).tolist(),
    }
