"""linear_act where the spec's cases cannot say it: errors, fall-backs, autocast, derivatives beyond the first."""

import re

import pytest
import torch

from fastft import _library, activations
from fastft.functional import _choice, linear_act
from fastft.functional.linear_act import backward, reference
from fastft.nn import MLP, LinearAct
from fastft.testing import error
from fastft.testing.spec import TensorMaker


def tensors(M=5, N=7, K=3, dtype=torch.float32, requires_grad=False):
    generator = torch.Generator().manual_seed(M * 10007 + N * 101 + K)
    shapes = (M, K), (N, K), (N,)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.to(dtype).requires_grad_(requires_grad) for tensor in drawn]


@pytest.mark.parametrize(
    ("input", "weight", "bias", "activation", "message"),
    [
        (
            torch.ones(4, 128, 512),
            torch.ones(3072, 768),
            None,
            "gelu",
            "weight is (3072, 768), input (4, 128, 512) needs (N, 512)",
        ),
        (torch.ones(()), torch.ones(2, 3), None, "gelu", "input () needs an input of at least one dimension (*, K)"),
        (torch.ones(2, 3), torch.ones(3), None, "gelu", "weight is (3,), needs two dimensions (N, K)"),
        (torch.ones(2, 3), torch.ones(4, 3), torch.ones(3), "gelu", "bias is (3,), weight (4, 3) needs (4,)"),
        (torch.ones(2, 3), torch.ones(4, 3).bfloat16(), None, "gelu", "weight is torch.bfloat16, input torch.float32"),
        (
            torch.ones(2, 3),
            torch.ones(4, 3),
            torch.ones(4).double(),
            "gelu",
            "bias is torch.float64, input torch.float32",
        ),
        (
            torch.ones(2, 3).long(),
            torch.ones(4, 3).long(),
            None,
            "gelu",
            "input is torch.int64, must be a floating-point tensor",
        ),
        (torch.ones(2, 3), torch.ones(4, 3, device="meta"), None, "gelu", "weight is on meta, input on cpu"),
        (torch.ones(2, 3), torch.ones(4, 3), None, "gelo", "'gelo'"),
    ],
)
def test_error_names_argument_and_value(input, weight, bias, activation, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_act(input, weight, bias, activation)


@pytest.mark.parametrize("value", [[[1.0]], None], ids=["list", "None"])
@pytest.mark.parametrize("which, name", enumerate(("input", "weight")))
def test_error_names_the_type_of_what_is_no_tensor(value, which, name):
    arguments = [torch.ones(2, 3), torch.ones(4, 3)]
    arguments[which] = value
    with pytest.raises(TypeError, match=f"^linear_act: {name} must be a tensor, got {type(value).__name__}$"):
        linear_act(*arguments)


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 5, 3), (2, 1, 5, 3), (0, 3), (2, 0, 3)])
def test_any_leading_shape(shape):
    _, weight, bias = tensors()
    input = torch.randn(shape, requires_grad=True)
    weight.requires_grad_()
    with _choice.use_backend("fastft"):
        output = linear_act(input, weight, bias, "tanh")
    assert output.shape == (*shape[:-1], 7)
    output.sum().backward()
    assert input.grad.shape == shape and weight.grad.shape == weight.shape
    if input.numel() == 0:
        assert not weight.grad.any()


def test_no_input_features_gives_the_activation_of_the_bias():
    with _choice.use_backend("fastft"):
        output = linear_act(torch.ones(4, 0), torch.ones(3, 0), torch.tensor([-1.0, 0.0, 2.0]), "relu")
    assert output.tolist() == [[0.0, 0.0, 2.0]] * 4


def test_float16_on_the_cpu_is_pytorchs():
    input, weight, bias = tensors(dtype=torch.float16)
    assert torch.equal(linear_act(input, weight, bias, "relu"), reference(input, weight, bias, "relu"))
    with (
        _choice.use_backend("fastft"),
        pytest.raises(RuntimeError, match=r"would run on PyTorch: there are no kernels for torch.float16"),
    ):
        linear_act(input, weight, bias, "relu")


def test_autocast_gives_bfloat16_output_and_float32_gradients_of_the_parameters():
    input, weight, bias = tensors(64, 64, 64, requires_grad=True)
    with _choice.use_backend("fastft"), torch.autocast("cpu", torch.bfloat16):
        output = linear_act(input, weight, bias, "gelu")
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert input.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32


def test_autocast_errors_are_within_the_budget():
    def run(function, seed, dtype, autocast):
        make = TensorMaker(torch.float32, seed=seed)
        leaves = [t.to(dtype).requires_grad_() for t in (make(64, 40), make(2048, 40, scale=40**-0.5), make(2048))]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = function(*leaves, "gelu")
        grads = torch.autograd.grad(output, leaves, make(64, 2048).to(output.dtype))
        return {"output": output, "grad input": grads[0], "grad weight": grads[1], "grad bias": grads[2]}

    def evaluate(seed):
        theirs, truth = run(reference, seed, torch.float32, True), run(reference, seed, torch.float64, False)
        with _choice.use_backend("fastft"):
            return run(linear_act, seed, torch.float32, True), theirs, truth

    error.check(evaluate)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M, N, K", [(1, 5, 3), (33, 100, 67), (300, 130, 770)])  # of few, and of streamed outputs
def test_gradient_through_the_activation_that_made_the_input(M, N, K, dtype, in_place):
    def run(seed, dtype, ours):
        make = TensorMaker(dtype, seed=seed)
        preact, weight, grad = make(M, K), make(N, K, scale=N**-0.5), make(M, N)
        if ours:
            input = preact if in_place else torch.empty_like(preact)
            through = activations.index("gelu"), preact, input
            result, _, _ = backward(0, None, (True, False, False), grad, preact, weight, None, through=through)
            return {"grad preact": result, "input": input}
        preact.requires_grad_()
        input = torch.nn.functional.gelu(preact)
        return {"grad preact": torch.autograd.grad(input, preact, grad @ weight)[0], "input": input}

    error.check(lambda seed: (run(seed, dtype, True), run(seed, dtype, False), run(seed, torch.float64, False)))


@pytest.mark.parametrize("activation", ["identity", "gelu", "tanh", "relu"])
def test_second_derivatives_are_pytorchs(activation):
    input, weight, bias = tensors(dtype=torch.float64, requires_grad=True)
    with _choice.use_backend("fastft"):
        assert torch.autograd.gradgradcheck(lambda *t: linear_act(*t, activation), (input, weight, bias))


def test_second_derivative_when_the_upstream_gradient_needs_none():
    input, weight, bias = tensors(dtype=torch.float64, requires_grad=True)

    def penalty(function):
        (grad,) = torch.autograd.grad(function(input, weight, bias, "gelu").sum(), input, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (input, weight, bias))

    with _choice.use_backend("fastft"):
        ours = penalty(linear_act)
    for a, b in zip(ours, penalty(reference), strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivative_with_a_weight_that_made_the_input():
    _, weight, _ = tensors(3, 3, 3, dtype=torch.float64, requires_grad=True)

    def penalty(function):
        (grad,) = torch.autograd.grad(function(weight.tanh(), weight, None, "gelu").sum(), weight, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), weight)[0]

    with _choice.use_backend("fastft"):
        ours = penalty(linear_act)
    torch.testing.assert_close(ours, penalty(reference))


def test_forward_mode_and_functorch_give_pytorchs_answer():
    input, weight, bias = tensors(dtype=torch.float64)
    tangent = torch.ones_like(input)
    for function in (linear_act, reference):
        _, ours = torch.func.jvp(lambda x, f=function: f(x, weight, bias, "gelu"), (input,), (tangent,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(input, tangent)
            dual = torch.autograd.forward_ad.unpack_dual(function(dual, weight, bias, "gelu")).tangent
        assert torch.equal(ours, dual)
    per_row = torch.func.vmap(torch.func.grad(lambda x: linear_act(x, weight, bias, "gelu").sum()))(input)
    torch.testing.assert_close(
        per_row, torch.autograd.functional.jacobian(lambda x: reference(x, weight, bias, "gelu").sum(), input)
    )


def test_inference_mode_and_no_grad_keep_nothing():
    input, weight, bias = tensors(requires_grad=True)
    with _choice.use_backend("fastft"):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert not linear_act(input, weight, bias, "gelu").requires_grad


def test_only_wanted_gradients_are_made():
    input, weight, bias = tensors(requires_grad=True)
    with _choice.use_backend("fastft"):
        output = linear_act(input.detach(), weight.detach(), bias, "gelu")
        (grad,) = torch.autograd.grad(output.sum(), bias)
    expected = torch.autograd.grad(reference(input, weight, bias, "gelu").sum(), bias)[0]
    torch.testing.assert_close(grad, expected)


def test_meta_tensors_have_the_shape_and_nothing_else():
    output = linear_act(torch.ones(2, 3, device="meta"), torch.ones(4, 3, device="meta"), None, "gelu")
    assert output.shape == (2, 4) and output.device.type == "meta"


def test_modules_have_torchs_parameters():
    layer = LinearAct(3, 4, activation="gelu_new")
    assert list(layer.state_dict()) == ["weight", "bias"] and layer.activation == "gelu_tanh"
    assert "activation=gelu_tanh" in repr(layer)
    assert MLP(3, 8, activation="silu")(torch.ones(2, 5, 3)).shape == (2, 5, 3)
    assert list(MLP(3, 8, 2, bias=False).state_dict()) == ["up.weight", "down.weight"]


@pytest.mark.skipif(not _library.available(), reason=f"no native library: {_library.why_not()}")
@pytest.mark.parametrize("wide", ("grad_output", "input"))
def test_a_weight_gradient_has_the_same_bits_wherever_its_operands_lie(wide, each_isa):
    """Of 25 MB in pages of 4 KB, which are packed, beside one that is not; of each half neither is."""
    generator = torch.Generator().manual_seed(0)
    large, small = (torch.randn(2100, width, generator=generator) for width in (3008, 32))

    def operands(large):
        return (large, small) if wide == "grad_output" else (small, large)

    def weight_gradient(large):
        grad_output, input = operands(large)
        weight = torch.empty(grad_output.shape[1], input.shape[1])
        found = torch.empty_like(weight)
        torch.ops.fastft.linear_act_backward(None, found, None, grad_output, None, input, weight, 0, None, None)
        return found

    halves = [weight_gradient(half.contiguous()) for half in large.chunk(2, 1)]
    whole = weight_gradient(large)
    assert torch.equal(whole, torch.cat(halves, 0 if wide == "grad_output" else 1))
    grad_output, input = operands(large)
    budget = error.Budget()
    budget.add(
        {"weight": whole}, {"weight": grad_output.mT @ input}, {"weight": grad_output.double().mT @ input.double()}
    )
    budget.check()
