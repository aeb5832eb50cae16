"""torch.nn.Embedding with a gradient of ours."""

import pytest
import torch

import fastft
from fastft.functional import _choice
from fastft.functional.embedding import embedding

V, H = 50, 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_values_and_gradients_have_pytorchs_bits(dtype, padding_idx):
    torch.manual_seed(0)
    for shape in ((4, 7), (1,), (0,), ()):
        indices = torch.randint(0, 6, shape)
        grads, outputs = [], []
        for function in (embedding, torch.nn.functional.embedding):
            weight = torch.randn(V, H, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
            outputs.append(function(indices, weight, padding_idx))
            upstream = torch.randn(*shape, H, generator=torch.Generator().manual_seed(2)).to(dtype)
            outputs[-1].backward(upstream)
            grads.append(weight.grad)
        assert torch.equal(*outputs) and torch.equal(*grads)


def test_second_derivatives_are_pytorchs():
    weight = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[1, 1, 4]])
    assert torch.autograd.gradcheck(lambda w: embedding(indices, w, 4)[:, :2].sum(-1), weight)
    assert torch.autograd.gradgradcheck(lambda w: embedding(indices, w).square().sum(-1), weight)


def test_optimize_takes_it_and_gives_it_back():
    model = torch.nn.Sequential(torch.nn.Embedding(V, H, padding_idx=0))
    fastft.optimize(model)
    with _choice.use_backend("fastft"):
        model(torch.tensor([[1, 0]])).sum().backward()
    assert model[0].weight.grad[1].tolist() == [1] * H and not model[0].weight.grad[0].any()
    assert type(fastft.restore(model)[0]) is torch.nn.Embedding


def test_what_is_unusual_is_pytorchs_and_reported():
    model = fastft.optimize(torch.nn.Sequential(torch.nn.Embedding(V, H, sparse=True)))
    model(torch.tensor([1])).sum().backward()
    assert model[0].weight.grad.is_sparse
    assert fastft.report(model).as_dict()["modules"]["0"]["reason"] == "its sparse is set"
