"""torch.optim's AdamW and torch.nn.utils' gradient clipping, in one pass over memory each; kernels: csrc/*/adamw.*."""

from fastft.optim.adamw import AdamW
from fastft.optim.clip import clip_grad_norm_

__all__ = ["AdamW", "clip_grad_norm_"]
