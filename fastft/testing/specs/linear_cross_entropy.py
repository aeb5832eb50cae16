"""Cases of linear_cross_entropy: every option, rows that end with a chunk or within one, and a vocabulary."""

from fastft import functional
from fastft.functional.linear_cross_entropy import reference
from fastft.testing.spec import OpSpec, Sample, Timed


def samples(t):
    def tensors(N, C, K):
        return t(N, K), t(C, K, scale=max(K, 1) ** -0.5), t.indices(C, N)

    def ignoring(N, C, K):
        input, linear_weight, target = tensors(N, C, K)
        target[::3] = -100
        return input, linear_weight, target

    for reduction in ("mean", "sum", "none"):
        yield Sample(f"bias, {reduction}", *tensors(40, 150, 24), linear_bias=t(150), reduction=reduction)
    yield Sample("some ignored", *ignoring(37, 60, 20))
    yield Sample("weights, some ignored", *ignoring(37, 60, 20), weight=t(60).abs() + 0.1)
    yield Sample("smoothing", *ignoring(37, 60, 20), label_smoothing=0.1)
    yield Sample("weights and smoothing", *tensors(37, 60, 20), weight=t(60).abs() + 0.1, label_smoothing=0.3)
    yield Sample("a class ignored", *tensors(37, 5, 20), ignore_index=0)
    yield Sample("two classes", *tensors(33, 2, 16))
    yield Sample("one row", *tensors(1, 300, 16), reduction="none")
    yield Sample("no rows", *tensors(0, 5, 8), reduction="sum")
    yield Sample("strided", t(24, 30).mT, t(24, 50).mT, t.indices(50, 30))
    yield Sample("two chunks of rows", *tensors(150, 100_000, 2))
    for N, C, K in ((1024, 30522, 768), (256, 30522, 384)):
        yield Timed(f"{N}x{K}->{C}", *tensors(N, C, K), linear_bias=t(C))


SPEC = OpSpec(
    op=functional.linear_cross_entropy,
    reference=reference,
    samples=samples,
    sizes=lambda input, linear_weight, target, linear_bias=None, weight=None, reduction="mean", ignore_index=-100, label_smoothing=0.0: (  # noqa: E501
        *input.shape,
        len(linear_weight),
    ),
    flops=lambda N, K, C: 2 * N * K * C + 24 * N * C,
    bytes=lambda N, K, C, size: (N * K + K * C) * size,
    gradients={
        "input": lambda N, K, C: 4 * N * K * C,  # the logits are made again
        "linear_weight": lambda N, K, C: 2 * N * K * C,
        "linear_bias": lambda N, K, C: N * C,
    },
    backward_bytes=lambda N, K, C, size: 2 * (N * K + K * C) * size,
    kernel="cross_entropy",
)
