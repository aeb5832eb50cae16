"""CUDA kernels without a GPU: csrc/cuda compiled by g++ against a host implementation of CUDA's execution model.

``kernels()`` is the NumPy module (module.cpp), built on first use in build/simt. Inside ``with OnCpu():`` our ops run the
CUDA kernels on CPU tensors, so that the specs of fastft/testing test them as they test the CPU's.

A new op takes one line in ``FIELDS``.
"""

import functools
import importlib.util
import sysconfig
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

SUFFIXES = {  # of a kernel's name, by the dtypes of activations and parameters: FASTFT_CUDA_DTYPES in csrc/kernels.h
    (torch.float32, torch.float32): "f32",
    (torch.float64, torch.float64): "f64",
    (torch.bfloat16, torch.bfloat16): "bf16",
    (torch.bfloat16, torch.float32): "bf16_f32",
    (torch.float16, torch.float16): "f16",
    (torch.float16, torch.float32): "f16_f32",
}

# Arguments of an op -> (tensor of T, tensor of W, fields of the kernel's argument struct in csrc/kernels.h)
FIELDS = {
    "linear_act_forward": lambda y, z, x, w, b, act: (x, w, (y, z, x, w, b, len(x), *w.shape, act)),
    "linear_act_backward": lambda dx, dw, db, dy, z, x, w, act: (x, w, (dx, dw, db, dy, z, x, w, len(x), *w.shape, act)),
}


class OnCpu(TorchDispatchMode):
    """Our ops run their CUDA kernels, on the CPU; ``names`` are the kernels that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = func.__name__.removesuffix(".default")
        if func.namespace != "fastft" or op not in FIELDS:
            return func(*args, **(kwargs or {}))
        activations, parameters, fields = FIELDS[op](*args, **(kwargs or {}))
        self.names.append(f"{op}_{SUFFIXES[activations.dtype, parameters.dtype]}")
        getattr(kernels(), self.names[-1])(*(to_numpy(f) if isinstance(f, torch.Tensor) else f for f in fields))


def to_numpy(tensor: torch.Tensor):
    """The tensor's memory as NumPy knows it; bfloat16 as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


@functools.cache
def kernels():
    """The module, built incrementally. Raises: setup.py's BuildError: see above it."""
    import pybind11

    build = imported("fastft_setup", ROOT / "setup.py")
    folder = ROOT / "build" / "simt"
    includes = [f"-I{path}" for path in (HERE, pybind11.get_include(), sysconfig.get_paths()["include"])]
    # HERE comes first: its cuda_runtime.h stands in for CUDA's. -O1 takes half the time of -O3, running included.
    flags = (*includes, *build.INCLUDES, "-DFASTFT_NAMESPACE=fastft::cuda", "-O1", "-Wno-unknown-pragmas", "-x", "c++")
    sources = [*build.CSRC.glob("cuda/*.cu"), *HERE.glob("*.c*")]
    objects = [build.Edge("cxx", folder / f"{s.stem}.o", (s,), flags) for s in build.largest_first(sources)]
    library = folder / "fastft_simt.so"
    edges = [*objects, build.link(library, objects, ("-Wl,-z,undefs", "-pthread"))]  # Python's symbols are its process's
    config = build.Config(cxx=build.find_compiler(), isas=())
    build.write_ninja(folder / "build.ninja", edges, config)
    build.run_ninja(folder / "build.ninja")
    return imported("fastft_simt", library)


def imported(name: str, path: Path):
    """The module in this file."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
