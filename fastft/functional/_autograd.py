"""What the ops' autograd functions share: autocast, and second derivatives through PyTorch's composition."""

import torch


def needs_grad(*tensors):
    """Whether autograd has to record an op of these tensors (None among them is skipped)."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


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


class Backward(torch.autograd.Function):
    """The backward of an op as a node of its own, so that ``create_graph=True`` gives the kernel's first derivatives
    and PyTorch's second ones.

    ``apply(kernel, reference, grad_output, *tensors)``: ``kernel(grad_output, *tensors)`` returns the gradients of
    ``tensors`` (None where not wanted), ``reference(*tensors)`` is the op in PyTorch's differentiable functions.
    """

    @staticmethod
    def forward(ctx, kernel, reference, grad_output, *tensors):
        ctx.reference = reference
        ctx.save_for_backward(grad_output, *tensors)
        return kernel(grad_output, *tensors)

    @staticmethod
    def backward(ctx, *grad_grads):
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases, so that an input that was computed from another one is not differentiated through.
            grad_output, *tensors = (None if t is None else t.view_as(t) for t in ctx.saved_tensors)
            output = ctx.reference(*tensors)
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
