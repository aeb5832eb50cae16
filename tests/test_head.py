"""A classifier's head where the spec's cases cannot say it: dropout, the loss alone, what falls back, what is wrong."""

import numpy
import philox
import pytest
import torch

from fastft import _library
from fastft.functional import _choice
from fastft.functional.head import _slower, composition, head, reference, run
from fastft.testing import error
from fastft.testing.spec import KernelCalls, TensorMaker

pytestmark = pytest.mark.skipif(not _library.available(), reason=f"no native library: {_library.why_not()}")

SEED = torch.tensor([-1234567890123456789])
OURS = ["head_forward", "head_backward"]


@pytest.fixture
def ours():
    with _choice.use_backend("fastft"):
        yield


def tensors(B=12, C=5, H=40, dtype=torch.float32, seed=0):
    t = TensorMaker(dtype, seed=seed)
    return {"input": t(B, H), "weight": t(C, H, scale=H**-0.5), "bias": t(C)}, t.indices(C, B)


def gradients(function, named, target, *options):
    """Loss, logits, and gradients of what the leaves give to a use of both."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in named.items()}
    loss, logits = function(*leaves.values(), target, *options)
    total = 3 * loss + (logits * logits.detach()).sum()
    return loss, logits, *torch.autograd.grad(total, list(leaves.values()))


# ---- dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(40, 3, 384), (17, 20, 31), (9, 6, 129)], ids=str)
def test_the_kernel_drops_what_the_rule_says_in_both_directions(each_isa, ours, dtype, sizes):
    B, C, H = sizes
    factors = torch.from_numpy(philox.factors(int(SEED), 2, 20000, B, H))

    def joined(loss, logits):
        return torch.cat([loss.reshape(1), logits.reshape(-1)])

    def evaluate(seed):
        named, target = tensors(B, C, H, dtype, seed)
        target[::4] = -100

        def kernel(input, weight, bias):
            return joined(*run(input, weight, bias, target, -100, (SEED, 20000, 2)))

        def stock(input, weight, bias):
            return joined(*reference(input * factors.to(input.dtype), weight, bias, target))

        yardstick = error.cast(named, torch.float32 if dtype == torch.float64 else dtype)
        double = error.cast(named, torch.float64)

        def grad(*sizes):
            return TensorMaker(dtype, seed=seed + 10**6)(*sizes)

        return tuple(error.run(f, x, named, grad) for f, x in ((kernel, named), (stock, yardstick), (stock, double)))

    error.check(evaluate, double=dtype == torch.float64)


def test_the_composition_drops_what_the_kernel_drops(ours):
    named, target = tensors(dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in named.values()]
    for ours_, theirs in zip(
        run(*leaves, target, -100, (SEED, 20000, 1)), composition(*leaves, target, -100, (SEED, 20000, 1)), strict=True
    ):
        torch.testing.assert_close(ours_, theirs)
    assert torch.autograd.gradgradcheck(lambda *x: run(*x, target, -100, (SEED, 20000, 1)), leaves)


def test_the_generator_s_seed_repeats_the_mask_and_every_call_has_its_own(ours):
    named, target = tensors()

    def logits():
        return head(*named.values(), target, 0.5)[1]

    torch.manual_seed(3)
    first, second = logits(), logits()
    torch.manual_seed(3)
    assert torch.equal(first, logits()) and torch.equal(second, logits())
    assert not torch.equal(first, second)
    assert torch.equal(head(*named.values(), target, 0.5, False)[1], head(*named.values(), target)[1])
    assert torch.equal(head(*named.values(), target, 1.0)[1], named["bias"].expand(12, 5))


# ---- loss and logits, together and alone


def test_the_loss_alone_is_within_the_budget(each_isa, ours):
    def evaluate(seed):
        named, target = tensors(37, 11, 101, seed=seed)
        ways = (head, torch.float32), (reference, torch.float32), (reference, torch.float64)
        return tuple(
            error.run(
                lambda f=f, **x: f(**x, target=target)[0], error.cast(named, dtype), named, lambda: torch.ones(())
            )
            for f, dtype in ways
        )

    error.check(evaluate)


@pytest.mark.parametrize("which", ["loss", "logits"])
def test_a_gradient_of_one_output_is_that_of_both_with_a_zero(which, ours):
    named, target = tensors()
    leaves = [tensor.requires_grad_() for tensor in named.values()]
    loss, logits = head(*leaves, target)
    grads = [torch.ones_like(loss), torch.zeros_like(logits)]
    alone = loss
    if which == "logits":
        grads, alone = [torch.zeros_like(loss), torch.ones_like(logits)], logits
    expected = torch.autograd.grad([loss, logits], leaves, grads, retain_graph=True)
    found = torch.autograd.grad(alone, leaves, torch.ones_like(alone))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_rows_of_nothing_but_ignored_targets_give_nan_as_pytorch_does(ours):
    named, _ = tensors()
    target = torch.full((12,), -100)
    loss, logits = head(*named.values(), target)
    assert loss.isnan() and torch.equal(logits, head(*named.values(), torch.zeros(12, dtype=torch.int64))[1])


def test_a_missing_value_reaches_the_loss_and_its_own_row_only(ours):
    named, target = tensors()
    named["input"][3, 7] = numpy.nan
    loss, logits = head(*named.values(), target)
    assert loss.isnan() and logits[3].isnan().all() and logits.isnan().sum() == 5


def test_autocast_gives_a_float32_loss_and_logits_in_its_dtype(ours):
    named, target = tensors()
    for parameters in (torch.float32, torch.bfloat16):
        given = {name: tensor.to(parameters) if name != "input" else tensor for name, tensor in named.items()}
        with torch.autocast("cpu", torch.bfloat16), KernelCalls() as kernels:
            loss, logits, *grads = gradients(head, given, target)
        assert (loss.dtype, logits.dtype) == (torch.float32, torch.bfloat16) and kernels.names[0] == OURS[0]
        assert [grad.dtype for grad in grads] == [tensor.dtype for tensor in given.values()]


# ---- what runs elsewhere, and what is wrong


def test_the_same_numbers_come_from_the_ops_one_by_one():
    named, target = tensors(C=1025)
    for given, labels in ((named, target), tensors(0), ({**named, "input": torch.randn(0, 40)}, target[:0])):
        with _choice.use_backend("fastft"), KernelCalls() as kernels:
            found = gradients(head, given, labels)
        assert "head_forward" not in kernels.names and "linear_act_forward" in kernels.names
        for ours, theirs in zip(found, gradients(reference, given, labels), strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_small_calls_are_pytorch_s_unless_there_is_more_to_save():
    assert _slower(True, 32, 2, 768, torch.float32, True, False)
    assert not _slower(True, 32, 2, 768, torch.float32, True, True)
    assert not _slower(True, 32, 2, 768, torch.bfloat16, True, False)
    assert _slower(True, 1, 2, 768, torch.bfloat16, True, False)
    assert _slower(True, 128, 2, 768, torch.float32, False, False)
    assert _slower(True, 4096, 1000, 768, torch.float64, True, True)
    assert not _slower(False, 32, 2, 768, torch.float64, True, False)
    named, target = tensors()
    with KernelCalls() as kernels:
        head(*named.values(), target)
    assert not kernels.names


@pytest.mark.parametrize("backend", ["auto", "fastft"])
@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"target": torch.tensor([0, 5] * 6)}, IndexError, r"cross_entropy: target\[1\] is 5, must be in \[0, 5\)"),
        ({"target": torch.zeros(11, dtype=torch.int64)}, ValueError, r"cross_entropy: target is \(11,\)"),
        ({"target": torch.zeros(12, dtype=torch.int32)}, RuntimeError, "cross_entropy: target is torch.int32"),
        ({"weight": torch.randn(5, 41)}, ValueError, r"linear_act: weight is \(5, 41\), input \(12, 40\)"),
        ({"bias": torch.randn(6)}, ValueError, r"linear_act: bias is \(6,\)"),
        ({"weight": torch.randn(5, 40).double()}, ValueError, "linear_act: weight is torch.float64"),
        ({"p": 1.5}, ValueError, "head: p is 1.5, must be between 0 and 1"),
    ],
)
def test_what_is_wrong_is_said(backend, changes, kind, message):
    named, target = tensors()
    with _choice.use_backend(backend), pytest.raises(kind, match=message):
        head(**{**named, "target": target, "training": "p" in changes, **changes})
