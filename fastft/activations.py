"""The activation table, Python half: names in the order of csrc/common/activation.h, aliases, PyTorch's functions."""

import functools
from collections.abc import Callable

import torch
from torch.nn import functional


def _identity(z: torch.Tensor) -> torch.Tensor:
    return z


def _quick_gelu(z: torch.Tensor) -> torch.Tensor:
    return z * torch.sigmoid(1.702 * z)


_TABLE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": _identity,
    "relu": functional.relu,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "silu": functional.silu,
    "mish": functional.mish,
    "softplus": functional.softplus,
}
NAMES = tuple(_TABLE)

# Further names of transformers' ACT2FN, of those that are the same function: "gelu_10", which clips, is not.
ALIASES = {
    "linear": "identity",
    "gelu_python": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
}


def resolve(name: str) -> str:
    """The name in :data:`NAMES` that ``name``, one of them or of :data:`ALIASES`, stands for.

    Raises: ValueError: naming the value and the valid names.
    Example:
        >>> resolve("gelu_new")
        'gelu_tanh'
    """
    if isinstance(name, str):
        if name in _TABLE:
            return name
        if name in ALIASES:
            return ALIASES[name]
    raise ValueError(f"activation is {name!r}, must be one of {', '.join(NAMES)}, or an alias: {', '.join(ALIASES)}")


def index(name: str) -> int:
    """The kernels' number of an activation; raises as :func:`resolve`."""
    return NAMES.index(resolve(name))


def torch_function(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """PyTorch's function of an activation, tensor in, tensor out; raises as :func:`resolve`."""
    try:
        return _TABLE[name]
    except (KeyError, TypeError):
        return _TABLE[resolve(name)]
