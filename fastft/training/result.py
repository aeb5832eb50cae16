"""What a run tells: its facts before training, its scores after, and the record from which it can be repeated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from fastft import environment
from fastft.training.data import Examples
from fastft.training.tokens import Tokens

SHOWN_LABELS = 8  # a line of facts names no more


@dataclass(frozen=True, repr=False)
class FinetuneResult:
    """What :func:`fastft.finetune` did. Prints as a table.

    Attributes:
        output: the folder with the model and everything about the run.
        labels: names of the classes in the order of their indices.
        history: one record per epoch, the lines of ``history.jsonl``.
        step_losses: the training loss of every step.
        metrics: the content of ``metrics.json``: the last epoch's model on the validation examples.
        predictions: (validation examples,) int64, the predicted class of each, in their order.
        seconds: ``training`` (steps only), ``validation`` and ``total``, loading and saving included.
        facts: what was trained on what, by name, one line each.
    """

    output: Path
    labels: list[str]
    history: list[dict[str, Any]]
    step_losses: list[float]
    metrics: dict[str, Any]
    predictions: np.ndarray
    seconds: dict[str, float]
    facts: dict[str, str]

    def __str__(self) -> str:
        table = [f"{'epoch':>5}{'loss':>9}{'accuracy':>10}{'val. loss':>11}{'val. accuracy':>15}{'seconds':>9}"]
        for record in self.history:
            table.append(
                f"{record['epoch']:5}{record['loss']:9.4f}{record['accuracy']:10.4f}"
                f"{record['validation_loss']:11.4f}{record['validation_accuracy']:15.4f}{record['seconds']:9.1f}"
            )
        return "\n".join([*(fact_line(*fact) for fact in self.facts.items()), "", *table, "", *self.score_lines()])

    __repr__ = __str__

    def score_lines(self) -> list[str]:
        """The metrics, the times and the folder, a line each."""
        scores = "  ".join(f"{key} {self.metrics[key]:.4f}" for key in ("accuracy", "precision", "recall", "f1"))
        times = ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())
        return [fact_line("scores", scores), fact_line("time", times), fact_line("saved in", str(self.output))]


def fact_line(name: str, fact: str) -> str:
    return f"{name:<10}{fact}"


def facts(
    network: PreTrainedModel,
    fresh: Sequence[str],
    options: dict[str, Any],
    gain: float | None,
    kernels: dict[str, Any] | None,
    parts: tuple[Examples, Examples],
    encoded: tuple[Tokens, Tokens],
    length: int,
) -> dict[str, str]:
    """What is trained on what, one line each.

    Args:
        fresh: the parameters that start at random.
        options: the arguments of ``finetune``.
        gain: how many times as fast a linear layer is in bfloat16, None when nobody is to choose.
        kernels: ``Report.as_dict()``, or None for PyTorch's.
        parts, encoded: the training and the validation examples, and their tokens, cut to ``length``.
    """
    size = sum(parameter.numel() for parameter in network.parameters())
    lengths = [length for part in encoded for length in part.lengths()]
    return {
        "model": f"{type(network).__name__} from {options['model']}: {size:,} parameters",
        "new": ", ".join(fresh),
        "dtype": options["dtype"]
        if gain is None
        else f"float32; in bfloat16 a linear layer runs {gain:.1f}x as fast here",
        "kernels": _kernels_line(kernels),
        "data": f"{len(parts[0])} examples to train on, {len(parts[1])} to validate",
        "labels": _labels_line(parts[0].counts()),
        "tokens": f"{np.mean(lengths):.1f} a text, {sum(part.cut for part in encoded)} texts cut to {length}",
    }


def _kernels_line(kernels: dict[str, Any] | None) -> str:
    if kernels is None:
        return "PyTorch's (stock=True)"
    modules = kernels["modules"].values()
    reasons = Counter(module["reason"] for module in modules if module["runs"] != "fastft")
    line = f"fastft's in {len(modules) - reasons.total()} of {len(modules)} modules"
    return "; ".join([line, *(f"PyTorch's in {count}: {reason}" for reason, count in reasons.items())])


def _labels_line(counts: dict[str, int]) -> str:
    shown = [f"{name} ({count})" for name, count in list(counts.items())[:SHOWN_LABELS]]
    more = [f"{len(counts) - len(shown)} more"] if len(counts) > len(shown) else []
    return ", ".join(shown + more)


def run_record(
    options: dict[str, Any],
    parts: tuple[Examples, Examples],
    length: int,
    kernels: dict[str, Any] | None,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The content of run.json: enough to repeat the run and to see what differs; arguments as in :func:`facts`."""
    paths = {"model": str(options["model"]), "output": str(options["output"])}
    given = {name: value for name, value in options.items() if name not in ("data", "validation", *paths)}
    return {
        "options": {**paths, **given},
        "max_length_used": length,
        "data": {
            name: {"source": part.source, "examples": len(part), "sha256": part.fingerprint()}
            for name, part in zip(("training", "validation"), parts, strict=True)
        },
        "environment": environment.describe(),
        "device": str(torch.accelerator.current_accelerator(check_available=True) or "cpu"),
        "kernels": kernels,
        "seconds": seconds,
    }
