"""``fastft compare``: stock and fastft side by side on one's own model, data and machine."""

from typing import Annotated

import typer

from fastft.cli import _options
from fastft.cli._errors import reporting
from fastft.cli._options import flag, one_of, option
from fastft.training.options import DTYPES

MODEL, JOB, RUN = "Model and data", "Job whose time is projected", "Run"


def compare(
    *,
    model: Annotated[str, option("NAME_OR_DIR", "Hugging Face name, or folder", panel=MODEL)],
    data: Annotated[str | None, option("DATA", "As for finetune; else random tokens", panel=MODEL)] = None,
    text: Annotated[str | None, option("COLUMN", "Column of the texts; else found", panel=MODEL)] = None,
    label: Annotated[str | None, option("COLUMN", "Column of the labels; else found", panel=MODEL)] = None,
    encoding: Annotated[str, option("NAME", "Of the files (utf-8)", panel=MODEL)] = "utf-8",
    lower_case: Annotated[bool, flag("--lower-case", "Change all texts to lower case", MODEL)] = False,
    batch_size: Annotated[int, option("N", "Texts in a step (32)", panel=MODEL)] = 32,
    max_length: Annotated[int, option("N", "Tokens of a text, the rest is cut (256)", panel=MODEL)] = 256,
    epochs: Annotated[int, option("N", "Passes over the data (3)", panel=JOB)] = 3,
    validation_share: Annotated[float, option("SHARE", "Part of DATA that trains nothing (0.1)", panel=JOB)] = 0.1,
    rows: Annotated[int | None, option("N", "To train on; else those of DATA, or 10,000", panel=JOB)] = None,
    price: Annotated[float | None, option("AMOUNT", "Of this machine per hour", panel=JOB)] = None,
    steps: Annotated[int, option("N", "Timed steps, of each in turn (20)", panel=RUN)] = 20,
    dtype: Annotated[one_of(DTYPES), option("DTYPE", "auto, float32, bfloat16 (auto)", panel=RUN)] = "auto",
    seed: Annotated[int, option("N", "The same gives the same batches (0)", panel=RUN)] = 0,
    json: Annotated[str | None, option("FILE", "Write one JSON object", panel=RUN)] = None,
    html: Annotated[str | None, option("FILE", "Write one page with plots", panel=RUN)] = None,
    quiet: Annotated[bool, flag("--quiet", "No progress bar", RUN)] = False,
    debug: Annotated[bool, flag("--debug", "Show tracebacks of errors", RUN)] = False,
):
    """Show what fastft gains on your model, data and machine.

    Trains some steps stock and with fastft, in turn on the same batches:
    differences of the numbers, time, memory. Nothing is saved but FILE.

    Example: fastft compare --model bert-base-uncased --data reviews.csv
    """
    given = _options.given(locals())
    with reporting(debug, given):
        from rich.console import Console

        import fastft

        result = fastft.compare(**given)
        Console(highlight=False).print(result)
        for path in filter(None, (json, html)):
            typer.echo(f"written: {path}")
