"""Linear layer and softmax cross-entropy without the logits in memory: a few rows of them at a time, by the kernels of
linear_act and cross_entropy."""

import functools

import torch

from fastft.functional import _autograd, _choice
from fastft.functional.cross_entropy import backward as loss_backward
from fastft.functional.cross_entropy import check as check_loss
from fastft.functional.cross_entropy import check_smoothing, raise_if_out_of_range
from fastft.functional.cross_entropy import forward as loss_forward
from fastft.functional.linear_act import backward as linear_backward
from fastft.functional.linear_act import forward as linear_forward
from fastft.functional.linear_act import rounds_input

LOGITS_BYTES = 1 << 25  # at a time; the weight is packed anew for each part


def linear_cross_entropy(
    input,
    linear_weight,
    target,
    *,
    linear_bias=None,
    weight=None,
    reduction="mean",
    ignore_index=-100,
    label_smoothing=0.0,
):
    """``cross_entropy(input @ linear_weight.T + linear_bias, target)``, as torch.nn.functional.linear_cross_entropy.

    At most 32 MB of logits exist at a time (64 rows of them, if these are more); the backward makes them again. Class
    probabilities as targets, and inputs of other shapes, run on PyTorch's functions.

    Args:
        input: ``(N, K)``, float32, bfloat16 or float64 (float16 on CUDA); any strides, no rows allowed.
        linear_weight: ``(C, K)``, same dtype.
        target: ``(N,)`` class indices, int64 or uint8.
        linear_bias: ``(C,)``, same dtype, or None.
        weight, reduction, ignore_index, label_smoothing: those of :func:`cross_entropy`.
    Returns: a scalar, or ``(N,)`` for ``"none"``; dtype of ``input``, float32 under autocast.
    Raises:
        IndexError: ``cross_entropy: target[3] is 7, must be in [0, 5) or ignore_index -100``
        ValueError: ``linear_cross_entropy: linear_weight is (4, 8), input (2, 16) needs (C, 16)``; and what
            :func:`cross_entropy` raises.
    Example:
        >>> linear_cross_entropy(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([0, 3]))
        tensor(1.3863)
    """
    options = {"linear_bias": linear_bias, "weight": weight, "reduction": reduction}
    options |= {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    cast = _check(input, linear_weight, target, linear_bias, weight, ignore_index, reduction, label_smoothing)
    dtype = cast or input.dtype
    why_not = _why_not(input, linear_weight, target, linear_bias, weight, dtype)
    ours = _choice.runs("linear_cross_entropy", why_not, _slower(input, linear_weight))
    try:
        if not ours:
            return reference(input, linear_weight, target, **options)
        return _run(input, linear_weight, target, cast, **options)
    except (IndexError, RuntimeError):
        raise_if_out_of_range(target, ignore_index, len(linear_weight))
        raise


def reference(
    input,
    linear_weight,
    target,
    *,
    linear_bias=None,
    weight=None,
    reduction="mean",
    ignore_index=-100,
    label_smoothing=0.0,
):
    """The same in PyTorch's functions."""
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    return torch.nn.functional.cross_entropy(
        logits, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


def _check(input, linear_weight, target, linear_bias, weight, ignore_index, reduction, label_smoothing):
    """Raises for what a user can get wrong; returns the dtype that autocast asks for, or None."""
    op = "linear_cross_entropy"
    tensors = {"input": input, "linear_weight": linear_weight, "target": target}
    tensors |= {"linear_bias": linear_bias, "weight": weight}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) and not (tensor is None and name in ("linear_bias", "weight")):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, input on {input.device}")
    if linear_weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != linear_weight.shape[1]:
        needs = f"(C, {input.shape[-1]})" if input.dim() else "an input of at least one dimension"
        raise ValueError(
            f"{op}: linear_weight is {tuple(linear_weight.shape)}, input {tuple(input.shape)} needs {needs}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise ValueError(f"{op}: linear_bias is {tuple(linear_bias.shape)}, must be {tuple(linear_weight.shape[:1])}")
    cast = _autograd.autocast_dtype(input)
    for name in ("linear_weight", "linear_bias"):
        if tensors[name] is not None and tensors[name].dtype != input.dtype and cast is None:
            raise ValueError(f"{op}: {name} is {tensors[name].dtype}, input {input.dtype}")
    check_smoothing(label_smoothing, op)
    if input.dim() == 2:  # what is wrong with the rest is cross_entropy's to say, of logits without numbers
        logits = torch.empty(
            (len(input), len(linear_weight)), dtype=torch.float32 if cast else input.dtype, device="meta"
        )
        target, weight = (None if tensor is None else tensor.detach().to("meta") for tensor in (target, weight))
        check_loss(logits, target, weight, ignore_index, reduction)
    return cast


def _why_not(input, linear_weight, target, linear_bias, weight, dtype):
    if (why_not := _choice.unsupported(input.new_empty(0, dtype=dtype), input, linear_weight, linear_bias)) is not None:
        return why_not
    if input.dim() != 2:
        return f"input has {input.dim()} dimensions, not 2"
    if target.is_floating_point():
        return "targets are probabilities"
    if weight is not None and _autograd.needs_grad(weight):
        return "the gradient of weight is PyTorch's"
    return None if len(linear_weight) else "there are no classes"


def _slower(input, linear_weight):
    """The shipped rule, not measured yet: few logits, where a call of PyTorch's costs less, and CUDA, where ours has no
    tensor cores."""
    return not input.is_cpu or input.shape[:-1].numel() * len(linear_weight) < 1 << 18


def _run(input, linear_weight, target, cast, *, linear_bias, weight, reduction, ignore_index, label_smoothing):
    if cast is not None:
        masters = linear_weight.dtype == torch.float32 and (linear_bias is None or linear_bias.dtype == torch.float32)
        if not masters:
            linear_weight = linear_weight.to(cast)
            linear_bias = None if linear_bias is None else linear_bias.to(cast)
        if not (masters and rounds_input(input, cast)):
            input = input.to(cast)
    dtype = cast or input.dtype
    result = dtype if cast is None else torch.float32
    summed = torch.promote_types(dtype, torch.float32)  # losses of rows are not rounded before they are added up
    target = target.long()
    weight = None if weight is None else weight.to(summed)
    losses = _losses(input, linear_weight, linear_bias, target, weight, dtype, (ignore_index, float(label_smoothing)))
    if reduction == "none":
        return losses.to(result)
    total = losses.sum()
    if reduction == "mean":
        counts = target != ignore_index
        total = total / (counts.sum() if weight is None else (weight[target.where(counts, 0)] * counts).sum())
    return total.to(result)


def _losses(input, linear_weight, linear_bias, target, weight, dtype, options):
    """The loss of each row, ``(N,)``."""
    if _autograd.needs_grad(input, linear_weight, linear_bias):
        return _autograd.apply(_LinearCrossEntropy, input, linear_weight, linear_bias, target, weight, dtype, options)
    return _forward(input, linear_weight, linear_bias, target, weight, dtype, options, keep=False)[0]


def _chunks(input, linear_weight, dtype):
    """Slices of rows whose logits fit."""
    rows = max(64, LOGITS_BYTES // (len(linear_weight) * dtype.itemsize))
    return [slice(start, min(start + rows, len(input))) for start in range(0, max(len(input), 1), rows)]


def _forward(input, linear_weight, linear_bias, target, weight, dtype, options, keep):
    summed = torch.promote_types(dtype, torch.float32)
    losses = input.new_empty(len(input), dtype=summed)
    stats = input.new_empty((3 if options[1] else 2, len(input)), dtype=summed) if keep else None
    for rows in _chunks(input, linear_weight, dtype):
        logits, _ = linear_forward(input[rows], linear_weight, linear_bias, 0, dtype, keep=False)
        losses[rows], own, *_ = loss_forward(logits, target[rows], weight, summed, (*options, 0), keep)
        if keep:
            stats[:, rows] = own
    return losses, stats


def _backward(dtype, options, stats, target, weight, wanted, grad_output, input, linear_weight, linear_bias):
    sources = zip((input, linear_weight, linear_bias), wanted, strict=True)
    grads = [torch.empty_like(source) if want else None for source, want in sources]
    grad_input, grad_weight, grad_bias = grads
    for index, rows in enumerate(_chunks(input, linear_weight, dtype)):
        logits, _ = linear_forward(input[rows], linear_weight, linear_bias, 0, dtype, keep=False)
        kept = (*options, 0), stats[:, rows].contiguous(), None, (True, False)
        grad_logits, _, _ = loss_backward(*kept, grad_output[rows], logits, target[rows], weight)
        own = linear_backward(0, None, wanted, grad_logits, input[rows], linear_weight, linear_bias)
        if grad_input is not None:
            grad_input[rows] = own[0]
        for total, part in ((grad_weight, own[1]), (grad_bias, own[2])):
            if total is not None:
                total.copy_(part) if index == 0 else total.add_(part)
    return grads


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, weight, dtype, options):
        losses, stats = _forward(input, linear_weight, linear_bias, target, weight, dtype, options, keep=True)
        ctx.dtype, ctx.options = dtype, options
        ctx.save_for_backward(input, linear_weight, linear_bias, target, weight, stats)
        return losses

    @staticmethod
    def backward(ctx, grad_output):
        *tensors, target, weight, stats = ctx.saved_tensors
        wanted = _autograd.wanted(ctx, slice(3))
        kernel = functools.partial(_backward, ctx.dtype, ctx.options, stats, target, weight, wanted)
        ignore_index, label_smoothing = ctx.options

        def composition(input, linear_weight, linear_bias):
            return reference(
                *(input, linear_weight, target),
                linear_bias=linear_bias,
                weight=weight,
                reduction="none",
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
            )

        return *_autograd.gradients(kernel, composition, grad_output, *tensors), None, None, None, None
