"""The CPU kernels without PyTorch: NumPy in, NumPy out, against NumPy in float64; then the same under sanitizers."""

import functools
import itertools
import os
import subprocess
import sys

import native
import numpy as np
import philox
import pytest
import torch
from numpys import (
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
from fastft.functional import _dropout

pytestmark = pytest.mark.skipif(setup.why_no_native() is not None, reason=str(setup.why_no_native()))

# ---- layer_norm, with everything: dropout, a residual, parameters

ROWS = [(1, 1), (3, 7), (5, 128), (70, 33), (2, 300), (0, 4)]  # (M, H)
SEED, THRESHOLD, USE, EPS = -(2**62) + 12345, 13107, 2, 1e-5


def layer_norm_inputs(sizes, dtypes, seed=0):
    (M, H), (T, W), draw = sizes, dtypes, np.random.default_rng(seed).standard_normal
    values = {"x": ((M, H), T), "residual": ((M, H), W), "w": (H, W), "b": (H, W), "dy": ((M, H), W)}
    return {name: stored(draw(shape), dtype) for name, (shape, dtype) in values.items()}


def layer_norm(kernels, suffix, x, residual, w, b, dy):
    (T, W), (M, H) = DTYPES[suffix], x.shape
    statistic, dropout = np.float64 if suffix == "f64" else np.float32, (np.array([SEED]), THRESHOLD, USE)
    y, h = (unwritten(M, H, dtype=W) for _ in "yh")
    mean, rstd = (unwritten(M, dtype=statistic) for _ in "mr")
    forward = y, h, mean, rstd, x, residual, w, b, M, H, EPS, *dropout
    y, h, mean, rstd, *_ = call(kernels, f"layer_norm_forward_{suffix}", *forward)
    dx, dresidual, dw, db = (
        unwritten(*shape, dtype=d) for shape, d in (((M, H), T), ((M, H), W), ((H,), W), ((H,), W))
    )
    backward = dx, dresidual, dw, db, None, dy, h, mean, rstd, w, M, H, *dropout
    dx, dresidual, dw, db, *_ = call(kernels, f"layer_norm_backward_{suffix}", *backward)
    return {"y": y, "h": h, "dx": dx, "dresidual": dresidual, "dw": dw, "db": db}


def numpy_layer_norm(suffix, x, residual, w, b, dy, dtype):
    """In ``dtype``, h rounded as the kernel keeps it, unless that is float64."""
    T, W = (dtype, dtype) if dtype == np.float64 else DTYPES[suffix]
    factors = philox.factors(SEED, USE, THRESHOLD, *x.shape).astype(dtype)
    x, residual, w, b, dy = (numbers(array, dtype) for array in (x, residual, w, b, dy))
    h = x * factors + residual
    mean = h.mean(1, keepdims=True)
    rstd = 1 / np.sqrt(h.var(1, keepdims=True) + dtype(EPS))
    y, n, g = (h - mean) * rstd * w + b, (numbers(stored(h, W), dtype) - mean) * rstd, dy * w
    dh = rstd * (g - g.mean(1, keepdims=True) - n * (g * n).mean(1, keepdims=True))
    results = {"y": (y, W), "h": (h, W), "dx": (dh * factors, T), "dresidual": (dh, W)}
    results |= {"dw": ((dy * n).sum(0), W), "db": (dy.sum(0), W)}
    return {name: stored(array, kind) for name, (array, kind) in results.items()}


@pytest.mark.parametrize("suffix", DTYPES)
def test_layer_norm_is_numpys_at_any_size(kernels, suffix):
    cases = itertools.product(range(4), ROWS)
    run, in_numpy = functools.partial(layer_norm, kernels, suffix), functools.partial(numpy_layer_norm, suffix)
    assert_numpys(suffix, cases, layer_norm_inputs, run, in_numpy)


@pytest.mark.parametrize("suffix", DTYPES)
def test_large_outputs_of_layer_norm_have_the_same_bits(kernels, suffix, monkeypatch):
    inputs = layer_norm_inputs((1030, 256), DTYPES[suffix])  # streamed where rows are aligned: half a MB of bf16
    stored = layer_norm(kernels, suffix, **inputs)
    monkeypatch.setattr(native, "exactly", aligned)
    for name, streamed in layer_norm(kernels, suffix, **inputs).items():
        np.testing.assert_array_equal(streamed, stored[name], err_msg=name)


# ---- embedding: three tables, dropout, a padding row; every id of a short table more often than a partial sum has rows

# (M, H, V, P, C)
TABLES = [
    (1, 1, 1, 1, 1),
    (3, 7, 5, 4, 2),
    (70, 33, 9, 5, 1),
    (201, 300, 2100, 7, 2),
    (5, 128, 70, 5, 3),
    (0, 4, 3, 2, 1),
]
PADDING = 1


def embedding_inputs(sizes, dtypes, seed=0):
    (M, H, *counts), (T, W), random = sizes, dtypes, np.random.default_rng(seed)
    ids = [random.integers(0, count, M) for count in counts]
    shapes = {"word": (counts[0], H), "position": (counts[1], H), "type": (counts[2], H), "w": (H,), "b": (H,)}
    parameters = {name: stored(random.standard_normal(shape), W) for name, shape in shapes.items()}
    return {"ids": ids, **parameters, "dy": stored(random.standard_normal((M, H)), T)}


def embedding(kernels, suffix, ids, word, position, type, w, b, dy):
    (T, W), (M, H), tables = DTYPES[suffix], dy.shape, (word, position, type)
    statistic, dropout = np.float64 if suffix == "f64" else np.float32, (np.array([SEED]), THRESHOLD, USE)
    sizes = M, H, *map(len, tables)
    y, mean, rstd = unwritten(M, H, dtype=T), *(unwritten(M, dtype=statistic) for _ in "mr")
    forward = y, mean, rstd, *ids, *tables, w, b, *sizes, EPS, *dropout
    y, mean, rstd, *_ = call(kernels, f"embedding_forward_{suffix}", *forward)
    dh, dw, db = unwritten(M, H, dtype=T), *(unwritten(H, dtype=W) for _ in "wb")
    backward = dh, dw, db, None, dy, mean, rstd, *ids, *tables, w, *sizes, *dropout
    dh, dw, db, *_ = call(kernels, f"embedding_backward_{suffix}", *backward)
    results = {"y": y, "dh": dh, "dw": dw, "db": db}
    for name, table, of in zip(("dword", "dposition", "dtype"), tables, ids, strict=True):
        padding = PADDING if name == "dword" else -1
        scatter = unwritten(*table.shape, dtype=W), of, None, dh, M, H, len(table), padding, None
        results[name] = call(kernels, f"embedding_scatter_{suffix}", *scatter)[0]
    return results


def numpy_embedding(suffix, ids, word, position, type, w, b, dy, dtype):
    """In ``dtype``; what is summed is rounded as the kernel keeps it, unless that is float64."""
    T, W = (dtype, dtype) if dtype == np.float64 else DTYPES[suffix]
    tables = word, position, type
    factors = philox.factors(SEED, USE, THRESHOLD, *dy.shape).astype(dtype)
    h = sum(numbers(table, dtype)[of] for table, of in zip(tables, ids, strict=True))
    w, b, dy = (numbers(array, dtype) for array in (w, b, dy))
    dy = dy * factors
    mean, rstd = h.mean(1, keepdims=True), 1 / np.sqrt(h.var(1, keepdims=True) + dtype(EPS))
    n, g = (h - mean) * rstd, dy * w
    dh = stored(rstd * (g - g.mean(1, keepdims=True) - n * (g * n).mean(1, keepdims=True)), T)
    results = {"y": ((n * w + b) * factors, T), "dh": (numbers(dh, dtype), T)}
    results |= {"dw": ((dy * n).sum(0), W), "db": (dy.sum(0), W)}
    for name, table, of in zip(("dword", "dposition", "dtype"), tables, ids, strict=True):
        sums = np.zeros(table.shape, dtype)
        np.add.at(sums, of, numbers(dh, dtype))
        if name == "dword":
            sums[PADDING:][:1] = 0
        results[name] = sums, W
    return {name: stored(array, kind) for name, (array, kind) in results.items()}


@pytest.mark.parametrize("suffix", DTYPES)
def test_embedding_is_numpys_at_any_size(kernels, suffix):
    assert_numpys(
        suffix,
        enumerate(TABLES),
        embedding_inputs,
        functools.partial(embedding, kernels, suffix),
        functools.partial(numpy_embedding, suffix),
    )


@pytest.mark.parametrize("suffix", DTYPES)
def test_embedding_has_the_same_bits_on_any_number_of_threads(kernels, suffix):
    inputs = embedding_inputs((301, 130, 2100, 70, 2), DTYPES[suffix])
    assert_same_bits_on_any_number_of_threads(kernels, lambda: embedding(kernels, suffix, **inputs))


# ---- cross_entropy: class indices, some of them ignored, or probabilities; weights, smoothing, a mean

# (N, C, S): one row; classes in a partial register; several registers and blocks; rows across lanes; spatial; empty
LOGITS = [(1, 1, 1), (5, 3, 1), (7, 150, 1), (300, 2, 1), (3, 5, 11), (40, 37, 9), (0, 4, 1)]
IGNORED, SMOOTHING, MEAN, SUM = -100, 0.1, 1, 2


def cross_entropy_inputs(sizes, dtypes, kind, seed):
    (N, C, S), (T, W), random = sizes, dtypes, np.random.default_rng(seed)
    target = random.integers(0, C, (N, S))
    target[random.random((N, S)) < 0.2] = IGNORED
    q = random.random((N, C, S)) / C
    return {
        "x": stored(3 * random.standard_normal((N, C, S)), T),
        "target": target if kind == "indices" else None,
        "q": None if kind == "indices" else stored(q, W),
        "w": stored(random.uniform(0.5, 2, C), W),
        "dy": stored([1.5], W),
    }


def cross_entropy(kernels, suffix, x, target, q, w, dy):
    (T, W), (N, C, S) = DTYPES[suffix], x.shape
    statistic = np.float64 if suffix == "f64" else np.float32
    loss, stats, divisor = (
        unwritten(*shape, dtype=d) for shape, d in (((1,), W), ((3, N, S), statistic), ((1,), statistic))
    )
    invalid, options = np.array([7]), (N, C, S, IGNORED, SMOOTHING, MEAN)
    forward = call(
        kernels, f"cross_entropy_forward_{suffix}", loss, stats, divisor, None, invalid, x, target, q, w, *options
    )
    loss, stats, divisor, _, invalid, *_ = forward
    assert invalid == -1
    dx, dq = unwritten(N, C, S, dtype=T), None if q is None else unwritten(N, C, S, dtype=W)
    backward = dx, dq, dy, stats, divisor, x, target, q, w, *options
    dx, dq, *_ = call(kernels, f"cross_entropy_backward_{suffix}", *backward)
    return {"loss": loss, "dx": dx} | ({} if q is None else {"dq": dq})


def numpy_cross_entropy(suffix, x, target, q, w, dy, dtype):
    """In ``dtype``, rounded at the end, unless that is float64."""
    T, W = (dtype, dtype) if dtype == np.float64 else DTYPES[suffix]
    C, (x, w, dy) = x.shape[1], (numbers(array, dtype) for array in (x, w, dy))
    share, w = dtype(SMOOTHING / C), w[:, None]
    valid = np.ones_like(x[:, 0]) if target is None else (target != IGNORED).astype(dtype)
    onto = numbers(q, dtype) if target is None else (np.arange(C)[:, None] == target[:, None]).astype(dtype)
    soft = (dtype(1 - SMOOTHING) * onto + share) * w * valid[:, None]
    divisor = dtype(valid.size) if target is None else (onto * w).sum(dtype=dtype)
    shifted = x - x.max(1, keepdims=True, initial=-np.inf)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    grad = dy / divisor
    loss = np.atleast_1d(-(soft * log_p).sum() / divisor)
    results = {"loss": (loss, W), "dx": (grad * (np.exp(log_p) * soft.sum(1, keepdims=True) - soft), T)}
    if target is None:
        results["dq"] = (-grad * dtype(1 - SMOOTHING) * w * log_p, W)
    return {name: stored(array, kind) for name, (array, kind) in results.items()}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the mean of no rows, 0 / 0
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("suffix", DTYPES)
def test_cross_entropy_is_numpys_at_any_size(kernels, suffix, kind):
    assert_numpys(
        suffix,
        enumerate(LOGITS),
        functools.partial(cross_entropy_inputs, kind=kind),
        functools.partial(cross_entropy, kernels, suffix),
        functools.partial(numpy_cross_entropy, suffix),
    )


@pytest.mark.parametrize("reduction", [MEAN, SUM])
@pytest.mark.parametrize("suffix", DTYPES)
def test_cross_entropy_in_one_pass_has_the_bits_of_two(kernels, suffix, reduction):
    (T, W), statistic = DTYPES[suffix], np.float64 if suffix == "f64" else np.float32
    for seed, (N, C) in enumerate([(1, 1), (5, 3), (7, 150), (300, 2), (3, 600), (70, 2049), (0, 4)]):
        inputs = cross_entropy_inputs((N, C, 1), DTYPES[suffix], "indices", seed)
        x, target, w, dy = (inputs[name] for name in ("x", "target", "w", "dy"))
        shapes = ((1,), W), ((2, N), statistic), ((1,), statistic), ((N, C), T)
        (loss, stats, divisor, dx), invalid = (unwritten(*shape, dtype=kind) for shape, kind in shapes), np.array([7])
        options = N, C, 1, IGNORED, 0.0, reduction
        forward = loss, stats, divisor, None, invalid, x, target, None, w, *options
        loss, stats, divisor, _, invalid, *_ = call(kernels, f"cross_entropy_forward_{suffix}", *forward)
        backward = dx, None, dy, stats, divisor, x, target, None, w, *options
        dx, *_ = call(kernels, f"cross_entropy_backward_{suffix}", *backward)
        outputs = *(unwritten(*shape, dtype=kind) for shape, kind in shapes), np.array([7])
        both = *outputs, 1.5, x, target, w, N, C, IGNORED, reduction
        found = call(kernels, f"cross_entropy_with_grad_{suffix}", *both)
        for one, two in zip(found, (loss, stats, divisor, dx, invalid), strict=False):
            assert one.tobytes() == two.tobytes()


def test_the_first_target_out_of_range_is_reported(kernels):
    inputs = cross_entropy_inputs((50, 3, 2), DTYPES["f32"], "indices", 0)
    inputs["target"][20, 1], inputs["target"][30, 0] = 3, -1
    fields = None, None, None, np.array([-1]), inputs["x"], inputs["target"], None, None, 50, 3, 2, IGNORED, 0.0, MEAN
    assert call(kernels, "cross_entropy_forward_f32", unwritten(1, dtype=np.float32), *fields)[4] == 41


# ---- head: dropout, class indices, some of them ignored, and a gradient of the logits, too

# (B, C, H): one of everything; a partial register; more rows and columns than a task's and a group's
BATCHES = [(1, 1, 1), (5, 3, 7), (19, 2, 300), (70, 37, 33)]


def head_inputs(sizes, dtypes, seed=0):
    (B, C, H), (T, W), random = sizes, dtypes, np.random.default_rng(seed)
    target = random.integers(0, C, B)
    target[1::4] = IGNORED
    draw = random.standard_normal
    weight = stored(draw((C, H)) * H**-0.5, T)  # of T, as linear_act's
    values = {"x": (draw((B, H)), T), "w": (numbers(weight), W), "b": (draw(C), W), "dloss": ([1.5], W)}
    values["dlogits"] = draw((B, C)), T
    return {"target": target} | {name: stored(array, dtype) for name, (array, dtype) in values.items()}


def head(kernels, suffix, target, x, w, b, dloss, dlogits):
    (T, W), (B, H), C = DTYPES[suffix], x.shape, len(w)
    statistic, invalid = np.float64 if suffix == "f64" else np.float32, np.array([7])
    options = B, C, H, IGNORED, np.array([SEED]), THRESHOLD, USE
    outputs = (((1,), W), ((B, C), T), ((2, B), statistic), ((1,), statistic))
    loss, logits, stats, divisor = (unwritten(*shape, dtype=d) for shape, d in outputs)
    forward = loss, logits, stats, divisor, None, None, invalid, x, w, b, target, *options
    loss, logits, stats, divisor, _, _, invalid, *_ = call(kernels, f"head_forward_{suffix}", *forward)
    assert invalid == -1
    dx, dw, db = unwritten(B, H, dtype=T), unwritten(C, H, dtype=W), unwritten(C, dtype=W)
    backward = dx, dw, db, None, dloss, dlogits, logits, stats, divisor, x, w, target, *options
    dx, dw, db, *_ = call(kernels, f"head_backward_{suffix}", *backward)
    return {"loss": loss, "logits": logits, "dx": dx, "dw": dw, "db": db}


def numpy_head(suffix, target, x, w, b, dloss, dlogits, dtype):
    """In ``dtype``, rounded where the kernel rounds, unless that is float64."""
    T, W = (dtype, dtype) if dtype == np.float64 else DTYPES[suffix]
    factors = philox.factors(SEED, USE, THRESHOLD, *x.shape).astype(dtype)
    x, w, b, dloss, dlogits = (numbers(array, dtype) for array in (x, w, b, dloss, dlogits))
    x = numbers(stored(x * factors, T), dtype)
    logits = numbers(stored(x @ w.T + b, T), dtype)
    valid, onto = (target != IGNORED)[:, None], np.arange(len(w)) == target[:, None]
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    divisor = dtype(valid.sum())
    dz = numbers(stored(dloss / divisor * valid * (np.exp(log_p) - onto), T), dtype)
    dz = numbers(stored(dz + dlogits, T), dtype)
    dx = numbers(stored(dz @ w, T), dtype) * factors
    loss = np.atleast_1d(-(log_p * onto).sum() / divisor)
    results = {"loss": (loss, W), "logits": (logits, T), "dx": (dx, T), "dw": (dz.T @ x, W), "db": (dz.sum(0), W)}
    return {name: stored(array, kind) for name, (array, kind) in results.items()}


@pytest.mark.parametrize("suffix", DTYPES)
def test_head_is_numpys_at_any_size(kernels, suffix):
    assert_numpys(
        suffix,
        enumerate(BATCHES),
        head_inputs,
        functools.partial(head, kernels, suffix),
        functools.partial(numpy_head, suffix),
    )


@pytest.mark.parametrize("suffix", DTYPES)
def test_head_has_the_same_bits_on_any_number_of_threads(kernels, suffix):
    inputs = head_inputs((67, 40, 130), DTYPES[suffix])
    assert_same_bits_on_any_number_of_threads(kernels, lambda: head(kernels, suffix, **inputs))


# ---- attention: a mask of keys, dropout

# (B, N, Sq, Sk, D): one element; primes; blocks of queries; blocks of keys; heads wider than a block; empty
HEADS = [(1, 1, 1, 1, 1), (2, 3, 17, 13, 5), (1, 2, 131, 37, 33), (2, 1, 9, 300, 16), (1, 1, 5, 6, 200)]
NO_HEADS = [(0, 2, 3, 4, 5), (1, 1, 0, 4, 5), (1, 1, 3, 0, 5)]
SEED, THRESHOLD, USE = 1234567890123, 20000, 3


def attention_inputs(sizes, dtypes, seed=0):
    (B, N, Sq, Sk, D), (T, _), random = sizes, dtypes, np.random.default_rng(seed)
    shapes = {"q": (B, N, Sq, D), "k": (B, N, Sk, D), "v": (B, N, Sk, D), "dy": (B, N, Sq, D)}
    values = {name: stored(random.standard_normal(shape), T) for name, shape in shapes.items()}
    keep = random.random((B, Sk)) < 0.8
    keep[:, :1] = True
    return {**values, "keep": keep.view(np.uint8)}


def attention(kernels, suffix, q, k, v, dy, keep, causal=0, threshold=THRESHOLD):
    T, (B, N, Sq, D), Sk = DTYPES[suffix][0], q.shape, k.shape[2]
    rows, seed = B * N * Sq, np.array([SEED])
    queries, keys = (N * Sq * D, Sq * D, D), (N * Sk * D, Sk * D, D)
    sizes, options = (B, N, Sq, Sk, D, rows, B * N * Sk), (Sk, 0, 0, 1, D**-0.5, causal, threshold, USE)
    stats = unwritten(2, rows, dtype=np.float64 if suffix == "f64" else np.float32)
    inputs = q, k, v, keep, None, None, None, seed
    strides = *queries, *queries, *keys, *keys
    o = unwritten(B, N, Sq, D, dtype=T)
    o, stats, *_ = call(kernels, f"attention_forward_{suffix}", o, stats, *inputs, *sizes, *strides, *options)
    grads = (unwritten(*array.shape, dtype=T) for array in (q, k, v))
    strides = *queries, *keys, *keys, *queries, *queries, *keys, *keys
    fields = *grads, None, dy, stats, *inputs, *sizes, *strides, *options
    dq, dk, dv, *_ = call(kernels, f"attention_backward_{suffix}", *fields)
    return {"o": o, "dq": dq, "dk": dk, "dv": dv}


def numpy_attention(suffix, q, k, v, dy, keep, dtype):
    """In ``dtype``, rounded at the end, unless that is float64."""
    T = dtype if dtype == np.float64 else DTYPES[suffix][0]
    q, k, v, dy = (numbers(array, dtype) for array in (q, k, v, dy))
    shape, scale = (*q.shape[:3], k.shape[2]), dtype(q.shape[3] ** -0.5)
    f = _dropout.factors(torch.tensor([SEED]), USE, THRESHOLD, shape[0] * shape[1] * shape[2], shape[3])
    f = f.view(shape).numpy().astype(dtype)
    x = np.where(keep[:, None, None, :], q @ k.swapaxes(2, 3) * scale, dtype(-np.inf))
    e = np.exp(x - x.max(3, keepdims=True, initial=-1e30))
    p = e / e.sum(3, keepdims=True)
    dp = dy @ v.swapaxes(2, 3) * f
    ds = p * (dp - (p * dp).sum(3, keepdims=True))
    dk, dv = scale * ds.swapaxes(2, 3) @ q, (p * f).swapaxes(2, 3) @ dy
    results = {"o": (p * f) @ v, "dq": scale * ds @ k, "dk": dk, "dv": dv}
    return {name: stored(array, T) for name, array in results.items()}


@pytest.mark.parametrize("suffix", DTYPES)
def test_attention_is_numpys_at_any_size(kernels, suffix):
    assert_numpys(
        suffix,
        enumerate(HEADS),
        attention_inputs,
        functools.partial(attention, kernels, suffix),
        functools.partial(numpy_attention, suffix),
    )


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("suffix", DTYPES)
def test_attention_has_the_same_bits_on_any_number_of_threads(kernels, suffix, causal):
    inputs = attention_inputs((3, 2, 30, 140, 20), DTYPES[suffix])
    assert_same_bits_on_any_number_of_threads(kernels, lambda: attention(kernels, suffix, **inputs, causal=causal))


@pytest.mark.parametrize("sizes", NO_HEADS)
def test_attention_of_nothing_writes_zeros(kernels, sizes):
    inputs = attention_inputs(sizes, DTYPES["f32"])
    for threshold in (0, THRESHOLD):
        assert not any(array.any() for array in attention(kernels, "f32", **inputs, threshold=threshold).values())


# ---- under sanitizers

in_sanitized_process = pytest.mark.skipif(native.SANITIZED in os.environ, reason="already under sanitizers")


@pytest.fixture(scope="module")
def sanitized():
    """Runs Python in a process whose kernels are sanitized."""
    environment = native.sanitized_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(setup.ROOT), str(setup.ROOT / "tests")])

    def run(*arguments):
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environment, cwd=setup.ROOT, capture_output=True, text=True)

    return run


@in_sanitized_process
def test_kernels_are_clean_under_sanitizers(sanitized):
    tests = [f"tests/test_{name}.py" for name in ("native", "native_linear_act", "activations")]
    done = sanitized("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not stated", *tests)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@in_sanitized_process
@pytest.mark.parametrize("isa", ["lowest", "highest"])
def test_one_element_too_many_would_be_seen(sanitized, isa):
    code = f"""
import native, numpy
kernels = native.kernels()
kernels.set_isa(kernels.isas().split(",")[{0 if isa == "lowest" else -1}])
x, w, y = (native.exactly(numpy.ones(shape, numpy.float32)) for shape in ((5, 7), (11, 7), (5, 11)))
b = native.exactly(numpy.ones(10, numpy.float32))
kernels.linear_act_forward_f32(y, None, x, w, b, 5, 11, 7, 0, None, None, 0, 0)
"""
    done = sanitized("-c", code)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-4000:]
