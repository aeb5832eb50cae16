"""Ops and whole models on tensors that claim to be on a GPU and have no numbers: what Python does there, of which the
CPU sees nothing. Run by test_devices.py in a process of its own, which gets a stand-in for CUDA's device guard.

PyTorch's fake tensors refuse to give a number, or to say how many there are: where that would be asked, the host would
wait for a GPU.
"""

import subprocess

import pytest
import small_models
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastft
import setup
from fastft import _library
from fastft.functional import _choice, _shadow
from fastft.functional.head import head
from fastft.models import encoder
from fastft.optim import clip
from fastft.testing.spec import all_specs

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="session", autouse=True)
def guard(tmp_path_factory):
    """As a CUDA build of PyTorch has one; that of a CPU build refuses views of fake CUDA tensors without it."""
    source = tmp_path_factory.mktemp("guard") / "guard.cpp"
    source.write_text(GUARD)
    library, at = source.with_suffix(".so"), setup.find_torch()
    flags = ("-std=c++20", "-shared", "-fPIC", f"-I{at / 'include'}", f"-L{at / 'lib'}", source, "-o", library, "-lc10")
    subprocess.run([*setup.find_compiler(), *flags], check=True)
    torch.ops.load_library(library)


@pytest.fixture(autouse=True)
def gpu(guard, monkeypatch):
    """Our CUDA kernels run, as far as anybody can tell; all tensors are fake."""
    monkeypatch.setattr(_library, "_why_not_gpu", lambda index: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(clip, "why_not_apart", lambda tensors: None)  # it compares addresses
    with FakeTensorMode(), torch.device("cuda"):
        yield


class Kernels(TorchDispatchMode):
    """The names of our kernels that were called, which get nothing of another device but the numbers of steps."""

    def __init__(self):
        super().__init__()
        self.names, self.masked = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastft" and func._schema.is_mutable:
            self.names.append(func._schema.name.removeprefix("fastft::"))
            given = [arg for arg, of in zip(args, func._schema.arguments, strict=False) if of.name != "steps"]
            devices = {leaf.device for leaf in tree_leaves((given, kwargs)) if isinstance(leaf, torch.Tensor)}
            assert devices == {GPU}, (func, devices)
            self.masked |= self.names[-1] == "attention_forward" and args[5] is not None
        return func(*args, **(kwargs or {}))


def run_backward(output, leaf):
    """The engine's work without the engine, which wants a real device: ``leaf(parameter, gradient)`` for each."""
    pending = {output.grad_fn: {0: torch.ones_like(output)}}
    while pending:
        node = max(pending, key=lambda node: node._sequence_nr())
        given = pending.pop(node)
        if hasattr(node, "variable"):
            leaf(node.variable, given[0])
            continue
        grads = getattr(node, "apply", node)(*(given.get(i) for i in range(len(node._input_metadata))))
        grads, edges = grads if isinstance(grads, tuple) else (grads,), node.next_functions
        if hasattr(node, "needs_input_grad"):  # one of Python's, which returns something for every argument
            grads = [grad for grad, need in zip(grads, node.needs_input_grad, strict=True) if need]
            edges = [edge for edge in edges if edge[0] is not None]
        for (following, at), grad in zip(edges, grads, strict=True):
            if following is not None and grad is not None:
                expected = following._input_metadata[at]
                grad, of = grad.sum_to_size(expected.shape).to(expected.dtype), pending.setdefault(following, {})
                assert grad.device == GPU
                of[at] = of[at] + grad if at in of else grad


@pytest.mark.parametrize(("dtype", "backend"), [(torch.bfloat16, "auto"), (torch.float32, "fastft")], ids=str)
@pytest.mark.parametrize("spec", all_specs(), ids=repr)
def test_every_case_has_the_shapes_dtypes_and_devices_of_pytorchs(spec, dtype, backend):
    for index, outlined in enumerate(spec.outline(dtype)):
        if not spec.small(outlined):
            continue
        sample = spec.sample(index, dtype, GPU)
        arguments, wanted = spec.named(sample), spec.differentiable(sample)
        leaves = {name: arguments[name].detach().requires_grad_() for name in wanted}
        with _choice.use_backend(backend), Kernels() as kernels:
            output = spec.op(**arguments | leaves)
            if wanted:
                grads = {}
                run_backward(output, grads.__setitem__)
                assert all(
                    grads[leaf].shape == leaf.shape and grads[leaf].dtype == leaf.dtype for leaf in leaves.values()
                )
        # PyTorch's takes packed sequences one by one, whose lengths it waits for.
        stock = arguments["query"] if "cu_seqlens" in sample.kwargs else spec.reference(**arguments)
        assert (output.shape, output.dtype, output.device) == (stock.shape, stock.dtype, GPU), sample
        assert kernels.names or backend == "auto" or output.numel() == 0, sample


class Conversions(TorchDispatchMode):
    """The shapes of float32 matrices that were converted to bfloat16."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name == "aten::_to_copy" and result.dtype == torch.bfloat16 and result.dim() == 2:
            self.shapes += [tuple(result.shape)] if args[0].dtype == torch.float32 else []
        return result


WEIGHTS = {(64, 64), (128, 64), (192, 64), (112, 64), (64, 112)}


@pytest.mark.parametrize(
    ("backend", "memory", "others"),
    [
        # The pooler's product is PyTorch's, and so is what autocast makes of its weight.
        *(("auto", memory, {(64, 64)}) for memory in ("fast", "lowest")),
        # What is ours takes query, key and value side by side in float32, and converts that.
        ("fastft", "fast", {(192, 64), (128, 64)}),
    ],
)
def test_weights_that_their_optimizer_wrote_are_not_converted(backend, memory, others, monkeypatch):
    monkeypatch.setattr(_shadow, "_place", lambda tensor: tensor.untyped_storage()._cdata)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    model = fastft.optimize(small_models.build(), activation_memory=memory)
    optimizer = fastft.optim.AdamW(model.parameters(), shadow=torch.bfloat16)
    inputs = {name: torch.ones(6, 11, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    monkeypatch.setattr(encoder, "_for_stock", lambda mask: mask)
    inputs["labels"] = torch.ones(6, dtype=torch.long)

    def converted():
        model.zero_grad()
        with _choice.use_backend(backend), Kernels(), Conversions() as conversions:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**inputs).loss
            run_backward(loss, lambda parameter, grad: setattr(parameter, "grad", grad))
            optimizer.step()
        return [shape for shape in conversions.shapes if shape in WEIGHTS]

    first, second, third = converted(), converted(), converted()
    assert first == second and len(third) == (1 if backend == "auto" else 4) and set(third) == others
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert converted() == first


BERT, *OTHERS = small_models.ARCHITECTURES[1:]
WAYS = ("fast", "low", "lowest", "autocast", "converted")


@pytest.mark.parametrize(
    ("architecture", "way", "lengths", "backend"),
    [
        *((BERT, way, lengths, "auto") for way in WAYS for lengths in ("uneven", "full", "unknown")),
        *((BERT, way, "uneven", "fastft") for way in WAYS),
        *((other, "fast", "uneven", "auto") for other in OTHERS),
    ],
)
def test_a_whole_step_runs_our_kernels_and_waits_for_nothing(architecture, way, lengths, backend, monkeypatch):
    torch.set_default_dtype(
        torch.bfloat16 if way == "converted" else torch.float32
    )  # fake parameters stay what they are
    model = small_models.build(architecture, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    torch.set_default_dtype(torch.float32)
    fastft.optimize(model, activation_memory=way if way in ("low", "lowest") else "fast")
    optimizer = fastft.optim.AdamW(model.parameters(), max_grad_norm=1.0)
    known = {"uneven": (5, 11, 3, 1, 7, 9), "full": (11,) * 6, "unknown": None}[lengths]
    mask = torch.ones(6, 11, dtype=torch.long)
    monkeypatch.setattr(encoder, "lengths_of", lambda of: known if of is mask else None)
    monkeypatch.setattr(encoder, "_for_stock", lambda mask: None if lengths == "full" else mask)
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": mask, "labels": torch.ones(6, dtype=torch.long)}

    def leaf(parameter, grad):
        assert grad.dtype == parameter.dtype
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad

    with _choice.use_backend(backend), Kernels() as kernels:
        with torch.autocast("cuda", torch.bfloat16, enabled=way == "autocast"):
            loss = model(**inputs).loss
        run_backward(loss, leaf)
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    ran = set(kernels.names)
    assert ran >= {
        f"{op}_{way}" for op in ("attention", "layer_norm", "embedding", "head") for way in ("forward", "backward")
    }
    assert ran >= {"linear_act_backward", "embedding_scatter", "grad_norm", "adamw"}
    assert ("pack_rows" in ran) == (lengths == "uneven") and kernels.masked == (lengths == "unknown")
    assert ("linear_act_forward" in ran) == (backend == "fastft")


@pytest.mark.parametrize(("classes", "rows", "ours"), [(128, 1024, True), (129, 1024, False), (128, 1025, False)])
def test_a_head_of_many_classes_or_rows_is_done_by_a_product(classes, rows, ours):
    input, weight, target = torch.ones(rows, 8), torch.ones(classes, 8), torch.ones(rows, dtype=torch.long)
    with Kernels() as kernels:
        loss, logits = head(input, weight, None, target)
    assert (loss.shape, logits.shape) == ((), (rows, classes))
    assert kernels.names[0] == ("head_forward" if ours else "cross_entropy_forward")
