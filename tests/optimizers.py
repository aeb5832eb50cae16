"""Steps of fastft.optim's AdamW beside torch's."""

import pytest
import torch

from fastft import _library
from fastft.functional import _choice
from fastft.optim import AdamW
from fastft.testing import error
from fastft.testing.spec import TensorMaker

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SHAPES = [(300, 40), (77,), (), (0, 3), (70_001,), (1, 1, 5)]  # two chunks of the kernel, and what is small
STEPS = 4

native = pytest.mark.skipif(not _library.available(), reason=f"{_library.why_not()}")


class Clipped(torch.optim.AdamW):
    """torch's, with its own clipping before a step."""

    def __init__(self, params, max_grad_norm=None, **options):
        super().__init__(params, **options)
        self.max_grad_norm = max_grad_norm

    def clipped_step(self):
        if self.max_grad_norm is not None:
            params = [param for group in self.param_groups for param in group["params"]]
            torch.nn.utils.clip_grad_norm_(params, self.max_grad_norm)
        self.step()


def make(shapes, dtype, seed, steps=STEPS):
    """Start values, and gradients of each step."""
    t = TensorMaker(dtype, seed=seed)
    return [t(*shape) for shape in shapes], [[t(*shape) for shape in shapes] for _ in range(steps)]


def train(optimizer_class, values, grads, place=lambda tensor: tensor, **options):
    """Parameters and moments after as many steps as there are gradients."""
    params = [torch.nn.Parameter(place(value.clone())) for value in values]
    optimizer = optimizer_class(params, **options)
    for step_grads in grads:
        step(optimizer, params, step_grads, place)
    return results(optimizer, params)


def step(optimizer, params, grads, place=lambda tensor: tensor):
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else place(grad.clone())
    (optimizer.clipped_step if isinstance(optimizer, Clipped) else optimizer.step)()


def results(optimizer, params):
    found = {}
    for i, param in enumerate(params):
        found[f"parameter {i}"] = param.detach()
        for name, value in optimizer.state[param].items():
            found[f"{name} {i}"] = value.float() if name == "step" else value
    return found


def evaluate(dtype, place=error.guard, shapes=SHAPES, **options):
    """For error.check: ours with FASTFT_BACKEND=fastft, torch's fused one, and torch's in float64."""
    yardstick = torch.float32 if dtype == torch.float64 else dtype

    def of(seed):
        values, grads = make(shapes, dtype, seed)
        with _choice.use_backend("fastft"):
            ours = train(AdamW, values, grads, place, **options)
        single, double = (
            ([value.to(to) for value in values], [[grad.to(to) for grad in some] for some in grads])
            for to in (yardstick, torch.float64)
        )
        theirs = train(Clipped, *single, place, fused=place is error.guard, **options)
        return ours, theirs, train(Clipped, *double, place, **options)

    return of


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
