"""CUDA kernels without a GPU: csrc/cuda compiled by g++ against a host implementation of CUDA's execution model.

``kernels()`` is the NumPy module (module.cpp), built on first use in build/simt. Inside ``with cuda_on_cpu():`` our ops
run the CUDA kernels on CPU tensors, so that the specs of fastft/testing test them as they test the CPU's.

A new op takes one function for each direction in ``FIELDS``.
"""

import contextlib
import functools
import itertools
import math
import os
import re
import subprocess
import sysconfig
from pathlib import Path

import native
import numpy
import pybind11
import pytest
import torch

import setup
from fastft import _library
from fastft.functional import _choice
from fastft.functional.embedding import sums_of_parts
from fastft.functional.linear_act import workspaces

HERE = Path(__file__).resolve().parent

SUMMARY = pytest.StashKey[list]()  # lines for the end of pytest's report

SUFFIXES = {  # of a kernel's name, by the dtypes of activations and parameters: FASTFT_CUDA_DTYPES in csrc/kernels.h
    (torch.float32, torch.float32): "f32",
    (torch.float64, torch.float64): "f64",
    (torch.bfloat16, torch.bfloat16): "bf16",
    (torch.bfloat16, torch.float32): "bf16_f32",
    (torch.float16, torch.float16): "f16",
    (torch.float16, torch.float32): "f16_f32",
}

SANITIZED = "FASTFT_TEST_SIMT_SANITIZED"  # set for a process whose kernels are to be sanitized

# -O1 compiles in half the time of -O3, which saves more than it costs in running.
# Kernels read and write arrays of numbers as vectors of them.
OPTIONS = ("-O1", "-g1", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-x", "c++")
# How kernels are compiled. race.cpp stands in for the library of -fsanitize=thread.
WATCHED = {
    "race": ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"),
    "asan": native.SANITIZER[2:],
}


HALF = (torch.bfloat16, torch.float16)


DENSE = 0, 0  # strides, which the CPU's kernels alone look at


# ---- what csrc/binding does: arguments of an op -> tensors of dtypes T and W, fields of the kernel's argument struct


def linear_act_forward(y, z, x, w, b, activation, low=None):
    if x.dtype in HALF:  # Python makes this for CUDA tensors only, and so for the backward
        low = w.to(x.dtype)
    return (x, w), (y, z, x, w, b, len(x), *w.shape, activation, None, low, *DENSE)


def linear_act_backward(
    dx, dw, db, dy, z, x, w, activation, add=None, y=None, low=None, dz=None, partial=None, *through
):
    if any(t is not None for t in (dx, dw, db)):
        _, dz, partial = workspaces([t is not None for t in (dx, dw, db)], dy, z, w)
        low = w.to(dy.dtype) if dy.dtype in HALF else None
    tensors, sizes = (dx, dw, db, dy, z, x, w), (len(x), *w.shape, activation)
    parts = 1 if partial is None else len(partial)
    through = through or (None, None, 0)
    return (x, w), (*tensors, *sizes, add, y, None, None, None, low, dz, partial, parts, *through, *DENSE)


def cross_entropy_forward(loss, stats, divisor, row_loss, x, target, w, *options):
    if row_loss is None:  # Python makes this workspace for CUDA tensors only
        row_loss = x.new_empty(x.numel(), dtype=torch.promote_types(x.dtype, torch.float32))
    return (x, loss), (loss, stats, divisor, row_loss, None, x, *index_or_probability(target), w, *sizes(x), *options)


def cross_entropy_backward(dx, dq, dy, stats, divisor, x, target, w, *options):
    return (x, dy), (dx, dq, dy, stats, divisor, x, *index_or_probability(target), w, *sizes(x), *options)


def sizes(x):
    """(N, C, S) of logits (N, C, *)."""
    S = math.prod(x.shape[2:])
    return (x.shape[0], x.shape[1], S) if S else (0, x.shape[1], 1)


def index_or_probability(target):
    return (target, None) if target.dtype == torch.int64 else (None, target)


def head_forward(loss, logits, stats, divisor, row_loss, blocks_done, x, w, b, target, *options):
    if row_loss is None:  # Python makes these workspaces for CUDA tensors only
        row_loss = x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
        blocks_done = torch.zeros(1, dtype=torch.int32)
    tensors = loss, logits, stats, divisor, row_loss, blocks_done, None, x, w, b, target
    return (x, w), (*tensors, *logits.shape, x.shape[1], *options)


def head_backward(dx, dw, db, dz, dloss, dlogits, logits, stats, divisor, x, w, target, *options):
    if dz is None:  # Python makes this workspace for CUDA tensors only
        dz = torch.empty_like(logits, dtype=stats.dtype)
    tensors = dx, dw, db, dz, dloss, dlogits, logits, stats, divisor, x, w, target
    return (x, w), (*tensors, *logits.shape, x.shape[1], *options)


def layer_norm_forward(y, h, mean, rstd, x, residual, w, b, eps, *dropout):
    return (x, y), (y, h, mean, rstd, x, residual, w, b, *x.shape, eps, *dropout)


def layer_norm_backward(dx, dresidual, dw, db, partial, dy, h, mean, rstd, w, *dropout):
    if partial is None:  # Python makes this workspace for CUDA tensors only
        partial = mean.new_empty(math.ceil(len(dy) / 64), 2, dy.shape[1])
    fields = (dx, dresidual, dw, db, partial, dy, h, mean, rstd, w, *dy.shape, *dropout)
    return (dy if dx is None else dx, dy), fields


def embedding_forward(y, mean, rstd, ids, position_ids, type_ids, word, position, type, w, b, *options):
    tensors = y, mean, rstd, ids, position_ids, type_ids, word, position, type, w, b
    return (y, word), (*tensors, *y.shape, *rows_of(word, position, type), *options)


def embedding_backward(
    dh, dw, db, partial, dy, mean, rstd, ids, position_ids, type_ids, word, position, type, w, *dropout
):
    if partial is None:  # Python makes this workspace for CUDA tensors only
        partial = mean.new_empty(math.ceil(len(dy) / 64), 2, dy.shape[1])
    tensors = dh, dw, db, partial, dy, mean, rstd, ids, position_ids, type_ids, word, position, type, w
    return (dy, word), (*tensors, *dy.shape, *rows_of(word, position, type), *dropout)


def embedding_scatter(dtable, ids, order, dh, padding, partial):
    if order is None:  # Python sorts, clears and makes this workspace for CUDA tensors only
        dtable.zero_()
        ids, order = torch.sort(ids, stable=True)
        partial = sums_of_parts(dh, dtable)
    return (dh, dtable), (dtable, ids, order, dh, *dh.shape, len(dtable), padding, partial)


def rows_of(*tables):
    return (0 if table is None else len(table) for table in tables)


def attention_forward(o, stats, q, k, v, mask, cu_q, cu_k, max_q, max_k, scale, causal, seed, *dropout):
    sizes, strides = attention_sizes(q, k, cu_q, cu_k, max_q, max_k), heads_strides(o, q, k, v)
    tensors = flat(o), stats, flat(q), flat(k), flat(v), *masks(mask), cu_q, cu_k, seed
    options = *strides, *mask_strides(mask), scale, causal, *dropout
    return (q, q if mask is None or mask.dtype == torch.bool else mask), (*tensors, *sizes, *options)


def attention_backward(
    dq, dk, dv, _, dy, stats, q, k, v, mask, cu_q, cu_k, max_q, max_k, scale, causal, seed, *dropout
):
    sizes, strides = attention_sizes(q, k, cu_q, cu_k, max_q, max_k), heads_strides(dq, dk, dv, dy, q, k, v)
    delta = torch.empty_like(stats[0])  # Python makes this workspace for CUDA tensors only
    tensors = flat(dq), flat(dk), flat(dv), delta, flat(dy), stats, flat(q), flat(k), flat(v)
    options = *masks(mask), cu_q, cu_k, seed, *sizes, *strides, *mask_strides(mask), scale, causal, *dropout
    return (q, q if mask is None or mask.dtype == torch.bool else mask), (*tensors, *options)


def attention_sizes(q, k, cu_q, cu_k, max_q, max_k):
    B, N, D = q.shape[0] if cu_q is None else len(cu_q) - 1, q.shape[1], q.shape[-1]
    Sq, Sk = q.shape[2] if cu_q is None else max_q, k.shape[2] if cu_k is None else max_k
    return B, N, Sq, Sk, D, q.shape[:-1].numel(), k.shape[:-1].numel()


def heads_strides(*tensors):
    """Of sequences, heads and tokens."""
    for t in tensors:
        yield from (0, 0, 0) if t is None else t.stride()[:3] if t.dim() == 4 else (0, t.stride(1), t.stride(0))


def masks(mask):
    if mask is not None and mask.dtype == torch.bool:
        return flat(mask).view(torch.uint8), None
    return None, flat(mask)


def mask_strides(mask):
    return (0,) * 4 if mask is None else mask.stride()


def flat(tensor):
    """The memory from a tensor's first element to its last."""
    if tensor is None:
        return None
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    return tensor.detach().as_strided((span,), (1,))


def pack_rows(packed, padded, present, cu_seqlens):
    return (packed, packed), (packed, padded, present, cu_seqlens, len(packed), *padded.shape)


def unpack_rows(padded, packed, cu_seqlens):
    return (packed, packed), (padded, packed, cu_seqlens, len(packed), *padded.shape)


def adamw(p, g, m, v, steps, factor, lr, beta1, beta2, eps, decay, maximize, low=None):
    for step in steps:  # the binding counts them
        step += 1
    numbers = torch.stack([step.double() for step in steps])
    lists = *map(addresses, (p, g, m, v)), sizes_of(p), numbers
    of_low = (None, False) if low is None else (addresses(low), low[0].dtype == torch.float16)
    return (g[0], p[0]), (*lists, len(p), factor, lr, beta1, beta2, eps, decay, maximize, *of_low)


def grad_norm(norm, partial, g):
    if partial is None:  # Python makes this workspace for CUDA tensors only
        partial = torch.empty(sum(math.ceil(t.numel() / 65536) for t in g), dtype=torch.float64)
    return (g[0], norm), (norm, partial, addresses(g), sizes_of(g), len(g))


def scale_grads(g, factor):
    return (g[0], factor), (addresses(g), sizes_of(g), len(g), factor)


def addresses(tensors):
    assert all(tensor.is_contiguous() for tensor in tensors)
    return torch.tensor([tensor.data_ptr() for tensor in tensors])


def sizes_of(tensors):
    return torch.tensor([tensor.numel() for tensor in tensors])


FIELDS = {
    op.__name__: op
    for op in (
        *(linear_act_forward, linear_act_backward),
        *(cross_entropy_forward, cross_entropy_backward),
        *(head_forward, head_backward),
        *(layer_norm_forward, layer_norm_backward),
        *(embedding_forward, embedding_backward, embedding_scatter),
        *(attention_forward, attention_backward),
        *(pack_rows, unpack_rows),
        *(adamw, grad_norm, scale_grads),
    )
}

# ---- the ops' kernels replaced

ORDERS = 3  # of the threads of a block


@contextlib.contextmanager
def cuda_on_cpu(order: int | None = None, widen: bool | None = False):
    """Within it our ops run their CUDA kernels on CPU tensors, float16 included; gives the names of those that ran.

    Args:
        order: in which threads take turns, see set_order in cuda_runtime.h; by default another one for each forward,
            and arrays at multiples of 16 bytes for every second one only.
        widen: gives half-precision parameters to the kernels as float32, and rounds what comes back; None: for every
            second forward.
    """
    with pytest.MonkeyPatch.context() as patch, _choice.use_backend("fastft"):
        names: list[str] = []
        for op in FIELDS:
            patch.setattr(torch.ops.fastft, op, functools.partial(run, names, order, widen, op), raising=False)
        patch.setattr(_library, "why_not", lambda: None)
        patch.setitem(_choice._DTYPES, "cpu", _choice._DTYPES["cuda"])
        yield names


LARGEST_COPY = 1 << 30  # bytes; what spans more is given as it is, since hardly any of it is memory yet
turns = itertools.count()
turn = 0


def run(names, order, widen, op, *args):
    global turn
    if not op.endswith("_backward"):
        turn = next(turns)
    (activations, parameters), fields = FIELDS[op](*args)
    widen = turn // 2 % 2 if widen is None else widen
    widen = widen and parameters.itemsize == 2 and not op.startswith("linear_act")  # for which Python rounds the weight
    names.append(f"{op}_{SUFFIXES[activations.dtype, torch.float32 if widen else parameters.dtype]}")
    fields = [to_numpy(field) if isinstance(field, torch.Tensor) else field for field in fields]
    copied = [isinstance(field, numpy.ndarray) and field.nbytes < LARGEST_COPY for field in fields]
    copies = [placed(f, move=order is None and turn % 2) if copy else f for f, copy in zip(fields, copied, strict=True)]
    befores = [bits(f).copy() if copy else None for f, copy in zip(copies, copied, strict=True)]
    kernels().set_order(turn % ORDERS if order is None else order)
    call = widened if widen else lambda kernel, copies: kernel(*copies)
    call(getattr(kernels(), names[-1]), copies)
    for field, copy, before in zip(fields, copies, befores, strict=True):
        if before is not None:  # what else lies in the span of a strided tensor is another one's
            numpy.copyto(bits(field), bits(copy), where=bits(copy) != before)


def widened(kernel, copies):
    """Calls the kernel with float32 in place of half precision where it asks for that."""
    wide = list(copies)
    while True:
        try:
            kernel(*wide)
            break
        except TypeError as refused:  # by native/arguments.h, before anything runs
            found = re.match(r"argument (\d+) is an array of (float16|uint16)", str(refused))
            if not found:
                raise
            at = int(found[1])
            wide[at] = from_numpy(copies[at]).float().numpy()
    for copy, other in zip(copies, wide, strict=True):
        if other is not copy:
            numpy.copyto(copy, to_numpy(torch.from_numpy(other).to(from_numpy(copy).dtype)))


def from_numpy(array):
    """The inverse of to_numpy."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def to_numpy(tensor: torch.Tensor):
    """The tensor's memory as NumPy knows it; bfloat16 as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


def bits(array):
    return array.view(f"u{array.itemsize}")


def placed(array, move):
    """A copy of what a kernel is given, like it at a multiple of 16 bytes or off it, or the other way round if `move`;
    sanitized, in a heap block of its own, else with NaN around it."""
    aligned = (array.ctypes.data % 16 == 0) != bool(move)
    if SANITIZED in os.environ:
        return array.copy() if aligned else native.exactly(array)
    line = 64 // array.itemsize
    buffer = numpy.frombuffer(b"\xff" * (array.nbytes + 4 * 64), array.dtype).copy()
    start = line - buffer.ctypes.data % 64 // array.itemsize + (line if aligned else line + 1)
    copy = buffer[start : start + array.size].reshape(array.shape)
    copy[...] = array
    return copy


# ---- the module


@functools.cache
def kernels():
    """The module of this process: its kernels are watched for races, or sanitized."""
    return native.imported(build("asan" if SANITIZED in os.environ else "race"))


def sanitized_environment() -> dict[str, str]:
    """Of a process whose kernels are sanitized."""
    build("asan")
    return {**native.preloading_sanitizer(), SANITIZED: "1"}


def build(watched: str) -> Path:
    """The module's file, up to date, with kernels as ``WATCHED`` says.

    Raises: BuildError: the compiler's messages are above it.
    """
    folder = setup.ROOT / "build" / "simt"
    # HERE comes first: its cuda_runtime.h stands in for CUDA's.
    includes = [f"-I{path}" for path in (HERE, HERE.parent, pybind11.get_include(), sysconfig.get_paths()["include"])]
    flags = (*includes, *setup.INCLUDES, "-DFASTFT_NAMESPACE=fastft::cuda", *OPTIONS)
    own = {".cpp": (folder, flags), ".cu": (folder / watched, (*flags, *WATCHED[watched]))}
    sources = setup.largest_first(p for p in (*setup.CSRC.glob("cuda/*"), *HERE.iterdir()) if p.suffix in own)
    objects = [setup.Edge("cxx", own[p.suffix][0] / f"{p.stem}.o", (p,), own[p.suffix][1]) for p in sources]
    # The symbols of Python and of the sanitizers are those of the process.
    libraries = ("-Wl,-z,undefs", "-pthread", *(WATCHED["asan"] if watched == "asan" else ()))
    module = setup.link(folder / watched / "fastft_simt.so", objects, libraries)
    setup.write_ninja(folder / f"{watched}.ninja", [*objects, module], setup.Config(setup.find_compiler(), isas=()))
    setup.run_ninja(folder / f"{watched}.ninja")
    return module.output


# ---- what was run


def declared() -> set[tuple[str, str]]:
    """(file, name) of each __global__ function in csrc/cuda."""
    found = set()
    for path in sorted(setup.CSRC.glob("cuda/*.cu*")):
        text = path.read_text()
        bounds = r"(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?"
        names = re.findall(rf"__global__\s+void\s+{bounds}(\w+)\(", text)
        assert len(names) == len(re.findall("__global__", text)), f"{path}: a kernel whose name was not found"
        found |= {(path.name, name) for name in names}
    return found


def launches() -> dict[tuple[str, str], dict[str, list[int]]]:
    """(file, name) of a kernel -> its instances, with the number of launches in each order of threads so far."""
    module = Path(kernels().__file__)
    nm = ["nm", "-C", "--defined-only", module]
    listing = subprocess.run(nm, capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = {int(line.split()[0], 16): line.split(maxsplit=2)[2] for line in listing if line.split()[1] in "tTwW"}
    names = {name for _, name in declared()}
    kernel = re.compile(r"::(\w+)(?:<.*>)?\(")
    found = {at: match[1] for at, text in symbols.items() if (match := kernel.search(text)) and match[1] in names}
    addr2line = ["addr2line", "-e", module, *map(hex, found)]
    places = subprocess.run(addr2line, capture_output=True, text=True, check=True).stdout.splitlines()
    counts: dict[tuple[str, str], dict[str, list[int]]] = {}
    for (at, name), place in zip(found.items(), places, strict=True):
        file = Path(place.partition(":")[0]).name
        if (file, name) in declared() and not re.search(r"\[clone|::operator\(\)", symbols[at]):  # parts of a kernel
            counts.setdefault((file, name), {})[symbols[at]] = kernels().launches().get(at, [0] * ORDERS)
    return counts
