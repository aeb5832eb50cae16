"""Loads libfastft.so, or says in one sentence why not; asks it what it holds and switches its instruction set."""

import contextlib
import ctypes
import functools
import json
import os
import re
import warnings
from pathlib import Path

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")  # ascending; the C++ half of this list is csrc/cpu/isa.cpp
PATH = Path(__file__).with_name("libfastft.so")
BUILD_INFO = Path(__file__).with_name("_build.json")  # written by setup.py

_tried = False
_why_not = None


def load():
    """Loads the native library if there is one; does nothing when called again.

    A library that is there but cannot be loaded is warned about once.

    Raises: ValueError: ``FASTFT_ISA is 'sse9', must be one of baseline, avx2, avx512, avx512_bf16``
    """
    global _tried, _why_not
    if _tried:
        return
    limit = os.environ.get("FASTFT_ISA")
    if limit and limit not in ISAS:
        raise ValueError(f"FASTFT_ISA is {limit!r}, must be one of {', '.join(ISAS)}")
    if PATH.is_file():
        import torch

        try:
            torch.ops.load_library(PATH)
            _register_fakes()
        except OSError as error:
            _why_not = f"fastft's native library cannot be loaded into torch {torch.__version__}: {error}"
            warnings.warn(f"{_why_not}; PyTorch's own kernels run instead", RuntimeWarning, stacklevel=2)
    else:
        never_built = "this checkout was never built, `python setup.py develop_native` does it"
        _why_not = f"fastft has no native library: {build_info().get('why_not') or never_built}"
    _tried = True


def _register_fakes():
    """Fake kernels for the ops that only write into their arguments: nothing to compute. Before any op's first call."""
    import torch

    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("fastft::"):
            schema = torch._C._get_schema(name, "")
            if schema.is_mutable and not schema.returns:
                torch.library.register_fake(name, lambda *args: None)


def build_info():
    """What setup.py wrote about this installation; an empty dict in a checkout that was never built."""
    return json.loads(BUILD_INFO.read_text()) if BUILD_INFO.is_file() else {}


def why_not():
    """None if the native library is loaded, else one sentence that says why PyTorch's own kernels run instead."""
    load()
    return _why_not


def available():
    """Whether torch.ops.fastft holds our kernels."""
    return why_not() is None


def isa():
    """The instruction set whose CPU kernels run, one of :data:`ISAS`. RuntimeError without a native library."""
    return _ops().isa()


def isas():
    """The instruction sets that this CPU has, the library holds and FASTFT_ISA allows, ascending; [] without one."""
    return _ops().isas().split(",") if available() else []


def set_isa(name):
    """Switches the CPU kernels to another of :func:`isas`; for tests, while no kernel runs.

    Raises: ValueError: ``set_isa: 'avx512' is not one of baseline, avx2``
    """
    ops = _ops()
    if name not in isas():
        raise ValueError(f"set_isa: {name!r} is not one of {', '.join(isas())}")
    ops.set_isa(name)


@contextlib.contextmanager
def use_isa(name):
    """Within the block, :func:`set_isa`."""
    before = isa()
    set_isa(name)
    try:
        yield
    finally:
        set_isa(before)


def bf16():
    """How the CPU's kernels multiply bfloat16: "dot", by VDPBF16PS, or "widen", in float32."""
    return _ops().bf16()


def set_bf16(how):
    """Switches :func:`bf16` to "dot" or "widen", while no kernel runs; it stays "widen" below avx512_bf16."""
    _ops().set_bf16(how)


@contextlib.contextmanager
def use_bf16(how):
    """Within the block, :func:`set_bf16`."""
    before = bf16()
    set_bf16(how)
    try:
        yield
    finally:
        set_bf16(before)


def huge_pages(tensors, written=False):
    """Pages of 2 MB for these tensors, dense and on the CPU, as far as the system gives some: for what is new as far as
    it fills them; for what is ``written`` as it is, where it is, together with what else lies in those pages."""
    if tensors and available():
        _ops().huge_pages(tensors, written)


def has_cuda():
    """Whether the library holds CUDA kernels; whether there is a GPU is torch.cuda's to say."""
    return available() and _ops().has_cuda()


def why_not_gpu(index=0):
    """None if our CUDA kernels run on that GPU, else one sentence that says why not. Every tensor of a step is asked
    for: found out once."""
    if index is None:
        import torch

        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return _why_not_gpu(index)


@functools.cache
def _why_not_gpu(index):
    if not has_cuda():
        return "fastft was built without CUDA"
    import torch

    if not torch.cuda.is_available():  # a tensor that only pretends to be on one
        return None
    info = build_info()
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    return why_not_driver(_driver_version(), info.get("nvcc")) or why_not_capability(
        name, capability, info.get("archs", ())
    )


def _driver_version():
    """The newest CUDA that the NVIDIA driver supports (13000), asked of itself; None where it does not tell."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (AttributeError, OSError):
        return None
    return None if failed else version.value


def why_not_driver(version, nvcc):
    """None if a driver that supports CUDA ``version`` (13000) runs what this nvcc built ("release 13.0, V13.0.88")."""
    built = re.search(r"release (\d+)\.(\d+)", nvcc or "")
    if not built or version is None or version // 1000 >= int(built[1]):  # within a major version any driver runs it
        return None
    supported = f"{version // 1000}.{version % 1000 // 10}"
    return (
        f"fastft was built with CUDA {built[1]}.{built[2]}, this NVIDIA driver supports {supported}: "
        "update the driver, or build fastft with an older CUDA"
    )


def why_not_capability(name, capability, archs):
    """None if code for ``archs`` ("sm_80", "compute_80") runs on a GPU of this compute capability, (8, 6)."""
    for arch in archs:
        kind, _, number = arch.partition("_")
        if not number.isdigit():  # sm_90a runs on 9.0 alone
            if kind == "sm" and (int(number[:-2]), int(number[-2])) == tuple(capability):
                return None
            continue
        of = int(number[:-1]), int(number[-1])
        # Machine code runs on later ones of its generation, what is compiled when it is loaded on all later ones.
        if of <= tuple(capability) and (kind == "compute" or of[0] == capability[0]):
            return None
    wanted = "".join(map(str, capability))
    return (
        f"fastft has no code for {name} (compute capability {'.'.join(map(str, capability))}), only for "
        f"{', '.join(archs)}: build it with FASTFT_CUDA_ARCHS=sm_{wanted}, from sm_80 on"
    )


def _ops():
    if not available():
        raise RuntimeError(why_not())
    import torch

    return torch.ops.fastft
