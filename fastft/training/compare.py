"""Stock and fastft side by side on somebody's own model, data and machine."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from fastft.testing import timing
from fastft.training import compare_job, compare_run, files
from fastft.training.compare_report import CompareResult, page
from fastft.training.data import load
from fastft.training.options import SEED, Rule, numbers, whole

DTYPES = {"auto": None, "float32": None, "bfloat16": torch.bfloat16}  # name: autocast


def compare(
    model: str | os.PathLike | PreTrainedModel,
    data: Any = None,
    *,
    text: str | None = None,
    label: str | None = None,
    batch_size: int = 32,
    max_length: int = 256,
    steps: int = 20,
    epochs: int = 3,
    rows: int | None = None,
    price: float | None = None,
    seed: int = 0,
    dtype: str = "auto",
    json: str | os.PathLike | None = None,
    html: str | os.PathLike | None = None,
    quiet: bool = False,
) -> CompareResult:
    """Trains a classifier for some steps stock and with fastft, side by side on the same batches, and tells how far
    apart logits, loss, gradients and loss curves are, and what it gains in time and memory.

    Stock is transformers' model with SDPA attention, batches of similar length and torch's fused AdamW; fastft trains
    with that optimizer, too. Nothing that is passed in changes, nor does any random state.

    Args:
        model: a folder or a name on the Hugging Face hub; a checkpoint without a classification head gets a fresh one.
            Or a sequence classifier of transformers with parameters in float32.
        data: labelled texts, as for :func:`fastft.finetune`: a path or a pair ``(texts, labels)``. None makes up rows
            of random tokens whose lengths are as uneven as those of real texts.
        text, label: columns or keys in ``data``, as for :func:`fastft.finetune`.
        batch_size, max_length: rows of a batch, tokens per text.
        steps: that are timed, from 2; batches of all sizes are among them.
        epochs, rows: of the job whose time is projected; ``rows`` None takes those of ``data``, or 10,000.
        price: of this machine per hour, in any currency, for the job's cost.
        seed: of made-up rows, a fresh head, the choice of batches, and dropout.
        dtype: of the computation: "bfloat16" is autocast over float32 weights, "auto" is float32.
        json, html: files to write: one JSON object, :meth:`CompareResult.as_dict`; one page with plots that needs
            nothing else.
        quiet: no progress bar (which only a terminal sees).
    Returns: a :class:`CompareResult`. It prints as tables below what there is to say about them, bad news first.
    Raises: ValueError, TypeError, OSError: one sentence that names the argument or place and the value; MemoryError:
        the model is too large for this machine, which is said before training.
    Example:
        >>> print(fastft.compare("bert-base-uncased", "reviews.csv"))  # doctest: +SKIP
    """
    options = _checked(dict(locals()))
    outputs = {name: Path(path) for name, path in (("json", json), ("html", html)) if path is not None}
    _require_folders(outputs)
    batch_size, steps, epochs, seed = (options[name] for name in ("batch_size", "steps", "epochs", "seed"))
    examples = None if data is None else load(data, text, label)
    recipe, variants = compare_run.Recipe(DTYPES[dtype], seed), compare_run.variants()
    with _own_random_state(seed):
        job = compare_job.load(model, examples, batch_size, options["max_length"], seed)
        _require_memory(job.network, len(variants))
        longest, *batches = job.batches(steps, seed)
        passes = 3 + 4 * len(variants) + (2 * len(variants) + 1) * steps
        with _progress(passes, quiet) as tick:
            parity = compare_run.parity(job.network, variants[1], batches, recipe, tick)
            memory = compare_run.memory(job.network, variants, longest, recipe, tick)
            without = compare_run.losses_without_dropout(job.network, variants, batches, recipe, tick)
            times = compare_run.timed(job.network, variants, longest, batches, recipe, tick)
    result = CompareResult(
        facts=job.facts | {"dtype": "bfloat16 autocast over float32 weights" if DTYPES[dtype] else "float32"},
        options={name: options[name] for name in ("dtype", *_RULES)},
        parity=parity,
        losses={"dropout_off": without, "dropout_on": {name: run.losses for name, run in times.items()}},
        times=times,
        tokens=sum(int(batch["attention_mask"].sum()) for batch in batches) / steps,
        memory=memory,
        padding=job.padding,
        rows=options["rows"] or job.rows,
        conditions=timing.conditions() | {"device": str(job.network.device)},
    )
    if "json" in outputs:
        files.write_json(outputs["json"], result.as_dict())
    if "html" in outputs:
        with files.replacing(outputs["html"]) as unfinished:
            unfinished.write_text(page(result), encoding="utf-8")
    return result


# ---- options

_RULES: dict[str, Rule] = {
    "batch_size": whole(1),
    "max_length": whole(3),
    "steps": whole(2),
    "epochs": whole(1),
    "rows": whole(1, optional=True),
    "price": (float, lambda value: 0 <= value < math.inf, "None or a number from 0"),
    "seed": SEED,
}


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """``options`` with Python's own numbers instead of NumPy's, or a sentence about the first one that is wrong."""
    checked = options | numbers("compare", options, _RULES)
    if options["dtype"] not in DTYPES:
        raise ValueError(f"compare: dtype={options['dtype']!r} is none of {', '.join(DTYPES)}")
    if options["data"] is None and (options["text"] or options["label"]):
        columns = f"text={options['text']!r}, label={options['label']!r}"
        raise ValueError(f"compare: {columns} name columns of a file, but data is None")
    return checked


def _require_folders(outputs: Mapping[str, Path]) -> None:
    """Raises OSError where a file could not be written: before minutes are spent."""
    for name, path in outputs.items():
        if path.is_dir():
            raise IsADirectoryError(f"compare: {name}={str(path)!r} is a folder, not a file")
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"compare: {name}={str(path)!r} is in a folder that does not exist")
        if not os.access(path.absolute().parent, os.W_OK):
            raise PermissionError(f"compare: {name}={str(path)!r} is in a folder that cannot be written to")


def _require_memory(network: PreTrainedModel, variants: int) -> None:
    """Raises MemoryError where weights, gradients and optimizer states alone do not fit."""
    size = sum(parameter.numel() for parameter in network.parameters())
    training = 4 + 12 * variants + 4  # ours; weights and two moments for each; the gradients of the one that steps
    judging = 4 + 8 + 8 + 2 * 4  # ours; float64 weights and gradients; gradients of stock and fastft
    needed, free = size * max(training, judging), compare_run.free_memory(network.device)
    if free is not None and needed > free:
        raise MemoryError(
            f"compare: the model has {size:,} parameters, training it {variants} times side by side takes "
            f"{needed / 1e9:.1f} GB and more, {free / 1e9:.1f} GB are free on {network.device}"
        )


# ---- surroundings


@contextlib.contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """Random numbers from ``seed`` on; afterwards the caller's are as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        transformers.set_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def _progress(passes: int, quiet: bool) -> Iterator[Callable[[], None]]:
    """A bar on a terminal's stderr, which is gone afterwards; yields what moves it on by one."""
    console = Console(stderr=True)
    columns = (TextColumn("comparing"), BarColumn(bar_width=40), TimeRemainingColumn())
    is_off = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, refresh_per_second=2, disable=is_off) as bar:
        yield functools.partial(bar.advance, bar.add_task("", total=passes))
