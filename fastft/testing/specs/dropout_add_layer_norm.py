"""Cases of dropout_add_layer_norm without dropout, which PyTorch would draw otherwise: tests/test_dropout.py has it."""

from fastft import functional
from fastft.functional.dropout_add_layer_norm import reference
from fastft.testing.spec import OpSpec, Sample, Timed


def samples(t):
    def tensors(*shape):
        return t(*shape), t(*shape), t(shape[-1]) + 1, t(shape[-1])

    yield Sample("rows of MiniLM", *tensors(40, 384), 0.0)
    yield Sample("not training", *tensors(30, 48), 0.5, False)
    yield Sample("odd tail", *tensors(33, 103), 0.0)
    yield Sample("three dimensions", *tensors(4, 7, 48), 0.0, eps=1e-5)
    yield Sample("no parameters", t(30, 24), t(30, 24), None, None, 0.0)
    yield Sample("no bias", t(30, 24), t(30, 24), t(24), None, 0.0)
    yield Sample("more rows than a partial sum's", *tensors(131, 20), 0.0)
    yield Sample("one dimension", *tensors(130), 0.0)
    yield Sample("no rows", *tensors(0, 48), 0.0)
    yield Sample("strided", t(64, 60).mT, t(64, 60).mT, t(64), t(64), 0.0)
    yield Sample("expanded residual", t(30, 48), t(48).expand(30, 48), t(48), t(48), 0.0)
    yield Sample("residual far from zero", t(40, 96), t(40, 96) + 1e3, t(96), t(96), 0.0)
    for M, H in ((4096, 768), (2048, 384)):
        yield Timed(f"{M}x{H}", *tensors(M, H), 0.0)


SPEC = OpSpec(
    op=functional.dropout_add_layer_norm,
    reference=reference,
    samples=samples,
    sizes=lambda input, residual, weight, bias, p=0.1, training=True, eps=1e-12: (
        input.shape[:-1].numel(),
        input.shape[-1],
    ),
    flops=lambda M, H: 9 * M * H,
    bytes=lambda M, H, size: 3 * M * H * size,
    gradients={
        **{name: lambda M, H: 6 * M * H for name in ("input", "residual")},
        "weight": lambda M, H: 2 * M * H,
        "bias": lambda M, H: M * H,
    },
    backward_bytes=lambda M, H, size: 4 * M * H * size,
    kernel="layer_norm",
)
