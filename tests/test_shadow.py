"""Copies of weights that fastft.optim.AdamW writes: the right numbers, or none.

The kernel is CUDA's, run by tests/simt on tensors that are taken to be on a GPU."""

import copy
import gc
import pickle
import weakref

import pytest
import simt
import torch
from optimizers import step

from fastft.functional import _choice, _shadow
from fastft.optim import AdamW

LOW = torch.bfloat16


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(_shadow, "_is_on_gpu", lambda tensor: True)
    with simt.cuda_on_cpu():
        yield


def make(*shapes, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    return params, AdamW(params, shadow=LOW, **options)


def advance(optimizer, *params):
    step(optimizer, params, [torch.randn_like(param) for param in params])


def written(*shapes, ask=None, **options):
    """Parameters with copies, their optimizer."""
    params, optimizer = make(*shapes, **options)
    advance(optimizer, *params)
    for param in params if ask is None else ask(params):
        assert _shadow.low(param, LOW).dtype == LOW
    advance(optimizer, *params)
    return params, optimizer


def taken(weight, dtype=LOW):
    """Whether what is taken of it was written by its optimizer; the numbers are right in any case."""
    found = _shadow.low(weight, dtype)
    assert torch.equal(found, weight.to(dtype))
    return found is _shadow.low(weight, dtype)


def test_what_was_asked_for_is_written_from_the_next_step_on():
    (weight, other), optimizer = make((6, 5), (4, 3))
    assert not taken(weight)
    advance(optimizer, weight, other)
    assert not taken(weight)  # this asks
    for _ in range(3):
        advance(optimizer, weight, other)
        assert taken(weight) and taken(weight.detach()) and taken(weight.view(6, 5))
    assert optimizer._shadows._of[other].tensor is None
    assert not taken(weight, torch.float16) and not taken(weight.t()) and not taken(weight[:5])
    assert _shadow.low(weight, torch.float32) is weight


def test_parameters_that_need_none_get_none():
    t = torch.randn
    bias, transposed = torch.nn.Parameter(t(7)), torch.nn.Parameter(t(5, 4).t())
    half, frozen = torch.nn.Parameter(t(4, 4).to(LOW)), torch.nn.Parameter(t(3, 3), requires_grad=False)
    optimizer = AdamW([bias, transposed, half, frozen], shadow=LOW)
    for _ in range(3):
        for param in (bias, transposed, half):
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert not any(taken(param) for param in (bias, transposed, frozen))
    assert not optimizer._shadows._of


CHANGES = {
    "copied into": lambda weight: weight.copy_(torch.randn_like(weight)),
    "multiplied": lambda weight: weight.mul_(2),
    "through an alias": lambda weight: weight.detach()[0].zero_(),
    "loaded": lambda weight: torch.nn.ParameterList([weight]).load_state_dict({"0": torch.randn_like(weight)}),
    "moved": lambda weight: setattr(weight, "data", torch.randn_like(weight)),
    "of another shape": lambda weight: setattr(weight, "data", torch.randn(3, 10)),
    "of another dtype": lambda weight: setattr(weight, "data", weight.data.double()),
    "initialised": torch.nn.init.zeros_,
    "another optimizer": lambda weight: step(torch.optim.SGD([weight]), [weight], [torch.ones_like(weight)]),
    "our other optimizer": lambda weight: step(AdamW([weight]), [weight], [torch.ones_like(weight)]),
    "ours that is PyTorch's": lambda weight: _fused_step(weight),
}


def _fused_step(weight):
    with _choice.use_backend("torch"):
        step(AdamW([weight], fused=True), [weight], [torch.ones_like(weight)])


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_is_not_taken_once_another_has_written(change):
    (weight, other), optimizer = written((6, 5), (4, 3))
    assert taken(weight) and taken(other)
    with torch.no_grad():
        CHANGES[change](weight)
    assert not taken(weight) and taken(other)
    if weight.dtype == torch.float32 and weight.shape == (6, 5):
        for _ in range(2):  # where it has moved, it is asked for anew
            advance(optimizer, weight, other)
            again = taken(weight)
        assert again


def test_what_lies_where_a_parameter_was_is_not_taken_for_it():
    (weight,), _ = written((6, 5))
    memory = weight.detach()
    weight.data = torch.randn(6, 5)
    assert not taken(memory) and not taken(torch.nn.Parameter(memory))


def test_the_last_of_two_optimizers_is_right():
    (weight,), first = written((6, 5))
    second = AdamW([weight], shadow=LOW)
    for optimizer in (second, first, second, second, first, first):
        advance(optimizer, weight)
        taken(weight)
    assert taken(weight)
    del second, optimizer
    gc.collect()
    advance(first, weight)
    assert taken(weight)


def test_an_update_by_pytorch_s_kernel_is_seen():
    (weight,), optimizer = written((6, 5), fused=True)
    assert taken(weight)
    with _choice.use_backend("torch"):
        advance(optimizer, weight)
    assert not taken(weight)
    advance(optimizer, weight)
    assert taken(weight)


def test_a_step_that_fails_leaves_no_copy(monkeypatch):
    """Memory that was made for one, and not written."""
    (weight,), optimizer = make((6, 5))
    advance(optimizer, weight)
    taken(weight)
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.fastft, "adamw", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            advance(optimizer, weight)
    assert optimizer._shadows._of[weight].tensor is not None and not taken(weight)


def test_a_parameter_without_gradient_keeps_its_copy():
    (weight, other), optimizer = written((6, 5), (4, 3))
    weight.grad = None
    other.grad = torch.ones_like(other)
    optimizer.step()
    assert taken(weight) and taken(other)


def test_copies_die_with_their_optimizer():
    (weight,), optimizer = written((6, 5))
    memory = weakref.ref(optimizer._shadows._of[weight].tensor)
    del optimizer
    gc.collect()
    assert memory() is None and not _shadow._at and not taken(weight)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copied_optimizer_has_its_own(again):
    (weight,), optimizer = written((6, 5))
    other = again(optimizer)
    (its,) = other.param_groups[0]["params"]
    assert other.shadow == LOW and other._shadows is None and not taken(its) and taken(weight)
    for _ in range(2):
        advance(other, its)
        found = taken(its)
    assert found and taken(weight)
    assert other.state_dict().keys() == torch.optim.AdamW([its]).state_dict().keys()


@pytest.mark.parametrize("shapes", [[(6, 8), (6, 8), (4, 8)], [(6, 5), (6, 5), (4, 5)]], ids=["side by side", "odd"])
def test_copies_of_weights_side_by_side_are_not_copied(shapes):
    params, optimizer = make(*shapes)
    biases = [torch.nn.Parameter(torch.randn(6)) for _ in params]
    every = [tensor for pair in zip(params, biases, strict=True) for tensor in pair]
    optimizer = AdamW(every, shadow=LOW)
    for _ in range(2):
        advance(optimizer, *every)
        joined = _shadow.joined(params, LOW)
    assert torch.equal(joined, torch.cat(params).to(LOW))
    is_view = joined.data_ptr() == _shadow.low(params[0], LOW).data_ptr()
    assert is_view == all(shape[1] == 8 for shape in shapes)
    assert torch.equal(_shadow.joined([params[2], params[0]], LOW), torch.cat([params[2], params[0]]).to(LOW))
    with torch.no_grad():
        params[1].add_(1)
    assert _shadow.joined(params, LOW) is None


def test_compiled_code_converts():
    (weight,), _ = written((6, 5))
    compiled = torch.compile(lambda: _shadow.low(weight, LOW) + 0, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = weight.to(LOW)
        assert torch.equal(compiled(), expected)
        weight.data.mul_(2)  # which is not seen otherwise
        assert torch.equal(compiled(), expected * 2)


@pytest.mark.parametrize("shadow", [torch.float32, "bfloat16", True])
def test_wrong_dtypes_of_copies(shadow):
    with pytest.raises(ValueError, match=rf"AdamW: shadow is {shadow}, must be torch.bfloat16, torch.float16 or None"):
        AdamW([torch.nn.Parameter(torch.ones(1))], shadow=shadow)
