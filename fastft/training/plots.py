"""Pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

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
        accuracy_axes.plot(epochs, columns["accuracy"], **style, alpha=0.6, label=name)
        accuracy_axes.plot(epochs, columns["validation_accuracy"], **style, marker="o")
    for axes, title in ((loss_axes, "loss"), (accuracy_axes, "accuracy")):
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.plot([], [], color="grey", marker="o", label="validation")
        axes.legend()
    accuracy_axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)


def _running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Mean of each value and the up to ``window - 1`` before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)
