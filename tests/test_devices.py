"""Tensors on different devices: one sentence that names both, before anything is read. The other one here is meta."""

import subprocess
import sys

import pytest
import small_models
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import fastft
import setup
from fastft import _library, functional
from fastft.functional._choice import use_backend
from fastft.functional.embedding import embeddings
from fastft.testing import error
from fastft.testing.spec import TensorMaker, all_specs


def here(*shape):
    return torch.randn(shape)


def there(*shape):
    return torch.randn(shape, device="meta")


IDS = torch.arange(3)
QKV = (1, 2, 3, 4)
TABLES = {"word": here(5, 4), "position": here(5, 4), "type": here(2, 4), "weight": here(4), "bias": here(4)}


def embedded(**other):
    ids = {"input": IDS, "position_ids": IDS, "type_ids": torch.zeros(3, dtype=torch.long)}
    return embeddings(**(ids | TABLES | other))


CASES = {
    "weight is on meta, input on cpu": [
        lambda: functional.linear_act(here(3, 4), there(5, 4)),
        lambda: functional.cross_entropy(here(3, 4), IDS, there(4)),
        lambda: functional.layer_norm(here(3, 4), (4,), there(4), here(4)),
        lambda: functional.dropout_add_layer_norm(here(3, 4), here(3, 4), there(4), here(4)),
    ],
    "bias is on meta, input on cpu": [lambda: functional.linear_act(here(3, 4), here(5, 4), there(5))],
    "target is on meta, input on cpu": [lambda: functional.cross_entropy(here(3, 4), IDS.to("meta"))],
    "residual is on meta, input on cpu": [
        lambda: functional.dropout_add_layer_norm(here(3, 4), there(3, 4), here(4), here(4))
    ],
    "linear_weight is on meta, input on cpu": [
        lambda: functional.linear_cross_entropy(here(3, 4), there(5, 4), IDS),
    ],
    "key is on meta, query on cpu": [lambda: functional.attention(here(*QKV), there(*QKV), here(*QKV))],
    "attn_mask is on meta, query on cpu": [lambda: functional.attention(*[here(*QKV)] * 3, there(3, 3))],
    "input is on meta, word on cpu": [lambda: embedded(input=IDS.to("meta"))],
    **{
        f"{name} is on meta, word on cpu": [lambda name=name: embedded(**{name: there(5, 4)})]
        for name in list(TABLES)[1:]
    },
}


@pytest.mark.parametrize("backend", ["auto", "fastft"])
@pytest.mark.parametrize("said", CASES)
def test_tensors_on_different_devices_are_named(said, backend):
    for call in CASES[said]:
        with use_backend(backend), pytest.raises((ValueError, RuntimeError), match=said):
            call()


@pytest.mark.parametrize("architecture", small_models.ARCHITECTURES)
def test_a_layer_on_another_device_than_what_it_gets_is_named(architecture):
    model = fastft.optimize(small_models.build(architecture).eval())
    layers = getattr(model.base_model, "encoder", None) or model.base_model.transformer
    layers.layer[1].to("meta")
    inputs = small_models.batch(0, rows=16)  # more than few rows
    with pytest.raises((ValueError, RuntimeError), match="weight is on meta, input on cpu"):
        model(
            **({k: v for k, v in inputs.items() if k != "labels"} if architecture is small_models.BertModel else inputs)
        )


native = pytest.mark.skipif(not _library.available(), reason=f"no native library: {_library.why_not()}")


class Calls(TorchDispatchMode):
    """Of each of our ops the call with the most tensors."""

    def __init__(self):
        super().__init__()
        self.of = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastft" and func._schema.is_mutable:
            known = self.of.get(func)
            if known is None or len(tensors_of(known)) < len(tensors_of(args)):
                self.of[func] = args
        return func(*args, **(kwargs or {}))


def tensors_of(args):
    return [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]


@pytest.fixture(scope="module")
def calls():
    with Calls() as found, use_backend("fastft"):
        for spec in all_specs():
            for index, outlined in enumerate(spec.outline()):
                if spec.small(outlined) and spec.cost(outlined) < 1e-6:
                    sample = spec.sample(index, torch.float32)
                    error.run(spec.op, spec.named(sample), spec.differentiable(sample), TensorMaker(torch.float32))
        functional.dropout_add_layer_norm(here(3, 4).requires_grad_(), here(3, 4), here(4), here(4)).sum().backward()
        weight = torch.nn.Parameter(here(3, 4))
        weight.grad = here(3, 4)
        fastft.optim.AdamW([weight], max_grad_norm=1.0).step()
        fastft.optim.clip_grad_norm_([weight], 1e-3)
    return found.of


@native
def test_ops_that_are_called_directly_touch_no_memory_of_another_device(calls):
    """Run as for the CPU, whatever PyTorch's dispatcher makes of such a mixture."""
    assert {func._schema.name for func in calls} == {
        f"fastft::{name}_{way}"
        for name in ("linear_act", "cross_entropy", "head", "layer_norm", "embedding", "attention")
        for way in ("forward", "backward")
    } | {f"fastft::{name}" for name in ("embedding_scatter", "adamw", "grad_norm", "scale_grads")}
    on_cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    for func, args in calls.items():
        for one in tensors_of(args):
            mixed = tree_map(lambda leaf, one=one: leaf.to("meta") if leaf is one else leaf, args)
            with pytest.raises(RuntimeError, match=r"fastft: tensor '.*' is on another device"):
                func.redispatch(on_cpu, *mixed)


@native
@pytest.mark.skipif(not _library.has_cuda(), reason="built without CUDA")
def test_cuda_s_ops_that_are_called_directly_touch_no_memory_of_the_cpu(calls):
    on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for func, args in calls.items():
        with pytest.raises(RuntimeError, match=r"; call (it|the op) through fastft.functional"):
            func.redispatch(on_cuda, *args)


@native
def test_what_python_does_on_a_gpu_runs_on_tensors_that_claim_to_be_there():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/on_fake_gpu.py"]
    done = subprocess.run(command, cwd=setup.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
