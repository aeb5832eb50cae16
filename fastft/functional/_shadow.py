"""Copies of float32 weights in the dtype of products, which :class:`fastft.optim.AdamW` writes as it updates them.

A product on a GPU takes one in place of a conversion while the weight is as its optimizer left it: in the same place,
of the same version, which PyTorch's operations in place raise. Under ``torch.compile`` and in the capture of a CUDA
graph weights are converted: a replay asks nobody whether a copy is still right.
"""

import itertools
import weakref

import torch

ALIGNED = 8  # elements: the kernel writes 16 bytes at a time

_at = weakref.WeakValueDictionary()  # address of a weight -> its _Shadow, of whichever optimizer came last


class Shadows:
    """Those of one optimizer, and gone with it."""

    def __init__(self, dtype):
        self.dtype, self._of = dtype, {}

    def to_write(self, params):
        """Where the kernel writes copies of ``params``, all on one device, of one dtype: a tensor for each, empty where
        no product asked for one; None if none did."""
        if params[0].dtype != torch.float32 or not _is_on_gpu(params[0]):
            return None
        shadows = [self._shadow(param) for param in params]
        new = [shadow for shadow in shadows if shadow is not None and shadow.asked and shadow.tensor is None]
        sizes = [-(-shadow.shape.numel() // ALIGNED) * ALIGNED for shadow in new]
        # One behind the other, as query, key and value are wanted.
        parts = torch.empty(sum(sizes), dtype=self.dtype, device=params[0].device).split(sizes) if new else ()
        for shadow, part in zip(new, parts, strict=True):
            shadow.tensor = part[: shadow.shape.numel()].view(shadow.shape)
        none = torch.empty(0, dtype=self.dtype, device=params[0].device)
        tensors = [none if shadow is None or shadow.tensor is None else shadow.tensor for shadow in shadows]
        return tensors if any(tensor is not none for tensor in tensors) else None

    def written(self, params):
        """Those copies are right from now on, until a parameter's version is another one."""
        for param in params:
            if (shadow := self._of.get(param)) is not None and shadow.version is None:
                shadow.version = param._version
                if _at.get(shadow.place) is not shadow:
                    _at[shadow.place] = shadow

    def _shadow(self, param):
        """That of a parameter, which is wrong until the kernel has run; None: it can have none."""
        if param.dim() < 2 or not param.is_contiguous() or (place := _place(param)) is None:
            return None
        shadow = self._of.get(param)
        if shadow is None or shadow.place != place or shadow.shape != param.shape:
            shadow = self._of[param] = _Shadow(param, place, self.dtype)
        shadow.version = None
        return shadow


class _Shadow:
    """Of one parameter; without memory until it was asked for."""

    def __init__(self, param, place, dtype):
        self.param, self.place, self.shape, self.dtype = param, place, param.shape, dtype
        self.asked, self.tensor, self.version = False, None, None


def low(weight, dtype):
    """``weight.to(dtype)``, which its optimizer may have written already."""
    if weight.dtype == dtype:
        return weight
    found = _find(weight, dtype)
    return weight.to(dtype) if found is None else found


def joined(weights, dtype):
    """``torch.cat`` of what the weights' optimizer has written in ``dtype``, copied only where they do not lie so; None
    if it has not written all of them."""
    found = [_find(weight, dtype) for weight in weights]
    if any(tensor is None for tensor in found):
        return None
    width, storage = found[0].shape[1], found[0].untyped_storage()._cdata
    neighbours = (
        right.storage_offset() == left.storage_offset() + left.numel() and right.untyped_storage()._cdata == storage
        for left, right in itertools.pairwise(found)
    )
    return found[0].as_strided((sum(map(len, found)), width), (width, 1)) if all(neighbours) else torch.cat(found)


def _find(weight, dtype):
    """The copy of a parameter or of an alias of one, if it is right, and a note that it is wanted."""
    if torch.compiler.is_compiling() or not _at or weight.dtype != torch.float32:
        return None
    shadow = _at.get(place := _place(weight))
    # The parameter may have moved away, and what was asked for be something else that lies there now.
    if shadow is None or _place(shadow.param) != place or shadow.dtype != dtype:
        return None
    if weight.shape != shadow.shape or not weight.is_contiguous():
        return None
    shadow.asked = True
    if shadow.tensor is None or shadow.version != shadow.param._version or _is_captured(weight):
        return None
    return shadow.tensor


def _place(tensor):
    """The address, None of what has none."""
    return tensor.data_ptr() if type(tensor) in (torch.Tensor, torch.nn.Parameter) else None


def _is_on_gpu(tensor):
    return tensor.is_cuda


def _is_captured(tensor):
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
