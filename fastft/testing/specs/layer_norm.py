"""Cases of layer_norm: rows of encoders, odd tails, and means far from zero, where a one-pass variance fails."""

import math

from fastft import functional
from fastft.functional.layer_norm import reference
from fastft.testing.spec import OpSpec, Sample, Timed


def samples(t):
    def parameters(*H):
        return H, t(*H) + 1, t(*H)

    yield Sample("rows of MiniLM", t(40, 384), *parameters(384))
    yield Sample("odd tail", t(33, 103), *parameters(103), 1e-12)
    yield Sample("three dimensions", t(4, 7, 48), *parameters(48))
    yield Sample("two dimensions normalised", t(9, 6, 20), *parameters(6, 20))
    yield Sample("normalized_shape as a number, no parameters", t(30, 24), 24)
    yield Sample("no bias", t(30, 24), (24,), t(24))
    yield Sample("more rows than a partial sum's", t(131, 20), *parameters(20))
    yield Sample("one row", t(1, 130), *parameters(130))
    yield Sample("one dimension", t(130), *parameters(130))
    yield Sample("no rows", t(0, 48), *parameters(48))
    yield Sample("one column: nothing but the bias", t(20, 1), *parameters(1))
    yield Sample("strided", t(64, 60).mT, *parameters(64))
    yield Sample("rows of a larger matrix", t(30, 100)[:, 7:55], *parameters(48))
    yield Sample("mean far from zero", t(40, 96) + 1e3, *parameters(96))
    yield Sample("nearly constant: eps decides", t(40, 96, scale=1e-4), *parameters(96))
    for M, H in ((4096, 768), (2048, 384)):
        yield Timed(f"{M}x{H}", t(M, H), *parameters(H))


def sizes(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    H = normalized_shape if isinstance(normalized_shape, int) else math.prod(normalized_shape)
    return input.numel() // H, H


SPEC = OpSpec(
    op=functional.layer_norm,
    reference=reference,
    samples=samples,
    sizes=sizes,
    flops=lambda M, H: 8 * M * H,
    bytes=lambda M, H, size: 2 * M * H * size,
    gradients={"input": lambda M, H: 12 * M * H, "weight": lambda M, H: 2 * M * H, "bias": lambda M, H: M * H},
    backward_bytes=lambda M, H, size: 3 * M * H * size,
    kernel="layer_norm",
)
