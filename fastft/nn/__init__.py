"""torch.nn modules over fastft.functional: same parameters, names and state_dict as torch's."""

from fastft.nn.cross_entropy import CrossEntropyLoss
from fastft.nn.layer_norm import LayerNorm
from fastft.nn.linear_act import MLP, LinearAct
from fastft.nn.linear_cross_entropy import LinearCrossEntropyLoss

__all__ = ["MLP", "CrossEntropyLoss", "LayerNorm", "LinearAct", "LinearCrossEntropyLoss"]
