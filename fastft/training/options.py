"""The options of ``finetune``, what they may be, and the check of numbers that every function has; imports no torch, so
that the command line says at once what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

HEADS = ("pooler", "cls")
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}  # ours: transformers'
DTYPES = ("auto", "float32", "bfloat16")

Rule = tuple[type, Callable[[Any], bool], str]  # int or float; what holds of it; the same in words


def whole(least: int, optional: bool = False) -> Rule:
    """The rule for whole numbers from ``least`` on, and None if that is ``optional``."""
    return int, lambda value: value >= least, f"{'None or ' if optional else ''}a whole number from {least}"


SEED: Rule = (int, lambda value: 0 <= value < 2**32, f"a whole number from 0 to {2**32 - 1}")
_RULES: dict[str, Rule] = {
    "epochs": whole(1),
    "batch_size": whole(1),
    "max_length": whole(3),
    "seed": SEED,
    "validation_share": (float, lambda value: 0 < value < 1, "a number between 0 and 1"),
    "learning_rate": (float, lambda value: 0 < value < math.inf, "a number above 0"),
    "warmup": (float, lambda value: 0 <= value < 1, "a share of the steps from 0 to below 1"),
    "weight_decay": (float, lambda value: 0 <= value < math.inf, "a number from 0"),
    "l1": (float, lambda value: 0 <= value < math.inf, "a number from 0"),
    "label_smoothing": (float, lambda value: 0 <= value < 1, "a number from 0 to below 1"),
    "clip": (float, lambda value: 0 <= value < math.inf, "a number from 0"),
    "dropout": (float, lambda value: 0 <= value < 1, "None or a probability from 0 to below 1"),
    "patience": whole(1, optional=True),
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


def numbers(function: str, options: Mapping[str, Any], rules: Mapping[str, Rule]) -> dict[str, Any]:
    """Those of ``options`` that have a rule, as Python's own numbers instead of NumPy's.

    Raises: TypeError, ValueError: ``predict: batch_size=0; a whole number from 1 is needed``
    """
    found = {}
    for name, (kind, holds, wanted) in rules.items():
        value = options[name]
        if value is None and wanted.startswith("None"):
            found[name] = None
            continue
        if not isinstance(value, _KINDS[kind]) or isinstance(value, bool):
            raise TypeError(f"{function}: {name}={value!r} is a {type(value).__name__}; {wanted} is needed")
        if not holds(value):
            raise ValueError(f"{function}: {name}={value!r}; {wanted} is needed")
        found[name] = kind(value)
    return found


def checked(options: dict[str, Any]) -> dict[str, Any]:
    """``options`` with Python's own numbers instead of NumPy's, or a sentence about the first one that is wrong.

    Raises: TypeError, ValueError: ``finetune: epochs=0; a whole number from 1 is needed``
    """
    checked = options | numbers("finetune", options, _RULES)
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
