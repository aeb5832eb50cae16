"""Functions over fastft's kernels, with the semantics of torch.nn.functional."""

from fastft.activations import NAMES as ACTIVATIONS
from fastft.functional.cross_entropy import cross_entropy
from fastft.functional.linear_act import linear_act

__all__ = ["ACTIVATIONS", "cross_entropy", "linear_act"]
