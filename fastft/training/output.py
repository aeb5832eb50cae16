"""Single files that a command is asked to write: refused before the work if they cannot be, then written whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastft.training import files


def check(path: str | os.PathLike, suffixes: Iterable[str] = (), data: str | os.PathLike | None = None) -> Path:
    """``path`` as one that may be written to; an old file there is replaced.

    Args:
        suffixes: how its name may end; any way if there are none.
        data: what is read, and must not be replaced.
    Raises: ValueError, OSError: it ends otherwise; it is ``data``, a folder or a device; its folder is not there or
        read-only.
    """
    path, suffixes = Path(path), tuple(suffixes)
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{path} ends in {path.suffix!r}, a file ending in {' or '.join(suffixes)} can be written")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file, it cannot be written")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: the folder {path.parent} is read-only")
    if data is not None and path.exists() and os.path.exists(data) and path.samefile(data):
        raise ValueError(f"{path} is the file that is read: name another one to write to")
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """:func:`files.replacing`, whose errors name the file.

    Raises: OSError: ``scores.json cannot be written: No space left on device``
    """
    try:
        with files.replacing(path) as unfinished:
            yield unfinished
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
