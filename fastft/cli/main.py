"""The typer application. Every other module of this folder is a command: a function of the module's name.

Commands import torch and transformers inside their functions, so that ``--help`` stays instant.
"""

import importlib
import pkgutil
import sys
from typing import Annotated

import typer
from typer.core import TyperCommand, TyperGroup

import fastft
from fastft import cli
from fastft.cli._errors import wrong_usage


class Helped:
    """--help looks like every other flag, and stands behind the last one."""

    def get_help_option(self, ctx):
        option = super().get_help_option(ctx)
        option.metavar, option.help = " ", "Show this message"
        option.rich_help_panel = self.params[-1].rich_help_panel
        return option


class Command(Helped, TyperCommand):
    """One command; its usage names all that must be given."""

    def collect_usage_pieces(self, ctx):
        needed = [parameter for parameter in self.get_params(ctx) if parameter.required]
        options = [f"{option.opts[0]} {option.metavar}" for option in needed if option.param_type_name == "option"]
        more = [f"[{argument.metavar}]..." for argument in self.params if argument.nargs == -1]
        names = [argument.metavar for argument in needed if argument.param_type_name == "argument"]
        return [*names, *more, *options, self.options_metavar]


class Commands(Helped, TyperGroup):
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


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", metavar=" ", help="Print the version", callback=print_version, is_eager=True)
    ] = False,
):
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


FIRST = ("finetune", "evaluate", "predict", "compare", "env")  # in the list of commands; others follow
FOUND = {module.name for module in pkgutil.iter_modules(cli.__path__) if not module.name.startswith("_")} - {"main"}
for name in (*FIRST, *sorted(FOUND.difference(FIRST))):
    app.command(cls=Command)(getattr(importlib.import_module(f"fastft.cli.{name}"), name))
