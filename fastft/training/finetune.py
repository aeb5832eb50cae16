"""Fine-tuning a pre-trained encoder as a text classifier: texts and labels in, a Hugging Face folder out.

Imports no torch until the data are read: wrong options, folders and data are told at once.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.training import preprocess, run_folder
from fastft.training.data import Examples, check_classes, load, require_known, split
from fastft.training.options import checked
from fastft.training.waiting import waiting

if TYPE_CHECKING:
    from fastft.training.result import FinetuneResult


def finetune(
    data: Any,
    model: str | os.PathLike,
    output: str | os.PathLike,
    *,
    text: str | None = None,
    label: str | None = None,
    encoding: str = "utf-8",
    validation: Any = None,
    validation_share: float = 0.1,
    head: str = "pooler",
    epochs: int = 3,
    batch_size: int = 32,
    max_length: int = 256,
    learning_rate: float = 5e-5,
    schedule: str = "linear",
    warmup: float = 0.06,
    weight_decay: float = 0.01,
    l1: float = 0.0,
    dropout: float | None = None,
    label_smoothing: float = 0.0,
    class_weights: str | None = None,
    clip: float = 1.0,
    patience: int | None = None,
    lower_case: bool = False,
    seed: int = 0,
    dtype: str = "auto",
    stock: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> FinetuneResult:
    """Fine-tunes a pre-trained encoder on labelled texts with transformers' Trainer and our kernels.

    A run can be broken off at any moment, by Ctrl-C, ``kill -9`` or a full disk, and goes on with ``resume`` to the
    same weights, bit for bit. Until it is finished, the folder ``.fastft`` in ``output`` holds for that four times the
    size of the weights, twice that while it is written.

    Args:
        data: path of a CSV, TSV or JSONL file or of a folder with one sub-folder per class, or a pair ``(texts,
            labels)``; labels are strings, integers or booleans.
        model: a folder or a name on the Hugging Face hub.
        output: the folder to create: model.safetensors, config.json and tokenizer, which
            ``transformers.pipeline("text-classification", output)`` loads; metrics.json, history.jsonl, run.json,
            preprocessing.json, learning_curves.png, confusion_matrix.png.
        text, label: columns or keys in ``data`` and ``validation``; None finds them by what is in them.
        encoding: of the files.
        validation: like ``data``; None puts ``validation_share`` of ``data`` aside, the same share of every label.
        head: "pooler" trains the model's own sequence classifier, which loads without fastft; "cls" trains
            :class:`fastft.TextClassifier`.
        epochs, batch_size, learning_rate, weight_decay, seed: of AdamW and the Trainer; the same seed gives the same
            split, the same batches and, on the CPU, the same bits.
        max_length: tokens per text, the rest is cut; at most what the model can take.
        schedule: of the learning rate after warm-up: "linear" or "cosine" to zero, or "constant".
        warmup: share of the steps in which the learning rate rises from zero.
        l1: after each step every weight w becomes ``sign(w) max(|w| - rate l1, 0)``, at the step's learning rate:
            the proximal step for the penalty ``l1 sum |w|``, decoupled as AdamW's weight decay. Biases and LayerNorm
            are exempt from both.
        dropout: every dropout probability of the model; None keeps the checkpoint's.
        label_smoothing: the part of each target that is spread over all classes (Szegedy et al. 2015,
            arXiv:1512.00567).
        class_weights: "balanced" weighs the loss of each class by n / (C * count), as scikit-learn does. The validation
            loss has neither weights nor smoothing.
        clip: largest norm of the gradient; 0 does not clip.
        patience: stop after so many epochs in a row without a lower validation loss, and keep the epoch that had the
            lowest; None trains all epochs and keeps the last.
        lower_case: change all texts to lower case, here and wherever the folder is used.
        dtype: of the computation; "auto" is float32, and tells what bfloat16 would gain. Weights stay float32.
        stock: train without our kernels.
        resume: go on with the run that was interrupted in ``output``, with the options that it was begun with. Where it
            kept nothing yet, it starts anew.
        overwrite: accept an output folder that is not empty; files of the same names are replaced, no others.
        quiet: print nothing.
    Returns: a :class:`FinetuneResult`.
    Raises: ValueError, TypeError, OSError: one sentence that names the argument or place and the value, before any
        training; FloatingPointError: the training loss is no longer finite; KeyboardInterrupt: after Ctrl-C, when the
        best epoch so far is in ``output``.
    """
    options, started = checked(dict(locals())), time.perf_counter()
    run_folder.check(output, resume, overwrite)
    place = Path(output).resolve()
    if os.path.isdir(model) and Path(model).resolve() == place:
        raise ValueError(f"finetune: output={str(output)!r} is the folder of the model itself: name another one")
    for name, given in (("data", data), ("validation", validation)):
        if isinstance(given, (str, Path)) and os.path.isdir(given) and Path(given).resolve() in (place, *place.parents):
            raise ValueError(f"finetune: output={str(output)!r} is inside the folder of the {name}: name another one")
    with waiting("reading", quiet=options["quiet"]):
        *parts, cleaning = _examples(options)

    from fastft.training import finetune_run

    return finetune_run.run(options, tuple(parts), cleaning, started)


def _examples(options: dict[str, Any]) -> tuple[Examples, Examples, preprocess.Prepared]:
    """(training, validation, what was done to the texts); every label of the second occurs in the first."""
    read = functools.partial(load, text=options["text"], label=options["label"], encoding=options["encoding"])
    cleaning = preprocess.prepare(read(options["data"]), lower_case=options["lower_case"])
    if options["validation"] is None:
        return *split(cleaning.examples, options["validation_share"], options["seed"]), cleaning
    check_classes(cleaning.examples)
    held_out = read(options["validation"], argument="validation")
    held_out = preprocess.prepare(held_out, lower_case=options["lower_case"], deduplicate=False).examples
    require_known(held_out, cleaning.examples.counts(), "the training data")
    return cleaning.examples, held_out, cleaning
