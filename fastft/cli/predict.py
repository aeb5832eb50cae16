"""``fastft predict``: the classes of new texts."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastft.cli import _options
from fastft.cli._errors import reporting
from fastft.cli._options import flag, option


def predict(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a trained model", show_default=False)],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Texts; else --file, or a line each from a pipe")
    ] = None,
    file: Annotated[str | None, option("DATA", "CSV, TSV, JSONL, or a folder of texts")] = None,
    text: Annotated[str | None, option("COLUMN", "Column of the texts; else found")] = None,
    encoding: Annotated[str, option("NAME", "Of the files (utf-8)")] = "utf-8",
    output: Annotated[str | None, option("FILE", "A .csv or .jsonl file to write")] = None,
    top: Annotated[int, option("N", "Classes for each text (1)")] = 1,
    batch_size: Annotated[int, option("N", "Texts at a time (32)")] = 32,
    max_length: Annotated[int | None, option("N", "Tokens of a text; else as in training")] = None,
    stock: Annotated[bool, flag("--stock", "Without fastft's kernels")] = False,
    quiet: Annotated[bool, flag("--quiet", "No progress bar")] = False,
    debug: Annotated[bool, flag("--debug", "Show tracebacks of errors")] = False,
):
    """Tell the class of each text, with its probability.

    Printed in the order of the texts: a line each, into a pipe a JSON object.

    Example: fastft predict out "What a film!" "Two lost hours."

    Example: fastft predict out --file new.csv --output classes.csv
    """
    given = _options.given(locals(), "texts", "file", "output")
    with reporting(debug, given):
        from fastft.training import output as place
        from fastft.training import readers
        from fastft.training.predict import SUFFIXES

        if output is not None:
            place.check(output, SUFFIXES, data=file)
        if texts and file is not None:
            raise ValueError(f"{len(texts)} TEXT and --file {file} are given: which of them is to be classified?")
        for argument in texts or ():  # evaluate takes a file in that place
            if argument.lower().endswith(readers.SUFFIXES) and Path(argument).is_file():
                raise ValueError(f"TEXT {argument!r} is a file: --file {argument} classifies the texts in it")
        if file is None and text is not None:
            raise ValueError(f"--text {text} names a column of --file, which is not given")
        if not texts and file is None:
            texts = piped()
        import fastft

        found = fastft.predict(texts=texts or file, **given)
        if output is not None:
            found.write(output)
            typer.echo(f"{len(found):,} predictions written to {output}")
        elif sys.stdout.isatty():
            import shutil

            for line in found.lines(shutil.get_terminal_size().columns):
                typer.echo(line)
        else:
            import json

            for record in found.records():
                typer.echo(json.dumps(record, ensure_ascii=False).encode(errors="replace"))


def piped():
    """The lines of standard input, an empty one too: the n-th result belongs to the n-th line."""
    if sys.stdin.isatty():
        raise ValueError("there are no texts: give some after DIR, or --file DATA, or pipe one a line into it")
    lines = sys.stdin.buffer.read().split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    texts = []
    for number, line in enumerate(lines, start=1):
        try:
            texts.append(line.decode().rstrip("\r"))
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise ValueError(f"standard input, line {number}: 0x{byte:02x} is not UTF-8") from error
    if not texts:
        raise ValueError("standard input is empty: there are no texts")
    return texts
