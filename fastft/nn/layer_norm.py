"""LayerNorm as a module."""

import torch

from fastft import functional


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm on :func:`fastft.functional.layer_norm`: the same arguments, shapes and state_dict.

    Example:
        >>> LayerNorm(2, eps=0.0)(torch.tensor([[1.0, 3.0]])).tolist()
        [[-1.0, 1.0]]
    """

    def forward(self, input):
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
