"""An attention mask whose lengths the host knows: on a GPU, what packs sequences need not wait for it."""

import torch


class Mask(torch.Tensor):
    """``(B, S)``, one up to each sequence's length and zero behind it; ``lengths`` are the lengths, as numbers.

    Moved, pinned or copied it stays one, and ``all()`` is answered by the host, which transformers asks of every batch;
    what else is computed of it is a plain tensor. Of the collator of :func:`fastft.finetune`; a caller's own batches
    get it by :func:`with_lengths`.
    """

    lengths: tuple[int, ...]

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
            if function in _KEEP and args[0].shape == result.shape:
                return with_lengths(result, args[0].lengths)
            if function is torch.Tensor.all and len(args) == 1 and not kwargs:
                return _all(args[0], result)
        return result


def _all(mask, result):
    """Whether nothing is padding, as the lengths say; where they say so, ``result`` is compared without waiting."""
    full = min(mask.lengths, default=mask.shape[1]) == mask.shape[1]
    if full:
        torch._assert_async(result, "the attention mask has other lengths than it came with")
    return torch.tensor(full)


_KEEP = {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu, torch.Tensor.pin_memory, torch.Tensor.clone}


def with_lengths(mask, lengths):
    """``mask``, ``(B, S)``, as a :class:`Mask`.

    Raises: ValueError: ``lengths`` are not one for each row, from 0 to S.
    """
    lengths = tuple(lengths)
    if mask.dim() != 2 or len(lengths) != len(mask) or not all(0 <= length <= mask.shape[1] for length in lengths):
        raise ValueError(f"with_lengths: mask is {tuple(mask.shape)}, lengths are {lengths}")
    marked = mask.as_subclass(Mask)
    marked.lengths = lengths
    return marked


def lengths_of(mask):
    """The lengths that the host knows, or None."""
    return getattr(mask, "lengths", None) if isinstance(mask, Mask) else None


def plain(mask):
    """The mask as everybody knows it."""
    return mask.as_subclass(torch.Tensor) if isinstance(mask, Mask) else mask
