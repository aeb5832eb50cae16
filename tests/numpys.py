"""What tests of the CPU kernels without PyTorch share: arrays of their dtypes, calls, and comparisons with NumPy."""

import native
import numpy as np
import torch

from fastft.testing import error

BF16 = np.uint16
# Suffix of a kernel's name -> dtypes of activations and of parameters
DTYPES = {
    "f32": (np.float32, np.float32),
    "bf16": (BF16, BF16),
    "bf16_f32": (BF16, np.float32),
    "f64": (np.float64,) * 2,
}


def to_bf16(values):
    return torch.from_numpy(np.asarray(values, np.float32)).bfloat16().view(torch.uint16).numpy()


def stored(values, dtype):
    """Values rounded to a kernel's dtype."""
    return to_bf16(values) if dtype == BF16 else np.asarray(values, dtype)


def numbers(array, dtype=np.float64):
    """The numbers that a kernel's array holds."""
    return (
        (np.uint32(array) << np.uint32(16)).view(np.float32).astype(dtype)
        if array.dtype == BF16
        else array.astype(dtype)
    )


def tensors(results):
    return {
        name: torch.from_numpy(array).view(torch.bfloat16) if array.dtype == BF16 else torch.from_numpy(array)
        for name, array in results.items()
    }


def assert_numpys(suffix, cases, inputs_of, run, in_numpy):
    """What ``run`` makes of ``inputs_of(sizes, dtypes, seed=seed)`` for all (seed, sizes) is ``in_numpy``'s."""
    budget = error.Budget(double=suffix == "f64")
    for seed, sizes in cases:
        inputs = inputs_of(sizes, DTYPES[suffix], seed=seed)
        theirs, truth = (in_numpy(**inputs, dtype=dtype) for dtype in (np.float32, np.float64))
        budget.add(tensors(run(**inputs)), tensors(theirs), tensors(truth), case=str(sizes), seed=seed)
    budget.check()


def assert_same_bits_on_any_number_of_threads(kernels, run):
    results = []
    for threads in (1, 2, 5):
        kernels.set_threads(threads)
        results.append(run())
    for other in results[1:]:
        for name, array in results[0].items():
            np.testing.assert_array_equal(array, other[name], name)


def call(kernels, name, *fields):
    """Runs a kernel on awkward copies of its arrays; returns the copies."""
    copies = [native.exactly(field) if isinstance(field, np.ndarray) else field for field in fields]
    getattr(kernels, name)(*copies)
    return copies


def unwritten(*shape, dtype):
    """An output to be: NaN, so that what a kernel leaves out shows."""
    return np.full(shape, 0xFFFF, BF16) if dtype == BF16 else np.full(shape, np.nan, dtype)


def aligned(array):
    """A copy that begins where registers do."""
    buffer = np.zeros(array.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
