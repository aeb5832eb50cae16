"""torch.nn.Embedding."""

import torch

from fastft.functional.embedding import embedding
from fastft.models.swap import Swapped, replaces


class Embedding(Swapped, torch.nn.Embedding):
    def _fastft_why_not(self):
        unusual = {"max_norm": None, "scale_grad_by_freq": False, "sparse": False}
        return next((f"its {name} is set" for name, usual in unusual.items() if getattr(self, name) != usual), None)

    @replaces(torch.nn.Embedding.forward)
    def forward(self, input):
        if self._fastft_why_not() is not None:
            return torch.nn.Embedding.forward(self, input)
        return embedding(input, self.weight, self.padding_idx)
