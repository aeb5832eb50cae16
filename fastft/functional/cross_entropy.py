"""Softmax cross-entropy; the kernels are csrc/*/cross_entropy.*."""

import functools

import torch
from torch.nn import functional as F

from fastft.functional import _autograd, _choice

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # enum Reduction of csrc/kernels.h

# Logits and classes from which on a row's gradient is made in the forward, while a cache has the row, for what the last
# two gradients of losses were: 1, mostly. Where the next one is another, it is made again.
_FORESEEN_LOGITS, _FORESEEN_CLASSES = 1 << 20, 1024
_seen = (1.0, 1.0)


def cross_entropy(input, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    """Softmax cross-entropy, as torch.nn.functional.cross_entropy, one pass over the logits and one for the gradient.

    Of the forward, two numbers of a row are kept for the backward (three with soft targets). On the CPU the gradient
    of a vocabulary's logits is made in the forward, where the loss's own gradient can be foreseen (it is 1, or what it
    was twice), and kept until it is asked for. Under autocast the loss is float32; the logits are read in the dtype
    they have. float64 on the CPU and small inputs are PyTorch's.

    Args:
        input: logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, …)``, float32, bfloat16 or float64 (float16 on CUDA).
        target: class indices, int64 or uint8, shaped as ``input`` without C; or probabilities, shaped as ``input``.
        weight: ``(C,)``, a factor for each class, in the dtype of ``input`` for class indices; or None.
        ignore_index: the class index whose rows count for nothing, inside of [0, C) or out of it.
        reduction: ``"mean"`` (over the weights of the classes met), ``"sum"`` or ``"none"``.
        label_smoothing: in [0, 1], the part of the target that is spread over all classes (Szegedy et al. 2015,
            arXiv:1512.00567).
    Returns: a scalar, or the shape of ``input`` without C for ``"none"``; dtype of ``input`` (with probabilities, the
        dtype that all tensors promote to). The mean of nothing is NaN.
    Raises: the types are those of torch.nn.functional.cross_entropy.
        IndexError: ``cross_entropy: target[3] is 7, must be in [0, 5) or ignore_index -100``; on CUDA a device-side
            assertion instead, as in PyTorch.
        ValueError: ``cross_entropy: target is (3,), input (4, 5) needs (4,) or, for probabilities, (4, 5)``; reduction.
        RuntimeError: other shapes, dtypes and devices that do not match; label_smoothing.
        TypeError: an argument is not a tensor.
    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(1.3863)
    """
    arguments = input, target, weight, ignore_index, reduction, label_smoothing
    try:
        # PyTorch checks what it gets: where it is faster, our checks are left to put its errors in our words. It is
        # called without names, for what happens before it may take 3 us of 100.
        if _choice.backend() == "auto" and _slower(input):
            return F.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
        if _is_plain(input, target, weight, reduction, label_smoothing):
            dtype, why_not = input.dtype, _choice.unavailable()
        else:
            classes, dtype = check(*arguments)
            why_not = _why_not(input, target, weight, classes)
        return _run(*arguments, dtype) if _choice.runs("cross_entropy", why_not) else reference(*arguments)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        failure = error
    try:
        classes, _ = check(*arguments)
        raise_if_out_of_range(target, ignore_index, classes)
        raise failure
    finally:
        del failure  # whose traceback holds this frame, and so all tensors


def reference(input, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    """PyTorch's: fall-back, source of second derivatives and yardstick."""
    return F.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


def _is_plain(input, target, weight, reduction, label_smoothing):
    """Whether this is a usual call on the CPU, in which there is nothing to complain of: a third of :func:`check`."""
    return (
        weight is None
        and _choice.plain(input)
        and input is not None
        and type(target) is torch.Tensor
        and target.dtype is torch.int64
        and target.is_cpu
        and input.ndim == 2
        and target.shape == input.shape[:1]
        and input.shape[1] > 0
        and reduction in _REDUCTIONS
        and 0.0 <= label_smoothing <= 1.0
        and not torch.is_autocast_enabled("cpu")
    )


def check_smoothing(label_smoothing, op="cross_entropy"):
    """Raises for what is no part of a target, in the name of a public function."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"{op}: label_smoothing is {label_smoothing}, must be in [0, 1]")


def check(input, target, weight, ignore_index, reduction, label_smoothing=0.0):
    """Raises, by PyTorch's types, for what a user can get wrong; returns the number of classes and the loss's dtype."""
    check_smoothing(label_smoothing)
    for name, tensor in (("input", input), ("target", target), ("weight", weight)):
        if not isinstance(tensor, torch.Tensor) and not (tensor is None and name == "weight"):
            raise TypeError(f"cross_entropy: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(f"cross_entropy: {name} is on {tensor.device}, input on {input.device}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"cross_entropy: reduction is {reduction!r}, must be one of {', '.join(_REDUCTIONS)}")
    if not input.is_floating_point():
        raise NotImplementedError(f"cross_entropy: input is {input.dtype}, must be a floating-point tensor")
    shape, dtype = input.shape, _computed_in(input)
    if not shape:
        raise RuntimeError("cross_entropy: input is (), needs (C,), (N, C) or (N, C, d1, …)")
    classes = shape[1 if len(shape) > 1 else 0]
    if weight is not None and weight.shape != (classes,):
        raise RuntimeError(f"cross_entropy: weight is {tuple(weight.shape)}, input {tuple(shape)} needs ({classes},)")
    if target.shape == shape:
        return classes, _check_probabilities(input, target, weight, ignore_index)
    _check_indices(input, target)
    if weight is not None and _computed_in(weight) != dtype:
        raise RuntimeError(f"cross_entropy: weight is {weight.dtype}, input {input.dtype}")
    return classes, dtype


def _check_probabilities(input, target, weight, ignore_index):
    if not target.is_floating_point():
        raise RuntimeError(
            f"cross_entropy: target is {target.dtype}, must be floating-point where it has input's shape "
            f"{tuple(input.shape)}: probabilities"
        )
    if ignore_index >= 0:
        raise RuntimeError(f"cross_entropy: ignore_index is {ignore_index}, probabilities have no class to ignore")
    dtype = torch.promote_types(_computed_in(input), _computed_in(target))
    return dtype if weight is None else torch.promote_types(dtype, _computed_in(weight))


def _check_indices(input, target):
    shape, found, single = input.shape, target.shape, input.dim() == 1
    expected = () if single else shape[:1] + shape[2:]
    if found != expected and not (single and found == (1,)):
        batch = found[:1] != expected[:1] or (single and len(found) == 1)  # where PyTorch's is a ValueError
        raise (ValueError if batch else RuntimeError)(
            f"cross_entropy: target is {tuple(found)}, input {tuple(shape)} needs {tuple(expected)} or, for "
            f"probabilities, {tuple(shape)}"
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"cross_entropy: target is {target.dtype}, class indices must be torch.int64 or torch.uint8")


def _computed_in(tensor):
    """The dtype that autocast would convert the tensor to."""
    return tensor.dtype if _autograd.autocast_dtype(tensor) is None else torch.float32


def _why_not(input, target, weight, classes):
    if (why_not := _choice.unsupported(input, target if target.is_floating_point() else None, weight)) is not None:
        return why_not
    if weight is not None and _autograd.needs_grad(weight):
        return "the gradient of weight is PyTorch's"
    return None if classes else "there are no classes"


def _slower(input):
    """The shipped rule: where PyTorch is done before an autograd.Function and our checks have cost their 30 us (5 us
    without a gradient); and float64, whose exponentials are the C library's, one after the other."""
    if not input.is_cpu:
        return False
    size, shape = input.numel(), input.shape
    if not (input.requires_grad and torch.is_grad_enabled()):
        size *= 2
    if len(shape) == 2 and (classes := shape[1]) <= 24:  # PyTorch's time goes with the rows
        few = size < 2048 * classes or (size < 6144 * classes and input.dtype == torch.float32)
    else:
        few = size < 150_000
    return few or input.dtype == torch.float64


def raise_if_out_of_range(target, ignore_index, classes):
    """Says which target it was that a kernel on the CPU refused."""
    if target.is_floating_point() or target.device.type != "cpu" or torch._C._are_functorch_transforms_active():
        return
    wrong = (((target < 0) | (target >= classes)) & (target != ignore_index)).nonzero()
    if len(wrong):
        index = tuple(wrong[0].tolist())
        where = f"target[{', '.join(map(str, index))}]" if index else "target"
        raise IndexError(
            f"cross_entropy: {where} is {target[index]}, must be in [0, {classes}) or ignore_index {ignore_index}"
        )


def _run(input, target, weight, ignore_index, reduction, label_smoothing, dtype):
    if dtype != input.dtype and not (dtype == torch.float32 and input.dtype in (torch.bfloat16, torch.float16)):
        input = input.to(dtype)
    if (stored := dtype if target.is_floating_point() else torch.int64) != target.dtype:
        target = target.to(stored)
    if weight is not None and weight.dtype != dtype:
        weight = weight.to(dtype)
    options = (ignore_index, float(label_smoothing), _REDUCTIONS[reduction])
    if _autograd.needs_grad(input, target):
        return _autograd.apply(_CrossEntropy, input, target, weight, dtype, options)
    return forward(input, target, weight, dtype, options, keep=False)[0]


def _classes_last(input):
    """Whether ``(N, C, d1, …)`` lies in memory as ``(N, d1, …, C)``: then each row is contiguous."""
    return input.dim() > 2 and not input.is_contiguous() and input.movedim(1, -1).is_contiguous()


def _dense(tensor, classes_last):
    """Logits or probabilities as the kernels take them: ``(N, C, *)``, with the rows as N where classes lie last."""
    if tensor.ndim == 2 and tensor.is_contiguous():
        return tensor
    if classes_last:
        return tensor.movedim(1, -1).reshape(-1, tensor.shape[1]).contiguous()
    return (tensor if tensor.dim() > 1 else tensor[None]).contiguous()


def _like(dense, tensor, classes_last):
    """A kernel's output in the shape of ``tensor``, whose gradient it is."""
    if tensor.ndim == 2:
        return dense
    if classes_last:
        return dense.view(tensor.movedim(1, -1).shape).movedim(-1, 1)
    return dense.view(tensor.shape)


def forward(input, target, weight, dtype, options, keep, foreseen=None):
    """The loss, and what the backward needs of the rows: ``stats``, and the divisor of a mean; where the loss's own
    gradient is ``foreseen``, that of input, too."""
    _, label_smoothing, reduction = options
    probabilities, last = target.is_floating_point(), _classes_last(input)
    logits = _dense(input, last)
    rows = logits.numel() // logits.shape[1]
    statistic = torch.float64 if input.dtype == torch.float64 else torch.float32
    shape = () if reduction or input.ndim == 1 else input.shape[:1] + input.shape[2:]
    loss = input.new_empty(shape, dtype=dtype)
    stats = input.new_empty((3 if probabilities or label_smoothing else 2, rows), dtype=statistic) if keep else None
    divisor = input.new_empty((), dtype=statistic) if keep and reduction == 1 else None
    row_loss = input.new_empty(rows, dtype=statistic) if reduction and input.is_cuda else None
    target = _dense(target, last) if probabilities else target.contiguous()
    weight = None if weight is None else weight.contiguous()
    if foreseen is None:
        torch.ops.fastft.cross_entropy_forward(loss, stats, divisor, row_loss, logits, target, weight, *options)
        return loss, stats, divisor, None
    grad_input, ignore_index = torch.empty_like(logits), options[0]
    torch.ops.fastft.cross_entropy_with_grad(
        loss, stats, divisor, grad_input, foreseen, logits, target, weight, ignore_index, reduction
    )
    return loss, stats, divisor, grad_input


def backward(options, stats, divisor, wanted, grad_output, input, target, weight):
    """Gradients of input, target (where it holds probabilities) and weight (None), None where not wanted."""
    probabilities, last = target.is_floating_point(), _classes_last(input)
    logits, targets = _dense(input, last), _dense(target, last) if probabilities else target.contiguous()
    grad_input = torch.empty_like(logits) if wanted[0] else None
    grad_target = torch.empty_like(targets) if wanted[1] else None
    weight = None if weight is None else weight.contiguous()
    torch.ops.fastft.cross_entropy_backward(
        grad_input, grad_target, grad_output.contiguous(), stats, divisor, logits, targets, weight, *options
    )
    return (
        None if grad_input is None else _like(grad_input, input, last),
        None if grad_target is None else _like(grad_target, target, last),
        None,
    )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, target, weight, dtype, options):
        foreseen = _foreseen(input, target, options)
        loss, stats, divisor, grad_input = forward(input, target, weight, dtype, options, keep=True, foreseen=foreseen)
        ctx.foreseen = foreseen, grad_input
        ctx.dtype, ctx.options = dtype, options
        ctx.save_for_backward(input, target, weight, stats, divisor)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        *tensors, stats, divisor = ctx.saved_tensors
        wanted = _autograd.wanted(ctx, slice(2))
        (foreseen, grad_input), ctx.foreseen = ctx.foreseen, (None, None)  # the gradient is the caller's from now on

        def kernel(grad_output, input, target, weight):
            if wanted[0] and _is_long(input, target, ctx.options) and _see(grad_output) == foreseen:
                return grad_input, None, None
            return backward(ctx.options, stats, divisor, wanted, grad_output, input, target, weight)

        composition = functools.partial(_composition, ctx.dtype, ctx.options)
        return *_autograd.gradients(kernel, composition, grad_output, *tensors), None, None


def _is_long(input, target, options):
    """Whether making the gradient in the forward would pay."""
    _, label_smoothing, reduction = options
    return (
        not torch.compiler.is_compiling()
        and input.is_cpu
        and input.dim() == 2
        and input.shape[1] >= _FORESEEN_CLASSES
        and input.numel() >= _FORESEEN_LOGITS
        and reduction > 0
        and not label_smoothing
        and not target.is_floating_point()
    )


def _foreseen(input, target, options):
    """What the gradient of the loss will be, or None where the gradient of input is left to the backward."""
    if not (_is_long(input, target, options) and _seen[0] == _seen[1]):
        return None
    # Who takes saved tensors elsewhere, as checkpoints do, would not want another one of that size to be kept.
    return _seen[1] if torch._C._autograd._top_saved_tensors_default_hooks(True) is None else None


def _see(grad_output):
    """The gradient of a loss as a number, which is taken note of."""
    global _seen
    _seen = _seen[1], grad_output.item()
    return _seen[1]


def _composition(dtype, options, input, target, weight):
    ignore_index, label_smoothing, reduction = options
    return reference(input.to(dtype), target, weight, ignore_index, list(_REDUCTIONS)[reduction], label_smoothing)
