"""Linear layer and cross-entropy as one module."""

import torch

from fastft import functional


class LinearCrossEntropyLoss(torch.nn.Linear):
    """A linear layer whose output is used for cross-entropy only: the logits never lie in memory.

    Parameters, initialisation and state_dict are torch.nn.Linear's. Shapes: ``(N, in_features)`` and targets ``(N,)``.

    Args: those of torch.nn.Linear, and of torch.nn.CrossEntropyLoss ``weight``, ``ignore_index``, ``reduction`` and
        ``label_smoothing``.
    Example:
        >>> LinearCrossEntropyLoss(3, 4, reduction="none")(torch.ones(2, 3), torch.tensor([0, 3])).shape
        torch.Size([2])
    """

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        device=None,
        dtype=None,
        *,
        weight=None,
        ignore_index=-100,
        reduction="mean",
        label_smoothing=0.0,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.register_buffer("class_weight", weight, persistent=False)
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing

    def forward(self, input, target):
        return functional.linear_cross_entropy(
            *(input, self.weight, target),
            linear_bias=self.bias,
            weight=self.class_weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )
