"""What a run tells: its facts before training, its scores after, and the record from which it can be repeated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from fastft import environment
from fastft.models.report import Report
from fastft.training.data import Examples
from fastft.training.lines import SHOWN_LABELS, class_lines, fact_line, kernels_fact, short
from fastft.training.preprocess import Prepared
from fastft.training.tokens import LengthGroupedSampler, Tokens, batches, padding_share


@dataclass(frozen=True, repr=False)
class FinetuneResult:
    """What :func:`fastft.finetune` did. Prints as a table.

    Attributes:
        output: the folder with the model and everything about the run.
        labels: names of the classes in the order of their indices.
        history: one record per epoch, the lines of ``history.jsonl``.
        step_losses: the training loss of every step.
        metrics: the content of ``metrics.json``: the saved model on the validation examples.
        predictions: (validation examples,) int64, the predicted class of each, in their order.
        seconds: ``training`` (steps only), ``validation`` and ``total``, loading and saving included.
        facts: what was trained on what, by name, one line each.
        epoch: from which the saved model is.
    """

    output: Path
    labels: list[str]
    history: list[dict[str, Any]]
    step_losses: list[float]
    metrics: dict[str, Any]
    predictions: np.ndarray
    seconds: dict[str, float]
    facts: dict[str, str]
    epoch: int

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
        """The metrics, the times and the folder."""
        scores = "  ".join(f"{key} {self.metrics[key]:.4f}" for key in ("accuracy", "precision", "recall", "f1"))
        times = ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())
        lines = [
            fact_line("scores", f"{scores} (macro, of epoch {self.epoch})"),
            *("" if line == "" else f"{'':10}{line}" for line in ["", *class_lines(self.metrics), ""]),
        ]
        later = [fact_line(name, self.facts[name]) for name in ("stopped", "l1") if name in self.facts]
        return [*lines, *later, fact_line("time", times), fact_line("saved in", str(self.output))]


def facts(
    network: PreTrainedModel,
    fresh: Sequence[str],
    options: dict[str, Any],
    gain: float | None,
    kernels: Report | None,
    parts: tuple[Examples, Examples],
    cleaning: Prepared,
    encoded: tuple[Tokens, Tokens],
    length: int,
) -> dict[str, str]:
    """What is trained on what, one line each.

    Args:
        fresh: the parameters that start at random.
        options: the arguments of ``finetune``.
        gain: how many times as fast a linear layer is in bfloat16, None when nobody is to choose.
        kernels: what runs in ``network``, or None for PyTorch's.
        parts, encoded: the training and the validation examples, and their tokens, cut to ``length``.
        cleaning: what was done to the texts.
    """
    size = sum(parameter.numel() for parameter in network.parameters())
    lengths = [length for part in encoded for length in part.lengths()]
    columns = parts[0].columns
    return {
        "model": f"{type(network).__name__} from {options['model']}: {size:,} parameters",
        "new": ", ".join(fresh) or "nothing, the checkpoint has all weights",
        "dtype": options["dtype"]
        if gain is None
        else f"float32; in bfloat16 a linear layer runs {gain:.1f}x as fast here",
        "kernels": kernels_fact(kernels),
        **({"columns": columns} if columns else {}),
        "cleaned": "\n".join(cleaning.lines()),
        "data": f"{len(parts[0]):,} examples to train on, {len(parts[1]):,} to validate",
        "labels": _labels_line(parts[0].counts()),
        "tokens": f"{np.mean(lengths):.1f} a text, {sum(part.cut for part in encoded):,} texts cut to {length}",
        "batches": f"{options['batch_size']} texts of similar length, "
        f"{_padding(encoded[0].lengths(), options['batch_size'], options['seed']):.1%} of the tokens are padding",
    }


def _padding(lengths: list[int], batch_size: int, seed: int) -> float:
    """The share of padding in the batches of the first epoch."""
    return padding_share(batches(list(LengthGroupedSampler(lengths, batch_size, seed)), batch_size), lengths)


def _labels_line(counts: dict[str, int]) -> str:
    shown = [f"{short(name)} ({count:,})" for name, count in list(counts.items())[:SHOWN_LABELS]]
    more = [f"{len(counts) - len(shown)} more"] if len(counts) > len(shown) else []
    return ", ".join(shown + more)


def run_record(
    options: dict[str, Any],
    parts: tuple[Examples, Examples],
    cleaning: Prepared,
    encoded: tuple[Tokens, Tokens],
    length: int,
) -> dict[str, Any]:
    """Of the content of run.json, what was known before training; arguments as in :func:`facts`."""
    paths = {"model": str(options["model"]), "output": str(options["output"])}
    given = {name: value for name, value in options.items() if name not in ("data", "validation", *paths)}
    return {
        "options": {**paths, **given},
        "max_length_used": length,
        "data": {
            name: {"source": part.source, "examples": len(part), "sha256": part.fingerprint(), "cut": tokens.cut}
            for name, part, tokens in zip(("training", "validation"), parts, encoded, strict=True)
        },
        "preprocessing": cleaning.counts,
        "environment": environment.describe(),
        "device": str(torch.accelerator.current_accelerator(check_available=True) or "cpu"),
    }
