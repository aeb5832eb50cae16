"""The activation table and the elementary functions below it, in every instruction set and as CUDA's scalars."""

import re

import native
import pytest
import torch
from transformers.activations import ACT2FN

import setup
from fastft import activations
from fastft.testing import error

FLOATS = (torch.float32, torch.float64)
ULPS = {torch.float32: 1, torch.float64: 4}  # of the error budget
# Where values are asymptotic; the range between them is the error budget's.
EDGES = [0.0, 1e-45, 1e-38, 1e-20, 1e-8, 1e4, 1e10, 1e20, 3e38, torch.inf]

FUNCTIONS = {
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "normal_cdf": lambda x: torch.erfc(x * -(0.5**0.5)) / 2,  # torch.special.ndtr has no digits left below -8.3
}
# Largest errors of float32 as stated in numeric.h
MAX_ULPS = {"exp": 0.97, "expm1": 1.48, "log": 1.16, "log1p": 1.19, "tanh": 1.07, "sigmoid": 2.4, "normal_cdf": 6.7}


@pytest.fixture(scope="module", params=["scalar", *setup.ISA_FLAGS])
def isa(request):
    if reason := setup.why_no_native():
        pytest.skip(reason)
    if request.param not in native.sets():
        pytest.skip(f"this machine does not have {request.param}")
    return request.param


def spread(seed):
    """Pre-activations of a trained layer, of a wide one, of the range where tails vanish, and tiny ones."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(3, 20_000, generator=generator, dtype=torch.float64)
    uniform = torch.rand(20_000, generator=generator, dtype=torch.float64)
    return {"normal": normal[0], "wide": 3 * normal[1], "uniform": 24 * uniform - 12, "tiny": 1e-3 * normal[2]}


def ours(name, isa, x):
    return torch.from_numpy(native.elementwise(name, isa, x.numpy()))


def in_cpp(name):
    return "".join(word.capitalize() for word in name.split("_"))


def value_and_slope(function, z):
    z = z.clone().requires_grad_()
    value = function(z)
    (slope,) = torch.autograd.grad(value, z, torch.ones_like(z))
    return {"f": value.detach(), "df": slope}


def our_value_and_slope(name, isa, z):
    return {"f": ours(in_cpp(name), isa, z), "df": ours(in_cpp(name) + "'", isa, z)}


# ---- the table


def test_both_halves_of_the_table_have_the_same_names_in_the_same_order():
    text = (setup.CSRC / "common" / "activation.h").read_text()
    table = text[text.index("#define FASTFT_ACTIVATIONS(X)") :].split("// clang-format on")[0]
    names = re.findall(r"^  X\((\w+),", table, re.MULTILINE)
    assert tuple(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() for name in names) == activations.NAMES
    assert [activations.index(name) for name in activations.NAMES] == list(range(len(names)))


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_a_name_of_transformers_means_the_same_function_or_nothing(name):
    try:
        canonical = activations.resolve(name)
    except ValueError as refusal:
        assert repr(name) in str(refusal)
        assert all(valid in str(refusal) for valid in activations.NAMES)
        return
    z = torch.linspace(-6, 6, 10_001, dtype=torch.float64)
    theirs = ACT2FN[name](z)
    assert ((activations.torch_function(canonical)(z) - theirs).abs() <= error.ulps(theirs, torch.float32)).all()


@pytest.mark.parametrize("wrong", ["gelu_10", "GELU", "", None, 6, torch.nn.functional.gelu])
def test_an_unknown_activation_is_named_in_the_error(wrong):
    for function in (activations.resolve, activations.index, activations.torch_function):
        with pytest.raises(ValueError, match=re.escape(repr(wrong))):
            function(wrong)


# ---- values


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", activations.NAMES)
def test_value_and_slope_are_within_the_error_budget(name, dtype, isa):
    function, budget = activations.torch_function(name), error.Budget(dtype == torch.float64)
    for case, z in spread(0).items():
        z = z.to(dtype)
        theirs = value_and_slope(function, z.float())
        budget.add(our_value_and_slope(name, isa, z), theirs, value_and_slope(function, z.double()), case=case)
    budget.check()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", activations.NAMES)
def test_at_zero_infinity_and_nan_values_are_pytorchs(name, dtype, isa):
    function = activations.torch_function(name)
    z = torch.tensor([torch.nan, *EDGES, *(-edge for edge in EDGES)], dtype=dtype)
    truth, limit = (value_and_slope(function, x) for x in (z.double(), z.double().clamp(-1e4, 1e4)))
    for what, got in our_value_and_slope(name, isa, z).items():
        number = ~truth[what].isnan()
        near = (got - truth[what]).abs() <= ULPS[dtype] * error.ulps(truth[what], dtype)
        same = near | (got == truth[what].to(dtype))
        # PyTorch's own NaN: inf - inf or inf * 0 in its formula, where ours may know the limit
        right = torch.where(number, same, got.isnan() | (got == limit[what]) & z.isinf())
        assert right.all(), [(what, *row) for row in torch.stack([z, got, truth[what]], 1)[~right].tolist()]


# ---- below the table


@pytest.mark.parametrize("name", MAX_ULPS)
def test_no_error_is_larger_than_numeric_h_states(name, isa):
    # Every 4999th float32 number, of both signs
    x = torch.arange(-(2**31), 2**31, 4999, dtype=torch.int64).to(torch.int32).view(torch.float32)
    truth, got = FUNCTIONS[name](x.double()), ours(name, isa, x)
    rounded = truth.float()
    same = (got == rounded) | (got.isnan() & rounded.isnan())
    ulps = ((got - truth).abs() / error.ulps(truth, torch.float32)).masked_fill(same, 0)
    worst = ulps.nan_to_num(torch.inf).argmax()
    assert ulps[worst] <= MAX_ULPS[name], f"{name}({x[worst]}) = {got[worst]}, not {truth[worst]}"


def test_a_softmaxs_exponential_is_as_good_as_stated(isa):
    x = spread(3)["uniform"].float() * 7  # where the result is a normal number
    truth = torch.exp(x.double())
    precise, rough = ((ours(name, isa, x) - truth).abs() for name in ("exp_times", "rough_exp"))
    assert (precise / error.ulps(truth, torch.float32) - x.abs() / 20).max() < 2.6
    assert (rough / truth).max() < 2**-13


def test_what_becomes_a_bfloat16_is_far_closer_than_its_rounding(isa):
    z = torch.linspace(-8, 8, 100_001)
    value, slope = ours("rough_gelu", isa, z), ours("rough_gelu_slope", isa, z)
    true = value_and_slope(torch.nn.functional.gelu, z.double())
    weight = torch.special.ndtr(z.double())
    assert ((value - true["f"]).abs() / z.double().abs().clamp(1e-9)).max() < 6.3e-7
    assert (slope - true["df"]).abs().max() < 2.3e-6
    tail = (z > -5.25) & (z < 0)  # half an ulp there: 2^-8 to 2^-9 of the value
    assert ((value / (z.double() * weight) - 1).abs()[tail]).max() < 2**-9


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64_functions_are_within_the_error_budget(name, isa):
    budget = error.Budget(double=True)
    for case, x in spread(1).items():
        x = x.abs() if name in ("log", "log1p") else x
        theirs, truth = FUNCTIONS[name](x.float()), FUNCTIONS[name](x)
        budget.add({name: ours(name, isa, x)}, {name: theirs}, {name: truth}, case=case)
    budget.check()


@pytest.mark.parametrize("name", ["Gelu", "Gelu'", "Softplus"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_value_does_not_depend_on_its_place_in_the_register(name, dtype, isa):
    x = spread(2)["wide"][:67].to(dtype)
    whole = ours(name, isa, x)
    assert all(torch.equal(ours(name, isa, x[start:]), whole[start:]) for start in range(67))
