"""Pictures of a run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fastft.training.lines import short
from fastft.training.result import FinetuneResult


def learning_curves(path: Path, runs: Mapping[str, FinetuneResult]) -> None:
    """Writes a PNG with the loss (left) and the accuracy (right) of each named run by epoch.

    The training loss is drawn per step as a running mean; circles are the validation after each epoch.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for index, (name, run) in enumerate(runs.items()):
        style = {"color": f"C{index}", "linestyle": ("-", "--", ":")[index % 3]}
        columns = {key: [record[key] for record in run.history] for key in run.history[0]}
        epochs = columns["epoch"]
        smooth = _running_mean(run.step_losses, window=max(1, len(run.step_losses) // 40))
        steps = np.arange(1, len(smooth) + 1) * len(epochs) / len(smooth)
        loss_axes.plot(steps, smooth, **style, alpha=0.6, label=name)
        loss_axes.plot(epochs, columns["validation_loss"], **style, marker="o")
        accuracy_axes.plot(epochs, columns["accuracy"], **style, alpha=0.6, marker=".", label=name)
        accuracy_axes.plot(epochs, columns["validation_accuracy"], **style, marker="o")
    for axes, title in ((loss_axes, "loss"), (accuracy_axes, "accuracy")):
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.plot([], [], color="grey" if len(runs) > 1 else "C0", marker="o", label="validation")
        axes.legend()
    accuracy_axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)


def confusion_matrix(path: Path, names: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
    """Writes a PNG of ``counts`` (C, C), rows for the true class; colours are shares of a row, the diagonal recall.

    Up to 30 classes every count is written into its field, beyond that the picture shows where the mistakes are.
    """
    from matplotlib.figure import Figure

    counts, classes = np.asarray(counts), len(names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    field = max(0.14, min(0.6, 12 / classes))  # inches; 0.14 has room for names of 7 points
    side = 2.5 + field * classes
    points = min(10.0, 0.7 * 72 * field)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, fraction=0.04, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true", title=f"{np.trace(counts):,} of {counts.sum():,} right")
    shown = [_plain(short(name)) for name in names]
    axes.set_xticks(range(classes), shown, rotation=90, fontsize=points)
    axes.set_yticks(range(classes), shown, fontsize=points)
    if classes <= 30:
        digits = len(str(counts.max()))
        size = min(points, 0.9 * 72 * field / (0.6 * digits))  # a digit is 0.6 of its size wide
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if shares[row, column] > 0.5 else "black" if count else "lightgrey"
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a box stands for it in the picture
        figure.savefig(path, dpi=120)


def _plain(name: str) -> str:
    return name.replace("$", r"\$")  # matplotlib would take it for a formula


def _running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Mean of each value and the up to ``window - 1`` before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)
