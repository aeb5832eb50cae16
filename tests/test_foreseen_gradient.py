"""cross_entropy's gradient, made in the forward for what the loss's was before: the same bits, or it is made again."""

import gc
import itertools
import re
import sys
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastft import _library
from fastft.functional import _choice, cross_entropy
from fastft.functional.cross_entropy import reference
from fastft.testing.spec import KernelCalls, TensorMaker

pytestmark = pytest.mark.skipif(not _library.available(), reason=f"no native library: {_library.why_not()}")

MODULE = sys.modules["fastft.functional.cross_entropy"]
BOTH, AGAIN = ["cross_entropy_with_grad"], ["cross_entropy_forward", "cross_entropy_backward"]
ROWS, CLASSES = 37, 1100


@pytest.fixture(autouse=True)
def ours(monkeypatch):
    """Our kernels, whose first gradient is foreseen to be 1, for fewer logits than pay."""
    monkeypatch.setattr(MODULE, "_FORESEEN_LOGITS", 1)
    monkeypatch.setattr(MODULE, "_seen", (1.0, 1.0))
    with _choice.use_backend("fastft"):
        yield


def case(dtype=torch.float32, rows=ROWS, classes=CLASSES):
    t = TensorMaker(dtype)
    target = t.indices(classes, rows)
    target[::3] = -100
    return t(rows, classes, scale=3).requires_grad_(), target


def step(input, target, grad=1.0, **options):
    """The loss, the gradient of input, and which kernels ran."""
    with KernelCalls() as kernels:
        loss = cross_entropy(input, target, **options)
        (found,) = torch.autograd.grad(loss, input, torch.tensor(grad, dtype=loss.dtype))
    return loss.detach(), found, kernels.names


@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_it_has_the_bits_of_one_that_is_made_afterwards(dtype, weighted, reduction, autocast, each_isa, monkeypatch):
    for rows, classes in ((ROWS, CLASSES), (1, 5003), (3, 65537)):  # the last one's task is one row
        input, target = case(dtype, rows, classes)
        target[-1] = classes - 1
        weight = None
        if weighted:
            weight = TensorMaker(torch.float32 if autocast and dtype != torch.float64 else dtype, seed=1)(classes).abs()
        for grad in (1.0, 0.375):
            monkeypatch.setattr(MODULE, "_seen", (grad, grad))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                *found, names = step(input, target, grad, weight=weight, reduction=reduction)
                monkeypatch.setattr(MODULE, "_seen", (grad, None))
                *expected, others = step(input, target, grad, weight=weight, reduction=reduction)
            assert names == BOTH and others == AGAIN
            assert all(map(torch.equal, found, expected))


def test_logits_that_do_not_fit_a_cache_in_bits_too(each_isa, monkeypatch):
    input, target = case(rows=300, classes=20011)  # 24 MB, streamed; runs of several rows
    found, again = step(input, target), []
    monkeypatch.setattr(MODULE, "_seen", (1.0, None))
    again = step(input, target)
    assert found[2] == BOTH and again[2] == AGAIN
    assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])


def test_the_bits_are_the_same_for_every_number_of_threads():
    input, target = case(rows=300)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(step(input, target)[:2])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for one, other in itertools.pairwise(found) for a, b in zip(one, other, strict=True))


def test_what_was_seen_twice_is_foreseen_and_everything_else_is_made_again():
    input, target = case()
    miss = BOTH + AGAIN[1:]  # foreseen, but it came otherwise
    # after 1, 1
    for grad, names in ((1.0, BOTH), (0.5, miss), (0.5, AGAIN), (0.5, BOTH), (2.0, miss), (0.5, AGAIN), (2.0, AGAIN)):
        _, found, ran = step(input, target, grad)
        expected = torch.autograd.grad(reference(input, target), input, torch.tensor(grad))[0]
        torch.testing.assert_close(found, expected)
        assert ran == names, grad


def test_a_gradient_that_is_not_a_number_is_never_foreseen():
    input, target = case()
    for _ in range(3):
        assert step(input, target, float("nan"))[1].isnan().any()
    assert step(input, target, 1.0)[2] == AGAIN


def test_the_graph_gives_it_away_once():
    input, target = case()
    loss = cross_entropy(input, target)
    loss.backward(retain_graph=True)
    once, place = input.grad.clone(), input.grad.data_ptr()
    loss.backward(retain_graph=True)
    assert torch.equal(input.grad, 2 * once) and input.grad.data_ptr() == place
    input.grad = None
    loss.backward()
    assert torch.equal(input.grad, once)


def test_it_is_freed_with_the_graph():
    input, target = case()
    loss = cross_entropy(input, target)
    kept = weakref.ref(loss.grad_fn.foreseen[1])
    del loss
    gc.collect()
    assert kept() is None


def test_a_second_derivative():
    input, target = case(torch.float64)
    (grad,) = torch.autograd.grad(cross_entropy(input, target), input, create_graph=True)
    found = torch.autograd.grad(grad.square().sum(), input)[0]
    (grad,) = torch.autograd.grad(reference(input, target), input, create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(grad.square().sum(), input)[0])


def test_who_saves_memory_gets_none_of_it_filled():
    input, target = case()
    with KernelCalls() as kernels, torch.autograd.graph.save_on_cpu():
        cross_entropy(input, target).backward()
    assert kernels.names == AGAIN
    with KernelCalls() as kernels:
        checkpoint(cross_entropy, input, target, use_reentrant=False).backward()
    assert "cross_entropy_with_grad" not in kernels.names


@pytest.mark.parametrize("options", ({"label_smoothing": 0.1}, {"reduction": "none"}), ids=str)
def test_where_it_is_not_made(options):
    input, target = case()
    with KernelCalls() as kernels:
        cross_entropy(input, target, **options).sum().backward()
        cross_entropy(input, input.detach().softmax(1)).backward()
        with torch.no_grad():
            cross_entropy(input, target)
    assert kernels.names == [*AGAIN, *AGAIN, AGAIN[0]]


def test_a_wrong_target_is_named():
    input, target = case()
    target[20] = CLASSES
    with pytest.raises(IndexError, match=re.escape(f"target[20] is {CLASSES}, must be in [0, {CLASSES})")):
        cross_entropy(input, target)


def test_nothing_but_ignored_rows():
    input, target = case()
    target[:] = -100
    loss, grad, names = step(input, target, reduction="sum")
    assert names == BOTH and loss == 0 and not grad.any()
    loss, grad, names = step(input, target)
    assert names == BOTH and loss.isnan() and not grad.any()


def test_the_raw_op_refuses_what_would_touch_foreign_memory():
    op = torch.ops.fastft.cross_entropy_with_grad
    input, target = torch.ones(4, 5), torch.zeros(4, dtype=torch.int64)
    loss, stats, divisor, grad = torch.empty(()), torch.empty(2, 4), torch.empty(()), torch.empty(4, 5)
    right = {"loss": loss, "stats": stats, "divisor": divisor, "grad_input": grad}
    right |= {"grad_output": 1.0, "input": input, "target": target, "weight": None}
    op(**right, ignore_index=-100, reduction=1)
    for name, wrong in (
        ("loss", torch.empty(4)),
        ("stats", torch.empty(3, 4)),
        ("divisor", torch.empty(2)),
        ("grad_input", torch.empty(4, 4)),
        ("input", torch.ones(4, 5, 2)),
        ("target", target[:3]),
        ("weight", torch.ones(4)),
    ):
        with pytest.raises(RuntimeError, match=f"tensor '{name}'"):
            op(**{**right, name: wrong}, ignore_index=-100, reduction=1)
    with pytest.raises(RuntimeError, match="tensor 'loss'"):
        op(**right, ignore_index=-100, reduction=0)
