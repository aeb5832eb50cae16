"""The error budget itself: it passes what PyTorch would pass, and catches planted wrong results."""

import dataclasses
import re

import pytest
import torch
from torch.nn import functional

from fastft.testing import OpSpec, Sample
from fastft.testing.error import ENOUGH, Budget, BudgetExceeded, check, check_op, guard, ulps

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def samples(t):
    yield Sample("rows", t(60, 40), t(50, 40), t(50))
    yield Sample("scalars", t(2, 3), t(1, 3), t(1))
    yield Sample("empty", t(0, 3), t(1, 3), t(1))
    yield Sample("strided", t(24, 30).mT, t(16, 24), t(1).expand(16))


def reference(input, weight, bias):
    return functional.linear(input, weight, bias).tanh()


def exact(input, weight, bias):
    """As good as it gets: in float64, rounded once."""
    return reference(*(tensor.double() for tensor in (input, weight, bias))).to(input.dtype)


def spec(op):
    return OpSpec(
        op=lambda input, weight, bias: op(input, weight, bias),
        reference=reference,
        samples=samples,
        sizes=lambda input, weight, bias: (*input.shape, weight.shape[0]),
        flops=lambda M, K, N: 2 * M * K * N,
        bytes=lambda M, K, N, size: (M * K + K * N + M * N) * size,
        gradients={"input": lambda M, K, N: 0, "weight": lambda M, K, N: 0, "bias": lambda M, K, N: 0},
    )


def scaled_gradient(factor):
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * factor

    return Scale.apply


@each_dtype
@pytest.mark.parametrize("op", (reference, exact), ids=lambda op: op.__name__)
def test_pytorch_and_better_pass(op, dtype):
    check_op(spec(op), range(4), dtype)


def coarse(x):
    step = torch.finfo(x.dtype).eps ** 0.5
    return x + ((x.detach() / step).round() * step - x.detach())


# Errors of a few ulp, which a mean or a maximum alone might miss.
PLANTED = {
    "every result slightly too large": lambda i, w, b: exact(i, w, b) * (1 + 8 * torch.finfo(i.dtype).eps),
    "results with half the digits": lambda i, w, b: coarse(exact(i, w, b)),
    "a weight gradient that is too large": lambda i, w, b: exact(i, scaled_gradient(1.1)(w), b),
    "a bias gradient that misses rows": lambda i, w, b: exact(i, w, scaled_gradient(0.9)(b)),
    "one wrong row": lambda i, w, b: torch.cat([exact(i, w, b)[:-1], exact(i, w, b)[-1:] * 1.5]),
    "a column of NaN": lambda i, w, b: exact(i, w, b).index_fill(1, torch.tensor([0]), torch.nan),
    "infinity": lambda i, w, b: exact(i, w, b) / 0,
    "another shape": lambda i, w, b: exact(i, w, b).mT,
    "another dtype": lambda i, w, b: exact(i, w, b).half(),
    "inputs taken for dense": lambda i, w, b: exact(i, w, b.as_strided(b.shape, (1,))),
}


@each_dtype
@pytest.mark.parametrize("op", PLANTED.values(), ids=PLANTED)
def test_a_wrong_result_is_caught(op, dtype):
    with pytest.raises(BudgetExceeded):
        check_op(spec(op), range(4), dtype)


def test_a_float32_result_is_not_good_enough_for_float64():
    with pytest.raises(BudgetExceeded):
        check_op(spec(lambda i, w, b: reference(i.float(), w.float(), b.float()).double()), range(4), torch.float64)


def test_one_wrong_element_among_many_is_named_with_all_values():
    truth = {"logits": torch.linspace(1, 2, 20_000, dtype=torch.float64).view(100, 200)}
    theirs = {"logits": truth["logits"].float()}
    ours = {"logits": theirs["logits"].clone()}
    ours["logits"][41, 7] += 1e-3
    with pytest.raises(BudgetExceeded) as caught:
        check(lambda seed: (ours, theirs, truth))
    value = truth["logits"][41, 7].item()
    for part in ("logits", "(41, 7)", f"ours {value + 1e-3:.6g}", f"PyTorch {value:.6g}", f"truth {value:.6g}"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("factor", "passes"), ((1.05, True), (1.2, False)))
def test_the_mean_may_be_a_tenth_above_pytorchs(factor, passes):
    assert judged(factor, extreme=1) == passes


@pytest.mark.parametrize(("extreme", "passes"), ((1.9, True), (2.1, False)))
def test_the_maximum_may_be_twice_pytorchs(extreme, passes):
    assert judged(1, extreme) == passes


def judged(factor, extreme):
    """Errors thousands of ulps large: ours ``factor`` times PyTorch's, one of them ``extreme`` times the largest."""
    truth = torch.ones(2 * ENOUGH, dtype=torch.float64)
    errors = torch.linspace(0, 1e-2, len(truth), dtype=torch.float64)
    ours = truth + errors * factor
    ours[0] += extreme * 1e-2
    budget = Budget()
    budget.add({"x": ours.float()}, {"x": (truth + errors).float()}, {"x": truth})
    try:
        budget.check()
    except BudgetExceeded:
        return False
    return True


def test_a_small_result_cannot_hide_behind_larger_ones():
    """Pooled results are each judged in their own unit: a loss near 1e-6 beside gradients near 1e6."""

    def evaluate(seed, wrong):
        drawn = torch.Generator().manual_seed(seed)
        truth = {
            "loss": torch.rand(50, generator=drawn, dtype=torch.float64) * 1e-6,
            "grad": torch.rand(100, generator=drawn, dtype=torch.float64) * 1e6,
        }
        theirs = {name: value.float() for name, value in truth.items()}
        return {**theirs, "loss": theirs["loss"] * wrong}, theirs, truth

    check(lambda seed: evaluate(seed, wrong=1))
    with pytest.raises(BudgetExceeded, match="loss"):
        check(lambda seed: evaluate(seed, wrong=1.001))


def test_too_few_elements_are_not_judged():
    budget = Budget()
    one = torch.ones(10, dtype=torch.float64)
    budget.add({"x": one.float()}, {"x": one.float()}, {"x": one})
    with pytest.raises(ValueError, match="10 elements are too few"):
        budget.check()


def test_a_missing_gradient_is_caught():
    one = torch.ones(ENOUGH, dtype=torch.float64)
    with pytest.raises(BudgetExceeded, match=re.escape("['x', 'grad x']")):
        Budget().add({"x": one.float()}, {"x": one.float(), "grad x": one.float()}, {"x": one, "grad x": one})


def test_infinities_and_nans_that_belong_there_pass():
    truth = torch.ones(ENOUGH, dtype=torch.float64)
    truth[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    truth[3] = 1e300  # infinite in float32
    check(lambda seed: ({"x": truth.float()}, {"x": truth.float()}, {"x": truth}))
    ours = truth.float()
    ours[1] = torch.inf
    with pytest.raises(BudgetExceeded, match=re.escape("(1,)")):
        check(lambda seed: ({"x": ours}, {"x": truth.float()}, {"x": truth}))


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    (
        (1.0, torch.float32, 2**-23),
        (-1.99, torch.float32, 2**-23),
        (2.0, torch.bfloat16, 2**-6),
        (0.75, torch.float16, 2**-11),
        (0.0, torch.float32, 2**-149),
        (2.0**-130, torch.float32, 2**-149),
        (1.0, torch.float64, 2**-52),
    ),
)
def test_ulps(value, dtype, expected):
    assert ulps(torch.tensor([value], dtype=torch.float64), dtype).item() == expected


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64, torch.int64))
@pytest.mark.parametrize(
    "view",
    (
        lambda t: t(5, 6),
        lambda t: t(6, 5).mT,
        lambda t: t(9, 20)[::2, 3:8],
        lambda t: t(1, 6).expand(5, 6),
        lambda t: t(0, 4),
        lambda t: t(1)[0],
    ),
    ids=("dense", "transposed", "gaps", "expanded", "empty", "scalar"),
)
def test_guard_keeps_values_and_strides_and_spoils_everything_else(view, dtype):
    tensor = view(lambda *shape: torch.arange(torch.Size(shape).numel()).view(shape).to(dtype))
    guarded = guard(tensor)
    assert torch.equal(guarded, tensor) and guarded.stride() == tensor.stride()
    assert guarded.data_ptr() % 64 == guarded.element_size() or not tensor.numel()
    buffer = torch.tensor([], dtype=dtype).set_(guarded.untyped_storage())
    spoiled = buffer.isnan() if dtype.is_floating_point else buffer == torch.iinfo(dtype).min
    assert (~spoiled).sum() == len({*range(buffer.numel())} & positions(guarded))


def positions(tensor):
    """Indices into the storage of a tensor's elements."""
    indices = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
    return set(indices.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten().tolist())


def test_samples_are_the_same_one_by_one():
    whole = spec(reference)
    for index, sample in enumerate(whole.outline()):
        again, more = (whole.sample(index, torch.float32, seed=5) for _ in range(2))
        assert again.why == sample.why
        for meta, a, b in zip(sample.args, again.args, more.args, strict=True):
            assert meta.shape == a.shape and torch.equal(a, b)


def test_a_spec_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec(reference).op = exact
