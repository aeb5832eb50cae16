"""LayerNorm; the kernels are csrc/*/layer_norm.*, which dropout_add_layer_norm.py shares."""

import math

import torch

from fastft.functional import _arena, _autograd, _choice, _dropout

ROWS_OF_PARTIAL_SUMS = 64  # kSumRows in csrc/kernels.h


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """torch.nn.functional.layer_norm in one pass over memory: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    Args:
        input: ``(*, *normalized_shape)``, float32, bfloat16 or float64 (float16 on CUDA); any strides, no rows allowed.
        normalized_shape: the trailing dimensions that are normalised over, an int or a sequence of them.
        weight: ``normalized_shape``, same dtype as ``input`` or float32; None is ones.
        bias: ``normalized_shape``, dtype of ``weight``; None is zeros.
        eps: added to the variance.
    Returns: shape and dtype of ``input``; statistics in float32 (float64 for float64).
        Ba et al. 2016, arXiv:1607.06450.
    Raises:
        ValueError: ``layer_norm: normalized_shape is (768,), input (2, 512) needs to end in it``; likewise for weight,
            bias, dtypes and devices.
        TypeError: an argument is not a tensor.
    Example:
        >>> layer_norm(torch.tensor([[1.0, 3.0]]), 2, eps=0.0)
        tensor([[-1.,  1.]])
    """
    shape = _check(input, normalized_shape, weight, bias)
    why_not = _choice.unsupported(input, weight, bias)
    if input.numel() == 0 and why_not is None and math.prod(shape) == 0:
        why_not = "rows are empty"
    if not _choice.runs("layer_norm", why_not, _slower(input)):
        return reference(input, shape, weight, bias, eps)
    columns = math.prod(shape)
    parameter = weight if weight is not None else bias
    compute = input.dtype if parameter is None else parameter.dtype  # float32 parameters: the row in float32, too
    output = normalize(
        input.reshape(-1, columns).to(compute),
        None,
        None if weight is None else weight.reshape(columns),
        None if bias is None else bias.reshape(columns),
        eps,
    )
    return output.reshape(input.shape).to(input.dtype)


def reference(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """The same in PyTorch's function."""
    return torch.nn.functional.layer_norm(input, _shape(normalized_shape), weight, bias, eps)


def _shape(normalized_shape):
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)


def _check(input, normalized_shape, weight, bias):
    """Raises for what a user can get wrong; returns ``normalized_shape`` as a tuple."""
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, torch.Tensor) and (tensor is not None or name == "input"):
            raise TypeError(f"layer_norm: {name} must be a tensor, got {type(tensor).__name__}")
    shape = _shape(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(f"layer_norm: normalized_shape is {shape}, input {tuple(input.shape)} needs to end in it")
    check_parameters("layer_norm", input, shape, weight, bias)
    return shape


def check_parameters(op, input, shape, weight, bias):
    """Raises: ValueError: where ``weight`` or ``bias`` does not fit ``input``, whose rows have this shape."""
    if not input.is_floating_point():
        raise ValueError(f"{op}: input is {input.dtype}, must be a floating-point tensor")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}, must be {tuple(shape)}")
        if tensor.device != input.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, input on {input.device}")
        other = weight is not None and tensor.dtype != weight.dtype
        is_half = input.dtype in (torch.bfloat16, torch.float16)
        if other or not (tensor.dtype == input.dtype or (is_half and tensor.dtype == torch.float32)):
            raise ValueError(f"{op}: {name} is {tensor.dtype}, input {input.dtype}")


def _slower(input):
    """The shipped rule, not measured yet: small inputs, where a call of PyTorch's costs less."""
    return input.is_cpu and input.numel() < 1 << 15


def normalize(rows, residual, weight, bias, eps, dropout=_dropout.NONE):
    """LayerNorm of ``dropout(rows) + residual``, all dense or not, by our kernel.

    Args:
        rows: ``(M, H)``.
        residual: ``(M, H)`` or None; its dtype, the parameters' and the output's are the same.
        dropout: (seed, threshold, use) of _dropout.py.
    Returns: ``(M, H)``.
    """
    if _autograd.needs_grad(rows, residual, weight, bias):
        return _autograd.apply(_Normalize, rows, residual, weight, bias, eps, *dropout)
    return forward(rows, residual, weight, bias, eps, dropout, keep=False)[0]


def composition(rows, residual, weight, bias, eps, dropout):
    """What :func:`normalize` computes in PyTorch's functions, with the elements dropped that it drops."""
    seed, threshold, use = dropout
    if seed is not None:
        rows = rows * _dropout.factors(seed, use, threshold, *rows.shape).to(rows.dtype)
    rows = rows if residual is None else rows + residual
    return torch.nn.functional.layer_norm(rows, rows.shape[-1:], weight, bias, eps)


def forward(rows, residual, weight, bias, eps, dropout, keep):
    """The output, and what the backward needs: the normalised sum, its mean and 1 / deviation."""
    kept = next((tensor.dtype for tensor in (weight, bias, residual) if tensor is not None), rows.dtype)
    rows, M = rows.contiguous(), rows.shape[0]
    statistic = torch.float64 if kept == torch.float64 else torch.float32
    output = _arena.empty_like(rows, kept)
    summed = keep and (residual is not None or dropout[0] is not None)
    sum = _arena.empty_like(rows, kept) if summed else None
    mean, rstd = (rows.new_empty(M, dtype=statistic) if keep else None for _ in range(2))
    residual, weight, bias = (None if t is None else t.contiguous() for t in (residual, weight, bias))
    torch.ops.fastft.layer_norm_forward(output, sum, mean, rstd, rows, residual, weight, bias, eps, *dropout)
    return output, rows if sum is None else sum, mean, rstd


def backward(saved, dropout, wanted, grad_output, rows, residual, weight, bias):
    """Gradients of rows, residual, weight and bias, None where not wanted."""
    sum, mean, rstd = saved
    M, H = sum.shape
    alike = wanted[0] and wanted[1] and dropout[0] is None and rows.dtype == sum.dtype
    grad_rows = _arena.empty_like(sum, rows.dtype) if wanted[0] else None
    grad_residual = _arena.empty_like(sum) if wanted[1] and not alike else None
    grad_weight = weight.new_empty(H) if wanted[2] else None
    grad_bias = bias.new_empty(H) if wanted[3] else None
    partial = None
    if not sum.is_cpu and (wanted[2] or wanted[3]):
        partial = mean.new_empty(-(-M // ROWS_OF_PARTIAL_SUMS), 2, H)
    torch.ops.fastft.layer_norm_backward(
        *(grad_rows, grad_residual, grad_weight, grad_bias, partial, grad_output.contiguous(), sum, mean, rstd),
        *(None if weight is None else weight.contiguous(), *dropout),
    )
    return grad_rows, grad_rows if alike else grad_residual, grad_weight, grad_bias


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, residual, weight, bias, eps, seed, threshold, use):
        output, *saved = forward(rows, residual, weight, bias, eps, (seed, threshold, use), keep=True)
        ctx.eps, ctx.threshold, ctx.use = eps, threshold, use
        ctx.save_for_backward(rows, residual, weight, bias, seed, *saved)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        rows, residual, weight, bias, seed, *saved = ctx.saved_tensors
        tensors, dropout = (rows, residual, weight, bias), (seed, ctx.threshold, ctx.use)
        wanted = _autograd.wanted(ctx, slice(4))

        def kernel(grad_output, *tensors):
            return backward(saved, dropout, wanted, grad_output, *tensors)

        def same(*tensors):
            return composition(*tensors, ctx.eps, dropout)

        return *_autograd.gradients(kernel, same, grad_output, *tensors), None, None, None, None
