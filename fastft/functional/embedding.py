"""Rows of tables: torch.nn.functional.embedding, and what an encoder begins with; the kernels are csrc/*/embedding.*.

The gradient of a table is as large as the table, 94 MB in BERT-base, and autograd wants it dense and new: it is written
in one pass, into memory that is taken again, each of its rows a sum in the order of the ids.
"""

import torch

from fastft.functional import _arena, _autograd, _choice, _dropout
from fastft.functional.layer_norm import ROWS_OF_PARTIAL_SUMS

SORTED_ROWS = 16  # whose sum is one warp's on CUDA: kScatterRows


def embedding(input, weight, padding_idx=None):
    """torch.nn.functional.embedding; the gradient is summed in the order of ``input``, on any number of threads.

    Args:
        input: ``(*)``, int64 or int32.
        weight: ``(V, H)``.
        padding_idx: the row that gets no gradient, or None.
    Returns: ``(*, H)``, dtype of ``weight``.
    Example:
        >>> embedding(torch.tensor([2, 0]), torch.eye(3))
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """
    why_not = _choice.unsupported(weight)
    if why_not is None and not weight.is_cpu:
        why_not = "on a GPU PyTorch's allocator takes memory again"
    # Ours is the gradient only.
    passed = not _autograd.needs_grad(weight) or torch.compiler.is_compiling() or input.numel() == 0
    if not _choice.runs("embedding", why_not) or passed:
        return torch.nn.functional.embedding(input, weight, padding_idx)
    return _autograd.apply(_Embedding, input, weight, padding_idx)


def embeddings(
    input,
    position_ids,
    type_ids,
    word,
    position,
    type,
    weight,
    bias,
    p=0.1,
    training=True,
    eps=1e-12,
    padding_idx=(None, None, None),
):
    """What an encoder begins with, in one pass: ``dropout(layer_norm(word[input] + type[type_ids] + position[…]))``.

    Args:
        input: ``(*)``, int64 or int32.
        position_ids: int64 or int32, broadcastable to ``(*)``.
        type_ids: the same, or None where there are no types.
        word, position: ``(V, H)`` and ``(P, H)``.
        type: ``(C, H)``, or None.
        weight, bias: ``(H,)``, of LayerNorm.
        p: probability of an element of the result to be dropped, as :func:`dropout_add_layer_norm` does it.
        training: False: nothing is dropped.
        eps: added to the variance.
        padding_idx: rows of ``word``, ``position`` and ``type`` that get no gradient, or None.
    Returns: ``(*, H)``, in the dtype that PyTorch gives the sum.
    Raises:
        IndexError: an id is out of range.
        ValueError: ``embeddings: position is on cpu, word on cuda:0``; ``embeddings: input is torch.float32, must be
            torch.int64 or torch.int32``
    Example:
        >>> word, position = torch.eye(2), torch.zeros(9, 2)
        >>> ids = torch.tensor([1, 0])
        >>> embeddings(ids, torch.arange(2), None, word, position, None, torch.ones(2), torch.zeros(2), 0.0)
        tensor([[-1.,  1.],
                [ 1., -1.]])
    """
    tensors = (word, position, type, weight, bias)
    names = ("input", "position_ids", "type_ids", "word", "position", "type", "weight", "bias")
    for name, tensor in zip(names, (input, position_ids, type_ids, *tensors), strict=True):
        if tensor is not None and tensor.device != word.device:
            raise ValueError(f"embeddings: {name} is on {tensor.device}, word on {word.device}")
    for name, ids in zip(names, (input, position_ids, type_ids), strict=False):
        if ids is not None and ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"embeddings: {name} is {ids.dtype}, must be torch.int64 or torch.int32")
    why_not = _choice.unsupported(*tensors)
    if why_not is None and word.shape[-1] == 0:
        why_not = "rows are empty"
    slower = word.is_cpu and input.numel() * word.shape[-1] < 1 << 12
    if not _choice.runs("embeddings", why_not, slower):
        return reference(input, position_ids, type_ids, *tensors, p, training, eps, padding_idx)
    drops = _dropout.threshold(p) if training else 0
    dropout = (_dropout.draw_seed(word.device), drops, 0) if drops else _dropout.NONE
    result = word.dtype
    for table in (position, type):
        result = result if table is None else torch.promote_types(result, table.dtype)
    compute = torch.promote_types(result, weight.dtype)
    ids = [_rows(of, input.shape) for of in (input, position_ids, type_ids if type is not None else None)]
    tensors = [None if tensor is None else tensor.to(compute) for tensor in tensors]
    try:
        output = _run(eps, dropout, padding_idx, ids, tensors)
    except RuntimeError:
        _raise_if_out_of_range(ids, tensors)
        raise
    return output.view(*input.shape, word.shape[1]).to(result)


def reference(
    input,
    position_ids,
    type_ids,
    word,
    position,
    type,
    weight,
    bias,
    p=0.1,
    training=True,
    eps=1e-12,
    padding_idx=(None, None, None),
):
    """The same in PyTorch's functions."""
    lookup = torch.nn.functional.embedding
    sum = lookup(input, word, padding_idx[0])
    if type is not None:
        sum = sum + lookup(type_ids, type, padding_idx[2])
    sum = sum + lookup(position_ids, position, padding_idx[1])
    sum = torch.nn.functional.layer_norm(sum, sum.shape[-1:], weight, bias, eps)
    return torch.nn.functional.dropout(sum, p, training)


def _rows(ids, shape):
    """Ids as the kernels take them: ``(M,)``."""
    return None if ids is None else ids.expand(shape).reshape(-1).long().contiguous()


def _raise_if_out_of_range(ids, tables):
    """Says which id it was that a kernel on the CPU refused."""
    for name, of, table in zip(("input", "position_ids", "type_ids"), ids, tables, strict=False):
        if of is None or not of.is_cpu:
            continue
        wrong = of[(of < 0) | (of >= len(table))]
        if len(wrong):
            raise IndexError(f"embeddings: {name} has {int(wrong[0])}, must be in [0, {len(table)})")


def _run(eps, dropout, paddings, ids, tensors):
    if _autograd.needs_grad(*tensors):
        return _autograd.apply(_Embeddings, eps, *dropout, paddings, *ids, *tensors)
    return _forward(eps, dropout, ids, tensors, keep=False)[0]


def _forward(eps, dropout, ids, tensors, keep):
    """The output, and what the backward needs: the rows' means and 1 / deviations."""
    word, M = tensors[0], len(ids[0])
    output = _arena.empty((M, word.shape[1]), word.dtype, word)
    statistic = torch.float64 if word.dtype == torch.float64 else torch.float32
    mean, rstd = (word.new_empty(M, dtype=statistic) if keep else None for _ in range(2))
    tensors = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    torch.ops.fastft.embedding_forward(output, mean, rstd, *ids, *tensors, eps, *dropout)
    return output, mean, rstd


def _backward(statistics, dropout, paddings, ids, wanted, grad_output, *tensors):
    """Gradients of the tables, of weight and of bias, None where not wanted."""
    (*tables, weight, bias), (M, H) = tensors, grad_output.shape
    grad_sum = _arena.empty_like(grad_output) if any(wanted[:3]) else None
    grad_weight = weight.new_empty(H) if wanted[3] else None
    grad_bias = bias.new_empty(H) if wanted[4] else None
    partial = None
    if not grad_output.is_cpu and any(wanted[3:]):
        partial = statistics[0].new_empty(-(-M // ROWS_OF_PARTIAL_SUMS), 2, H)
    torch.ops.fastft.embedding_backward(
        *(grad_sum, grad_weight, grad_bias, partial, grad_output.contiguous(), *statistics, *ids),
        *(None if tensor is None else tensor.contiguous() for tensor in (*tables, weight)),
        *dropout,
    )
    grads = [
        _table_gradient(table, of, grad_sum, padding) if want else None
        for table, of, padding, want in zip(tables, ids, paddings, wanted[:3], strict=True)
    ]
    return *grads, grad_weight, grad_bias


def _table_gradient(table, ids, grad_rows, padding):
    """The gradient of a table of which the rows ``ids`` were taken, from theirs."""
    grad, order = _arena.empty(table.shape, table.dtype, table, _arena.GRADIENT), None
    padding, partial = -1 if padding is None else padding, None
    if not grad_rows.is_cpu:
        grad.zero_()
        ids, order = torch.sort(ids, stable=True)
        partial = sums_of_parts(grad_rows, grad)
    torch.ops.fastft.embedding_scatter(grad, ids, order, grad_rows, padding, partial)
    return grad


def sums_of_parts(grad_rows, grad):
    """Memory for sums of rows that go on in the next rows of an id."""
    M, H = grad_rows.shape
    return grad.new_empty((-(-M // SORTED_ROWS), 2, H), dtype=torch.promote_types(grad.dtype, torch.float32))


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, padding_idx):
        ctx.padding_idx = padding_idx
        ctx.save_for_backward(input, weight)
        return torch.nn.functional.embedding(input, weight)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors

        def kernel(grad_output, weight):
            rows = grad_output.reshape(-1, weight.shape[1]).contiguous()
            return (_table_gradient(weight, _rows(input, input.shape), rows, ctx.padding_idx),)

        def composition(weight):
            return torch.nn.functional.embedding(input, weight, ctx.padding_idx)

        return None, *_autograd.gradients(kernel, composition, grad_output, weight), None


class _Embeddings(torch.autograd.Function):
    @staticmethod
    def forward(ctx, eps, seed, threshold, use, paddings, input, position_ids, type_ids, *tensors):
        ids = (input, position_ids, type_ids)
        output, *statistics = _forward(eps, (seed, threshold, use), ids, tensors, keep=True)
        ctx.options = eps, threshold, use, paddings
        ctx.save_for_backward(*statistics, seed, *ids, *tensors)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        mean, rstd, seed, *saved = ctx.saved_tensors
        (eps, threshold, use, paddings), ids, tensors = ctx.options, saved[:3], saved[3:]
        dropout, wanted = (seed, threshold, use), _autograd.wanted(ctx, slice(8, None))

        def kernel(grad_output, *tensors):
            return _backward((mean, rstd), dropout, paddings, ids, wanted, grad_output, *tensors)

        def composition(*tensors):
            output = reference(*ids, *tensors, 0.0, True, eps, paddings)
            if seed is None:
                return output
            return output * _dropout.factors(seed, use, threshold, *output.shape).to(output.dtype)

        return *[None] * 8, *_autograd.gradients(kernel, composition, grad_output, *tensors)
