"""Linear layers with a fused activation."""

import torch

from fastft import activations, functional


class LinearAct(torch.nn.Linear):
    """``act(input @ weight.T + bias)``; parameters, initialisation and state_dict are torch.nn.Linear's.

    Args: those of torch.nn.Linear, and ``activation``, a name in :data:`fastft.functional.ACTIVATIONS`.
    Shapes: ``(*, in_features)`` -> ``(*, out_features)``.
    Example:
        >>> LinearAct(3, 2, activation="tanh")(torch.ones(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(self, in_features, out_features, bias=True, activation="gelu", device=None, dtype=None):
        self.activation = activations.resolve(activation)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, input):
        return functional.linear_act(input, self.weight, self.bias, self.activation)

    def extra_repr(self):
        return f"{super().extra_repr()}, activation={self.activation}"


class MLP(torch.nn.Module):
    """Two linear layers with an activation between them: a transformer's feed-forward block.

    Shapes: ``(*, in_features)`` -> ``(*, out_features)``, through ``(*, hidden_features)``.
    """

    def __init__(
        self, in_features, hidden_features, out_features=None, bias=True, activation="gelu", device=None, dtype=None
    ):
        super().__init__()
        out_features = in_features if out_features is None else out_features
        self.up = LinearAct(in_features, hidden_features, bias, activation, device, dtype)
        self.down = LinearAct(hidden_features, out_features, bias, "identity", device, dtype)

    def forward(self, input):
        return self.down(self.up(input))
