"""The CUDA kernels, run on the CPU by tests/simt: within the error budget, in any order of threads, without a hang."""

import math

import pytest
import simt
import torch

from fastft import _library
from fastft.functional import ACTIVATIONS, _choice, linear_act
from fastft.testing import error
from fastft.testing.spec import TensorMaker, all_specs

pytestmark = pytest.mark.skipif(not _library.available(), reason=f"our ops are not declared: {_library.why_not()}")

SPECS = [spec for spec in all_specs() if f"{spec.name}_forward" in simt.FIELDS]
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


@pytest.fixture
def gpu(monkeypatch):
    """CPU tensors stand in for CUDA's: the same dtypes, the same kernels, no fall-back. Gives the names of those that ran."""
    monkeypatch.setitem(_choice._DTYPES, "cpu", _choice._DTYPES["cuda"])
    with _choice.use_backend("fastft"), simt.OnCpu() as mode:
        yield mode.names


@pytest.fixture
def order():
    """Sets the order in which threads take turns."""
    yield simt.kernels().set_order
    simt.kernels().set_order(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_every_small_case_is_within_the_error_budget(spec, dtype, gpu):
    small = [index for index, sample in enumerate(spec.outline(dtype)) if spec.small(sample)]
    error.check_op(spec, small, dtype)
    suffix = simt.SUFFIXES[dtype, dtype]
    assert {f"{spec.name}_forward_{suffix}", f"{spec.name}_backward_{suffix}"} <= set(gpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_float32_parameters_into_the_kernel(dtype, gpu):
    def evaluate(seed):
        t = TensorMaker(torch.float32, seed=seed)
        arguments = {"input": t(70, 67), "weight": t(66, 67, scale=67**-0.5), "bias": t(66)}

        def result(function, dtype, autocast):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                return error.run(function, error.cast(arguments, dtype), arguments, TensorMaker(torch.float32, seed=-seed))

        def stock(input, weight, bias):
            return torch.nn.functional.gelu(torch.nn.functional.linear(input, weight, bias))

        return result(linear_act, torch.float32, dtype), result(stock, torch.float32, dtype), result(stock, torch.float64, None)

    error.check(evaluate)
    suffix = simt.SUFFIXES[dtype, torch.float32]
    assert {f"linear_act_forward_{suffix}", f"linear_act_backward_{suffix}"} == set(gpu)


def results(activation="mish", wanted=("input", "weight", "bias"), sizes=(131, 137, 130)):
    M, N, K = sizes
    t = TensorMaker(torch.float32)
    arguments = {"input": t(M, K), "weight": t(N, K), "bias": t(N)}
    return error.run(lambda **tensors: linear_act(**tensors, activation=activation), arguments, wanted, t_of_ones)


def t_of_ones(shape):
    return torch.ones(shape)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_order_of_threads_does_not_change_a_bit(seed, gpu, order):
    before = results()
    order(seed)
    after = results()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("wanted", ["input", "weight", "bias"])
def test_each_gradient_alone_has_the_bits_it_has_with_the_others(wanted, gpu):
    assert torch.equal(results(wanted=(wanted,))[f"grad {wanted}"], results()[f"grad {wanted}"])


@pytest.mark.parametrize("sizes", [(1, 1, 1), (64, 64, 16), (65, 63, 17), (128, 192, 144), (3, 200, 5)])
def test_whole_numbers_come_out_exactly(sizes, gpu):
    M, N, K = sizes
    x, w, b, dy = (torch.arange(math.prod(s)).remainder(7).sub(3).view(s).float() for s in ((M, K), (N, K), (N,), (M, N)))
    x, w, b = (tensor.requires_grad_() for tensor in (x, w, b))
    y = linear_act(x, w, b, "identity")
    assert torch.equal(y, x @ w.T + b)
    y.backward(dy)
    assert torch.equal(x.grad, dy @ w) and torch.equal(w.grad, dy.T @ x) and torch.equal(b.grad, dy.sum(0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinite_and_missing_values_are_pytorchs(activation, gpu):
    values = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 3e38, -3e38, 1e-45], requires_grad=True)
    ours = linear_act(values[:, None], torch.ones(1, 1), None, activation)
    (grad,) = torch.autograd.grad(ours.sum(), values)
    with _choice.use_backend("torch"):
        theirs = linear_act(values[:, None], torch.ones(1, 1), None, activation)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    (expected,) = torch.autograd.grad(theirs.sum(), values)
    torch.testing.assert_close(grad, expected, equal_nan=True)


def test_every_kernel_of_the_module_can_be_called_through_an_op():
    named = {f"{op}_{suffix}" for op in simt.FIELDS for suffix in simt.SUFFIXES.values()}
    others = {"set_order"} | {name for name in dir(simt.kernels()) if name.startswith(("_", "planted"))}
    assert set(dir(simt.kernels())) - others == named


# ---- the executor itself, on kernels with a planted bug each (tests/simt/planted.cu)


def planted(name):
    import numpy

    out = numpy.full(64, -1, numpy.float32)
    getattr(simt.kernels(), f"planted_{name}")(out)
    return out.tolist()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent_barrier", r"thread \(32, 0, 0\) is at a barrier that thread \(0, 0, 0\) is not at, .*planted.cu:\d+"),
        ("exit_before_barrier", r"thread \(63, 0, 0\) has exited, while others wait at a barrier, .*planted.cu:\d+"),
        ("divergent_shuffle", r"thread \(0, 0, 0\) waits for lanes of its warp that do not come, .*planted.cu:\d+"),
        ("shuffle_from_exited_lane", r"thread \(30, 0, 0\) shuffles from a lane that .* has exited, .*planted.cu:\d+"),
        ("too_many_threads", "invalid configuration argument"),
    ],
)
def test_wrong_synchronisation_is_named(name, message, seed, order):
    order(seed)
    with pytest.raises(RuntimeError, match=message):
        planted(name)


@pytest.mark.parametrize("name", ["missing_barrier", "unwritten_shared"])
def test_shared_memory_read_before_it_is_written_is_nan(name):
    assert any(math.isnan(value) for value in planted(name))


def test_nothing_is_found_in_a_right_kernel(order):
    for seed in range(3):
        order(seed)
        assert planted("none") == [63 - i for i in range(64)]
