"""What a command says when it cannot go on: one sentence on stderr and status 2; 130 after Ctrl-C."""

import contextlib
import itertools
import re
import traceback
from collections.abc import Iterable, Iterator, Sequence

import typer

from fastft.training.readers import first_line

USER_ERROR, INTERRUPTED = 2, 130


@contextlib.contextmanager
def reporting(debug: bool = False, options: Iterable[str] = ()) -> Iterator[None]:
    """Turns what a user can cause into one sentence on stderr and exit status 2; with ``debug``, after the traceback.

    Ctrl-C is status 130, with the interrupt's own message where it has one. Other exceptions are bugs and pass.

    Args:
        options: parameters of the command, which messages of the library (``batch_size=0``, ``pass overwrite=True``)
            are to name as on the command line (``--batch-size 0``, ``pass --overwrite``).
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        typer.echo(f"fastft: {as_typed(str(interrupt) or 'interrupted', options)}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        said = sentence(error)
        if said is None:
            raise
        if debug:
            traceback.print_exc()
        typer.echo(f"fastft: {as_typed(said, options)}", err=True)
        raise typer.Exit(USER_ERROR) from None


def sentence(error: Exception) -> str | None:
    """``error`` in one line, None if it is none that a user can cause."""
    first = first_line(error)
    if type(error) is MemoryError and first:  # of ours, which says what is too large; Python's has no words
        return first
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _is_out_of_memory(first)):
        return f"out of memory, a smaller batch_size= or max_length= needs less: {first or type(error).__name__}"
    if isinstance(error, BrokenPipeError):
        return None  # the reader of our output has gone; typer ends quietly
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, TypeError, OSError, FloatingPointError)) or _of_a_reader(error):
        return first or type(error).__name__
    return None


def wrong_usage(error: Exception, arguments: Sequence[str]) -> str | None:
    """``error`` of typer about what was typed, in one sentence with the value; None if it is none of those."""
    if not isinstance(error, typer.BadParameter.__mro__[1]):  # UsageError, which typer has no public name for
        return None
    said = " ".join(error.format_message().split()).removesuffix(".")
    names = getattr(getattr(error, "param", None), "opts", ())
    words = [word for argument in arguments for word in argument.split("=", 1)]
    typed = [repr(value) for name, value in itertools.pairwise(words) if name in names]
    value = f" {typed[-1]}" if typed and typed[-1] not in said else ""
    said = re.sub(r"^Invalid value for '?([\w-]+)'?: (?:Value error, )?", rf"\1{value}: ", said)
    path = error.ctx.command_path if getattr(error, "ctx", None) else "fastft"
    return f"{said}; {path} --help tells more"


def as_typed(message: str, options: Iterable[str]) -> str:
    """``message`` with ``name=value``, ``name=True`` and ``name=`` of these options as they are typed in a shell."""
    names = "|".join(map(re.escape, options))
    if not names:
        return message

    def typed(match: re.Match) -> str:
        option = f"--{match[1].replace('_', '-')}"
        return option if match[2] or not match[3] else f"{option} {match[3]}"

    return re.sub(rf"\b({names})=(?:(True\b)|([^\s,;:]?))", typed, message)


def _is_out_of_memory(message: str) -> bool:
    return any(
        words in message.lower() for words in ("out of memory", "can't allocate memory", "cannot allocate memory")
    )


def _of_a_reader(error: Exception) -> bool:
    """Whether it comes from safetensors or tokenizers, whose errors are plain Exceptions of their own."""
    return type(error).__module__.partition(".")[0] in ("safetensors", "safetensors_rust") or type(error) is Exception
