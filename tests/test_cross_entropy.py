"""cross_entropy where the spec's cases cannot say it: errors, extreme logits, ignored rows, fall-backs, autocast."""

import itertools
import math
import random
import re

import pytest
import torch

from fastft import _library
from fastft.functional import _choice, cross_entropy, linear_cross_entropy
from fastft.functional.cross_entropy import reference
from fastft.nn import CrossEntropyLoss
from fastft.testing import error
from fastft.testing.error import Budget
from fastft.testing.spec import KernelCalls, TensorMaker

INF, NAN = math.inf, math.nan

needs_library = pytest.mark.skipif(not _library.available(), reason=f"no native library: {_library.why_not()}")


@pytest.fixture
def ours():
    if not _library.available():
        pytest.skip(f"no native library: {_library.why_not()}")
    with _choice.use_backend("fastft"):
        yield


def loss_and_gradient(function, input, *args, **kwargs):
    input = input.detach().requires_grad_()
    loss = function(input, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss.sum(), input)[0]


def logits(*shape, dtype=torch.float32, seed=0):
    return TensorMaker(dtype, seed=seed)(*shape)


# ---- values

SHAPES = ((6,), (9, 3), (5, 31), (2, 129), (3, 260), (0, 4), (2, 5, 3), (2, 33, 20), (3, 3, 2, 4), (2, 7, 0))
OPTIONS = [
    dict(zip(("probabilities", "weighted", "reduction", "smoothing", "ignore"), values, strict=True))
    for values in itertools.product(
        (False, True), (False, True), ("mean", "sum", "none"), (0.0, 0.25, 1.0), (None, -100, 0, 10**12)
    )
    if not (values[0] and values[-1] in (0, 10**12))  # probabilities have no class to ignore
]


def arguments(shape, dtype, seed, probabilities, weighted, reduction, smoothing, ignore):
    t = TensorMaker(dtype, seed=seed)
    classes = shape[min(1, len(shape) - 1)]
    named = {"input": t(*shape), "reduction": reduction, "label_smoothing": smoothing}
    if probabilities:
        named["target"] = t(*shape).softmax(min(1, len(shape) - 1))
    else:
        named["target"] = t.indices(classes, *shape[:1], *shape[2:]) if len(shape) > 1 else t.indices(classes)
        if ignore is not None and named["target"].numel() > 1:
            named["target"].view(-1)[:: 1 + seed % 3] = ignore
    if weighted:
        named["weight"] = t(classes).abs()
    return named if ignore is None else {**named, "ignore_index": ignore}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_every_combination_of_options_is_within_the_budget(dtype, ours, each_isa):
    budget, shapes = Budget(dtype == torch.float64), random.Random(f"{dtype} {each_isa}")  # other shapes each time
    for seed, options in enumerate(OPTIONS):
        shape = shapes.choice(SHAPES)
        named = arguments(shape, dtype, seed, **options)
        wanted = ("input", "target") if options["probabilities"] else ("input",)
        yardstick = torch.float32 if dtype == torch.float64 else dtype
        case = ", ".join(f"{name} {value}" for name, value in {"shape": shape, **options}.items())
        budget.add(
            error.run(cross_entropy, named, wanted, TensorMaker(torch.bfloat16, seed=seed)),
            error.run(reference, error.cast(named, yardstick), wanted, TensorMaker(torch.bfloat16, seed=seed)),
            error.run(reference, error.cast(named, torch.float64), wanted, TensorMaker(torch.bfloat16, seed=seed)),
            case=case,
            seed=seed,
        )
    budget.check()


@pytest.mark.parametrize(
    ("classes", "options"),
    [
        (3, {}),
        (3, {"label_smoothing": 0.1}),
        (200, {}),
        (200, {"label_smoothing": 0.1}),
        (20011, {}),
    ],  # a whole vocabulary
    ids=str,
)
def test_infinite_nan_and_huge_logits_give_what_pytorch_gives(classes, options, ours, each_isa):
    rows = [[INF], [-INF], [NAN], [INF, -INF], [-INF, -INF], [1e35, -1e35], [-1e35, 1e35], [-1e35, -1e35], [1e35, -INF]]
    input = logits(len(rows) + 2, classes)
    for row, values in enumerate(rows):
        input[row, : len(values)] = torch.tensor(values)
    input[-1], input[-2] = -INF, torch.finfo(torch.float32).min
    for label in (0, 1, classes - 1):
        target = torch.full((len(input),), label)
        found = loss_and_gradient(cross_entropy, input, target, reduction="none", **options)
        expected = loss_and_gradient(reference, input, target, reduction="none", **options)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf() * a.sign(), b.isinf() * b.sign()), (a, b)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_gradient_that_is_written_past_the_caches_has_the_bits_of_one_that_is_not(dtype, ours, each_isa):
    classes = 30522
    rows = (20 << 20) // (classes * dtype.itemsize)  # 20 MB; halves are too small for it
    input, target = logits(rows, classes, dtype=dtype), torch.arange(rows) * 7 % classes
    _, whole = loss_and_gradient(cross_entropy, input, target, reduction="sum")
    halves = zip(input.chunk(2), target.chunk(2), strict=True)
    assert torch.equal(
        whole, torch.cat([loss_and_gradient(cross_entropy, *half, reduction="sum")[1] for half in halves])
    )


@pytest.mark.parametrize("classes", (2, 6, 300))
@pytest.mark.parametrize("ignored", (0, 1, -100))
@pytest.mark.parametrize("options", ({}, {"weight": True}, {"label_smoothing": 0.2}), ids=str)
def test_ignored_rows_get_zero_gradient(classes, ignored, options, ours, each_isa):
    input, target = logits(23, classes), torch.arange(23) % classes
    target[::4] = ignored
    input[0, 1], input[4] = NAN, -INF
    if "weight" in options:
        options = {"weight": torch.linspace(0.5, 2, classes)}
    skip = target == ignored
    loss, grad = loss_and_gradient(cross_entropy, input, target, ignore_index=ignored, **options)
    assert loss.isfinite() and (grad[skip] == 0).all()
    assert grad[~skip].isfinite().all() and (grad[~skip] != 0).any(1).all()
    none, _ = loss_and_gradient(cross_entropy, input, target, ignore_index=ignored, reduction="none", **options)
    assert (none[skip] == 0).all() and (none[~skip] > 0).all()


@pytest.mark.parametrize("classes", (3, 300))
@pytest.mark.parametrize("options", ({}, {"label_smoothing": 0.2}), ids=str)
def test_nothing_but_ignored_rows(classes, options, ours):
    target = torch.full((5,), -100)
    loss, grad = loss_and_gradient(cross_entropy, logits(5, classes), target, **options)
    assert loss.isnan() and (grad == 0).all()
    loss, grad = loss_and_gradient(cross_entropy, logits(5, classes), target, reduction="sum", **options)
    assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize("shape", ((0, 4), (0, 4, 3), (2, 4, 0)))
@pytest.mark.parametrize("probabilities", (False, True))
def test_mean_of_an_empty_batch_is_nan_and_its_sum_zero(shape, probabilities, ours):
    input = logits(*shape)
    target = input.clone() if probabilities else torch.ones(*shape[:1], *shape[2:], dtype=torch.int64)
    loss, grad = loss_and_gradient(cross_entropy, input, target)
    assert loss.isnan() and grad.shape == shape
    assert loss_and_gradient(cross_entropy, input, target, reduction="sum")[0] == 0


def test_rows_whose_weights_are_all_zero_have_no_mean(ours):
    target = torch.tensor([1, 2, -100])
    found = loss_and_gradient(cross_entropy, logits(3, 4), target, torch.tensor([1.0, 0, 0, 1]))
    expected = loss_and_gradient(reference, logits(3, 4), target, torch.tensor([1.0, 0, 0, 1]))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("offset", (0.0, 1e4, -1e4))
def test_a_row_is_judged_by_differences_of_its_logits(offset, ours, each_isa):
    input, target = torch.arange(600.0).remainder(7).view(4, 150), torch.tensor([0, 3, 77, 149])
    found = loss_and_gradient(cross_entropy, input + offset, target, reduction="none")
    expected = loss_and_gradient(cross_entropy, input, target, reduction="none")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_uint8_targets_are_class_indices(ours):
    input, target = logits(4, 256), torch.tensor([0, 255, 7, 9], dtype=torch.uint8)
    assert torch.equal(cross_entropy(input, target), cross_entropy(input, target.long()))
    assert torch.equal(
        cross_entropy(input, target, ignore_index=255), cross_entropy(input, target.long(), ignore_index=255)
    )


def test_a_target_of_one_element_for_a_single_row_gives_a_scalar(ours):
    assert cross_entropy(logits(5), torch.tensor([3]), reduction="none").shape == ()


def test_mixed_dtypes_of_probabilities_promote(ours):
    t = TensorMaker(torch.float64)
    input, target, weight = t(5, 300), t(5, 300).softmax(1), t(300).abs()
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    for a, b, c in itertools.product(dtypes, dtypes, dtypes):
        leaves = [input.to(a).requires_grad_(), target.to(b).requires_grad_()]
        loss = cross_entropy(*leaves, weight.to(c))
        grads = torch.autograd.grad(loss, leaves)
        assert loss.dtype == reference(*leaves, weight.to(c)).dtype and [g.dtype for g in grads] == [a, b]
        budget = 0.02 if a == torch.bfloat16 else 0.005
        assert abs(loss.item() - reference(input, target, weight).item()) < budget


# ---- errors

ones = torch.ones
BAD_CALLS = [
    ((ones(4, 5), ones(3).long()), {}, "target is (3,), input (4, 5) needs (4,) or, for probabilities, (4, 5)"),
    ((ones(4, 5), torch.tensor(1)), {}, "target is (), input (4, 5) needs (4,)"),
    ((ones(4, 5), ones(4, 1).long()), {}, "target is (4, 1), input (4, 5) needs (4,)"),
    ((ones(5), ones(2).long()), {}, "target is (2,), input (5,) needs ()"),
    ((ones(2, 5, 3), ones(2, 4).long()), {}, "target is (2, 4), input (2, 5, 3) needs (2, 3)"),
    ((ones(2, 5, 3), ones(3, 3).long()), {}, "target is (3, 3), input (2, 5, 3) needs (2, 3)"),
    ((ones(()), torch.tensor(0)), {}, "input is (), needs (C,), (N, C) or (N, C, d1, …)"),
    ((ones(4, 5), ones(4).int()), {}, "target is torch.int32, class indices must be torch.int64 or torch.uint8"),
    ((ones(4, 5), ones(4)), {}, "target is torch.float32, class indices must be"),
    ((ones(4, 5), ones(4, 5).long()), {}, "target is torch.int64, must be floating-point where it has"),
    ((ones(4, 5).long(), ones(4).long()), {}, "input is torch.int64, must be a floating-point tensor"),
    ((ones(4, 5), ones(4).long(), ones(4)), {}, "weight is (4,), input (4, 5) needs (5,)"),
    ((ones(4, 5), ones(4, 5), ones(1, 5)), {}, "weight is (1, 5), input (4, 5) needs (5,)"),
    ((ones(4, 5), ones(4).long(), ones(5).double()), {}, "weight is torch.float64, input torch.float32"),
    ((ones(4, 5), ones(4).long(), ones(5, device="meta")), {}, "weight is on meta, input on cpu"),
    ((ones(4, 5), ones(4, device="meta").long()), {}, "target is on meta, input on cpu"),
    ((ones(4, 5), ones(4, 5)), {"ignore_index": 2}, "ignore_index is 2, probabilities have no class to ignore"),
    ((ones(4, 5), ones(4).long()), {"label_smoothing": 1.5}, "label_smoothing is 1.5, must be in [0, 1]"),
    ((ones(4, 5), ones(4).long()), {"reduction": "avg"}, "reduction is 'avg', must be one of none, mean, sum"),
    (([1.0], ones(4).long()), {}, "input must be a tensor, got list"),
    ((None, ones(4).long()), {}, "input must be a tensor, got NoneType"),
    ((ones(4, 5), 3), {}, "target must be a tensor, got int"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), BAD_CALLS, ids=[message[:40] for _, _, message in BAD_CALLS])
def test_errors_have_pytorchs_type_and_name_argument_and_value(args, kwargs, message):
    with pytest.raises(Exception) as torchs:
        reference(*args, **kwargs)
    with pytest.raises(torchs.type, match=re.escape(f"cross_entropy: {message}")) as error:
        cross_entropy(*args, **kwargs)
    assert error.type is torchs.type


@pytest.mark.parametrize("backend", ("fastft", "auto", "torch"))
@pytest.mark.parametrize(
    ("target", "shape", "options", "message"),
    [
        (torch.tensor([0, 1, 5, 7]), (4, 5), {}, "target[2] is 5, must be in [0, 5) or ignore_index -100"),
        (
            torch.tensor([0, 1, -1, 2]),
            (4, 5),
            {"ignore_index": 5},
            "target[2] is -1, must be in [0, 5) or ignore_index 5",
        ),
        (torch.tensor([[1, 2, 0], [0, 300, 4]]), (2, 300, 3), {}, "target[1, 1] is 300, must be in [0, 300)"),
        (torch.tensor([2**40, 0]), (2, 300), {"label_smoothing": 0.1}, f"target[0] is {2**40}, must be in [0, 300)"),
        (torch.tensor([1, 200], dtype=torch.uint8), (2, 5), {}, "target[1] is 200, must be in [0, 5)"),
        (torch.tensor(-7), (5,), {}, "target is -7, must be in [0, 5)"),
    ],
)
def test_a_class_out_of_range_is_named_with_its_place(backend, target, shape, options, message):
    if backend == "fastft" and not _library.available():
        pytest.skip(f"no native library: {_library.why_not()}")
    with _choice.use_backend(backend), pytest.raises(IndexError, match=re.escape(f"cross_entropy: {message}")):
        cross_entropy(logits(*shape), target, **options)


@pytest.mark.parametrize("backend", ("torch", "auto", "fastft"))
def test_behind_a_linear_layer_too(backend):
    if backend == "fastft" and not _library.available():
        pytest.skip(f"no native library: {_library.why_not()}")
    wrong = pytest.raises(IndexError, match=r"cross_entropy: target\[1\] is 7, must be in \[0, 5\)")
    with _choice.use_backend(backend), wrong:
        linear_cross_entropy(logits(2, 3), logits(5, 3), torch.tensor([4, 7]))


def test_the_first_wrong_target_of_many_is_named_whatever_the_threads(ours, each_isa):
    target = torch.zeros(3000, dtype=torch.int64)
    target[[1234, 1235, 2999]] = torch.tensor([64, -5, 99])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with pytest.raises(IndexError, match=re.escape("target[1234] is 64")):
                cross_entropy(logits(3000, 64), target)
    finally:
        torch.set_num_threads(before)


@needs_library
def test_the_raw_op_refuses_what_would_touch_foreign_memory():
    op = torch.ops.fastft.cross_entropy_forward
    loss, input, target = torch.empty(()), torch.ones(4, 5), torch.zeros(4, dtype=torch.int64)
    op(loss, None, None, None, input, target, None, -100, 0.0, 1)
    for args, what in (
        ((loss, None, None, None, input, target[:3], None), "target"),
        ((loss, None, None, None, input, target, torch.ones(4)), "weight"),
        ((loss, torch.empty(1, 4), None, None, input, target, None), "stats"),
        ((loss, None, None, None, input.mT, target, None), "input"),
        ((loss, None, None, None, torch.ones(4, 0), target, None), "input"),
    ):
        with pytest.raises(RuntimeError, match=f"tensor '{what}'"):
            op(*args, -100, 0.0, 1)
    with pytest.raises(RuntimeError, match="tensor 'loss' has the wrong size"):
        op(loss, None, None, None, input, target, None, -100, 0.0, 0)


# ---- which kernel runs


@needs_library
def test_small_inputs_are_pytorchs_and_large_ones_ours():
    input, target = logits(32, 2), torch.zeros(32).long()
    with KernelCalls() as kernels:
        assert torch.equal(cross_entropy(input, target), reference(input, target))
    assert not kernels.calls
    with KernelCalls() as kernels:
        cross_entropy(logits(4096, 20), torch.zeros(4096).long())
    assert kernels.names == ["cross_entropy_forward"]


def test_a_gradient_of_the_weights_is_pytorchs():
    weight = torch.ones(5, requires_grad=True)
    input, probabilities = logits(9000, 5), logits(9000, 5).softmax(1)
    found, expected = (
        torch.autograd.grad(loss(input, probabilities, weight), weight)[0] for loss in (cross_entropy, reference)
    )
    assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
        cross_entropy(input, torch.zeros(9000).long(), weight)


def test_the_gradient_of_the_weights_is_no_fall_back_without_autograd(ours):
    weight = torch.ones(5, requires_grad=True)
    with pytest.raises(RuntimeError, match="would run on PyTorch: the gradient of weight is PyTorch's"):
        cross_entropy(logits(3, 5), torch.zeros(3).long(), weight)
    with torch.no_grad():
        cross_entropy(logits(3, 5), torch.zeros(3).long(), weight)


def test_no_classes_are_pytorchs():
    assert cross_entropy(torch.ones(2, 0), torch.full((2,), -100)).isnan()
    with pytest.raises(IndexError, match=re.escape("target[0] is 1, must be in [0, 0)")):
        cross_entropy(torch.ones(2, 0), torch.ones(2).long())


def test_autocast_reads_bfloat16_logits_and_gives_a_float32_loss(ours):
    input = logits(40, 300, dtype=torch.bfloat16).requires_grad_()
    with KernelCalls(keep_arguments=True) as kernels, torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(input, torch.arange(40), torch.ones(300, dtype=torch.bfloat16))
    loss.backward()
    assert loss.dtype == torch.float32 and input.grad.dtype == torch.bfloat16
    ((_, args, _),) = kernels.calls
    assert args[4].dtype == torch.bfloat16


def test_functorch_gives_pytorchs_answer():
    input, target = logits(6, 5, 4, dtype=torch.float64), TensorMaker(torch.float32).indices(4, 6, 5)
    per_sample = torch.func.vmap(torch.func.grad(lambda x, t: cross_entropy(x, t)))(input, target)
    expected = torch.stack([loss_and_gradient(reference, x, t)[1] for x, t in zip(input, target, strict=True)])
    torch.testing.assert_close(per_sample, expected)


def test_a_second_derivative_when_the_upstream_gradient_needs_none(ours):
    def penalty(loss):
        input = logits(4, 300, dtype=torch.float64).requires_grad_()
        (grad,) = torch.autograd.grad(loss(input, torch.arange(4)), input, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), input)[0]

    torch.testing.assert_close(penalty(cross_entropy), penalty(reference))


def test_a_target_changed_between_forward_and_backward_is_an_error(ours):
    input, target = logits(3, 5).requires_grad_(), torch.tensor([0, 1, 2])
    loss = cross_entropy(input, target)
    target[0] = 4
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_classes_that_lie_last_in_memory_are_not_copied(ours):
    input = logits(3, 20, 9).mT.requires_grad_()
    with KernelCalls(keep_arguments=True) as kernels:
        grad = torch.autograd.grad(cross_entropy(input, torch.ones(3, 20).long()), input)[0]
    assert kernels.calls[0][1][4].shape == (60, 9)
    assert grad.stride() == input.stride()


# ---- module


def test_the_module_is_pytorchs_with_our_function(ours):
    weight = torch.tensor([1.0, 2.0, 0.5])
    ours = CrossEntropyLoss(weight, ignore_index=1, reduction="sum", label_smoothing=0.1)
    torchs = torch.nn.CrossEntropyLoss(weight, ignore_index=1, reduction="sum", label_smoothing=0.1)
    assert isinstance(ours, torch.nn.CrossEntropyLoss) and repr(ours) == repr(torchs)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    input, target = logits(8, 3), torch.arange(8) % 3
    with KernelCalls() as kernels:
        torch.testing.assert_close(ours(input, target), torchs(input, target))
    assert kernels.names == ["cross_entropy_forward"]
    assert CrossEntropyLoss(reduction="none")(input, target).shape == (8,)
