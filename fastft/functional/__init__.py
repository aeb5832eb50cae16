"""Functions over fastft's kernels, with the semantics of torch.nn.functional."""

from fastft.activations import NAMES as ACTIVATIONS
from fastft.functional.attention import attention
from fastft.functional.cross_entropy import cross_entropy
from fastft.functional.dropout_add_layer_norm import dropout_add_layer_norm
from fastft.functional.layer_norm import layer_norm
from fastft.functional.linear_act import linear_act
from fastft.functional.linear_cross_entropy import linear_cross_entropy

__all__ = [
    "ACTIVATIONS",
    "attention",
    "cross_entropy",
    "dropout_add_layer_norm",
    "layer_norm",
    "linear_act",
    "linear_cross_entropy",
]
