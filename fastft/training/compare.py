"""Stock and fastft side by side on somebody's own model, data and machine.

Imports no torch until the data are read: wrong options, files and data are told at once.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.training import data as readable
from fastft.training import files, output, preprocess
from fastft.training.options import DTYPES, SEED, Rule, numbers, whole
from fastft.training.waiting import waiting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastft.training.compare_report import CompareResult


def compare(
    model: str | os.PathLike | PreTrainedModel,
    data: Any = None,
    *,
    text: str | None = None,
    label: str | None = None,
    encoding: str = "utf-8",
    lower_case: bool = False,
    batch_size: int = 32,
    max_length: int = 256,
    validation_share: float = 0.1,
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
        text, label, encoding, lower_case: as for :func:`fastft.finetune`, which cleans the texts in the same way.
        batch_size, max_length: rows of a batch, tokens per text.
        validation_share: of ``data`` that is put aside, as :func:`fastft.finetune` does, and trains nothing; 0 for a
            job that validates on a file of its own.
        steps: that are timed, from 2; batches of all sizes are among them.
        epochs, rows: of the job whose training is projected; ``rows`` None takes those of ``data``, or 10,000.
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
    read = data if isinstance(data, (str, Path)) else None
    json, html = (None if path is None else output.check(path, data=read) for path in (json, html))
    batch_size, steps, epochs, seed = (options[name] for name in ("batch_size", "steps", "epochs", "seed"))
    examples, told = None, {}
    if data is not None:
        with waiting("reading", quiet=quiet):
            found = readable.load(data, text, label, encoding=encoding)
            cleaning = preprocess.prepare(found, lower_case=bool(lower_case))
        examples, told = _training(cleaning, options["validation_share"], seed)

    from fastft.testing import timing
    from fastft.training import compare_job, compare_run
    from fastft.training.compare_report import CompareResult, page

    recipe, variants = compare_run.Recipe(compare_run.AUTOCAST[dtype], seed), compare_run.variants()
    with compare_run.own_random_state(seed):
        job = compare_job.load(model, examples, batch_size, options["max_length"], seed)
        compare_run.require_memory(job.network, len(variants))
        longest, *batches = job.batches(steps, seed)
        passes = 3 + 4 * len(variants) + 2 * (len(variants) + 1) * steps
        with waiting("comparing", passes, quiet) as tick:
            parity = compare_run.parity(job.network, variants[1], batches, recipe, tick)
            memory = compare_run.memory(job.network, variants, longest, recipe, tick)
            without = compare_run.losses_without_dropout(job.network, variants, batches, recipe, tick)
            other_seed = compare_run.losses_of_another_seed(job.network, variants[0], batches, recipe, tick)
            times = compare_run.timed(job.network, variants, longest, batches, recipe, tick)
    dropout_on = {name: run.losses for name, run in times.items()} | {compare_run.OTHER_SEED: other_seed}
    result = CompareResult(
        facts=job.facts | told | {"dtype": "bfloat16 autocast over float32 weights" if recipe.autocast else "float32"},
        options={name: options[name] for name in ("dtype", *_RULES)},
        parity=parity,
        losses={"dropout_off": without, "dropout_on": dropout_on},
        times=times,
        tokens=sum(int(batch["attention_mask"].sum()) for batch in batches) / steps,
        memory=memory,
        padding=job.padding,
        rows=options["rows"] or job.rows,
        conditions=timing.conditions() | {"device": str(job.network.device)},
    )
    for path, content in ((json, lambda: files.json_text(result.as_dict())), (html, lambda: page(result))):
        if path is not None:
            with output.writing(path) as unfinished:
                unfinished.write_text(content(), encoding="utf-8")
    return result


# ---- options

_RULES: dict[str, Rule] = {
    "batch_size": whole(1),
    "max_length": whole(3),
    "validation_share": (float, lambda value: 0 <= value < 1, "a number from 0 to below 1"),
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
    if options["data"] is None:
        readable.refuse_columns("compare", options["text"], options["label"], "there is no data")
    return checked


def _training(cleaning: preprocess.Prepared, share: float, seed: int) -> tuple[readable.Examples, dict[str, str]]:
    """(the rows that finetune would train on, what there is to tell of the others)."""
    told = {"cleaned": "; ".join(preprocess.said(cleaning.counts, all=False)) or "nothing to clean was found"}
    if share == 0:
        readable.check_classes(cleaning.examples)
        return cleaning.examples, told
    examples, held_out = readable.split(cleaning.examples, share, seed)
    return examples, told | {"put aside": f"{len(held_out):,} rows to validate, which train nothing"}
