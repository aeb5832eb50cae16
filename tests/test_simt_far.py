"""CUDA kernels on more than 2^31 elements: of a grid the last blocks run, on the last rows of tensors that for the rest
are never touched, and so take no memory. What they make of them has the bits it has in a tensor of nothing else.

Attention's strides are in test_simt.py. Sums over all rows have the same loops over rows as these.
"""

import contextlib

import pytest
import simt
import torch

from fastft import activations

FAR = 2**31 + 100  # elements, at least
LAST = 3  # rows with numbers
ZEROS = 5000  # rows before them, of which the last blocks have some
H = 1032  # more than four spans; rows begin at multiples of 16 bytes
GELU = activations.index("gelu")


class Rows:
    """Makes tensors of ``count`` rows, of which the last have numbers: the same, whatever the count."""

    def __init__(self, count, dtype):
        self.count, self.dtype, self.generator = count, dtype, torch.Generator().manual_seed(0)

    def __call__(self, *row):
        tensor = self.empty(*row)
        tensor[-ZEROS:] = 0
        tensor[-LAST:] = self.parameter(LAST, *row)
        return tensor

    def empty(self, *row, dtype=None):
        return torch.empty(self.count, *row, dtype=dtype or self.dtype)

    def parameter(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def indices(self, *last):
        indices = self.empty(dtype=torch.long)
        indices[-ZEROS:] = 0
        indices[-LAST:] = torch.tensor(last)
        return indices


def layer_norm(t):
    x, dy, w, b = t(H), t(H), t.parameter(H), t.parameter(H)
    y, h, dx, dresidual = (t.empty(H) for _ in range(4))
    mean, rstd = torch.zeros(2, t.count)
    torch.ops.fastft.layer_norm_forward(y, h, mean, rstd, x, x, w, b, 1e-5, None, 0, 0)
    torch.ops.fastft.layer_norm_backward(dx, dresidual, None, None, None, dy, h, mean, rstd, w, None, 0, 0)
    return y, h, mean, rstd, dx, dresidual


def embedding(t):
    """Of a table that is as large as what is taken of it."""
    table, dy, position, w = t(H), t(H), t.parameter(2, H), t.parameter(H)
    y, dh, dtable = t.empty(H), t.empty(H), t.empty(H)
    mean, rstd = torch.zeros(2, t.count)
    ids = t.indices(*(t.count - i for i in (3, 1, 1)))  # sorted, but that they begin anew with zeros
    ids[:-LAST] = 0
    tables = ids, torch.zeros_like(ids), None, table, position, None
    torch.ops.fastft.embedding_forward(y, mean, rstd, *tables, w, w, 1e-5, None, 0, 0)
    torch.ops.fastft.embedding_backward(dh, None, None, None, dy, mean, rstd, *tables, w, None, 0, 0)
    dtable[-LAST:] = 0
    partial = torch.empty(-(-t.count // 16), 2, H)
    torch.ops.fastft.embedding_scatter(dtable, ids, torch.arange(t.count), dh, -1, partial)
    return y, dh, dtable


def cross_entropy(t, C):
    x, dy, target = t(C), t(), t.indices(1, C - 1, 0)
    loss, dx, stats = t.empty(), t.empty(C), torch.empty(2, t.count)
    torch.ops.fastft.cross_entropy_forward(loss, stats, None, None, x, target, None, -100, 0.0, 0)
    torch.ops.fastft.cross_entropy_backward(dx, None, dy, stats, None, x, target, None, -100, 0.0, 0)
    return loss, dx, *stats


def cross_entropy_of_a_thread(t):
    return cross_entropy(t, 7)


def cross_entropy_of_a_warp(t):
    return cross_entropy(t, 1000)


def cross_entropy_of_a_block(t):
    return cross_entropy(t, 4001)


def cross_entropy_of_places(t):
    """Of each class all places lie side by side, those of the last one more than 2^31 elements behind the first's."""
    x = torch.empty(1, 4, t.count, dtype=t.dtype)
    for of_class in x[0]:
        of_class[-ZEROS:] = t()[-ZEROS:]
    target, loss, dx, stats = t.indices(2, 3, 1)[None], t.empty()[None], torch.empty_like(x), torch.empty(2, t.count)
    torch.ops.fastft.cross_entropy_forward(loss, stats, None, None, x, target, None, -100, 0.0, 0)
    torch.ops.fastft.cross_entropy_backward(dx, None, t()[None], stats, None, x, target, None, -100, 0.0, 0)
    return loss[0], *dx[0], *stats


def linear_act_of_many_outputs(t):
    x, w, b = t(8), t.parameter(776, 8), t.parameter(776)
    y, z, dx = t.empty(776), t.empty(776), t.empty(8)
    torch.ops.fastft.linear_act_forward(y, z, x, w, b, GELU)
    torch.ops.fastft.linear_act_backward(dx, None, None, t(776), z, x, w, GELU)
    return y, z, dx


def linear_act_of_many_inputs(t):
    """Which were an activation's, whose gradient comes with the product."""
    x, w, dy, add, again = t(776), t.parameter(16, 776), t(16), t(776), t.empty(776)
    y, dx = t.empty(16), t.empty(776)
    torch.ops.fastft.linear_act_forward(y, None, x, w, None, 0)
    through = x, again, GELU
    torch.ops.fastft.linear_act_backward(dx, None, None, dy, None, x, w, 0, add, None, None, None, None, *through)
    return y, dx, again


def head(t):
    x, w, b, target = t(H), t.parameter(5, H), t.parameter(5), t.indices(4, 0, 2)
    loss, logits, dx = torch.empty((), dtype=t.dtype), t.empty(5), t.empty(H)
    stats, divisor = torch.empty(2, t.count), torch.ones(())
    torch.ops.fastft.head_forward(loss, logits, stats, divisor, None, None, x, w, b, target, -100, None, 0, 0)
    gradient = None, t(5), logits, stats, divisor
    torch.ops.fastft.head_backward(dx, None, None, None, *gradient, x, w, target, -100, None, 0, 0)
    return logits, *stats, dx


def packing(t):
    """Of rows that are copied two bytes at a time."""
    packed, starts = t(H + 1), torch.tensor([0, t.count], dtype=torch.int32)
    padded, again = torch.empty(1, t.count + 2, H + 1, dtype=t.dtype), t.empty(H + 1)
    torch.ops.fastft.unpack_rows(padded, packed, starts)
    torch.ops.fastft.pack_rows(again, padded, None, starts)
    return padded[0], again


def optimizer(t):
    p, g, m, v = t(), t(), t(), t()
    v[-ZEROS:].abs_()
    torch.ops.fastft.adamw([p], [g], [m], [v], [torch.tensor(3.0)], None, 1e-3, 0.9, 0.99, 1e-8, 0.01, False)
    torch.ops.fastft.scale_grads([g], p.new_full((), 0.75))
    return p, m, v, g


CASES = {  # elements of a row in the largest tensor, blocks of the largest grid that have the last rows
    layer_norm: (H, 2),
    embedding: (H, 12),
    cross_entropy_of_a_thread: (7, 2),
    cross_entropy_of_a_warp: (1000, 2),
    cross_entropy_of_a_block: (4001, 3),
    cross_entropy_of_places: (3, 2),
    linear_act_of_many_outputs: (776, 26),
    linear_act_of_many_inputs: (776, 26),
    head: (H, 15),
    packing: (H, 2),
    optimizer: (1, 2),
}


@contextlib.contextmanager
def last_blocks(count):
    simt.kernels().set_last_blocks(count)
    try:
        yield
    finally:
        simt.kernels().set_last_blocks(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_last_of_more_than_two_to_the_31_elements_are_computed_as_if_alone(case, dtype):
    row, blocks = CASES[case]
    with simt.cuda_on_cpu(order=0):
        near = case(Rows(LAST, dtype))
        with last_blocks(blocks):
            far = case(Rows(FAR // row + 2, dtype))
    for number, (found, expected) in enumerate(zip(far, near, strict=True)):
        assert torch.equal(found[-LAST:], expected[-LAST:]), number
