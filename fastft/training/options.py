"""The options of ``finetune`` and what they may be; imports no torch, so that the command line says at once what is
wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

HEADS = ("pooler", "cls")
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}  # ours: transformers'
DTYPES = ("auto", "float32", "bfloat16")

_RULES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "epochs": (int, lambda value: value >= 1, "a whole number from 1"),
    "batch_size": (int, lambda value: value >= 1, "a whole number from 1"),
    "max_length": (int, lambda value: value >= 3, "a whole number from 3"),
    "seed": (int, lambda value: 0 <= value < 2**32, f"a whole number from 0 to {2**32 - 1}"),
    "validation_share": (float, lambda value: 0 < value < 1, "a number between 0 and 1"),
    "learning_rate": (float, lambda value: 0 < value < math.inf, "a number above 0"),
    "warmup": (float, lambda value: 0 <= value < 1, "a share of the steps from 0 to below 1"),
    "weight_decay": (float, lambda value: 0 <= value < math.inf, "a number from 0"),
    "l1": (float, lambda value: 0 <= value < math.inf, "a number from 0"),
    "label_smoothing": (float, lambda value: 0 <= value < 1, "a number from 0 to below 1"),
    "clip": (float, lambda value: 0 <= value < math.inf, "a number from 0"),
    "dropout": (float, lambda value: 0 <= value < 1, "None or a probability from 0 to below 1"),
    "patience": (int, lambda value: value >= 1, "None or a whole number from 1"),
}
_KINDS = {int: Integral, float: Real}
_CHOICES = {
    "head": HEADS,
    "schedule": tuple(SCHEDULES),
    "dtype": DTYPES,
    "class_weights": (None, "balanced"),
}
_FLAGS = ("stock", "lower_case", "resume", "overwrite", "quiet")
# What may differ when a run is resumed: data and model are compared by their content.
_FREE = ("data", "validation", "text", "label", "encoding", "model", "output", "resume", "overwrite", "quiet")


def checked(options: dict[str, Any]) -> dict[str, Any]:
    """``options`` with Python's own numbers instead of NumPy's, or a sentence about the first one that is wrong.

    Raises: TypeError, ValueError: ``finetune: epochs=0; a whole number from 1 is needed``
    """
    checked = dict(options)
    for name, (kind, holds, wanted) in _RULES.items():
        value = options[name]
        if value is None and wanted.startswith("None"):
            continue
        if not isinstance(value, _KINDS[kind]) or isinstance(value, bool):
            raise TypeError(f"finetune: {name}={value!r} is a {type(value).__name__}; {wanted} is needed")
        if not holds(value):
            raise ValueError(f"finetune: {name}={value!r}; {wanted} is needed")
        checked[name] = kind(value)
    for name, choices in _CHOICES.items():
        if options[name] not in choices:
            raise ValueError(f"finetune: {name}={options[name]!r} is none of {', '.join(map(str, choices))}")
    checked |= {name: bool(options[name]) for name in _FLAGS}
    if checked["resume"] and checked["overwrite"]:
        raise ValueError("finetune: resume=True goes on with a run, overwrite=True replaces it: pass one of them")
    return checked


def of_the_run(options: dict[str, Any]) -> dict[str, Any]:
    """Those of the checked ``options`` that decide about the weights, ready for JSON: a resumed run needs the same."""
    return {name: value for name, value in options.items() if name not in _FREE}
