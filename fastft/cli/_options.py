"""How the commands declare their options, and what of them goes to the library."""

from collections.abc import Mapping
from enum import Enum
from typing import Any

import typer


def option(metavar: str, help: str, *names: str, panel: str | None = None):
    """An option whose line of help holds its default, as a line of 80 columns has no room for more."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)


def flag(name: str, help: str, panel: str | None = None):
    return option(" ", help, name, panel=panel)


def one_of(choices) -> type[Enum]:
    return Enum("Choice", {name: name for name in choices})


def given(arguments: Mapping[str, Any], *left_out: str) -> dict[str, Any]:
    """The arguments of a command as those of the function it calls, without ``left_out`` and ``debug``."""
    return {
        name: value.value if isinstance(value, Enum) else value
        for name, value in arguments.items()
        if name not in ("debug", *left_out)
    }
