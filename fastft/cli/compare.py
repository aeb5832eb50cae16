"""``fastft compare``: stock and fastft side by side on one's own model, data and machine."""

from enum import Enum
from typing import Annotated

import typer

from fastft.cli._errors import reporting
from fastft.training.options import DTYPES

MODEL, JOB, RUN = "Model and data", "Job whose time is projected", "Run"
Dtype = Enum("Dtype", {name: name for name in DTYPES})


def option(panel, metavar, help, *names):
    """An option whose line of help holds its default, as a line of 80 columns has no room for more."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)


def compare(
    *,
    model: Annotated[str, option(MODEL, "NAME_OR_DIR", "Name on the Hugging Face hub, or folder")],
    data: Annotated[str | None, option(MODEL, "DATA", "As for finetune; else random tokens")] = None,
    text: Annotated[str | None, option(MODEL, "COLUMN", "Column of the texts; else found")] = None,
    label: Annotated[str | None, option(MODEL, "COLUMN", "Column of the labels; else found")] = None,
    batch_size: Annotated[int, option(MODEL, "N", "Texts in a step (32)")] = 32,
    max_length: Annotated[int, option(MODEL, "N", "Tokens of a text, the rest is cut (256)")] = 256,
    epochs: Annotated[int, option(JOB, "N", "Passes over the data (3)")] = 3,
    rows: Annotated[int | None, option(JOB, "N", "Texts; else those of DATA, or 10,000")] = None,
    price: Annotated[float | None, option(JOB, "AMOUNT", "Of this machine per hour")] = None,
    steps: Annotated[int, option(RUN, "N", "Timed steps, of each in turn (20)")] = 20,
    dtype: Annotated[Dtype, option(RUN, "DTYPE", "auto, float32, bfloat16 (auto)")] = "auto",
    seed: Annotated[int, option(RUN, "N", "The same gives the same batches (0)")] = 0,
    json: Annotated[str | None, option(RUN, "FILE", "Write one JSON object")] = None,
    html: Annotated[str | None, option(RUN, "FILE", "Write one page with plots")] = None,
    quiet: Annotated[bool, option(RUN, " ", "No progress bar", "--quiet")] = False,
    debug: Annotated[bool, option(RUN, " ", "Show tracebacks of errors", "--debug")] = False,
):
    """Show what fastft gains on your model, data and machine.

    Trains some steps stock and with fastft, in turn on the same batches:
    differences of the numbers, time, memory. Nothing is saved but FILE.

    Example: fastft compare --model bert-base-uncased --data reviews.csv
    """
    given = {name: value.value if isinstance(value, Enum) else value for name, value in locals().items()}
    given.pop("debug")
    with reporting(debug, given):
        from rich.console import Console

        import fastft

        result = fastft.compare(**given)
        Console(highlight=False).print(result)
        for path in filter(None, (json, html)):
            typer.echo(f"written: {path}")
