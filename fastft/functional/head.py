"""A classifier's end: dropout, a linear layer to a few classes, cross-entropy; the kernels are csrc/*/head.*."""

import functools

import torch

from fastft.functional import _arena, _autograd, _choice, _dropout
from fastft.functional.cross_entropy import cross_entropy, raise_if_out_of_range
from fastft.functional.linear_act import linear_act

CLASSES = 1024  # kHeadClasses in csrc/kernels.h


def head(input, weight, bias, target, p=0.0, training=True, ignore_index=-100):
    """``logits = dropout(input) @ weight.T + bias``, and the mean of their cross-entropy.

    Under autocast parameters stay float32, and so is the loss.

    Args:
        input: ``(B, H)``, float32, bfloat16 or float64 (float16 on CUDA).
        weight: ``(C, H)``, same dtype.
        bias: ``(C,)``, same dtype, or None.
        target: ``(B,)`` class indices, int64.
        p: probability of an element of ``input`` to be dropped, as :func:`dropout_add_layer_norm` does it.
        training: False: nothing is dropped.
        ignore_index: the class index whose rows count for nothing.
    Returns: (loss, logits): a scalar, and ``(B, C)`` in the dtype of ``input``.
    Raises: what :func:`linear_act` and :func:`cross_entropy` raise.
    Example:
        >>> head(torch.ones(2, 3), torch.zeros(4, 3), None, torch.tensor([0, 3]))
        (tensor(1.3863), tensor([[0., 0., 0., 0.],
                [0., 0., 0., 0.]]))
    """
    _dropout.check_probability("head", "p", p)
    if not _is_usual(input, weight, bias, target):
        return _by_others(input, weight, bias, target, p, training, ignore_index)
    cast = _autograd.autocast_dtype(input)
    dtype = cast or input.dtype
    why_not = _choice.unsupported(input.new_empty(0, dtype=dtype), input, weight, bias)
    drops = _dropout.threshold(p) if training else 0
    train = _autograd.needs_grad(input, weight, bias)
    if not _choice.runs("head", why_not, _slower(input.is_cpu, len(input), *weight.shape, dtype, train, drops > 0)):
        return _by_others(input, weight, bias, target, p, training, ignore_index)
    if cast is not None:
        input, weight, bias = input.to(cast), weight.float(), None if bias is None else bias.float()
    dropout = (_dropout.draw_seed(input.device), drops, 0) if drops else _dropout.NONE
    try:
        return run(input, weight, bias, target, ignore_index, dropout)
    except RuntimeError:
        raise_if_out_of_range(target, ignore_index, len(weight))
        raise


def reference(input, weight, bias, target, p=0.0, training=True, ignore_index=-100):
    """The same in PyTorch's functions."""
    logits = torch.nn.functional.linear(torch.nn.functional.dropout(input, p, training), weight, bias)
    return torch.nn.functional.cross_entropy(logits, target, ignore_index=ignore_index), logits


def _by_others(input, weight, bias, target, p, training, ignore_index):
    """The same in our functions, each of which chooses its kernel, and says what is wrong with its arguments."""
    logits = linear_act(torch.nn.functional.dropout(input, p, training), weight, bias, "identity")
    return cross_entropy(logits, target, ignore_index=ignore_index), logits


def _is_usual(input, weight, bias, target):
    """Whether the arguments are what the kernel is for."""
    tensors = (input, weight, target) if bias is None else (input, weight, target, bias)
    if not all(isinstance(tensor, torch.Tensor) and tensor.device == input.device for tensor in tensors):
        return False
    if input.dim() != 2 or weight.dim() != 2 or input.numel() == 0 or not 0 < len(weight) <= CLASSES:
        return False
    if weight.shape[1] != input.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    if target.dtype != torch.int64 or target.shape != input.shape[:1]:
        return False
    if _autograd.autocast_dtype(input) is not None:
        return True
    return weight.dtype == input.dtype and (bias is None or bias.dtype == input.dtype)


def _slower(is_cpu, B, C, H, dtype, train, drops):
    """The shipped rule. On the CPU: where PyTorch's three calls take no longer than one of an autograd.Function, which
    saves most where there is something to round or to draw. On CUDA, not measured yet: where a product pays."""
    if not is_cpu:
        return C > 128 or B > 1024
    if dtype == torch.float64:
        return True
    if dtype == torch.bfloat16:
        return B * H < 1 << 11
    if not train:
        return B * C * H < 1 << 23
    elements = B * H
    return elements < (1 << 14 if drops else 1 << 16)


def run(input, weight, bias, target, ignore_index, dropout):
    """:func:`head` by our kernel; ``dropout`` is (seed, threshold, use) of _dropout.py."""
    if _autograd.needs_grad(input, weight, bias):
        return _autograd.apply(_Head, input, weight, bias, target, ignore_index, *dropout)
    return forward(input, weight, bias, target, ignore_index, dropout, keep=False)[:2]


def composition(input, weight, bias, target, ignore_index, dropout):
    """What :func:`run` computes in PyTorch's functions, with the elements dropped that it drops."""
    seed, threshold, use = dropout
    if seed is not None:
        input = input * _dropout.factors(seed, use, threshold, *input.shape).to(input.dtype)
    low = [None if tensor is None else tensor.to(input.dtype) for tensor in (weight, bias)]
    logits = torch.nn.functional.linear(input, *low)
    return torch.nn.functional.cross_entropy(logits.to(weight.dtype), target, ignore_index=ignore_index), logits


def forward(input, weight, bias, target, ignore_index, dropout, keep):
    """The loss, the logits, and what the backward needs: ``stats`` of the rows, and the divisor of the mean."""
    B, C = len(input), len(weight)
    statistic = torch.float64 if input.dtype == torch.float64 else torch.float32
    loss, logits = input.new_empty((), dtype=weight.dtype), input.new_empty((B, C))
    stats = input.new_empty((2, B), dtype=statistic) if keep else None
    divisor = input.new_empty((), dtype=statistic) if keep else None
    row_loss = input.new_empty(B, dtype=statistic) if input.is_cuda else None
    torch.ops.fastft.head_forward(
        *(loss, logits, stats, divisor, row_loss, _blocks_done(input)),
        *(input.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()),
        *(target.contiguous(), ignore_index, *dropout),
    )
    return loss, logits, stats, divisor


def backward(saved, target, ignore_index, dropout, wanted, grad_loss, grad_logits, input, weight, bias):
    """Gradients of input, weight and bias, None where not wanted."""
    logits, stats, divisor = saved
    grad_input = torch.empty_like(input, memory_format=torch.contiguous_format) if wanted[0] else None
    grad_weight = _arena.empty_like(weight, kind=_arena.GRADIENT) if wanted[1] else None
    grad_bias = bias.new_empty(len(weight)) if wanted[2] else None
    torch.ops.fastft.head_backward(
        *(grad_input, grad_weight, grad_bias, torch.empty_like(logits, dtype=stats.dtype) if input.is_cuda else None),
        None if grad_loss is None else grad_loss.contiguous(),
        None if grad_logits is None else grad_logits.contiguous(),
        *(logits, stats, divisor, input.contiguous(), weight.contiguous(), target.contiguous()),
        *(ignore_index, *dropout),
    )
    return grad_input, grad_weight, grad_bias


_counters = {}  # of CUDA's streams


def _blocks_done(input):
    """Where the blocks of CUDA's forward count, so that the last one adds up the loss: a zero, which the kernel leaves.

    One for each stream, whose kernels do not overlap; a captured graph, which may be replayed on any, has its own."""
    if not input.is_cuda:
        return None
    if torch.compiler.is_compiling() or type(input) is not torch.Tensor or torch.cuda.is_current_stream_capturing():
        return input.new_zeros(1, dtype=torch.int32)
    stream = input.device, torch.cuda.current_stream(input.device).cuda_stream
    if stream not in _counters:
        _counters[stream] = input.new_zeros(1, dtype=torch.int32)
    return _counters[stream]


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, target, ignore_index, seed, threshold, use):
        dropout = seed, threshold, use
        loss, logits, *stats = forward(input, weight, bias, target, ignore_index, dropout, keep=True)
        ctx.ignore_index, ctx.threshold, ctx.use = ignore_index, threshold, use
        ctx.save_for_backward(input, weight, bias, target, seed, logits, *stats)
        ctx.set_materialize_grads(False)
        return loss, logits

    @staticmethod
    def backward(ctx, grad_loss, grad_logits):
        *tensors, target, seed, logits, stats, divisor = ctx.saved_tensors
        if grad_loss is None and grad_logits is None:
            return (None,) * 8
        dropout, wanted = (seed, ctx.threshold, ctx.use), _autograd.wanted(ctx, slice(3))
        kernel = functools.partial(backward, (logits, stats, divisor), target, ctx.ignore_index, dropout, wanted)
        if _autograd.only_numbers(*(grad for grad in (grad_loss, grad_logits) if grad is not None)):
            return *kernel(grad_loss, grad_logits, *tensors), *(None,) * 5
        loss_dtype = tensors[1].dtype

        # Both outputs as one, which is what `gradients` takes.
        def joined(loss, logits):
            return torch.cat([loss.reshape(1), logits.reshape(-1)])

        def kernel_of_joined(grad, *tensors):
            return kernel(grad[0].to(loss_dtype), grad[1:].to(logits.dtype).view(logits.shape), *tensors)

        def composed(*tensors):
            return joined(*composition(*tensors, target, ctx.ignore_index, dropout))

        grad = joined(
            logits.new_zeros((), dtype=loss_dtype) if grad_loss is None else grad_loss,
            torch.zeros_like(logits) if grad_logits is None else grad_logits,
        )
        return *_autograd.gradients(kernel_of_joined, composed, grad, *tensors), *(None,) * 5
