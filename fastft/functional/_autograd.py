"""What the ops' autograd functions share: autocast, and derivatives through PyTorch's composition."""

import torch
from torch.autograd import forward_ad


def needs_grad(*tensors):
    """Whether autograd has to record an op of these tensors (None among them is skipped)."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def apply(function, *arguments):
    """``function.apply(*arguments)``, tensors that are given twice included: torch.compile takes none of them."""
    if torch.compiler.is_compiling():
        arguments = [
            argument.view_as(argument) if _is_among(argument, arguments[:index]) else argument
            for index, argument in enumerate(arguments)
        ]
    return function.apply(*arguments)


def _is_among(argument, others):
    return isinstance(argument, torch.Tensor) and any(argument is other for other in others)


def autocast_dtype(tensor):
    """The dtype that autocast gives to ``tensor`` in a matrix product, None where it leaves it alone."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def wanted(ctx, inputs):
    """Which of these inputs, a slice of all, get a gradient in this pass of the engine.

    ``ctx.needs_input_grad`` says which may: torch.autograd.grad and ``backward(inputs=…)`` can ask for fewer.
    """
    needs = ctx.needs_input_grad
    if not torch.compiler.is_compiling():
        nodes = (node for node, _ in ctx.next_functions if node is not None)  # of inputs that may, in their order
        needs = tuple(need and _will_run(next(nodes)) for need in needs)
    return needs[inputs]


def _will_run(node):
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # of a leaf that torch.autograd.grad was asked for
        return True


def gradients(kernel, composition, grad_output, *tensors):
    """What the backward of an op returns: the gradients of ``tensors``, None where not wanted.

    Args:
        kernel: ``kernel(grad_output, *tensors)`` returns them.
        composition: ``composition(*tensors)`` is the op in PyTorch's differentiable functions.
    """
    if only_numbers(grad_output):
        return kernel(grad_output, *tensors)
    if _is_more(grad_output):
        return _composed(composition, grad_output, tensors)
    return _Backward.apply(kernel, composition, grad_output, *tensors)


def only_numbers(*grad_outputs):
    """Whether a backward gets and is asked for nothing but the numbers of gradients, which is what kernels know of."""
    return torch.compiler.is_compiling() or not (torch.is_grad_enabled() or any(map(_is_more, grad_outputs)))


def _is_more(grad_output):
    """Whether this is a batch of gradients, of ``is_grads_batched`` or torch.vmap, or one that may have a tangent."""
    return (
        forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(grad_output)
    )


def _composed(composition, grad_output, tensors):
    """By PyTorch's functions alone."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        tensors = _aliases(tensors)
        sources = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
        found = torch.autograd.grad(
            composition(*tensors), sources, grad_output, create_graph=create_graph, allow_unused=True
        )
    found = iter(found)
    return tuple(next(found) if tensor is not None and tensor.requires_grad else None for tensor in tensors)


def _aliases(tensors):
    """So that an input that was computed from another one is not differentiated through."""
    return [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]


class _Backward(torch.autograd.Function):
    """The backward of an op as a node of its own, so that ``create_graph=True`` gives the kernel's first derivatives
    and PyTorch's second ones; its arguments are those of :func:`gradients`."""

    @staticmethod
    def forward(ctx, kernel, composition, grad_output, *tensors):
        ctx.composition = composition
        ctx.save_for_backward(grad_output, *tensors)
        return tuple(kernel(grad_output, *tensors))

    @staticmethod
    def backward(ctx, *grad_grads):
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            grad_output, *tensors = _aliases(ctx.saved_tensors)
            output = ctx.composition(*tensors)
            sources = [t for t in (grad_output, *tensors) if t is not None and t.requires_grad]
            wanted = [(t, gg) for t, gg in zip(tensors, grad_grads, strict=True) if gg is not None]
            first = torch.autograd.grad(
                output, [t for t, _ in wanted], grad_output, create_graph=True, allow_unused=True
            )
            pairs = [(g, gg) for g, (_, gg) in zip(first, wanted, strict=True) if g is not None and g.requires_grad]
            second = iter([None] * len(sources))
            if pairs:
                outputs, upstream = zip(*pairs, strict=True)
                second = iter(
                    torch.autograd.grad(outputs, sources, upstream, create_graph=create_graph, allow_unused=True)
                )
        of = [next(second) if t is not None and t.requires_grad else None for t in (grad_output, *tensors)]
        return None, None, *of
