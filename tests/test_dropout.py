"""Dropout: the mask is the documented one, what is dropped is dropped both ways, and the numbers are random."""

import numpy
import philox
import pytest
import torch

from fastft.functional import _dropout, dropout_add_layer_norm
from fastft.functional._choice import use_backend
from fastft.functional.layer_norm import normalize
from fastft.testing import error
from fastft.testing.spec import TensorMaker

SEED = torch.tensor([-1234567890123456789])


@pytest.fixture(autouse=True)
def ours():
    with use_backend("fastft"):
        yield


def test_philox_gives_the_numbers_of_its_authors():
    """The last of Random123's known answers for philox4x32-10: counter and key are digits of pi."""
    found = philox.words((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    assert [int(word) for word in found] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("shape", [(5, 300), (3, 128), (19, 1), (7, 17), (5, 33), (3, 65), (2, 129)], ids=str)
def test_the_composition_drops_what_the_rule_says(shape):
    expected = philox.factors(int(SEED), 3, 6554, *shape)
    assert numpy.array_equal(_dropout.factors(SEED, 3, 6554, *shape).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(70, 384), (65, 31), (9, 129)], ids=str)
def test_the_kernel_drops_what_the_rule_says_in_both_directions(each_isa, dtype, shape):
    M, H = shape
    factors = torch.from_numpy(philox.factors(int(SEED), 2, 20000, M, H))

    def composition(rows, residual, weight, bias):
        return torch.nn.functional.layer_norm(rows * factors.to(rows.dtype) + residual, (H,), weight, bias, 1e-12)

    def kernel(rows, residual, weight, bias):
        return normalize(rows, residual, weight, bias, 1e-12, (SEED, 20000, 2))

    def evaluate(seed):
        t = TensorMaker(dtype, seed=seed)
        arguments = {"rows": t(M, H), "residual": t(M, H), "weight": t(H) + 1, "bias": t(H)}
        theirs = error.cast(arguments, torch.float32 if dtype == torch.float64 else dtype)
        double = error.cast(arguments, torch.float64)

        def grad(*sizes):
            return TensorMaker(dtype, seed=seed + 10**6)(*sizes)

        return (
            error.run(kernel, arguments, arguments, grad),
            error.run(composition, theirs, arguments, grad),
            error.run(composition, double, arguments, grad),
        )

    error.check(evaluate, double=dtype == torch.float64)


def test_second_derivatives_see_the_same_mask():
    t = TensorMaker(torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (t(6, 20), t(6, 20), t(20) + 1, t(20))]
    assert torch.autograd.gradgradcheck(lambda *x: normalize(*x, 1e-12, (SEED, 20000, 0)), leaves)


def dropped(shape=(256, 768), p=0.1):
    """Which elements one call drops."""
    input = torch.ones(shape, requires_grad=True)
    # Of a gradient that is one element of a row, what dropout lets through is zero where it dropped and nowhere else.
    output = dropout_add_layer_norm(input, torch.randn(shape), None, None, p)
    (grad,) = torch.autograd.grad(output, input, torch.randn(shape))
    return grad == 0


def test_the_generator_s_seed_repeats_the_mask_and_every_call_has_its_own():
    torch.manual_seed(3)
    first, second = dropped(), dropped()
    torch.manual_seed(3)
    assert torch.equal(first, dropped()) and torch.equal(second, dropped())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.003])
def test_the_rate_is_p_within_four_standard_errors(p):
    torch.manual_seed(0)
    n, found = 256 * 768, dropped(p=p).double().mean()
    assert abs(found - round(65536 * p) / 65536) < 4 * (p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (0, 16), (0, 128), (7, 3)], ids=str)
def test_neighbours_calls_and_uses_are_independent(shift):
    torch.manual_seed(1)
    p = 0.25
    first, second = dropped(p=p), dropped(p=p)
    other_use = _dropout.factors(SEED, 1, 16384, 256, 768) == 0
    this_use = _dropout.factors(SEED, 0, 16384, 256, 768) == 0
    shifted = first.roll(shift, (0, 1))
    for a, b in ((first, shifted), (first, second), (this_use, other_use)):
        both = (a & b).double().mean()
        assert abs(both - p * p) < 4 * (p * p * (1 - p * p) / a.numel()) ** 0.5


def test_everything_or_nothing_dropped():
    input, residual = torch.randn(40, 200), torch.randn(40, 200)
    assert torch.equal(
        dropout_add_layer_norm(input, residual, None, None, 1.0),
        dropout_add_layer_norm(torch.zeros_like(input), residual, None, None, 0.0),
    )
    assert torch.equal(
        dropout_add_layer_norm(input, residual, None, None, 0.5, training=False),
        dropout_add_layer_norm(input, residual, None, None, 0.0),
    )


@pytest.mark.parametrize("of_input", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("of_residual", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_a_residual_of_any_dtype_is_taken_by_either_kernel(of_input, of_residual):
    input, residual = torch.randn(3, 8, dtype=of_input), torch.randn(3, 8, dtype=of_residual)
    parameters = torch.rand(2, 8, dtype=of_input)
    outputs = []
    for backend in ("fastft", "torch"):
        with use_backend(backend):
            outputs.append(dropout_add_layer_norm(input, residual, *parameters, 0.0))
    assert outputs[0].dtype == outputs[1].dtype == (input + residual).dtype
    assert all(output.isfinite().all() for output in outputs)


def test_the_number_of_threads_changes_no_bit():
    before, found = torch.get_num_threads(), []
    t = TensorMaker(torch.float32)
    arguments = [tensor.requires_grad_() for tensor in (t(300, 130), t(300, 130), t(130), t(130))]
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output = normalize(*arguments, 1e-12, (SEED, 6554, 0))
            found.append((output, *torch.autograd.grad(output, arguments, torch.ones_like(output))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_compiled_without_graph_breaks_it_draws_anew_each_time():
    torch._dynamo.reset()
    compiled = torch.compile(dropout_add_layer_norm, backend="aot_eager", fullgraph=True)
    arguments = torch.ones(64, 128), torch.randn(64, 128), None, None, 0.5
    torch.manual_seed(5)
    first, second = compiled(*arguments), compiled(*arguments)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(compiled(*arguments), first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.ones(2, 4)}, "residual is (2, 4), must be (2, 3) as input"),
        ({"weight": torch.ones(4)}, "weight is (4,), must be (3,)"),
        ({"bias": torch.ones(3).double()}, "bias is torch.float64, input torch.float32"),
        ({"p": 1.5}, "p is 1.5, must be between 0 and 1"),
        ({"p": float("nan")}, "p is nan, must be between 0 and 1"),
        ({"input": torch.ones(2, 3).long()}, "input is torch.int64, must be a floating-point tensor"),
    ],
)
def test_error_names_argument_and_value(change, message):
    arguments = {"input": torch.ones(2, 3), "residual": torch.ones(2, 3), "weight": None, "bias": None} | change
    with pytest.raises(ValueError) as caught:
        dropout_add_layer_norm(**arguments)
    assert str(caught.value) == f"dropout_add_layer_norm: {message}"
