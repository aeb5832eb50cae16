"""Dropout, residual sum and torch.nn.LayerNorm, which end each half of an encoder layer."""

import torch

from fastft.functional import dropout_add_layer_norm
from fastft.models.swap import watched


def normalized(input, residual, dropout, norm):
    """``norm(dropout(input) + residual)`` by one kernel, without calling either module; ``why_not_normalized`` must be
    None."""
    return dropout_add_layer_norm(input, residual, norm.weight, norm.bias, dropout.p, dropout.training, norm.eps)


def why_not_normalized(dropout, norm):
    """A sentence if these two modules, as they are now, have to be called one after the other, else None; ``dropout``
    may be None."""
    for what, module, known in (("dropout", dropout, torch.nn.Dropout), ("LayerNorm", norm, torch.nn.LayerNorm)):
        if module is None:
            continue
        if type(module) is not known:
            kind = type(module)
            return f"its {what} is {kind.__module__}.{kind.__qualname__}, not torch.nn.{known.__name__}"
        if why := watched(module):
            return f"its {what} {why}"
    if norm.weight is None or norm.bias is None:
        return "its LayerNorm has no weight or no bias"
    if len(norm.normalized_shape) != 1:
        return f"its LayerNorm normalises over {len(norm.normalized_shape)} dimensions, not one"
    return None
