"""The typer application. Every other module of this folder is a command: a function of the module's name.

Commands import torch and transformers inside their functions, so that ``--help`` stays instant.
"""

import importlib
import pkgutil

import typer

import fastft
from fastft import cli

app = typer.Typer(
    help="Fine-tunes BERT-family encoders as fast as the hardware allows, with the same numbers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def print_version(wanted: bool):
    if wanted:
        typer.echo(f"fastft {fastft.__version__}")
        raise typer.Exit


VERSION = typer.Option(False, "--version", help="Print the version.", callback=print_version, is_eager=True)


@app.callback()
def main(version: bool = VERSION):
    pass


for module in pkgutil.iter_modules(cli.__path__):
    if module.name != "main" and not module.name.startswith("_"):
        app.command()(getattr(importlib.import_module(f"fastft.cli.{module.name}"), module.name))
