"""The typer application. Every other module of this folder is a command: a function of the module's name.

Commands import torch and transformers inside their functions, so that ``--help`` stays instant.
"""

import importlib
import pkgutil
import sys

import typer
from typer.core import TyperGroup

import fastft
from fastft import cli
from fastft.cli._errors import wrong_usage


class Commands(TyperGroup):
    """All commands; what was typed wrongly is one sentence like every other error, where typer draws a box."""

    def main(self, args=None, standalone_mode=True, **options):
        args = sys.argv[1:] if args is None else list(args)
        try:
            status = super().main(args, standalone_mode=False, **options)
        except Exception as error:
            if not standalone_mode or (said := wrong_usage(error, args)) is None:
                raise
            typer.echo(f"fastft: {said}", err=True)
            status = error.exit_code
        if not standalone_mode:
            return status
        sys.exit(status)


app = typer.Typer(
    cls=Commands,
    help="Fine-tunes BERT-family encoders as fast as the hardware allows, with the same numbers.\n\n"
    "Example: fastft finetune reviews.csv --model bert-base-uncased --output out",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def print_version(wanted: bool):
    if wanted:
        typer.echo(f"fastft {fastft.__version__}")
        raise typer.Exit


VERSION = typer.Option(False, "--version", help="Print the version.", callback=print_version, is_eager=True)


@app.callback()
def main(context: typer.Context, version: bool = VERSION):
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for module in pkgutil.iter_modules(cli.__path__):
    if module.name != "main" and not module.name.startswith("_"):
        app.command()(getattr(importlib.import_module(f"fastft.cli.{module.name}"), module.name))
