"""linear_act's CPU kernels without PyTorch: NumPy in, NumPy out, against NumPy in float64."""

import functools
import itertools

import native
import numpy as np
import pytest
from numpys import (
    BF16,
    DTYPES,
    aligned,
    assert_numpys,
    assert_same_bits_on_any_number_of_threads,
    call,
    numbers,
    stored,
    unwritten,
)

import setup
from fastft import activations

pytestmark = pytest.mark.skipif(setup.why_no_native() is not None, reason=str(setup.why_no_native()))

ACTIVATIONS = {
    "identity": (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(z.dtype)),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
}
# (M, N, K): one element; less than a tile; a tile and one; more than one block of K; many rows; long and thin; empty
SIZES = [(1, 1, 1), (3, 5, 7), (15, 33, 17), (29, 65, 401), (257, 19, 64), (2, 300, 3), (0, 4, 3), (4, 3, 0)]

# The last fields of LinearActBackward: of an input in float32, and for CUDA's tensor cores.
DENSE = 0, 0
NO_FLOAT, CUDA_ONLY = (None, None, None), (None, None, None, 1, None, None, 0, *DENSE)


def linear_act_inputs(sizes, dtypes, seed=0):
    (M, N, K), (T, W), draw = sizes, dtypes, np.random.default_rng(seed).standard_normal
    weight = stored(
        draw((N, K)) * max(K, 1) ** -0.5, T
    )  # a number of T, since the kernel may round it to T, as autocast does
    values = {"x": (draw((M, K)), T), "w": (numbers(weight), W), "b": (draw(N), W), "dy": (draw((M, N)), T)}
    return {name: stored(array, dtype) for name, (array, dtype) in values.items()}


def linear_act(kernels, suffix, activation, x, w, b, dy):
    T, W = DTYPES[suffix]
    M, K, N, index = *x.shape, len(w), activations.index(activation)
    y, z = (unwritten(M, N, dtype=T) for _ in "yz")
    y, z, *_ = call(kernels, f"linear_act_forward_{suffix}", y, z, x, w, b, M, N, K, index, None, None, *DENSE)
    dx, dw, db = unwritten(M, K, dtype=T), unwritten(N, K, dtype=W), unwritten(N, dtype=W)
    kept = None if activation == "identity" else z
    again = None if kept is None else unwritten(M, N, dtype=T)
    fields = dx, dw, db, dy, kept, x, w, M, N, K, index, None, again, *NO_FLOAT, *CUDA_ONLY
    dx, dw, db, _, _, _, _, _, _, _, _, _, again, *_ = call(kernels, f"linear_act_backward_{suffix}", *fields)
    return {"y": y, "z": z, "dx": dx, "dw": dw, "db": db, "y again": y if again is None else again}


def numpy_linear_act(suffix, activation, x, w, b, dy, dtype):
    """In ``dtype``; rounded where the kernel rounds, unless that is float64."""
    f, df = ACTIVATIONS[activation]
    exact = dtype == np.float64
    T, W = (dtype, dtype) if exact else DTYPES[suffix]
    x, w, b, dy = (numbers(array, dtype) for array in (x, w, b, dy))
    z = x @ w.T + b
    dz = numbers(stored(dy * df(numbers(stored(z, T), dtype)), T), dtype)
    again = f(numbers(stored(z, T), dtype))
    results = {
        "y": (f(z), T),
        "y again": (again, T),
        "z": (z, T),
        "dx": (dz @ w, T),
        "dw": (dz.T @ x, W),
        "db": (dz.sum(0), W),
    }
    return {name: stored(array, kind) for name, (array, kind) in results.items()}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("suffix", DTYPES)
def test_linear_act_is_numpys_at_any_size(kernels, suffix, activation):
    kernels.set_scattered(activation == "tanh")
    assert_numpys(
        suffix,
        enumerate(SIZES),
        linear_act_inputs,
        functools.partial(linear_act, kernels, suffix, activation),
        functools.partial(numpy_linear_act, suffix, activation),
    )


# whole panels of every instruction set, with and without whole tiles of rows; more than a block of depth, one step
@pytest.mark.parametrize("sizes", [(197, 96, 128), (13, 32, 64), (1, 224, 32), (400, 61, 32), (0, 32, 32)])
@pytest.mark.parametrize("suffix", DTYPES)
def test_linear_act_has_the_same_bits_where_operands_are_packed_and_where_they_lie(kernels, suffix, sizes, monkeypatch):
    monkeypatch.setattr(native, "exactly", aligned)  # as whole panels must be to be taken from where they lie
    inputs, results = linear_act_inputs(sizes, DTYPES[suffix]), []
    for scattered, threads in itertools.product((False, True), (1, 3)):
        kernels.set_scattered(scattered)
        kernels.set_threads(threads)
        results.append(linear_act(kernels, suffix, "tanh", **inputs))
    for name, array in results[0].items():
        for other in results[1:]:
            np.testing.assert_array_equal(array, other[name], name)


# Products for dx whose rows are made meanwhile: of few blocks, of blocks that pack their panels, of blocks in pieces.
@pytest.mark.parametrize("sizes", [(131, 259, 77), (257, 61, 416), (700, 61, 400)])
@pytest.mark.parametrize("suffix", DTYPES)
def test_linear_act_has_the_same_bits_on_any_number_of_threads(kernels, suffix, sizes):
    inputs = linear_act_inputs(sizes, DTYPES[suffix])
    assert_same_bits_on_any_number_of_threads(kernels, lambda: linear_act(kernels, suffix, "gelu", **inputs))


def test_linear_act_leaves_out_what_is_not_wanted(kernels):
    inputs = linear_act_inputs((6, 10, 9), DTYPES["f32"])
    x, w, dy = (inputs[name] for name in ("x", "w", "dy"))
    everything = linear_act(kernels, "f32", "gelu", x, w, np.zeros(10, np.float32), dy)
    forward = unwritten(6, 10, dtype=np.float32), None, x, w, None, 6, 10, 9, activations.index("gelu"), None, None
    forward = *forward, *DENSE
    np.testing.assert_array_equal(call(kernels, "linear_act_forward_f32", *forward)[0], everything["y"])
    for position, name in enumerate(("dx", "dw", "db")):
        outputs = [None, None, None]
        outputs[position] = np.full_like(everything[name], np.nan)
        needed = x if name == "dw" else None, w if name == "dx" else None
        fields = (
            *outputs,
            dy,
            everything["z"],
            *needed,
            6,
            10,
            9,
            activations.index("gelu"),
            None,
            None,
            *NO_FLOAT,
            *CUDA_ONLY,
        )
        np.testing.assert_array_equal(call(kernels, "linear_act_backward_f32", *fields)[position], everything[name])


@pytest.mark.parametrize("suffix", DTYPES)
def test_linear_act_adds_a_gradient_before_it_rounds(kernels, suffix):
    """In whole numbers, so that the sum is exact in every dtype."""
    T, W = DTYPES[suffix]
    M, N, K = 37, 45, 70
    draw = np.random.default_rng(0).integers
    dy, w, add = (draw(-1, 2, shape) for shape in ((M, N), (N, K), (M, K)))
    fields = *(stored(dy, T), None, None, stored(w, W), M, N, K, 0), stored(add, T), None, *NO_FLOAT, *CUDA_ONLY
    dx = call(kernels, f"linear_act_backward_{suffix}", unwritten(M, K, dtype=T), None, None, *fields)[0]
    np.testing.assert_array_equal(numbers(dx), dy @ w + add)


@pytest.mark.parametrize("suffix", DTYPES)
def test_linear_act_takes_rows_that_lie_apart(kernels, suffix):
    M, N, K, x_gap, y_gap = 67, 50, 40, 5, 8
    (T, W), gelu = DTYPES[suffix], activations.index("gelu")
    x, w, b, dy = linear_act_inputs((M, N, K), (T, W)).values()

    def apart(array, gap):
        return np.concatenate([array, unwritten(M, gap, dtype=T)], axis=1)

    def run(x_gap, y_gap):
        strides = (K + x_gap, N + y_gap) if x_gap else DENSE
        of_x, of_y = functools.partial(apart, gap=x_gap), functools.partial(apart, gap=y_gap)
        y, z, *_ = call(
            *(kernels, f"linear_act_forward_{suffix}", of_y(unwritten(M, N, dtype=T)), of_y(unwritten(M, N, dtype=T))),
            *(of_x(x), w, b, M, N, K, gelu, None, None, *strides),
        )
        found = [(y, N), (z, N)]
        for through in (None, None, 0), (of_x(x), of_x(unwritten(M, K, dtype=T)), gelu):
            dx, dw, db = of_x(unwritten(M, K, dtype=T)), unwritten(N, K, dtype=W), unwritten(N, dtype=W)
            add, again = (None if through[2] else of_x(x)), of_y(unwritten(M, N, dtype=T))
            fields = of_y(dy), of_y(z[:, :N]), of_x(x), w, M, N, K, gelu, add, again, *NO_FLOAT, None, None, None, 1
            dx, dw, db, *rest = call(kernels, f"linear_act_backward_{suffix}", dx, dw, db, *fields, *through, *strides)
            found += [(dx, K), (dw, K), (db, N), (rest[9], N), *([(rest[-4], K)] if through[2] else [])]
        return found

    for (dense, cols), (spread, _) in zip(run(0, 0), run(x_gap, y_gap), strict=True):
        np.testing.assert_array_equal(dense, spread[..., :cols])
        gap = spread[..., cols:]
        np.testing.assert_array_equal(gap, unwritten(*gap.shape, dtype=gap.dtype))


def test_linear_act_rounds_a_float32_input_on_its_way_in(kernels):
    inputs = linear_act_inputs((31, 45, 19), DTYPES["bf16_f32"])
    x, w, b, dy = inputs.values()
    M, N, K, index = 31, 45, 19, activations.index("gelu")
    rounded = linear_act(kernels, "bf16_f32", "gelu", **inputs)
    x32, (y, z) = numbers(x, np.float32), (unwritten(M, N, dtype=BF16) for _ in "yz")
    y, z, *_ = call(kernels, "linear_act_forward_bf16_f32", y, z, None, w, b, M, N, K, index, x32, None, *DENSE)
    np.testing.assert_array_equal(y, rounded["y"])
    dw, db, dx32 = unwritten(N, K, dtype=np.float32), unwritten(N, dtype=np.float32), unwritten(M, K, dtype=np.float32)
    fields = None, dw, db, dy, z, None, w, M, N, K, index, None, None, x32, dx32, None, *CUDA_ONLY
    _, dw, db, _, _, _, _, _, _, _, _, _, _, _, dx32, *_ = call(kernels, "linear_act_backward_bf16_f32", *fields)
    np.testing.assert_array_equal(dw, rounded["dw"])
    np.testing.assert_array_equal(stored(dx32, BF16), rounded["dx"])
