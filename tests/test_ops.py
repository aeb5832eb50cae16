"""Every op's spec in every way an op is used: dtypes, instruction sets, autograd, autocast, torch.compile, threads.

All of it with FASTFT_BACKEND=fastft, so that nothing passes by falling back to PyTorch.
"""

import functools
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from fastft import _library
from fastft.functional import attention, cross_entropy, dropout_add_layer_norm, linear_act
from fastft.functional._choice import use_backend
from fastft.testing import TensorMaker, all_specs
from fastft.testing.error import SEEDS, Budget, cast, check_op, guard, run
from fastft.testing.spec import KernelCalls

pytestmark = pytest.mark.skipif(not _library.available(), reason=f"no native library: {_library.why_not()}")

SPECS = all_specs()
CUDA = torch.cuda.is_available() and _library.has_cuda()
DEVICES = ["cpu", *(["cuda"] if CUDA else [])]
DTYPES = (torch.float32, torch.bfloat16, torch.float64, *([torch.float16] if CUDA else []))
HALF = {"cpu": torch.bfloat16, "cuda": torch.float16}

each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
each_device = pytest.mark.parametrize("device", DEVICES)


def name_of(value):
    return str(value).removeprefix("torch.")


@pytest.fixture(autouse=True)
def ours_or_an_error():
    with use_backend("fastft"):
        yield


def small(spec):
    """Indices of the samples that may be called hundreds of times."""
    return [index for index, sample in enumerate(spec.outline()) if spec.small(sample)]


def large(spec, least=0.0, most=float("inf")):
    """Indices of the others, of a cost in that range."""
    outline = [(i, sample) for i, sample in enumerate(spec.outline()) if not spec.small(sample)]
    return [index for index, sample in outline if least <= spec.cost(sample) < most]


def results(spec, function, index, dtype, device="cpu", only=None, grad_output=None):
    """Output and gradients of a sample, all or ``only`` some."""
    sample = spec.sample(index, dtype, device)
    wanted = spec.differentiable(sample) if only is None else only
    return run(function, spec.named(sample), wanted, grad_output or TensorMaker(dtype, device, seed=7))


def assert_same_bits(ours, expected):
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        other = expected[name]
        assert tensor.dtype == other.dtype and tensor.shape == other.shape, name
        bits = torch.uint8 if tensor.numel() else tensor.dtype
        assert torch.equal(tensor.contiguous().view(-1).view(bits), other.contiguous().view(-1).view(bits)), name


# ---- numbers


@each_spec
@each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_results_stay_within_the_error_budget(spec, dtype, device):
    if dtype not in spec.dtypes_on(device):
        pytest.skip(f"{dtype} is PyTorch's on {device}")
    check_op(spec, small(spec), dtype, device, isas=_library.isas() if device == "cpu" else ())


@each_spec
@each_device
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
def test_benchmark_shapes_stay_within_the_error_budget(spec, dtype, device):
    check_op(spec, large(spec, most=0.02), dtype, device)


@pytest.mark.slow
@each_spec
@each_device
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
def test_the_largest_benchmark_shapes_stay_within_the_error_budget(spec, dtype, device):
    check_op(spec, large(spec, least=0.02), dtype, device)


@each_spec
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=name_of)
def test_the_number_of_threads_changes_no_bit(spec, dtype, each_isa):
    before = torch.get_num_threads()
    try:
        for index in [*small(spec), *large(spec, most=0.005)]:
            sample = spec.sample(index, dtype)  # once: PyTorch's softmax, say, depends on the threads
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(run(spec.op, spec.named(sample), spec.differentiable(sample), TensorMaker(dtype, seed=7)))
            assert_same_bits(found[1], found[0])
            assert_same_bits(found[2], found[0])
    finally:
        torch.set_num_threads(before)


@each_spec
@each_device
def test_inputs_are_left_as_they_were(spec, device):
    for index in small(spec):
        arguments = spec.named(spec.sample(index, torch.float32, device))
        buffers = {name: guard(value) for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        spec.op(**{**arguments, **buffers})
        assert_same_bits(buffers, {name: arguments[name] for name in buffers})


# ---- autograd


@each_spec
@each_device
def test_gradients_are_derivatives_of_the_output(spec, device):
    for index in small(spec):
        function, leaves = differentiable(spec, index, device)
        assert gradcheck(function, leaves, fast_mode=True, check_batched_grad=True), spec.outline()[index]


@each_spec
@each_device
def test_second_derivatives_are_derivatives_of_the_gradients(spec, device):
    for index in small(spec):
        function, leaves = differentiable(spec, index, device)
        assert gradgradcheck(function, leaves, fast_mode=True), spec.outline()[index]


@each_spec
@each_device
def test_a_tangent_of_the_upstream_gradient_is_not_lost(spec, device):
    function, leaves = differentiable(spec, small(spec)[0], device)
    output = function(*leaves)

    def gradients(grad_output):
        return torch.autograd.grad(output, leaves, grad_output, create_graph=True)

    upstream = torch.ones_like(output, requires_grad=True)
    assert gradcheck(gradients, upstream, check_backward_ad=False, check_forward_ad=True, fast_mode=True)


def differentiable(spec, index, device):
    """A function of a float64 sample's differentiable arguments alone, and these."""
    sample = spec.sample(index, torch.float64, device)
    arguments, wanted = spec.named(sample), spec.differentiable(sample)
    leaves = [arguments[name].detach().clone().requires_grad_() for name in wanted]
    return lambda *values: spec.op(**{**arguments, **dict(zip(wanted, values, strict=True))}), leaves


@each_spec
@each_device
def test_each_gradient_alone_is_the_one_of_all(spec, device):
    for index in small(spec):
        everything = results(spec, spec.op, index, torch.float32, device)
        for name in spec.differentiable(spec.outline()[index]):
            alone = results(spec, spec.op, index, torch.float32, device, only=(name,))
            assert_same_bits(alone, {key: everything[key] for key in alone})


@each_spec
@each_device
def test_gradients_that_nobody_asks_for_are_not_computed(spec, device):
    for index in small(spec)[:3]:
        sample = spec.sample(index, torch.float32, device)
        arguments, wanted = spec.named(sample), spec.differentiable(sample)

        def outputs(name, leaves, arguments=arguments):
            """Of the kernels of the backward for one gradient, which are there, where these require gradients."""
            leaves = {leaf: arguments[leaf].detach().requires_grad_() for leaf in leaves}
            output = spec.op(**{**arguments, **leaves})
            with KernelCalls(keep_arguments=True) as kernels:
                torch.autograd.grad(output, leaves[name], torch.ones_like(output))
            return [(op, [value is not None for value in args]) for op, args, _ in kernels.calls]

        for name in wanted:
            assert outputs(name, wanted) == outputs(name, [name]), (sample.why, name)


@each_spec
@each_device
def test_an_expanded_gradient_is_read_with_its_strides(spec, device):
    for index in small(spec):
        ones = functools.partial(torch.ones, dtype=torch.float32, device=device)
        dense = results(spec, spec.op, index, torch.float32, device, grad_output=lambda *shape, one=ones: one(shape))
        expanded = results(
            spec, spec.op, index, torch.float32, device, grad_output=lambda *shape, one=ones: one(()).expand(shape)
        )
        assert_same_bits(expanded, dense)


@each_spec
@each_device
def test_without_autograd_the_output_has_the_same_bits(spec, device):
    for index in small(spec):
        expected = results(spec, spec.op, index, torch.float32, device)["output"]
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                output = spec.op(**spec.named(spec.sample(index, torch.float32, device)))
            assert output.grad_fn is None and not output.requires_grad
            assert_same_bits({"output": output.clone()}, {"output": expected})


@each_spec
@each_device
def test_forward_mode_tangents_are_right(spec, device):
    index = 0
    arguments = spec.named(spec.sample(index, torch.float32, device))
    name = spec.differentiable(spec.outline()[index])[0]
    tangent = TensorMaker(torch.float32, device, seed=3)(*arguments[name].shape)

    def derivative(function):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(arguments[name], tangent)
            return forward_ad.unpack_dual(function(**{**arguments, name: dual})).tangent

    with use_backend("auto"):
        assert torch.equal(derivative(spec.op), derivative(spec.reference))
    with pytest.raises(RuntimeError, match=f"FASTFT_BACKEND=fastft, but {spec.name} would run on PyTorch"):
        derivative(spec.op)


# ---- PyTorch's machinery


@each_spec
@each_device
def test_the_raw_ops_keep_their_contracts(spec, device):
    seen = set()
    for dtype in (torch.float32, torch.bfloat16):
        for index in small(spec):
            with KernelCalls(keep_arguments=True) as kernels:
                results(spec, spec.op, index, dtype, device)
            for op, args, kwargs in kernels.calls:
                key = (op, *map(kind, args))
                if key not in seen and not kwargs:
                    seen.add(key)
                    torch.library.opcheck(op, args)
    assert seen


def kind(value):
    """What an op's contract may depend on; numbers only reach its kernel."""
    return (value.dtype, value.dim()) if isinstance(value, torch.Tensor) else type(value)


@each_spec
@each_device
def test_our_kernels_run_and_only_when_asked(spec, device):
    for index in small(spec):
        with KernelCalls() as kernels:
            results(spec, spec.op, index, torch.float32, device)
        assert kernels.calls, spec.outline()[index]
        with use_backend("torch"), KernelCalls() as kernels:
            results(spec, spec.op, index, torch.float32, device)
        assert not kernels.calls


@each_spec
def test_a_dtype_without_kernels_runs_on_pytorch_or_says_so(spec):
    index = 0
    with pytest.raises(RuntimeError, match=r"there are no kernels for torch\.float16 on 'cpu'"):
        results(spec, spec.op, index, torch.float16)
    with use_backend("auto"):
        assert_same_bits(
            results(spec, spec.op, index, torch.float16), results(spec, spec.reference, index, torch.float16)
        )


@each_spec
@each_device
@pytest.mark.parametrize("first_is_half", (False, True), ids=("all float32", "first argument in half precision"))
def test_autocast_stays_within_the_budget_of_pytorch_under_autocast(spec, device, first_is_half):
    budget = Budget()
    for index in small(spec):
        for seed in range(SEEDS):
            sample = spec.sample(index, torch.float32, device, seed)
            arguments, wanted = spec.named(sample), spec.differentiable(sample)
            if first_is_half and wanted:
                arguments[wanted[0]] = arguments[wanted[0]].to(HALF[device])
            budget.add(
                run(autocast(spec.op, device), arguments, wanted, grad_output(device, seed)),
                run(autocast(spec.reference, device), arguments, wanted, grad_output(device, seed)),
                run(spec.reference, cast(arguments, torch.float64), wanted, grad_output(device, seed)),
                case=sample.why,
                seed=seed,
            )
    budget.check()


def autocast(function, device):
    def under_autocast(**arguments):
        with torch.autocast(device, HALF[device]):
            return function(**arguments)

    return under_autocast


def grad_output(device, seed):
    """Numbers that half precision holds, so that every version gets the same."""
    return lambda *shape: TensorMaker(HALF[device], device, seed + 1_000_000)(*shape).float()


@each_spec
def test_meta_and_fake_tensors_have_the_shapes_of_real_ones(spec):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for index in small(spec):
        expected = results(spec, spec.op, index, torch.bfloat16)
        meta = results(spec, spec.op, index, torch.bfloat16, "meta")
        with FakeTensorMode():
            fake = results(spec, spec.op, index, torch.bfloat16)
        for name, tensor in expected.items():
            for other in (meta[name], fake[name]):
                assert (other.shape, other.dtype, other.stride()) == (tensor.shape, tensor.dtype, tensor.stride())


@each_spec
@each_device
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compiled_without_graph_breaks_it_gives_the_same_bits(spec, device, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(spec.op, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for index in small(spec)[:1]:
        assert_same_bits(
            results(spec, compiled, index, torch.float32, device), results(spec, spec.op, index, torch.float32, device)
        )


def test_the_first_use_of_an_op_may_be_inside_of_a_compiled_function():
    code = """
import torch, fastft
torch.compile(lambda x: fastft.functional.layer_norm(x, 256), backend="aot_eager", fullgraph=True)(torch.ones(128, 256))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "function",
    [
        lambda x: linear_act(x, x, x[0]),
        lambda x: cross_entropy(x, x),
        lambda x: dropout_add_layer_norm(x, x, x[0], x[0], 0.0),
        lambda x: attention(x[None, None], x[None, None], x[None, None]),
    ],
    ids=("linear_act", "cross_entropy", "dropout_add_layer_norm", "attention"),
)
def test_compiled_it_takes_a_tensor_twice(function):
    torch._dynamo.reset()
    ours, expected = (torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab")
    assert torch.equal(torch.compile(function, backend="aot_eager", fullgraph=True)(ours), function(expected))


@each_spec
@each_device
def test_compiled_by_inductor_it_gives_the_same_bits(spec, device):
    torch._dynamo.reset()
    compiled = torch.compile(spec.op, fullgraph=True)
    index = small(spec)[0]
    assert_same_bits(
        results(spec, compiled, index, torch.float32, device), results(spec, spec.op, index, torch.float32, device)
    )


@each_spec
@each_device
def test_a_second_forward_before_the_backward_changes_nothing(spec, device):
    first, second = small(spec)[:2]
    expected = results(spec, spec.op, first, torch.float32, device)
    sample = spec.sample(first, torch.float32, device)
    arguments, wanted = spec.named(sample), spec.differentiable(sample)
    leaves = {name: arguments[name].requires_grad_() for name in wanted}
    output = spec.op(**arguments)
    results(spec, spec.op, second, torch.float32, device)
    grads = torch.autograd.grad(
        output, list(leaves.values()), TensorMaker(torch.float32, device, seed=7)(*output.shape)
    )
    ours = {"output": output, **{f"grad {name}": grad for name, grad in zip(wanted, grads, strict=True)}}
    assert_same_bits(ours, expected)
