"""Files that are there whole or not at all, whenever the process is killed or the disk is full."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, beside ``path`` and with its suffix; it takes the place of ``path`` once it is on disk.

    After an error ``path`` is what it was, and the unfinished file is gone.
    """
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        yield unfinished
        sync(unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Returns when the content of a file, or the names in a folder, would survive a power failure."""
    if os.name == "nt" and path.is_dir():
        return  # Windows does not open folders, and needs no such call
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_text(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, content: Any) -> None:
    _write(path, json_text(content))


def write_json_lines(path: Path, records: Sequence[Any]) -> None:
    _write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _write(path: Path, content: str) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(content, encoding="utf-8")
