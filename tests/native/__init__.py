"""The CPU kernels as a NumPy module, in two builds: as they are shipped, and under AddressSanitizer and UBSan.

``kernels()`` is the module (module.cpp), built incrementally. The first build takes the objects of the shipped library.
The second, in build/sanitized, can be imported only by a process whose environment is ``sanitized_environment()``.
"""

import dataclasses
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
SANITIZED = "FASTFT_TEST_SANITIZED"  # names the sanitized module, for the process that is to take it
# ASan sees what null and object-size would, and they double the compiler's time.
SANITIZER = (
    "-O0",
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,object-size",
    "-fno-sanitize-recover=all",
)


@functools.cache
def kernels():
    """The module of this process. Raises: setup.BuildError: see what the compiler printed."""
    return imported(os.environ.get(SANITIZED) or build("fastft_native", setup.BUILD, setup.Config.discover().isas))


def imported(path: str | Path):
    """The extension module in this file."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sanitized_environment() -> dict[str, str]:
    """Builds the sanitized module, with the lowest and the highest instruction set of this machine."""
    usable = kernels().isas().split(",")
    highest = usable[-2:] if usable[-1] == "avx512_bf16" else usable[-1:]  # which is avx512 but for bf16
    folder = setup.ROOT / "build" / "sanitized"
    module = build("fastft_sanitized", folder, tuple(dict.fromkeys((usable[0], *highest))), SANITIZER)
    return {**preloading_sanitizer(), SANITIZED: str(module)}


def preloading_sanitizer() -> dict[str, str]:
    """The environment of a process that can import what is compiled with ``SANITIZER``."""
    # ASan looks for what throws exceptions when it is loaded, and Python brings no C++.
    commands = [[*setup.find_compiler(), f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6")]
    done = [subprocess.run(command, capture_output=True, text=True, check=True) for command in commands]
    options = "detect_leaks=0"  # Python's own
    return {**os.environ, "LD_PRELOAD": ":".join(each.stdout.strip() for each in done), "ASAN_OPTIONS": options}


def build(name: str, folder: Path, isas: tuple[str, ...], flags: tuple[str, ...] = ()) -> Path:
    """Compiles what is out of date; returns the module's file."""
    config = dataclasses.replace(setup.Config.discover(), isas=isas)  # else as the library's: its objects are taken
    objects = [*setup.compile_cpu(config, folder, flags), *compile_module(config, folder / "numpy", name, flags)]
    module = folder / f"{name}.so"
    # Python's and the sanitizers' symbols are those of the process.
    edges = [*objects, setup.link(module, objects, ("-Wl,-z,undefs", "-pthread", *flags))]
    setup.write_ninja(folder / f"{name}.ninja", edges, config)
    setup.run_ninja(folder / f"{name}.ninja")
    return module


def compile_module(config: setup.Config, folder: Path, name: str, flags: tuple[str, ...]) -> list[setup.Edge]:
    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    own = (*setup.INCLUDES, *includes, f"-DFASTFT_MODULE={name}", "-O1", *flags)
    edges = [setup.Edge("cxx", folder / "module.o", (HERE / "module.cpp",), own)]
    for isa in ("scalar", *config.isas):
        names = (f"-DFASTFT_NAMESPACE=fastft::cpu::{isa}", f"-DFASTFT_ISA_{isa.upper()}=1", f"-DFASTFT_TEST_SET={isa}")
        own = (*setup.INCLUDES, *names, *setup.ISA_FLAGS.get(isa, ()), *flags)
        edges.append(setup.Edge("cxx", folder / isa / "functions.o", (HERE / "functions.cpp",), own))
    return edges


def sets() -> list[str]:
    """What :func:`elementwise` offers here: "scalar" and the instruction sets that are built and usable."""
    return ["scalar", *kernels().isas().split(",")]


def elementwise(name: str, isa: str, x: numpy.ndarray) -> numpy.ndarray:
    """A function of functions.h at each x, float32 or float64."""
    y = exactly(numpy.empty_like(x))
    kernels().elementwise(name, isa, y, exactly(x))
    return y


def exactly(array: numpy.ndarray | None) -> numpy.ndarray | None:
    """A copy that is aligned to its elements only and ends where its heap block ends: an overrun is an error."""
    if array is None:
        return None
    copy = numpy.empty(array.size + 1, array.dtype)[1:].reshape(array.shape)
    copy[...] = array
    return copy
