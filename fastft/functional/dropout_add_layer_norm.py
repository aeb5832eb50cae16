"""Dropout, residual sum and LayerNorm; the kernels are csrc/*/layer_norm.*."""

import torch

from fastft.functional import _choice, _dropout
from fastft.functional.layer_norm import check_parameters, normalize


def dropout_add_layer_norm(input, residual, weight, bias, p=0.1, training=True, eps=1e-12):
    """What ends each half of an encoder layer, in one pass over memory: ``layer_norm(residual + dropout(input))``.

    Dropout's random numbers are Philox's, from a seed that is drawn from PyTorch's generator of the device
    (torch.manual_seed makes them repeatable); ``p`` is rounded to a multiple of 2^-16, and the scale belongs to that.

    Args:
        input: ``(*, H)``, float32, bfloat16 or float64 (float16 on CUDA); any strides, no rows allowed.
        residual: shape of ``input``, floating-point.
        weight, bias: ``(H,)``, dtype of ``input``, or float32; None is ones, or zeros.
        p: probability of an element of ``input`` to be dropped.
        training: False: nothing is dropped.
        eps: added to the variance.
    Returns: shape of ``input``, dtype that PyTorch gives ``residual + input``.
    Raises:
        ValueError: ``dropout_add_layer_norm: residual is (2, 512), must be (2, 768) as input``; likewise for weight,
            bias, p, dtypes and devices.
        TypeError: an argument is not a tensor.
    Example:
        >>> dropout_add_layer_norm(torch.ones(1, 2), torch.tensor([[1.0, 3.0]]), None, None, training=False)
        tensor([[-1.,  1.]])
    """
    _check(input, residual, weight, bias, p)
    why_not = _choice.unsupported(input, residual, weight, bias)
    if why_not is None and input.shape[-1] == 0:
        why_not = "rows are empty"
    slower = input.is_cpu and input.numel() < 1 << 12
    if not _choice.runs("dropout_add_layer_norm", why_not, slower):
        return reference(input, residual, weight, bias, p, training, eps)
    drops = _dropout.threshold(p) if training else 0
    dropout = (_dropout.draw_seed(input.device), drops, 0) if drops else _dropout.NONE
    result = torch.promote_types(input.dtype, residual.dtype)
    parameter = weight if weight is not None else bias
    compute = torch.promote_types(result, result if parameter is None else parameter.dtype)
    pairs = ((compute, compute), (torch.bfloat16, torch.float32), (torch.float16, torch.float32))
    rows = input if (input.dtype, compute) in pairs else input.to(compute)
    H = input.shape[-1]
    output = normalize(
        rows.reshape(-1, H),
        residual.reshape(-1, H).to(compute),
        None if weight is None else weight.to(compute),
        None if bias is None else bias.to(compute),
        eps,
        dropout,
    )
    return output.reshape(input.shape).to(result)


def reference(input, residual, weight, bias, p=0.1, training=True, eps=1e-12):
    """The same in PyTorch's functions."""
    sum = residual + torch.nn.functional.dropout(input, p, training)
    weight, bias = (None if t is None else t.to(torch.promote_types(t.dtype, sum.dtype)) for t in (weight, bias))
    return torch.nn.functional.layer_norm(sum, sum.shape[-1:], weight, bias, eps)


def _check(input, residual, weight, bias, p):
    op = "dropout_add_layer_norm"
    for name, tensor in (("input", input), ("residual", residual), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, torch.Tensor) and (tensor is not None or name in ("input", "residual")):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if input.dim() == 0:
        raise ValueError(f"{op}: input is a scalar, needs at least one dimension (*, H)")
    if residual.shape != input.shape:
        raise ValueError(f"{op}: residual is {tuple(residual.shape)}, must be {tuple(input.shape)} as input")
    if residual.device != input.device:
        raise ValueError(f"{op}: residual is on {residual.device}, input on {input.device}")
    if not residual.is_floating_point():
        raise ValueError(f"{op}: residual is {residual.dtype}, must be a floating-point tensor")
    check_parameters(op, input, input.shape[-1:], weight, bias)
    _dropout.check_probability(op, "p", p)
