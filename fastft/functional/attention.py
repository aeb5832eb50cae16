"""Scaled dot-product attention; the kernels are csrc/*/attention.*."""

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from fastft.functional import _arena, _autograd, _choice, _dropout

LARGEST_HEAD = 256  # elements of a head that the kernels are tested with


def attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    *,
    cu_seqlens=None,
    max_seqlen=None,
):
    """Attention, as torch.nn.functional.scaled_dot_product_attention: ``dropout(softmax(scale q kᵀ + mask)) v``.

    Of the forward, two numbers of a row are kept for the backward, and the seed of the dropout; no matrix of scores.
    Tensors whose last dimension is contiguous are read as they lie. The memory of the output is laid out as
    ``(B, S, N, D)``, so that ``output.transpose(1, 2).flatten(2)`` is a view. Under autocast, as PyTorch's, it computes
    in autocast's dtype. A mask that requires a gradient, heads that differ in number or size and those of more than
    256 elements are PyTorch's.

    Args:
        query: ``(B, N, S, D)``, float32, bfloat16 or float64 (float16 on CUDA); or packed, ``(T, N, D)``: the tokens of
            all sequences one after the other, without padding.
        key: likewise; S may be another one.
        value: likewise, as many rows as ``key``.
        attn_mask: bool (True: attend) or floating-point (is added to the scores), broadcastable to ``(B, N, S, S)``. A
            row that attends to nothing gives zeros. None for packed tensors.
        dropout_p: probability that a weight is dropped, whether training or not, rounded to a multiple of 2⁻¹⁶.
        is_causal: query i attends to keys 0 to i only.
        scale: of the scores, ``D ** -0.5`` if None.
        cu_seqlens: ``(B + 1,)``, int32 or int64, for packed tensors: sequence b is rows ``cu_seqlens[b]`` to
            ``cu_seqlens[b + 1]``; from 0 to T.
        max_seqlen: the length of the longest sequence; found in ``cu_seqlens`` if None, which a GPU has to wait for and
            ``torch.compile`` cannot do.
    Returns: the shape and dtype of ``query``; products and softmax in float32 (float64 for float64), rounded once.
    Raises:
        ValueError: ``attention: key is (2, 12, 7, 32), query (2, 12, 7, 64) needs (…, 64)``; likewise for the other
            shapes, dtypes and devices, dropout_p, and ``cu_seqlens`` that do not cut T tokens into sequences.
        TypeError: an argument is not a tensor, or ``max_seqlen`` not an integer.
    Example:
        >>> q, k, v = torch.ones(3, 2, 4, 7, 8)
        >>> attention(q, k, v).shape
        torch.Size([2, 4, 7, 8])
    """
    unusual = dropout_p != 0 or attn_mask is not None or cu_seqlens is not None or max_seqlen is not None
    if not unusual and _slower_at_a_glance(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale)
    arguments = query, key, value, attn_mask, dropout_p, is_causal, scale
    cast = _check(*arguments[:5], cu_seqlens, max_seqlen)
    if cu_seqlens is not None:
        max_seqlen = _longest(query, cu_seqlens, max_seqlen)
    why_not = _why_not(query, key, value, attn_mask, cast, cu_seqlens)
    slower = why_not is None and _choice.backend() == "auto" and _slower(query, key, value, cast, max_seqlen, dropout_p)
    if not _choice.runs("attention", why_not, slower):
        return reference(*arguments, cu_seqlens, max_seqlen)
    if cast is not None:
        query, key, value = query.to(cast), key.to(cast), value.to(cast)
    threshold = _dropout.threshold(dropout_p)
    call = Call(
        scale=query.shape[-1] ** -0.5 if scale is None and query.shape[-1] else scale or 0.0,
        causal=bool(is_causal),
        max_q=max_seqlen or 0,
        max_k=max_seqlen or 0,
        threshold=threshold,
    )
    seed = _dropout.draw_seed(query.device) if threshold else None
    starts = None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()
    mask = None if attn_mask is None else _mask(attn_mask, query, key, cast)
    if _autograd.needs_grad(query, key, value):
        return _autograd.apply(_Attention, query, key, value, mask, starts, seed, call)
    return forward(call, query, key, value, mask, starts, starts, seed, keep=False)[0]


def reference(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    cu_seqlens=None,
    max_seqlen=None,
):
    """PyTorch's, sequence by sequence where they are packed: fall-back and yardstick."""
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().tolist()
        parts = zip(*(t.transpose(0, 1).split(lengths, 1) for t in (query, key, value)), strict=True)
        outputs = [_stock(*(part[None] for part in three), None, options)[0] for three in parts]
        return torch.cat(outputs, 1).transpose(0, 1) if outputs else query.new_empty(query.shape)
    return _stock(query, key, value, attn_mask, options)


def _stock(query, key, value, attn_mask, options):
    if options["is_causal"] and attn_mask is not None:  # which PyTorch takes together on the CPU only
        future = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).triu(1)
        dropped = False if attn_mask.dtype == torch.bool else -torch.inf
        attn_mask, options = attn_mask.masked_fill(future, dropped), {**options, "is_causal": False}
    stock = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, query, key, value, attn_mask=attn_mask, **options
    )
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:  # the fused ones have no tangents
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return stock()
    return stock()


# ---- what a user can get wrong, what is PyTorch's


def _check(query, key, value, attn_mask, dropout_p, cu_seqlens, max_seqlen):
    """Raises for what a user can get wrong; returns the dtype that autocast asks for, or None."""
    optional = (("attn_mask", attn_mask), ("cu_seqlens", cu_seqlens))
    for name, tensor in (("query", query), ("key", key), ("value", value), *optional):
        if not isinstance(tensor, torch.Tensor) and not (tensor is None and (name, tensor) in optional):
            raise TypeError(f"attention: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"attention: {name} is on {tensor.device}, query on {query.device}")
    _dropout.check_probability("attention", "dropout_p", dropout_p)
    cast = _autograd.autocast_dtype(query)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype and (cast is None or tensor.dtype == torch.float64):
            raise ValueError(f"attention: {name} is {tensor.dtype}, query {query.dtype}")
        if tensor.dim() != query.dim():
            raise ValueError(f"attention: {name} is {tuple(tensor.shape)}, query {tuple(query.shape)}")
    if not query.is_floating_point():
        raise ValueError(f"attention: query is {query.dtype}, must be a floating-point tensor")
    if query.dim() < 2:
        raise ValueError(f"attention: query is {tuple(query.shape)}, needs (B, N, S, D)")
    if key.shape[-1] != query.shape[-1]:
        needs = f"(…, {query.shape[-1]})"
        raise ValueError(f"attention: key is {tuple(key.shape)}, query {tuple(query.shape)} needs {needs}")
    if value.shape[-2] != key.shape[-2]:
        needs = f"(…, {key.shape[-2]}, D)"
        raise ValueError(f"attention: value is {tuple(value.shape)}, key {tuple(key.shape)} needs {needs}")
    if cu_seqlens is not None:
        _check_packed(query, key, value, attn_mask, cu_seqlens)
        if isinstance(max_seqlen, torch.Tensor | float | str):
            raise TypeError(f"attention: max_seqlen must be an integer, got {type(max_seqlen).__name__}")
    elif max_seqlen is not None:
        raise ValueError(f"attention: max_seqlen is {max_seqlen}, but there are no cu_seqlens")
    if attn_mask is not None:
        _check_mask(attn_mask, query, key, cast)
    return cast


def _check_packed(query, key, value, attn_mask, cu_seqlens):
    if query.dim() != 3:
        raise ValueError(f"attention: query is {tuple(query.shape)}, with cu_seqlens it needs (T, N, D)")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape:
            needs = f"cu_seqlens need query's {tuple(query.shape)}"
            raise ValueError(f"attention: {name} is {tuple(tensor.shape)}, {needs}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(
            f"attention: cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, must be int32 or int64 (B + 1,)"
        )
    if attn_mask is not None:
        raise ValueError(f"attention: attn_mask is {tuple(attn_mask.shape)}, packed tensors take none")


def _check_mask(attn_mask, query, key, cast):
    dtype = attn_mask.dtype
    if dtype not in (torch.bool, torch.float32, query.dtype) and not (cast and attn_mask.is_floating_point()):
        raise ValueError(f"attention: attn_mask is {dtype}, must be torch.bool, torch.float32 or query's {query.dtype}")
    scores = (*query.shape[:-1], key.shape[-2])
    pairs = zip(reversed(attn_mask.shape), reversed(scores), strict=False)
    if not 2 <= attn_mask.dim() <= len(scores) or any(n not in (1, size) for n, size in pairs):
        raise ValueError(f"attention: attn_mask is {tuple(attn_mask.shape)}, must be broadcastable to {scores}")


def _longest(query, cu_seqlens, max_seqlen):
    """The longest sequence; where the numbers can be seen at no cost, they are checked."""
    if max_seqlen is not None and (not query.is_cpu or torch.compiler.is_compiling() or _has_no_numbers(cu_seqlens)):
        return max_seqlen
    starts = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    if starts[0] != 0 or starts[-1] != len(query) or min(lengths, default=0) < 0:
        raise ValueError(f"attention: cu_seqlens is {_shortened(starts)}, must ascend from 0 to T = {len(query)}")
    longest = max(lengths, default=0)
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(f"attention: max_seqlen is {max_seqlen}, but cu_seqlens have a sequence of {longest}")
    return longest if max_seqlen is None else max_seqlen


def _has_no_numbers(tensor):
    return type(tensor) is not torch.Tensor or tensor.is_meta


def _shortened(numbers):
    return numbers if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:3]))}, …, {numbers[-2]}, {numbers[-1]}]"


def _why_not(query, key, value, attn_mask, cast, cu_seqlens):
    """Why our kernels cannot run, or None."""
    tensors = (query, key, value) if cast is None else (t.new_empty(0, dtype=cast) for t in (query, key, value))
    if (why_not := _choice.unsupported(*tensors)) is not None:
        return why_not
    dims = 3 if cu_seqlens is not None else 4
    if query.dim() != dims:
        return f"query has {query.dim()} dimensions, not {dims}"
    if key.shape[:-2] != query.shape[:-2] or value.shape[:-2] != query.shape[:-2]:
        return f"query, key and value are broadcast: {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
    if value.shape[-1] != query.shape[-1]:
        return f"value has heads of {value.shape[-1]} elements, query of {query.shape[-1]}"
    if query.shape[-1] > LARGEST_HEAD:
        return f"query has heads of {query.shape[-1]} elements, more than {LARGEST_HEAD}"
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return "attn_mask requires a gradient"
    return None


def _slower_at_a_glance(query, key, value):
    """Whether PyTorch's kernel is the faster one for a usual call on the CPU, in which there is nothing to complain of.

    All the checks that come before it else take as long as its work.
    """
    try:
        (B, N, S, D), dtype, of_key = query.shape, query.dtype, key.shape
        keys = of_key[-2]
        plain = query.is_cpu and key.is_cpu and value.is_cpu and key.dtype is dtype and value.dtype is dtype
        train = query.requires_grad or key.requires_grad or value.requires_grad
        if not plain or of_key != (B, N, keys, D) or value.shape != of_key or forward_ad._current_level >= 0:
            return False
    except (AttributeError, IndexError, ValueError):  # no tensors, or of other numbers of dimensions
        return False
    if dtype not in LITTLE or not (S and keys and 0 < D <= LARGEST_HEAD) or _choice.backend() != "auto":
        return False
    rows = B * N * S
    # What takes 40 us at most is over before it has been found out what was measured of it.
    return shipped_rule("cpu", dtype, train, rows, keys) and (rows * keys <= LITTLE[dtype] or not _choice.table("cpu"))


def _slower(query, key, value, cast, max_seqlen, dropout_p):
    device = query.device.type
    if query.dim() == 3 or (dropout_p and device == "cpu"):
        # PyTorch's would be called for each packed sequence, for whose lengths a GPU would have to be waited; with
        # dropout it has no fused kernel on the CPU.
        return False
    dtype, train = cast or query.dtype, _autograd.needs_grad(query, key, value)
    rows, keys, D = sizes(query, key, max_seqlen)
    shipped = shipped_rule(device, dtype, train, rows, keys)
    if not (facts := _choice.table(device)):
        return shipped
    return _choice.slower(facts, "attention", dtype, train, (rows, keys, D), shipped)


def sizes(query, key, max_seqlen=None):
    """Rows of scores, scores of a row (at most, where sequences are packed), elements of a head."""
    if query.dim() == 3:
        return math.prod(query.shape[:2]), max_seqlen, query.shape[2]
    return math.prod(query.shape[:-1]), key.shape[-2], query.shape[-1]


LITTLE = {torch.float32: 1 << 14, torch.bfloat16: 1 << 9}  # scores that take no longer than a call of ours


def shipped_rule(device, dtype, train, rows, keys):
    """Whether PyTorch's is faster on most machines: where there is little to do, with hardly any keys, and with fewer
    heads than threads, which ours share among them whole. Of bfloat16 it has slower kernels."""
    if device == "cuda":
        return True
    if rows * keys <= LITTLE.get(dtype, 0):
        return True
    few_heads = not torch.compiler.is_compiling() and rows < keys * torch.get_num_threads()
    if dtype == torch.bfloat16:
        return few_heads and not train and rows * keys <= 8 * LITTLE[dtype]
    return few_heads or keys < 4


def _mask(attn_mask, query, key, cast):
    """The mask as the kernels take it: expanded, without a copy; a floating-point one in a dtype that they have."""
    B, N, S, _ = query.shape
    mixed = cast is None and query.dtype in (torch.bfloat16, torch.float16)
    if attn_mask.dtype not in (torch.bool, query.dtype, torch.float32 if mixed else None):
        attn_mask = _unexpanded(attn_mask).to(query.dtype)
    return attn_mask.detach().expand(B, N, S, key.shape[-2])


def _unexpanded(tensor):
    """Without the copies that it was expanded to."""
    for dim, step in enumerate(tensor.stride()):
        if step == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


# ---- the kernels. What encoder_layer strings together: a seed and its `use` are given, outputs may be.


class Call(NamedTuple):
    """What the kernels of forward and backward are told alike."""

    scale: float
    causal: bool = False
    max_q: int = 0  # length of the longest sequence where queries are packed
    max_k: int = 0  # where keys are
    threshold: int = 0  # of dropout: fastft.functional._dropout
    use: int = 0


def forward(call, query, key, value, mask, cu_q, cu_k, seed, keep, output=None):
    """The output and, where the backward needs them, each row's two statistics.

    ``query`` is ``(B, N, S, D)``, or ``(T, N, D)`` with ``cu_q``; likewise ``key`` and ``value`` with ``cu_k``.
    ``output``, if given, has query's shape and any layout whose last dimension is contiguous.
    """
    query, key, value = _readable(query), _readable(key), _readable(value)
    if output is None:
        output = _tokens_first(query)
    rows = query.shape[:-1].numel()
    dtype = torch.promote_types(query.dtype, torch.float32)
    stats = query.new_empty((2, rows), dtype=dtype) if keep else None
    torch.ops.fastft.attention_forward(output, stats, query, key, value, mask, cu_q, cu_k, *_order(call, seed))
    return output, stats


def backward(call, grads, grad_output, stats, query, key, value, mask, cu_q, cu_k, seed):
    """Writes the gradients of query, key and value into the three ``grads``, None where not wanted."""
    grad_output, query, key, value = (_readable(tensor) for tensor in (grad_output, query, key, value))
    delta = torch.empty_like(stats[0]) if query.is_cuda else None
    torch.ops.fastft.attention_backward(
        *grads, delta, grad_output, stats, query, key, value, mask, cu_q, cu_k, *_order(call, seed)
    )
    return grads


def _order(call, seed):
    return call.max_q, call.max_k, call.scale, call.causal, seed, call.threshold, call.use


def _readable(tensor):
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _tokens_first(query):
    if query.dim() == 3:
        return _arena.empty_like(query)
    B, N, S, D = query.shape
    return _arena.empty((B, S, N, D), query.dtype, query).transpose_(1, 2)  # no view: callers may change it in place


def _empty_grad(tensor):
    """In the layout of the tensor, if it is one that the kernels can write."""
    grad = torch.empty_like(tensor)
    return grad if grad.shape[-1] <= 1 or grad.stride(-1) == 1 else tensor.new_empty(tensor.shape)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, starts, seed, call):
        output, stats = forward(call, query, key, value, mask, starts, starts, seed, keep=True)
        ctx.call = call
        ctx.save_for_backward(query, key, value, stats, mask, starts, seed)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, stats, mask, starts, seed = ctx.saved_tensors
        wanted = _autograd.wanted(ctx, slice(3))

        def kernel(grad_output, *tensors):
            grads = [_empty_grad(t) if want else None for t, want in zip(tensors, wanted, strict=True)]
            return tuple(backward(ctx.call, grads, grad_output, stats, *tensors, mask, starts, starts, seed))

        same = functools.partial(composition, ctx.call, (mask, starts, starts, seed))
        grads = _autograd.gradients(kernel, same, grad_output, query, key, value)
        return *grads, None, None, None, None


# ---- in PyTorch's differentiable functions, dropping what the kernel dropped


def composition(call, others, query, key, value):
    """What :func:`forward` computes, in PyTorch's differentiable functions, dropping what it drops."""
    mask, cu_q, cu_k, seed = others
    cols = key.shape[-2] if cu_k is None else call.max_k
    rows = query.shape[:-1].numel()
    factors = None if seed is None else _dropout.factors(seed, call.use, call.threshold, rows, cols)
    if cu_q is None:
        factors = None if factors is None else factors.view(*query.shape[:-1], cols)
        return _compose(call, query, key, value, mask, factors)
    T, N, _ = query.shape
    factors = None if factors is None else factors.view(N, T, cols)
    outputs, of_queries, of_keys = [], cu_q.tolist(), cu_k.tolist()
    for b in range(len(of_queries) - 1):
        queries, keys = slice(of_queries[b], of_queries[b + 1]), slice(of_keys[b], of_keys[b + 1])
        q, k, v = (t[rows].transpose(0, 1) for t, rows in ((query, queries), (key, keys), (value, keys)))
        part = None if factors is None else factors[:, queries, : keys.stop - keys.start]
        outputs.append(_compose(call, q, k, v, None, part).transpose(0, 1))
    return torch.cat(outputs) if outputs else query.sum() * value


def _compose(call, query, key, value, mask, factors):
    scores = query @ key.mT * call.scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    if call.causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
    return (weights if factors is None else weights * factors.to(weights.dtype)) @ value
