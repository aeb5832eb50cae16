"""Rows of a table, torch.nn.functional.embedding's: PyTorch's lookup, and a gradient in memory that is taken again.

The gradient of a table is as large as the table, 94 MB in BERT-base, and autograd wants it dense and new.
"""

import torch

from fastft.functional import _arena, _autograd, _choice


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
    # Ours is the gradient only; sums of other dtypes, one row after the other, would lose more than PyTorch's do.
    sums = weight.dtype in (torch.float32, torch.float64)
    passed = not (sums and _autograd.needs_grad(weight)) or torch.compiler.is_compiling() or input.numel() == 0
    if not _choice.runs("embedding", why_not) or passed:
        return torch.nn.functional.embedding(input, weight, padding_idx)
    return _Embedding.apply(input, weight, padding_idx)


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
            grad = _arena.empty_like(weight).zero_()
            rows = grad_output.reshape(-1, weight.shape[1]).to(weight.dtype)
            grad.index_add_(0, input.reshape(-1), rows)
            if ctx.padding_idx is not None:
                grad[ctx.padding_idx].zero_()
            return (grad,)

        if torch.is_grad_enabled():

            def reference(weight):
                return torch.nn.functional.embedding(input, weight, ctx.padding_idx)

            (grad,) = _autograd.Backward.apply(kernel, reference, grad_output, weight)
        else:
            (grad,) = kernel(grad_output, weight)
        return None, grad, None
