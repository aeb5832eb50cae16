"""Cases of a classifier's head without dropout, which PyTorch would draw otherwise: tests/test_head.py has it."""

import torch

from fastft.functional import head as functional
from fastft.testing.spec import OpSpec, Sample, Timed


def head(input, weight, bias, target, p=0.0, training=True, ignore_index=-100):
    """Loss and logits as one output, so that gradients of both are tested."""
    return _joined(*functional.head(input, weight, bias, target, p, training, ignore_index))


def reference(input, weight, bias, target, p=0.0, training=True, ignore_index=-100):
    return _joined(*functional.reference(input, weight, bias, target, p, training, ignore_index))


def _joined(loss, logits):
    return torch.cat([loss.reshape(1), logits.reshape(-1)])


def samples(t):
    def tensors(B, C, H, ignored=None, scale=1.0):
        target = t.indices(C, B)
        if ignored is not None:
            target[::3] = ignored
        return t(B, H, scale=scale), t(C, H, scale=H**-0.5), t(C), target

    yield Sample("two classes, rows of MiniLM", *tensors(16, 2, 384))
    yield Sample("odd everything, some rows ignored", *tensors(19, 5, 103, -100))
    yield Sample("one of everything", *tensors(1, 1, 1))
    yield Sample("not training", *tensors(8, 3, 40), 0.5, False)
    yield Sample("class 0 ignored", *tensors(12, 4, 24, 0), ignore_index=0)
    yield Sample("no bias", t(9, 65), t(7, 65), None, t.indices(7, 9))
    yield Sample("more classes than a warp has lanes", *tensors(7, 45, 96))
    yield Sample("more columns than are held at once", *tensors(3, 3, 2051))
    yield Sample("one row of them all: nothing to add", *tensors(1, 20, 32))
    yield Sample("more rows than warps, one class", *tensors(70, 1, 16))
    yield Sample("first rows of sequences", t(10, 5, 48)[:, 0], t(6, 48), t(6), t.indices(6, 10))
    yield Sample("strided", t(48, 40).mT, t(48, 6).mT, t(6), t.indices(6, 40, 2)[:, 1])
    yield Sample("logits far apart", *tensors(40, 6, 48, scale=100))
    for B, C, H in ((32, 2, 768), (64, 20, 384), (128, 100, 768), (32, 1000, 768)):
        yield Timed(f"{B}x{C}x{H}", *tensors(B, C, H))


SPEC = OpSpec(
    op=head,
    reference=reference,
    samples=samples,
    sizes=lambda input, weight, bias, target, **_: (len(input), *weight.shape),
    flops=lambda B, C, H: 2 * B * C * H + 24 * B * C,
    bytes=lambda B, C, H, size: (B * H + C * H) * size,
    gradients={
        "input": lambda B, C, H: 2 * B * C * H,
        "weight": lambda B, C, H: 2 * B * C * H,
        "bias": lambda B, C, H: B * C,
    },
    backward_bytes=lambda B, C, H, size: (2 * B * H + 2 * C * H) * size,
)
