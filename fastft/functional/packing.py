"""Padded sequences and their rows one after the other, on CUDA; the kernels are csrc/cuda/packing.cu.

Each is the other's gradient. On the CPU, where nobody waits for a mask, the encoder indexes.
"""

import torch

from fastft.functional import _arena


def pack(padded, present, cu_seqlens, tokens):
    """``(tokens, H)`` of ``(B, S, H)``: of each sequence ``b`` the first ``cu_seqlens[b + 1] - cu_seqlens[b]`` rows.

    ``present``, ``(B, S)`` bool or None, is where there is no padding: a device-side assertion compares both.
    """
    return _Pack.apply(padded, present, cu_seqlens, tokens)


def unpack(packed, cu_seqlens, shape):
    """``(B, S, H)``, which is ``shape``, of ``(tokens, H)``: zeros at padding."""
    return _Unpack.apply(packed, cu_seqlens, shape)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, padded, present, cu_seqlens, tokens):
        ctx.shape = padded.shape
        ctx.save_for_backward(cu_seqlens)
        packed = _arena.empty((tokens, padded.shape[2]), padded.dtype, padded)
        present = None if present is None else present.contiguous().view(torch.uint8)
        torch.ops.fastft.pack_rows(packed, padded.contiguous(), present, cu_seqlens)
        return packed

    @staticmethod
    def backward(ctx, grad_output):
        (cu_seqlens,) = ctx.saved_tensors
        return unpack(grad_output, cu_seqlens, ctx.shape), None, None, None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed, cu_seqlens, shape):
        ctx.tokens = len(packed)
        ctx.save_for_backward(cu_seqlens)
        padded = packed.new_empty(shape)
        torch.ops.fastft.unpack_rows(padded, packed.contiguous(), cu_seqlens)
        return padded

    @staticmethod
    def backward(ctx, grad_output):
        (cu_seqlens,) = ctx.saved_tensors
        return pack(grad_output, None, cu_seqlens, ctx.tokens), None, None
