"""Which kernel runs: ours, or PyTorch's and why."""

import contextlib
import os

import torch

from fastft import _library

BACKENDS = ("auto", "torch", "fastft")


def _from_environment():
    name = os.environ.get("FASTFT_BACKEND") or "auto"
    if name not in BACKENDS:
        raise ValueError(f"FASTFT_BACKEND is {name!r}, must be one of {', '.join(BACKENDS)}")
    return name


_backend = _from_environment()


def backend():
    """``"auto"``: the faster kernel; ``"torch"``: PyTorch's; ``"fastft"``: ours, or an error. Set by FASTFT_BACKEND."""
    return _backend


@contextlib.contextmanager
def use_backend(name):
    """Within the block, as if FASTFT_BACKEND were ``name``; for tests and benchmarks, not thread-local."""
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"use_backend: {name!r} is not one of {', '.join(BACKENDS)}")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def runs(op, why_not, slower=False):
    """Whether our kernel runs.

    Args:
        op: name of the public function, for the error.
        why_not: a sentence if our kernel cannot run, else None.
        slower: our kernel can run, but PyTorch's is faster here.
    Raises: RuntimeError: ``FASTFT_BACKEND=fastft, but linear_act would run on PyTorch: …``
    """
    if why_not is None:
        return _backend == "fastft" or (_backend == "auto" and not slower)
    if _backend == "fastft":
        raise RuntimeError(f"FASTFT_BACKEND=fastft, but {op} would run on PyTorch: {why_not}")
    return False


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "meta": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}


def unsupported(*tensors):
    """A sentence if no kernel of ours can take these tensors (None among them is skipped), else None."""
    if (why_not := _library.why_not()) is not None:
        return why_not
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            return "torch.func transforms are PyTorch's"
        if torch.autograd.forward_ad._current_level >= 0:
            return "forward-mode differentiation is PyTorch's"
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN and _is_foreign(tensor):
            return f"{type(tensor).__name__} is not a plain tensor"
        device = tensor.device.type
        if device not in _DTYPES:
            return f"there are no kernels for device {device!r}"
        if tensor.dtype not in _DTYPES[device]:
            return f"there are no kernels for {tensor.dtype} on {device!r}"
        if device == "cuda" and not _library.has_cuda():
            return "fastft was built without CUDA"
        if tensor.is_sparse or tensor.layout != torch.strided:
            return f"there are no kernels for layout {tensor.layout}"
    return None


def _is_foreign(tensor):
    """Subclasses that take operators into their own hands (DTensor, quantised weights), not PyTorch's tracing ones."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    dispatch = type(tensor).__torch_dispatch__
    return (
        not isinstance(tensor, FakeTensor | FunctionalTensor) and dispatch is not torch._C._disabled_torch_dispatch_impl
    )
