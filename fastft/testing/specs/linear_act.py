"""Cases of linear_act: every activation, the shapes of BERT and MiniLM, and those where a blocked GEMM goes wrong."""

import functools
import itertools
import math

import torch

from fastft import activations, functional
from fastft.testing.spec import OpSpec, Sample, Timed


def reference(input, weight, bias=None, activation="gelu"):
    return activations.torch_function(activation)(torch.nn.functional.linear(input, weight, bias))


def tensors(t, M, K, N, bias=True):  # scaled as a trained layer's: pre-activations of about 1
    return t(M, K), t(N, K, scale=max(K, 1) ** -0.5), t(N) if bias else None


def samples(t):
    linear = functools.partial(tensors, t)
    for name in functional.ACTIVATIONS:
        yield Sample(f"activation {name}", *linear(60, 40, 50), activation=name)
    yield Sample("no bias", *linear(33, 64, 32, bias=False))
    yield Sample("identity, no bias: a GEMM", *linear(33, 64, 32, bias=False), activation="identity")
    yield Sample("alias of an activation", *linear(5, 7, 3), activation="gelu_new")
    yield Sample("every size prime: edge tiles in all three products", *linear(31, 37, 29), activation="tanh")
    yield Sample("one more than whole tiles", *linear(57, 65, 97))
    yield Sample("one row", *linear(1, 48, 64))
    yield Sample("one of everything", *linear(1, 1, 1), activation="sigmoid")
    yield Sample("classifier: two columns", *linear(32, 768, 2), activation="identity")
    yield Sample("long sums: K of BERT's second FFN layer", *linear(16, 3072, 24), activation="identity")
    yield Sample("long sums over rows in the weight gradient", *linear(3001, 24, 20))
    yield Sample("no rows", *linear(0, 12, 8))
    yield Sample("no columns", *linear(6, 12, 0))
    yield Sample("no depth: the bias alone", *linear(6, 0, 8))
    yield Sample("one dimension", t(24), t(16, 24), t(16))
    yield Sample("three dimensions", t(4, 7, 24), t(16, 24), t(16))
    yield Sample("four dimensions, one of them empty", t(2, 0, 3, 24), t(16, 24), t(16))
    yield Sample("strided input", t(24, 30).mT, t(16, 24), t(16))
    yield Sample("rows of a larger matrix", t(30, 100)[:, 7:31], t(16, 24), t(16))
    yield Sample("strided weight", t(30, 24), t(24, 16).mT, t(16))
    yield Sample("expanded input and bias", t(1, 24).expand(30, 24), t(16, 24), t(1).expand(16))
    yield Sample("saturated: |z| far beyond every tail", t(40, 24, scale=30), t(32, 24), t(32))
    yield Sample("tiny: z near zero", t(40, 24, scale=1e-6), t(32, 24), t(32, scale=1e-6))
    yield Sample(
        "below the least normal number", t(40, 24, scale=0), t(32, 24), t(32, scale=1e-39), activation="identity"
    )
    yield Sample("few rows: the weight is not the operand that is packed", *linear(37, 20, 230))
    yield Sample("few rows, edges everywhere", *linear(9, 37, 61, bias=False), activation="tanh")
    for M, (K, N, activation) in itertools.product((4096, 2048, 256), LAYERS):
        yield Timed(f"{M}x{K}->{N} {activation}", *linear(M, K, N), activation=activation)
    for name in functional.ACTIVATIONS:
        if name != "gelu":
            yield Timed(f"2048x384->1536 {name}", *linear(2048, 384, 1536), activation=name)
    yield Timed("32x768->768 tanh", *linear(32, 768, 768), activation="tanh")  # the pooler of a batch


LAYERS = (
    *((768, 768, "identity"), (768, 3072, "gelu"), (3072, 768, "identity")),  # BERT-base
    *((384, 1536, "gelu"), (1536, 384, "identity")),  # MiniLM
)


SIZES = (2, 5, 384, 768, 1536, 3072)  # classifiers' and encoders'
ALL_LAYERS = tuple(itertools.product(SIZES, SIZES))


def grid(t, rows=(1, 7, 64, 512, 4096), layers=ALL_LAYERS):
    for M, (K, N) in itertools.product(rows, layers):
        yield Timed(f"{M}x{K}->{N}", *tensors(t, M, K, N), activation="identity")


SPEC = OpSpec(
    op=functional.linear_act,
    reference=reference,
    samples=samples,
    grid=grid,
    sizes=lambda input, weight, bias=None, activation="gelu": (math.prod(input.shape[:-1]), *reversed(weight.shape)),
    flops=lambda M, K, N: 2 * M * K * N,
    bytes=lambda M, K, N, size: (M * K + K * N + M * N) * size,
    gradients={
        "input": lambda M, K, N: 2 * M * K * N,
        "weight": lambda M, K, N: 2 * M * K * N,
        "bias": lambda M, K, N: 0,
    },
    # Both operands, dy and z are read, the two gradients written.
    backward_bytes=lambda M, K, N, size: (2 * M * K + 2 * K * N + 2 * M * N) * size,
)
