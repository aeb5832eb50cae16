"""What a terminal shows while one waits: a line on stderr that is gone afterwards. Imports no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def waiting(title: str, total: int | None = None, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Shows ``title`` and how much of ``total`` is done, or where nobody knows that the time so far; nothing if
    ``quiet`` or where stderr is no terminal. Yields what moves it on, by one or by the number given."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (TimeElapsedColumn(),)
    if total is not None:
        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    how = {"transient": True, "refresh_per_second": 2, "disable": quiet or not console.is_terminal}
    with Progress(TextColumn("{task.description}"), *columns, console=console, **how) as bar:
        task = bar.add_task(title, total=total)

        def advance(count: int = 1) -> None:
            bar.advance(task, count)

        yield advance
