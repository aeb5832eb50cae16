"""The main job on real text, stock and with fastft, one after the other: accuracy, time, speed-up, learning curves.

    make demo                        or   python -m benchmarks.demo
    make demo DROPOUT=0              also shows that both compute the same
    make demo ROWS=0 EPOCHS=3        all of the data

Movie-review snippets (Hutto & Gilbert, ICWSM 2014) and a MiniLM checkpoint, both from ordinary packages. Stock is
transformers' Trainer on the same split, batches (grouped by length) and seed, with SDPA and fused AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import fastft
from benchmarks import datasets
from fastft.training import plots
from fastft.training.result import FinetuneResult

STOCK, FASTFT, ONE_THREAD = "stock", "fastft", "stock, one thread"


def run(
    data: tuple[Sequence[str], Sequence[str]], model: str | os.PathLike, output: Path, console: Console, **options: Any
) -> dict[str, FinetuneResult]:
    """Fine-tunes stock and with fastft, by name; with ``dropout=0`` on two threads, and stock on one thread as well."""
    threads = torch.get_num_threads()
    plan = [(STOCK, threads), (FASTFT, threads)]
    if options["dropout"] == 0:
        plan = [(STOCK, 2), (FASTFT, 2), (ONE_THREAD, 1)]
    runs = {}
    for name, count in plan:
        console.rule(name, align="left")
        torch.set_num_threads(count)
        try:
            folder = output / name.replace(", ", "_").replace(" ", "_")
            runs[name] = fastft.finetune(data, model, folder, stock=name != FASTFT, overwrite=True, **options)
        finally:
            torch.set_num_threads(threads)
        console.print()
    return runs


def table(runs: dict[str, FinetuneResult]) -> Table:
    """One row per run; the speed-up is that of the training steps over stock's."""
    result = Table(box=box.SIMPLE, title="validation after the last epoch; time of the training steps, of everything")
    for column in ("", "accuracy", "loss", "training", "everything", "speed-up"):
        result.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, run in runs.items():
        seconds = run.seconds
        result.add_row(
            name,
            f"{run.metrics['accuracy']:.4f}",
            f"{run.metrics['loss']:.4f}",
            f"{seconds['training']:.1f} s",
            f"{seconds['total']:.1f} s",
            f"{runs[STOCK].seconds['training'] / seconds['training']:.2f}x",
        )
    return result


def agreement(runs: dict[str, FinetuneResult]) -> dict[str, Any]:
    """How far apart two runs without dropout are: stock and fastft, and stock on one and on two threads.

    Returns: for both pairs the largest difference of the training ``loss`` at any step and the number of validation
    ``predictions`` that differ; and whether fastft's number is ``allowed``: at most two more than twice stock's own.
    """

    def apart(a: FinetuneResult, b: FinetuneResult) -> dict[str, float]:
        loss = float(np.max(np.abs(np.subtract(a.step_losses, b.step_losses))))
        return {"loss": loss, "predictions": int(np.sum(a.predictions != b.predictions))}

    ours, own = apart(runs[STOCK], runs[FASTFT]), apart(runs[STOCK], runs[ONE_THREAD])
    allowed = ours["predictions"] <= 2 * own["predictions"] + 2
    return {"fastft": ours, "stock": own, "validation_examples": len(runs[STOCK].predictions), "allowed": allowed}


def agreement_lines(found: dict[str, Any]) -> list[str]:
    pairs = {"stock and fastft": found["fastft"], "stock on one and two threads": found["stock"]}
    lines = [
        "Without dropout, the largest difference of the training loss at any step, and the validation examples that",
        "were predicted differently:",
    ]
    for name, pair in pairs.items():
        lines.append(f"  {name:30}{pair['loss']:.2e}   {pair['predictions']} of {found['validation_examples']}")
    limit = 2 * found["stock"]["predictions"] + 2
    verdict = "as expected" if found["allowed"] else "MORE THAN EXPECTED"
    return [*lines, f"  {verdict}: at most {limit}, two more than twice stock's own"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.demo",
        description="Fine-tunes MiniLM on movie reviews, stock and with fastft.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=4000, help="examples, validation included; 0 takes all 10568")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--dropout", type=float, help="instead of the checkpoint's 0.1; 0 also compares the numbers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="models, learning curves, demo.json")
    options = vars(parser.parse_args(arguments))
    rows, output = options.pop("rows"), options.pop("output")

    console = Console(highlight=False)
    model = datasets.minilm()
    texts, labels = datasets.movie_reviews()
    chosen = np.random.default_rng(options["seed"]).permutation(len(texts))[: rows or None]
    runs = run(([texts[i] for i in chosen], [labels[i] for i in chosen]), model, output, console, **options)

    console.print(table(runs))
    report = {
        name: {"metrics": run.metrics, "seconds": run.seconds, "history": run.history} for name, run in runs.items()
    }
    if ONE_THREAD in runs:
        report["agreement"] = agreement(runs)
        console.print(*agreement_lines(report["agreement"]), sep="\n", soft_wrap=True)
    plots.learning_curves(output / "learning_curves.png", runs)
    (output / "demo.json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"learning curves: {output / 'learning_curves.png'}", soft_wrap=True)
    return 0 if report.get("agreement", {}).get("allowed", True) else 1


if __name__ == "__main__":
    raise SystemExit(main())
