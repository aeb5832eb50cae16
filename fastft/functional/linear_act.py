"""Fused linear layer and activation; the kernels are csrc/*/linear_act.*."""

import functools

import torch
from torch.nn import functional as F

from fastft import activations
from fastft.functional import _arena, _autograd, _choice, _shadow, _tuning

_DTYPES = _choice.DTYPES


def linear_act(input, weight, bias=None, activation="gelu"):
    """Linear layer and activation in one pass over memory: ``act(input @ weight.T + bias)``.

    Under autocast, ``input`` is converted to autocast's dtype as torch.nn.functional.linear does, while float32
    parameters are converted inside the kernel and get float32 gradients.

    Args:
        input: ``(*, K)``, float32, bfloat16 or float64 (float16 on CUDA); any strides, empty allowed.
        weight: ``(N, K)``, same dtype.
        bias: ``(N,)``, same dtype, or None.
        activation: a name in :data:`ACTIVATIONS` or an alias of transformers; ``"gelu"`` is erf
            (Hendrycks & Gimpel 2016, arXiv:1606.08415).
    Returns: ``(*, N)``, dtype of ``input``; accumulated in float32 (float64 for float64), rounded once.
    Raises:
        ValueError: ``linear_act: weight is (3072, 768), input (4, 128, 512) needs (N, 512)``; likewise for dtypes,
            devices and an unknown activation.
        TypeError: an argument is not a tensor.
    Example:
        >>> linear_act(torch.ones(2, 3), torch.eye(3)).shape
        torch.Size([2, 3])
    """
    # What happens before PyTorch's op may take 3 us of a product of 100 us, and where others have had the caches each
    # look takes up to half a one: hence short names, a variable before any call, and the op's own checks.
    try:
        N, K = weight.shape
        few = N < FEW or K < FEW or input.numel() < FEW * K
        usual = few and weight.is_cpu and input.dtype in _DTYPES and (bias is None or bias.shape == (N,))
        if usual and (_tuning.by_rule or _goes_by_rule(input, N)):
            output = F.linear(input, weight, bias)
            return output if activation == "identity" else activations.torch_function(activation)(output)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        _check(input, weight, bias)
        raise
    name = activations.resolve(activation)
    if _is_plain(input, weight, bias):
        cast, why_not = None, _choice.unavailable()
    else:
        cast = _check(input, weight, bias)
        why_not = _choice.unsupported(input if cast is None else input.new_empty(0, dtype=cast), weight, bias)
    # On the CPU `few` is what the shipped rule would say, 2 us later.
    slower = few if _tuning.by_rule and weight.is_cpu else why_not is None and _slower(input, weight, bias, cast)
    if not _choice.runs("linear_act", why_not, slower):
        return reference(input, weight, bias, name)
    dtype = cast or input.dtype
    if cast is not None:
        masters = weight.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32)
        if not masters:
            weight, bias = weight.to(cast), None if bias is None else bias.to(cast)
        if not (masters and rounds_input(input, cast)):
            input = input.to(cast)
    index = activations.index(name)
    if _autograd.needs_grad(input, weight, bias):
        return _autograd.apply(_LinearAct, input, weight, bias, index, dtype)
    return forward(input, weight, bias, index, dtype, keep=False)[0]


def reference(input, weight, bias, activation):
    """The same in PyTorch's functions: fall-back, source of second derivatives and yardstick."""
    if weight.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
        weight, bias = weight.to(input.dtype), None if bias is None else bias.to(input.dtype)
    return activations.torch_function(activation)(F.linear(input, weight, bias))


def _check(input, weight, bias):
    """Raises for what a user can get wrong; returns the dtype that autocast asks for, or None."""
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, torch.Tensor) and not (tensor is None and name == "bias"):
            raise TypeError(f"linear_act: {name} must be a tensor, got {type(tensor).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"linear_act: weight is {tuple(weight.shape)}, needs two dimensions (N, K)")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        needs = f"(N, {input.shape[-1]})" if input.dim() else "an input of at least one dimension (*, K)"
        raise ValueError(f"linear_act: weight is {tuple(weight.shape)}, input {tuple(input.shape)} needs {needs}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_act: bias is {tuple(bias.shape)}, weight {tuple(weight.shape)} needs {tuple(weight.shape[:1])}"
        )
    cast = _autograd.autocast_dtype(input)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != input.device:
            raise ValueError(f"linear_act: {name} is on {tensor.device}, input on {input.device}")
        if tensor.dtype != input.dtype and cast is None:
            raise ValueError(f"linear_act: {name} is {tensor.dtype}, input {input.dtype}")
    if not input.is_floating_point():
        raise ValueError(f"linear_act: input is {input.dtype}, must be a floating-point tensor")
    return cast


def rounds_input(input, cast):
    """Whether the kernel itself rounds ``input`` to ``cast``, and gives it a gradient that is not rounded."""
    return input.is_cpu and input.dtype == torch.float32 and cast == torch.bfloat16


def _goes_by_rule(input, N):
    """Whether PyTorch's runs of few rows, inputs or outputs: nothing was measured that could decide, or the product is
    over, after 40 us at most, before that has been found out."""
    return input.is_cpu and _choice.backend() == "auto" and (not _choice.table("cpu") or input.numel() * N < 1 << 22)


def _is_plain(input, weight, bias):
    """Whether this is a usual call on the CPU, in which there is nothing to complain of: a third of :func:`_check`."""
    if input is None or weight is None or not _choice.plain(input, weight, bias) or torch.is_autocast_enabled("cpu"):
        return False
    dtype, shape = input.dtype, weight.shape
    return (
        weight.dtype is dtype
        and len(shape) == 2
        and input.ndim > 0
        and input.shape[-1] == shape[1]
        and (bias is None or (bias.dtype is dtype and bias.shape == shape[:1]))
    )


def _slower(input, weight, bias, cast):
    device = "cpu" if input.is_cpu else input.device.type
    M, (N, K) = _count_rows(input), weight.shape
    shipped = shipped_rule(device, M, K, N)
    if not (facts := _choice.table(device)):
        return shipped
    train = _autograd.needs_grad(input, weight, bias)
    return _choice.slower(facts, "linear_act", cast or input.dtype, train, (M, K, N), shipped)


FEW = 64  # rows, inputs or outputs


def shipped_rule(device, M, K, N):
    """Whether PyTorch's is faster on most machines: with few rows or few outputs packing the weight costs more than the
    product, and on CUDA ours has not been measured yet."""
    return device == "cuda" or M < FEW or N < FEW or K < FEW


def _count_rows(tensor):
    return tensor.shape[:-1].numel()


def _rows(tensor, size):
    if tensor.ndim == 2 and (tensor.is_contiguous() or _arena.has_rows_apart(tensor)):
        return tensor
    return tensor.reshape(_count_rows(tensor), size).contiguous()


def forward(input, weight, bias, activation, dtype, keep, apart=False):
    """The output, and the pre-activation if the backward will need it; ``apart``: only products of ours take them."""
    N, K = weight.shape
    rows = _rows(input, K)
    if _multiplied_by_torch(rows, dtype, keep, N):
        output, preact = _forward_around_torch(rows, weight, bias, activation, dtype)
        return output.view(*input.shape[:-1], N), preact if keep and activation else None
    if apart:
        output = _arena.empty_rows(len(rows), N, dtype, input)
        preact = _arena.empty_rows(len(rows), N, dtype, input) if keep and activation else None
    else:  # no view of another tensor: callers may change it in place
        output = _arena.empty((*input.shape[:-1], N), dtype, input)
        preact = _arena.empty((len(rows), N), dtype, input) if keep and activation else None
    torch.ops.fastft.linear_act_forward(
        output if output.ndim == 2 else output.view(rows.shape[0], N),
        preact,
        rows,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        activation,
        _low(weight, dtype),
    )
    return output, preact


def backward(activation, preact, wanted, grad_output, input, weight, bias, add=None, output=None, through=None):
    """Gradients of input (plus ``add``), weight and bias, None where not wanted; ``output`` is written once more.

    ``through``: the activation that made the input, of what, and where it is written once more; then the gradient is of
    that in place of the input (:func:`goes_through_activation`).
    """
    N, K = weight.shape
    rows, grads = _rows(input, K), _rows(grad_output, N)
    if _multiplied_by_torch(grads, grads.dtype, True, N, K):
        return _backward_around_torch(activation, preact, wanted, grads, rows, weight, bias, add, output, input.shape)
    grad_input = _arena.rows_like(rows) if wanted[0] else None
    grad_weight = _arena.empty_like(weight, kind=_arena.GRADIENT) if wanted[1] else None
    grad_bias = bias.new_empty(N) if wanted[2] else None
    torch.ops.fastft.linear_act_backward(
        grad_input,
        grad_weight,
        grad_bias,
        grads,
        preact,
        rows,
        weight.contiguous(),
        activation,
        add,
        output,
        *_for_cuda(wanted, grads, preact, weight),
        *(() if through is None else (through[1], through[2], through[0])),
    )
    if grad_input is not None and rows.ndim != input.ndim:
        grad_input = grad_input.view(input.shape)
    return grad_input, grad_weight, grad_bias


def goes_through_activation(grads, weight):
    """Whether :func:`backward` takes ``through``: where the product is ours."""
    return not _multiplied_by_torch(grads, grads.dtype, True, *weight.shape)


# ---- on CUDA: PyTorch's products with our kernel before or after them


def joined_low(weights, input, dtype, train):
    """The weights one behind the other as a product of ``input`` takes them, in ``dtype``: where it is PyTorch's, and
    their optimizer has written them so; else None. Its gradient has that dtype, too."""
    if weights[0].dtype == dtype or not _multiplied_by_torch(input, dtype, train, sum(map(len, weights))):
        return None
    return _shadow.joined(weights, dtype)


def _multiplied_by_torch(rows, dtype, train, N, K=None):
    """Whether the product is PyTorch's: on GPUs, unless ours was measured to be faster there."""
    if not rows.is_cuda or _choice.backend() == "fastft":
        return False
    facts = _choice.table("cuda")
    return _choice.slower(facts, "linear_act", dtype, train, (len(rows), K or rows.shape[1], N), True)


def _forward_around_torch(rows, weight, bias, activation, dtype):
    """The output and the pre-activation, which is the same where the activation is the identity."""
    with torch.autocast(rows.device.type, enabled=False):
        preact = F.linear(rows, _shadow.low(weight, dtype), None if bias is None else bias.to(dtype))
    if not activation:
        return preact, preact
    output = torch.empty_like(preact)
    # Of a backward nothing is wanted but the activation made again.
    torch.ops.fastft.linear_act_backward(
        *(None, None, None, preact, preact, rows, weight.contiguous(), activation, None, output)
    )
    return output, preact


def _backward_around_torch(activation, preact, wanted, grads, rows, weight, bias, add, output, shape):
    if preact is not None:
        grad_preact = torch.empty_like(preact)
        torch.ops.fastft.linear_act_backward(
            *(None, None, None, grads, preact, rows, weight.contiguous(), activation),
            *(None, output, None, grad_preact, None),
        )
        grads = grad_preact
    grad_input = grad_weight = grad_bias = None
    with torch.autocast(grads.device.type, enabled=False):
        if wanted[0]:
            low = _shadow.low(weight, grads.dtype)
            grad_input = (grads @ low if add is None else torch.addmm(add, grads, low)).view(shape)
        if wanted[1]:
            grad_weight = (grads.T @ rows).to(weight.dtype)
    if wanted[2]:
        grad_bias = grads.sum(0, dtype=torch.promote_types(grads.dtype, torch.float32)).to(bias.dtype)
    return grad_input, grad_weight, grad_bias


# ---- what CUDA's kernels need beside: csrc/cuda/linear_act.cu and gemm_sm80.cu

TILE, STEP = 128, 32  # of a product: rows and columns of a block, and the depth it takes at a time
BLOCKS = 2 * 132  # that run at once on an H100, and not many more than on other large GPUs
BLOCK_FLOPS, BYTES = 2e12, 2e12  # a second: of one of them among as many, and of partial sums through L2 and memory
LAUNCHES_S = 5e-6  # of the two kernels that add partial sums up


def splits(M, N, K):
    """How many parts the rows are cut into for the gradient of a weight, so that its few tiles occupy the GPU; more
    partial sums take longer to write and to add up. By sizes alone: the order of the sums is the same everywhere."""

    def seconds(parts):
        blocks = -(-N // TILE) * -(-K // TILE) * parts
        depth = -(-M // (parts * STEP)) * STEP
        rest = 2 * 4 * N * K * parts / BYTES + LAUNCHES_S if parts > 1 else 0
        return -(-blocks // BLOCKS) * 2 * TILE**2 * depth / BLOCK_FLOPS + rest

    return min(range(1, 17), key=seconds)


def _low(weight, dtype):
    """The weight in the dtype of the products, where CUDA's kernels do not take it as it is."""
    return _shadow.low(weight, dtype).contiguous() if weight.is_cuda and weight.dtype != dtype else None


def _for_cuda(wanted, grads, preact, weight):
    """The weight in their dtype, memory for the gradient of the pre-activation, and for partial sums."""
    return workspaces(wanted, grads, preact, weight) if grads.is_cuda else (None, None, None)


def workspaces(wanted, grads, preact, weight):
    """:func:`_for_cuda` on any device."""
    (M, N), K = grads.shape, weight.shape[1]
    on_tensor_cores = grads.dtype in (torch.bfloat16, torch.float16)
    parts = splits(M, N, K) if on_tensor_cores and (wanted[1] or wanted[2]) else 1
    return (
        _shadow.low(weight, grads.dtype).contiguous() if wanted[0] and weight.dtype != grads.dtype else None,
        torch.empty_like(preact) if preact is not None and any(wanted) else None,
        grads.new_empty((parts, N * K + N), dtype=torch.float32) if parts > 1 else None,
    )


class _LinearAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, activation, dtype):
        output, preact = forward(input, weight, bias, activation, dtype, keep=True)
        ctx.activation, ctx.dtype = activation, dtype
        ctx.save_for_backward(input, weight, bias, preact)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        *tensors, preact = ctx.saved_tensors
        kernel = functools.partial(backward, ctx.activation, preact, _autograd.wanted(ctx, slice(3)))

        def composition(input, *parameters):
            return reference(input.to(ctx.dtype), *parameters, activations.NAMES[ctx.activation])

        return *_autograd.gradients(kernel, composition, grad_output, *tensors), None, None
