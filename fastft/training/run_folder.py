"""The folder of a run: who may write into it, and which interrupted run it holds. Imports no torch.

A run keeps what it needs to go on in the folder ``.fastft`` inside, which goes when it is finished. ``run.json`` in
there says what run it is: there is an interrupted run in the folder if and only if that file is there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastft.training import files

try:
    import fcntl
except ImportError:  # Windows: two runs into one folder are not noticed there
    fcntl = None

LOCK, KEPT = ".fastft.lock", ".fastft"
_UNFINISHED = (".unfinished-*", ".tmp??????")  # ours, and safetensors' own, which it renames to ours
_STATE = ("*.safetensors", "trainer_state.json")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # from network file systems that have none


def check(output: str | os.PathLike, resume: bool, overwrite: bool) -> None:
    """Refuses an ``output`` that a run of these options must not write into.

    Raises: FileExistsError: it is a file; it is not empty and neither ``resume`` nor ``overwrite`` is set; there is
        something in it, but nothing to resume. NotADirectoryError, PermissionError: it cannot be made there.
        BlockingIOError: another run is writing into it.
    """
    folder, place = Path(output), f"output={str(output)!r}"
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{place} is a file, not a folder")
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{place} cannot be made: {above} is a file, not a folder")
    if not os.access(above, os.W_OK):
        raise PermissionError(f"{place} cannot be written to: the folder {above} is read-only")
    foreign = {path.name for path in folder.iterdir()} - {LOCK, KEPT} if folder.is_dir() else set()
    if (writer := _writer(folder)) is not None:
        raise BlockingIOError(_busy(output, writer))
    if _record(folder).is_file():
        if not resume and not overwrite:
            raise FileExistsError(
                f"{place} holds an interrupted run: resume=True goes on with it, overwrite=True starts anew"
            )
    elif foreign and resume:
        found = "a run that was finished" if "run.json" in foreign else "files, but no interrupted run"
        raise FileExistsError(f"{place} holds {found}, there is nothing to resume: overwrite=True starts anew")
    elif foreign and not overwrite:
        raise FileExistsError(f"{place} is not empty: name another folder or pass overwrite=True")


@contextlib.contextmanager
def locked(output: str | os.PathLike) -> Iterator[Path]:
    """Creates the folder and keeps other runs out of it; a lock dies with its process, whatever kills that.

    Raises: BlockingIOError: ``output='runs/a' is being written by another run, process 4711``
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    descriptor = _lock(path, output)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        _take_away(folder / KEPT, _UNFINISHED)  # of a run that was killed while it wrote
        yield folder
    finally:
        path.unlink(missing_ok=True)  # before others can lock it: see below
        os.close(descriptor)


def _lock(path: Path, output: str | os.PathLike) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            process = os.read(descriptor, 32).decode().strip() or "unknown"
            os.close(descriptor)
            raise BlockingIOError(_busy(output, process)) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
        os.close(descriptor)  # a run that ended in between took the file away


def _writer(folder: Path) -> str | None:
    """The other process that is writing into ``folder`` now."""
    if fcntl is None or not (folder / LOCK).is_file():
        return None
    process = ""
    try:
        with (folder / LOCK).open() as file:
            process = file.read(32).strip() or "unknown"
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return None if process == str(os.getpid()) else process
    except OSError:  # no locks there, or the run has ended in between
        pass
    return None


def _busy(output: str | os.PathLike, process: str) -> str:
    return f"output={str(output)!r} is being written by another run, process {process}"


def interrupted(folder: Path) -> dict[str, Any] | None:
    """What :func:`begin` recorded of the interrupted run in ``folder``, None if there is none.

    Raises: ValueError: the record is damaged.
    """
    record = _record(folder)
    if not record.is_file():
        return None
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{record} is damaged ({error}): overwrite=True starts anew") from error


def begin(folder: Path, identity: dict[str, Any]) -> str:
    """Records a new run in ``folder``; returns its name, under which it keeps its state.

    Whatever an earlier run kept in there belongs to another name and is taken away.
    """
    name = secrets.token_hex(8)
    (folder / KEPT).mkdir(exist_ok=True)
    files.write_json(_record(folder), {"run": name, **identity})
    _take_away(folder / KEPT, _STATE)
    return name


def finish(folder: Path) -> None:
    """Takes away what the run kept for going on."""
    _take_away(folder / KEPT, ("run.json", *_STATE))  # the record first, without which the rest means nothing
    with contextlib.suppress(OSError):  # somebody else's file is in there
        (folder / KEPT).rmdir()


def same_run(found: dict[str, Any], wanted: dict[str, Any], place: str) -> None:
    """Refuses to go on with the run ``found`` as the run ``wanted``, naming the first option that differs.

    Args:
        found, wanted: identities: ``options``, and a fingerprint for each of ``data``, ``validation``, ``model``.
        place: the folder, for the message.
    Raises: ValueError: ``finetune: epochs=4, but the run in output='a' was begun with epochs=3: …``
    """
    remedy = f"the run in output={place!r} was begun with"
    for name, value in wanted["options"].items():
        before = found["options"].get(name)
        if value != before:
            raise ValueError(
                f"finetune: {name}={value!r}, but {remedy} {name}={before!r}: "
                "resume with that, or pass overwrite=True to start anew"
            )
    for name in ("model", "data", "validation"):
        if found[name] != wanted[name]:
            raise ValueError(
                f"finetune: the {name} given is not what {remedy}, its content differs: "
                "resume with that, or pass overwrite=True to start anew"
            )


def _record(folder: Path) -> Path:
    return folder / KEPT / "run.json"


def _take_away(kept: Path, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        for path in kept.glob(pattern):
            path.unlink()
