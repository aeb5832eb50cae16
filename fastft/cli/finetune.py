"""``fastft finetune``: from labelled texts and a pre-trained encoder to a classifier."""

from pathlib import Path
from typing import Annotated

import typer

from fastft.cli import _options
from fastft.cli._errors import reporting
from fastft.cli._options import flag, one_of, option
from fastft.training import options as known
from fastft.training import run_folder

DATA, MODEL, TRAINING, OVERFITTING, RUN = "Data", "Model", "Training", "Against overfitting", "Run"


def finetune(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="CSV, TSV, JSONL, or a folder per class", show_default=False)
    ],
    *,
    text: Annotated[str | None, option("COLUMN", "Column of the texts; else found", panel=DATA)] = None,
    label: Annotated[str | None, option("COLUMN", "Column of the labels; else found", panel=DATA)] = None,
    encoding: Annotated[str, option("NAME", "Of the files (utf-8)", panel=DATA)] = "utf-8",
    validation: Annotated[str | None, option("FILE", "Like DATA, to validate on; else:", panel=DATA)] = None,
    validation_share: Annotated[float, option("SHARE", "Part of DATA put aside for that (0.1)", panel=DATA)] = 0.1,
    max_length: Annotated[int, option("N", "Tokens of a text, the rest is cut (256)", panel=DATA)] = 256,
    lower_case: Annotated[bool, flag("--lower-case", "Change all texts to lower case", DATA)] = False,
    model: Annotated[str, option("NAME_OR_DIR", "Hugging Face name, or folder", panel=MODEL)],
    head: Annotated[one_of(known.HEADS), option("HEAD", "pooler: its own; cls: ours (pooler)", panel=MODEL)] = "pooler",
    dropout: Annotated[float | None, option("P", "Dropout; else the checkpoint's", panel=MODEL)] = None,
    epochs: Annotated[int, option("N", "Passes over the data (3)", panel=TRAINING)] = 3,
    batch_size: Annotated[int, option("N", "Texts in a step (32)", panel=TRAINING)] = 32,
    learning_rate: Annotated[float, option("RATE", "Of AdamW, after the warm-up (5e-5)", panel=TRAINING)] = 5e-5,
    schedule: Annotated[
        one_of(known.SCHEDULES), option("NAME", "linear, cosine, constant (linear)", panel=TRAINING)
    ] = "linear",
    warmup: Annotated[float, option("SHARE", "Steps in which the rate rises (0.06)", panel=TRAINING)] = 0.06,
    clip: Annotated[float, option("NORM", "Of the gradient at most, 0: any (1.0)", panel=TRAINING)] = 1.0,
    class_weights: Annotated[
        one_of(["balanced"]) | None, option("NAME", "balanced: each class weighs the same", panel=TRAINING)
    ] = None,
    weight_decay: Annotated[float, option("RATE", "Of AdamW (0.01)", panel=OVERFITTING)] = 0.01,
    l1: Annotated[float, option("RATE", "Shrinks weights by rate x L1, to 0 (0)", panel=OVERFITTING)] = 0.0,
    label_smoothing: Annotated[float, option("SHARE", "Of a target, over all classes (0)", panel=OVERFITTING)] = 0.0,
    patience: Annotated[int | None, option("N", "Epochs without a lower validation loss", panel=OVERFITTING)] = None,
    output: Annotated[Path, option("DIR", "Folder to create", panel=RUN)],
    seed: Annotated[int, option("N", "The same gives the same weights (0)", panel=RUN)] = 0,
    dtype: Annotated[one_of(known.DTYPES), option("DTYPE", "auto, float32, bfloat16 (auto)", panel=RUN)] = "auto",
    stock: Annotated[bool, flag("--stock", "Train without fastft's kernels", RUN)] = False,
    resume: Annotated[bool, flag("--resume", "Go on with the interrupted run in DIR", RUN)] = False,
    overwrite: Annotated[bool, flag("--overwrite", "Accept a DIR that is not empty", RUN)] = False,
    quiet: Annotated[bool, flag("--quiet", "Print nothing but errors", RUN)] = False,
    debug: Annotated[bool, flag("--debug", "Show tracebacks of errors", RUN)] = False,
):
    """Fine-tune an encoder to classify texts.

    DIR gets the last epoch's model; with --patience, or after Ctrl-C, that
    of the lowest validation loss. --resume goes on to the same weights.

    Example: fastft finetune reviews.csv --model bert-base-uncased --output out
    """
    given = _options.given(locals())
    with reporting(debug, given):
        known.checked(given)
        run_folder.check(output, resume, overwrite)
        import fastft

        fastft.finetune(**given)
