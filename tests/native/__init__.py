"""The CPU kernels as a NumPy module, in two builds: as they are shipped, and under AddressSanitizer and UBSan.

``kernels()`` is the module (module.cpp). The first build takes the objects of the shipped library. The second has its own,
in build/sanitized; a process that imports it must have ``sanitizer_environment()``.
"""

import functools
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path

import numpy
import pybind11

import setup

HERE = Path(__file__).resolve().parent
SANITIZED = "FASTFT_TEST_SANITIZED"  # set in the environment of a process that has the sanitizer's library preloaded
SANITIZER = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1")


@functools.cache
def kernels():
    """The module of this process, built incrementally. Raises: setup.BuildError: see above it."""
    return imported(build(sanitized=bool(os.environ.get(SANITIZED))))


def build(sanitized: bool) -> Path:
    """Compiles what is out of date and returns the module's file."""
    config = setup.Config.discover()
    folder = setup.ROOT / "build" / "sanitized" if sanitized else setup.BUILD
    flags = SANITIZER if sanitized else ()
    module = "fastft_sanitized" if sanitized else "fastft_native"
    # One ninja file's log is another's in the same folder: objects of the shipped library are not compiled again.
    objects = [*setup.compile_cpu(config, folder, flags), *compile_module(config, folder / "numpy", module, flags)]
    library = folder / f"{module}.so"
    # Python's and the sanitizer's symbols are those of the process.
    edges = [*objects, setup.link(library, objects, ("-Wl,-z,undefs", "-pthread", *flags))]
    setup.write_ninja(folder / f"{module}.ninja", edges, config)
    setup.run_ninja(folder / f"{module}.ninja")
    return library


def compile_module(config: setup.Config, folder: Path, module: str, flags: tuple[str, ...]) -> list[setup.Edge]:
    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    own = (*setup.INCLUDES, *includes, f"-DFASTFT_MODULE={module}", "-O1", *flags)
    edges = [setup.Edge("cxx", folder / "module.o", (HERE / "module.cpp",), own)]
    for isa in ("scalar", *config.isas):
        names = (f"-DFASTFT_NAMESPACE=fastft::cpu::{isa}", f"-DFASTFT_ISA_{isa.upper()}=1", f"-DFASTFT_TEST_SET={isa}")
        own = (*setup.INCLUDES, *names, *setup.ISA_FLAGS.get(isa, ()), *flags)
        edges.append(setup.Edge("cxx", folder / isa / "functions.o", (HERE / "functions.cpp",), own))
    return edges


def imported(path: Path):
    """The module in this file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sanitizer_environment() -> dict[str, str]:
    """Environment of a process that can import the sanitized module."""
    command = [*setup.find_compiler(), "-print-file-name=libasan.so"]
    library = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    # Python itself leaks at exit.
    options = "detect_leaks=0"
    return {**os.environ, SANITIZED: "1", "LD_PRELOAD": library, "ASAN_OPTIONS": options}


def sets() -> list[str]:
    """"scalar" and the instruction sets of this machine, for :func:`elementwise`."""
    return ["scalar", *kernels().isas().split(",")]


def elementwise(name: str, isa: str, x: numpy.ndarray) -> numpy.ndarray:
    """A function of functions.h at each x, float32 or float64."""
    y = exactly(numpy.empty_like(x))
    kernels().elementwise(name, isa, y, exactly(x))
    return y


def exactly(array: numpy.ndarray) -> numpy.ndarray:
    """A copy that is aligned to its elements only and ends where its heap block ends: an overrun of it is an error."""
    buffer = numpy.empty(array.size + 1, array.dtype)
    copy = buffer[1:].reshape(array.shape)
    copy[...] = array
    return copy
