"""What was measured on this machine: which kernel is faster for which sizes. A JSON file in the user's cache.

``fastft bench --tune`` and the first ``fastft.optimize`` on a machine write it (fastft/testing/tune.py); FASTFT_TUNE=0
leaves it alone. Beside facts of other machines, instruction sets, numbers of threads and versions it holds::

    {"format": 1, "machines": {"AMD EPYC (family 25, model 17), avx512_bf16, 2 threads, fastft 0.1.0, torch 2.13.0+cpu":
      {"bf16": "dot", "cells": [{"op": "linear_act", "dtype": "bfloat16", "path": "train", "sizes": [512, 768, 3072],
                                 "runs": "fastft", "fastft_us": 28034.1, "torch_us": 30121.9}, …]}}}
"""

import functools
import json
import os
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import fastft
from fastft import _library, environment

FORMAT = 1
PATHS = ("forward", "train")  # without autograd; forward and backward
BF16 = ("dot", "widen")  # products of bfloat16 by VDPBF16PS; in float32
_LARGEST = 32  # bucket of the largest numbers of rows
_LAUNCHED_AS_GROUP = os.environ.get("WORLD_SIZE", "") not in ("", "0", "1")  # torchrun's


@dataclass(frozen=True)
class Cell:
    """One size of an op: which kernel runs, and both times in microseconds."""

    op: str
    dtype: str  # "float32"
    path: str  # one of PATHS
    sizes: tuple[int, ...]  # rows first: (M, K, N) for linear_act, (rows, classes) for cross_entropy
    runs: str  # "fastft" or "torch"
    fastft_us: float
    torch_us: float

    @property
    def key(self):
        return key(self.op, getattr(torch, self.dtype), self.path == "train", *self.sizes)

    @classmethod
    def parse(cls, stored):
        """From JSON; ValueError, KeyError or TypeError where that is not a cell."""
        cell = cls(**{**stored, "sizes": tuple(stored["sizes"])})
        numbers = (cell.fastft_us, cell.torch_us)
        if not (
            isinstance(cell.op, str)
            and isinstance(getattr(torch, cell.dtype, None), torch.dtype)
            and cell.path in PATHS
            and 2 <= len(cell.sizes) <= 3
            and all(type(size) is int and size > 0 for size in cell.sizes)
            and cell.runs in ("fastft", "torch")
            and all(isinstance(number, int | float) for number in numbers)
        ):
            raise ValueError(f"{stored} says nothing about a kernel")
        return cell


def key(op, dtype, train, rows, second, third=0):
    """What sizes that share a fact have in common: rows up to a factor of 4, the others up to a factor of 2."""
    return op, dtype, train, rows.bit_length() + 1 >> 1, second.bit_length(), third.bit_length()


@dataclass(frozen=True)
class Facts:
    """What is known of one machine; nothing, unless given."""

    cells: tuple[Cell, ...] = ()
    bf16: str | None = None  # one of BF16

    @functools.cached_property
    def table(self):
        """``{key: Cell}``; what holds for the most rows that were measured holds for more of them."""
        table = {cell.key: cell for cell in self.cells}
        most = {}
        for op, dtype, train, rows, *sizes in table:
            group = (op, dtype, train, *sizes)
            most[group] = max(rows, most.get(group, 0))
        for (op, dtype, train, *sizes), rows in most.items():
            cell = table[(op, dtype, train, rows, *sizes)]
            table.update({(op, dtype, train, more, *sizes): cell for more in range(rows + 1, _LARGEST + 1)})
        return table

    def as_dict(self):
        """For JSON; an empty dict if nothing is known."""
        return (
            {"bf16": self.bf16, "cells": [{**asdict(cell), "sizes": list(cell.sizes)} for cell in self.cells]}
            if self
            else {}
        )

    @classmethod
    def parse(cls, stored):
        """The reverse of :meth:`as_dict`; ValueError, KeyError or TypeError where it is not one."""
        if not stored:
            return NOTHING
        if stored["bf16"] not in (*BF16, None):
            raise ValueError(f"bf16 is {stored['bf16']!r}, must be one of {', '.join(BF16)}")
        return cls(tuple(map(Cell.parse, stored["cells"])), stored["bf16"])

    def __bool__(self):
        return bool(self.cells) or self.bf16 is not None


NOTHING = Facts()

# Whether every op's own rule chooses its kernels: "auto", and nothing was measured. None: _choice.table will tell. A
# variable, because a call, of Python after an op that filled the caches, takes half a microsecond.
by_rule = None


def enabled():
    """Whether facts count at all: FASTFT_TUNE is not 0."""
    return os.environ.get("FASTFT_TUNE") != "0"


def path():
    """The file: tuning.json in FASTFT_CACHE, or in fastft's part of the user's cache as the system has it."""
    if folder := os.environ.get("FASTFT_CACHE"):
        return Path(folder) / "tuning.json"
    if folder := os.environ.get("XDG_CACHE_HOME"):
        cache = Path(folder)
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        cache = Path.home() / ".cache"
    return cache / "fastft" / "tuning.json"


def machine(device, threads):
    """What facts hold for: other ones may be true of any other processor, instruction set, thread count or version."""
    versions = f"fastft {fastft.__version__}, torch {torch.__version__}"
    if device == "cuda":  # whatever the number of threads
        return f"{torch.cuda.get_device_name()}, {versions}"
    return f"{environment.cpu_model()}, {_library.isa()}, {threads} threads, {versions}"


@functools.cache
def load(device, threads):
    """The file's facts for a device and torch's number of threads; none if FASTFT_TUNE is 0 or without kernels.

    A file that cannot be used is warned about once.
    """
    if device not in ("cpu", "cuda") or not enabled() or not _library.available():
        return NOTHING
    machines, wrong = _read()
    if wrong:
        _warn(wrong)
    try:
        facts = Facts.parse(machines.get(machine(device, threads)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        _warn(f"{path()} is damaged ({type(error).__name__}: {error})")
        return NOTHING
    if device == "cpu" and facts.bf16 and not in_group():
        _library.set_bf16(facts.bf16)
    return facts


@functools.cache
def known():
    """Whether the file holds anything, of whatever machine: asked first, as it costs a tenth of :func:`load`."""
    return enabled() and bool(_read()[0] or _read()[1])


@functools.cache
def _read():
    """What the file holds for each machine, and what is wrong with it, if anything."""
    try:
        content = json.loads(path().read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT}")
        return dict(content["machines"]), None
    except (FileNotFoundError, NotADirectoryError):
        return {}, None
    except OSError as error:
        return {}, f"{path()} cannot be read ({error.strerror})"
    except (KeyError, TypeError, ValueError) as error:
        return {}, f"{path()} is damaged, or not fastft's ({type(error).__name__}: {error})"


def store(facts, device, threads):
    """Writes the facts of this machine beside those of others; the file is the old or the new one at any moment.

    Returns: whether it could be written; a warning says why not.
    """
    forget()  # another process may have written since
    machines, _ = _read()
    content = {"format": FORMAT, "machines": {**machines, machine(device, threads): facts.as_dict()}}
    target = path()
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=target.parent, prefix=".tuning-", delete=False
        ) as file:
            temporary = file.name
            json.dump(content, file, indent=None, separators=(",", ":"))
        os.replace(temporary, target)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        _warn(f"{target} cannot be written ({error.strerror})")
        return False
    forget()
    return True


def in_group():
    """Whether several processes work together, or were launched to."""
    if _LAUNCHED_AS_GROUP:
        return True
    group = torch.distributed
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1


def writable():
    """Whether :func:`store` may hope to succeed, asked before time is spent on measuring."""
    folder = path().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


def forget():
    """Reads the file again when next asked: it, the instruction set or the environment may have changed."""
    global by_rule
    by_rule = None
    for cached in (load, known, _read, _warn):
        cached.cache_clear()


@functools.cache  # once
def _warn(what):
    warnings.warn(f"fastft: {what}; the shipped rule chooses kernels", RuntimeWarning, stacklevel=2)
