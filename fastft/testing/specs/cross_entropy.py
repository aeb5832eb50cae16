"""Cases of cross_entropy: every option, every layout of classes in registers, and logits where a softmax goes wrong."""

import itertools
import math

import torch

from fastft import functional
from fastft.functional.cross_entropy import reference
from fastft.testing.spec import OpSpec, Sample, Timed


def samples(t):
    def labelled(N, C, *d, scale=1.0, ignored=0):  # every third row ignored, from the first on
        target = t.indices(C, N, *d)
        if ignored:
            target.view(-1)[::3] = ignored
        return t(N, C, *d, scale=scale), target

    def probable(N, C, *d):
        return t(N, C, *d), t(N, C, *d, scale=2).softmax(1)

    def weights(C):
        return t(C).abs() + 0.1

    for C, why in ((7, "few classes: rows in the lanes"), (201, "many classes: an odd tail")):
        for reduction in ("mean", "sum", "none"):
            yield Sample(f"{why}, {reduction}", *labelled(37, C), reduction=reduction)
            yield Sample(
                f"{why}, weights, {reduction}", *labelled(37, C, ignored=-100), weights(C), reduction=reduction
            )
        yield Sample(f"{why}, smoothing", *labelled(37, C, ignored=-100), label_smoothing=0.1)
        yield Sample(f"{why}, smoothing and weights", *labelled(37, C, ignored=-100), weights(C), label_smoothing=0.3)
        yield Sample(f"{why}, class 0 ignored", *labelled(37, C, ignored=0), ignore_index=0)
        yield Sample(f"{why}, probabilities", *probable(37, C))
        yield Sample(f"{why}, weighted smooth probabilities", *probable(37, C), weights(C), -100, "none", 0.2)
    yield Sample("two classes", *labelled(33, 2))
    yield Sample("one class", *labelled(5, 1), reduction="none")
    yield Sample("one row", *labelled(1, 300))
    yield Sample("whole registers and blocks", *labelled(3, 2048))
    yield Sample("one more than whole registers and blocks", *labelled(3, 2049))
    yield Sample("a vocabulary: long rows in parts", *labelled(3, 20011, ignored=-100))
    yield Sample("no rows", *labelled(0, 5), reduction="sum")
    yield Sample("one dimension", t(11), t.indices(11))
    yield Sample("one dimension, probabilities", t(150), t(150).softmax(0), reduction="none")
    yield Sample("three dimensions: classes in the middle", *labelled(3, 20, 21, ignored=-100), weights(20))
    yield Sample("four dimensions, smoothing", *labelled(2, 150, 3, 6), label_smoothing=0.1, reduction="none")
    yield Sample("four dimensions, probabilities", *probable(2, 19, 3, 7), weights(19))
    yield Sample("three dimensions, one of them empty", *labelled(2, 5, 0), reduction="none")
    yield Sample("classes last in memory", t(3, 20, 9).mT, t.indices(9, 3, 20))
    yield Sample("classes last in memory, probabilities", t(3, 20, 9).mT, t(3, 20, 9).softmax(-1).mT)
    yield Sample("strided logits and targets", t(9, 31).mT, t.indices(9, 31, 2)[:, 1])
    yield Sample("rows of a larger matrix", t(30, 300)[:, 7:207], t.indices(200, 30), t(1).abs().expand(200))
    yield Sample("near 1e4: one log-sum-exp would lose all digits", t(64, 200) + 1e4, t.indices(200, 64))
    yield Sample("near -1e4, few classes", t(64, 9) - 1e4, t.indices(9, 64), label_smoothing=0.1)
    yield Sample("far apart: most probabilities vanish", *labelled(40, 150, scale=50))
    yield Sample("far apart, few classes, smoothing", *labelled(40, 12, scale=50), label_smoothing=0.1)
    for C in (2, 20, 1000):  # classifiers
        yield Timed(f"4096x{C}", *labelled(4096, C))
    yield Timed("32x2", *labelled(32, 2))
    yield Timed("512x30522, most rows ignored", t(512, 30522), _one_in_eight(t.indices(30522, 512)))  # masked words
    yield Timed("4096x30522", *labelled(4096, 30522))


def grid(t, rows=(32, 128, 1024, 4096)):
    for N, C in itertools.product(rows, (2, 5, 20, 100, 1000)):
        yield Timed(f"{N}x{C}", t(N, C), t.indices(C, N))


def _one_in_eight(target):
    ignored = torch.full_like(target, -100)
    ignored[::8] = target[::8]
    return ignored


def sizes(input, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    C = input.shape[min(1, input.dim() - 1)]
    return (math.prod(input.shape) // C, C)


SPEC = OpSpec(
    op=functional.cross_entropy,
    reference=reference,
    samples=samples,
    grid=grid,
    sizes=sizes,
    flops=lambda M, C: 24 * M * C,  # maximum, difference, sum, and about 20 for an exponential
    bytes=lambda M, C, size: M * C * size,
    gradients={"input": lambda M, C: 24 * M * C, "target": lambda M, C: 3 * M * C},
    backward_bytes=lambda M, C, size: 2 * M * C * size,
    train_bytes=lambda M, C, size: 2 * M * C * size,  # where a gradient is made while a cache has the logits
)
