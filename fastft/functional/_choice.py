"""Which kernel runs: ours, or PyTorch's and why; by what was measured on this machine, or by the rule of each op."""

import contextlib
import os

import torch

from fastft import _library
from fastft.functional import _tuning

BACKENDS = ("auto", "torch", "fastft")


def _from_environment():
    name = os.environ.get("FASTFT_BACKEND") or "auto"
    if name not in BACKENDS:
        raise ValueError(f"FASTFT_BACKEND is {name!r}, must be one of {', '.join(BACKENDS)}")
    return name


_backend = _from_environment()
_library.load()  # here, because torch.compile, where it may be used first, cannot


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
    _tuning.by_rule = None
    try:
        yield
    finally:
        _backend = before
        _tuning.by_rule = None


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


# ---- facts that were measured

_used = None  # Facts of use_facts, in force whatever the file says


def slower(facts, op, dtype, train, sizes, shipped):
    """Whether PyTorch's kernel is the faster one: as was measured on this machine, else as ``shipped`` says.

    Args:
        facts: :func:`table` of the device.
        op: name of the public function.
        dtype: that is computed in.
        train: whether a backward follows.
        sizes: of the op, rows first.
        shipped: what the op's own rule says.
    """
    cell = facts.get(_tuning.key(op, dtype, train, *sizes))
    return shipped if cell is None else cell.runs == "torch"


def measured(op, device, dtype, train, sizes):
    """The :class:`fastft.functional._tuning.Cell` that decides such a call on a device, "cpu" or "cuda"; None: none."""
    return table(device).get(_tuning.key(op, dtype, train, *sizes))


def table(device):
    """The facts that count now by their key; none under ``torch.compile``, where each size would compile anew."""
    if torch.compiler.is_compiling():
        return {}
    if _used is None and not _tuning.known():
        _tuning.by_rule = _backend == "auto"
        return {}
    found = _tuning.load(device, torch.get_num_threads()) if _used is None else _used
    return {} if found.table and _used is None and _tuning.in_group() else found.table


def facts_in_force():
    """The :class:`fastft.functional._tuning.Facts` that choose the CPU's kernels now, on torch's number of threads.

    None in a group of processes, which may not share a file and have to agree, unless :func:`use_facts` gave some.
    """
    if _used is not None:
        return _used
    return _tuning.NOTHING if _tuning.in_group() else _tuning.load("cpu", torch.get_num_threads())


def facts():
    """The facts that choose the CPU's kernels now, for JSON: what a checkpoint carries. Empty: the shipped rule."""
    return facts_in_force().as_dict()


@contextlib.contextmanager
def use_facts(stored):
    """Within the block, what :func:`facts` returned once chooses kernels, whatever this machine's file says.

    Raises: ValueError: ``use_facts: these are no facts of fastft's: …``
    """
    global _used
    try:
        given = _tuning.Facts.parse(stored)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"use_facts: these are no facts of fastft's: {type(error).__name__}: {error}") from error
    facts_in_force()  # first, as reading them may switch the products of bf16
    before, _used = _used, given
    _tuning.by_rule = None
    with _library.use_bf16(given.bf16 or _tuning.BF16[0]) if _library.available() else contextlib.nullcontext():
        try:
            yield
        finally:
            _used = before
            _tuning.by_rule = None


# ---- what our kernels can take

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "meta": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}
DTYPES = _DTYPES["cuda"]  # those that any kernel takes


def plain(*tensors):
    """Whether these are on the CPU and :func:`unsupported` has nothing to say of any of them; False where that is rare.

    For calls that are done before all of its checks would be.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or not tensor.is_cpu or tensor.layout is not torch.strided:
            return False
        if tensor.dtype not in _DTYPES["cpu"]:
            return False
    return True


def unavailable():
    """A sentence if no kernel of ours can run now, whatever the tensors are, else None."""
    if (why_not := _library.why_not()) is not None:
        return why_not
    if not torch.compiler.is_compiling():
        if torch.jit.is_tracing():
            return "torch.jit.trace is PyTorch's"
        if torch._C._are_functorch_transforms_active():
            return "torch.func transforms are PyTorch's"
        if torch.autograd.forward_ad._current_level >= 0:
            return "forward-mode differentiation is PyTorch's"
    return None


def unsupported(*tensors):
    """A sentence if no kernel of ours can take these tensors (None among them is skipped), else None."""
    if (why_not := unavailable()) is not None:
        return why_not
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
        if device == "cuda" and (why_not := _library.why_not_gpu(tensor.device.index)) is not None:
            return why_not
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
