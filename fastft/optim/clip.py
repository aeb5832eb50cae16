"""Gradient clipping: the norm over all gradients in one pass over memory, their scaling in another where needed."""

import functools
import operator

import torch

from fastft.functional import _choice

CHUNK = 1 << 16  # kOptimizerChunk in csrc/kernels.h


@torch.no_grad()
def clip_grad_norm_(parameters, max_norm, norm_type=2.0, error_if_nonfinite=False, foreach=None):
    """torch.nn.utils.clip_grad_norm_: scales the gradients in place so that their norm is at most ``max_norm``.

    Where the norm is below already, gradients on the CPU are only read.

    Args:
        parameters: a tensor or an iterable of tensors; those without ``.grad`` are skipped.
        max_norm: of all gradients as one vector.
        norm_type: PyTorch's functions compute other norms than 2.
        error_if_nonfinite: raise where the norm is NaN or infinite, before anything is scaled.
        foreach: chooses among PyTorch's implementations, where one of them runs.
    Returns: the norm before, a scalar tensor on the first gradient's device, of the gradients' common dtype.
    Raises: RuntimeError: the norm is not finite, in torch's words.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_(weight, 1.0), weight.grad
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    given = parameters
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    why_not = f"norm_type is {norm_type}" if float(norm_type) != 2 else unsupported(grads)
    if _choice.runs("clip_grad_norm_", why_not):
        norm = total_norm(grads)
        if not error_if_nonfinite or norm.isfinite():
            scale(grads, clip_factor(norm, max_norm))
            return norm.to(common_dtype(grads))
    # An exhausted generator is handed on, torch warns of it.
    return torch.nn.utils.clip_grad_norm_(parameters or given, max_norm, norm_type, error_if_nonfinite, foreach)


def unsupported(grads):
    """A sentence if our kernels cannot take these gradients, else None."""
    if torch.compiler.is_compiling():
        return "torch.compile makes its own kernels for many tensors"
    if not grads:
        return "there are no gradients"
    return _choice.unsupported(*one_of_each(grads)) or why_not_apart(grads)


def why_not_apart(tensors):
    """A sentence if two tensors are in one place, where two threads would write at once, else None."""
    places = [tensor.data_ptr() for tensor in tensors if tensor.numel()]
    return None if len(set(places)) == len(places) else "two tensors are in the same memory"


_KIND = operator.attrgetter("__class__", "device", "dtype", "layout")


def one_of_each(tensors):
    """A tensor of each kind: a look at every single one would cost more than a small model's step."""
    return dict(zip(map(_KIND, tensors), tensors, strict=True)).values()


def common_dtype(tensors):
    return functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors})


def total_norm(grads):
    """The 2-norm of all elements of ``grads``, a scalar on the first one's device: float32, float64 with a float64."""
    alike = {}
    for grad in grads:
        alike.setdefault((grad.device, grad.dtype), []).append(in_memory_order(grad)[0].contiguous())
    norms = []
    for (device, dtype), tensors in alike.items():
        norm = torch.empty((), dtype=torch.promote_types(dtype, torch.float32), device=device)
        partial = None
        if device.type != "cpu":
            chunks = sum(-(-tensor.numel() // CHUNK) for tensor in tensors)
            partial = torch.empty(chunks, dtype=torch.float64, device=device)
        torch.ops.fastft.grad_norm(norm, partial, tensors)
        norms.append(norm)
    if len(norms) == 1:
        return norms[0]
    dtype = common_dtype(norms)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, dtype) for norm in norms]))


def clip_factor(norm, max_norm):
    """What gradients of this norm are multiplied with: as torch has it, at most 1."""
    return (float(max_norm) / (norm + 1e-6)).clamp_(max=1.0)


def scale(grads, factor):
    """``grad *= factor`` for all of them."""
    alike = {}
    for grad in grads:
        dense = in_memory_order(grad)[0]
        if dense.is_contiguous():
            alike.setdefault((grad.device, grad.dtype), []).append(dense)
        else:
            grad.mul_(factor.to(grad.device))
    for (device, dtype), tensors in alike.items():
        torch.ops.fastft.scale_grads(tensors, factor.to(device, torch.promote_types(dtype, torch.float32)))
    torch.autograd.graph.increment_version(grads)


def in_memory_order(first, *others):
    """The tensors, their dimensions in the order in which ``first`` lies in memory: contiguous, if it has no gaps."""
    if first.is_contiguous():
        return first, *others
    order = sorted(range(first.dim()), key=first.stride, reverse=True)
    return tuple(tensor.permute(order) for tensor in (first, *others))
