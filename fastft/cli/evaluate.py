"""``fastft evaluate``: how well a trained classifier does on labelled texts."""

from pathlib import Path
from typing import Annotated

import typer

from fastft.cli import _options
from fastft.cli._errors import reporting
from fastft.cli._options import flag, option


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a trained model", show_default=False)],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="CSV, TSV, JSONL, or a folder per class", show_default=False)
    ],
    text: Annotated[str | None, option("COLUMN", "Column of the texts; else found")] = None,
    label: Annotated[str | None, option("COLUMN", "Column of the labels; else found")] = None,
    encoding: Annotated[str, option("NAME", "Of the files (utf-8)")] = "utf-8",
    json: Annotated[str | None, option("FILE", "Write the scores there; - is the output")] = None,
    batch_size: Annotated[int, option("N", "Texts at a time (32)")] = 32,
    max_length: Annotated[int | None, option("N", "Tokens of a text; else as in training")] = None,
    stock: Annotated[bool, flag("--stock", "Without fastft's kernels")] = False,
    quiet: Annotated[bool, flag("--quiet", "No progress bar")] = False,
    debug: Annotated[bool, flag("--debug", "Show tracebacks of errors")] = False,
):
    """Classify labelled texts and tell how many are right.

    DIR is what fastft finetune wrote, or any text classifier of transformers.
    Texts are cleaned as they were for its training, and none is left out.

    Example: fastft evaluate out test.csv --json scores.json
    """
    given = _options.given(locals(), "json")
    with reporting(debug, given):
        from fastft.training import files, output

        to = None if json in (None, "-") else output.check(json, data=data)
        import fastft

        result = fastft.evaluate(**given)
        scores = files.json_text(result.as_dict())
        if json == "-":
            typer.echo(scores, nl=False)
            return
        typer.echo(str(result))
        if to is not None:
            with output.writing(to) as unfinished:
                unfinished.write_text(scores, encoding="utf-8")
            typer.echo(f"\nwritten   {to}")
