"""``fastft finetune``: from labelled texts and a pre-trained encoder to a classifier."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastft.cli._errors import reporting
from fastft.training import options as known
from fastft.training import run_folder

DATA, MODEL, TRAINING, OVERFITTING, RUN = "Data", "Model", "Training", "Against overfitting", "Run"


def option(panel, metavar, help, *names):
    """An option whose line of help holds its default, as a line of 80 columns has no room for more."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)


def flag(panel, name, help):
    return option(panel, " ", help, name)


def one_of(choices):
    return Enum("Choice", {name: name for name in choices})


def finetune(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="CSV, TSV, JSONL, or a folder per class", show_default=False)
    ],
    *,
    text: Annotated[str | None, option(DATA, "COLUMN", "Column of the texts; else found")] = None,
    label: Annotated[str | None, option(DATA, "COLUMN", "Column of the labels; else found")] = None,
    encoding: Annotated[str, option(DATA, "NAME", "Of the files (utf-8)")] = "utf-8",
    validation: Annotated[str | None, option(DATA, "FILE", "Like DATA, to validate on; else:")] = None,
    validation_share: Annotated[float, option(DATA, "SHARE", "Part of DATA put aside for that (0.1)")] = 0.1,
    max_length: Annotated[int, option(DATA, "N", "Tokens of a text, the rest is cut (256)")] = 256,
    lower_case: Annotated[bool, flag(DATA, "--lower-case", "Change all texts to lower case")] = False,
    model: Annotated[str, option(MODEL, "NAME_OR_DIR", "Name on the Hugging Face hub, or folder")],
    head: Annotated[one_of(known.HEADS), option(MODEL, "HEAD", "pooler: its own; cls: ours (pooler)")] = "pooler",
    dropout: Annotated[float | None, option(MODEL, "P", "Dropout; else the checkpoint's")] = None,
    epochs: Annotated[int, option(TRAINING, "N", "Passes over the data (3)")] = 3,
    batch_size: Annotated[int, option(TRAINING, "N", "Texts in a step (32)")] = 32,
    learning_rate: Annotated[float, option(TRAINING, "RATE", "Of AdamW, after the warm-up (5e-5)")] = 5e-5,
    schedule: Annotated[
        one_of(known.SCHEDULES), option(TRAINING, "NAME", "linear, cosine, constant (linear)")
    ] = "linear",
    warmup: Annotated[float, option(TRAINING, "SHARE", "Steps in which the rate rises (0.06)")] = 0.06,
    clip: Annotated[float, option(TRAINING, "NORM", "Of the gradient at most, 0: any (1.0)")] = 1.0,
    class_weights: Annotated[
        one_of(["balanced"]) | None, option(TRAINING, "NAME", "balanced: each class weighs the same")
    ] = None,
    weight_decay: Annotated[float, option(OVERFITTING, "RATE", "Of AdamW (0.01)")] = 0.01,
    l1: Annotated[float, option(OVERFITTING, "RATE", "Shrinks weights by rate x L1, to 0 (0)")] = 0.0,
    label_smoothing: Annotated[float, option(OVERFITTING, "SHARE", "Of a target, over all classes (0)")] = 0.0,
    patience: Annotated[int | None, option(OVERFITTING, "N", "Epochs without a lower validation loss")] = None,
    output: Annotated[Path, option(RUN, "DIR", "Folder to create")],
    seed: Annotated[int, option(RUN, "N", "The same gives the same weights (0)")] = 0,
    dtype: Annotated[one_of(known.DTYPES), option(RUN, "DTYPE", "auto, float32, bfloat16 (auto)")] = "auto",
    stock: Annotated[bool, flag(RUN, "--stock", "Train without fastft's kernels")] = False,
    resume: Annotated[bool, flag(RUN, "--resume", "Go on with the interrupted run in DIR")] = False,
    overwrite: Annotated[bool, flag(RUN, "--overwrite", "Accept a DIR that is not empty")] = False,
    quiet: Annotated[bool, flag(RUN, "--quiet", "Print nothing but errors")] = False,
    debug: Annotated[bool, flag(RUN, "--debug", "Show tracebacks of errors")] = False,
):
    """Fine-tune an encoder to classify texts.

    DIR gets the last epoch's model; with --patience, or after Ctrl-C, that
    of the lowest validation loss. --resume goes on to the same weights.

    Example: fastft finetune reviews.csv --model bert-base-uncased --output out
    """
    given = {name: value.value if isinstance(value, Enum) else value for name, value in locals().items()}
    given.pop("debug")
    with reporting(debug, given):
        known.checked(given)
        run_folder.check(output, resume, overwrite)
        import fastft

        fastft.finetune(**given)
