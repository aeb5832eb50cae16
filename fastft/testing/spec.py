"""One list of cases per op: its tests, its gradcheck and its benchmark. The lists are in ``specs/<op>.py``."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

FLOATS = (torch.float32, torch.bfloat16, torch.float64)


class Sample:
    """One call of an op, and why it is in the list: ``Sample("odd tail", t(3, 1023), weight, eps=1e-5)``."""

    def __init__(self, why: str, /, *args: Any, **kwargs: Any) -> None:
        self.why, self.args, self.kwargs = why, args, kwargs

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.why!r})"


class Timed(Sample):
    """A sample that benchmarks time, named by its sizes."""


class TensorMaker:
    """``t`` of a spec's samples: ``t(3, 1023)`` draws standard normal numbers, the same for the same seed.

    Args:
        dtype: of what ``t(...)`` makes.
        device: where; "meta" makes shapes without numbers.
        seed: of the numbers.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers times ``scale``, in the maker's dtype."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        # Drawn in float32 at least, and on the CPU: the same numbers for every dtype (but for rounding) and device.
        drawn = torch.float64 if self.dtype == torch.float64 else torch.float32
        return (torch.randn(shape, generator=self._generator, dtype=drawn) * scale).to(self.device, self.dtype)

    def indices(self, below: int, *shape: int) -> torch.Tensor:
        """Class indices, int64, uniform in [0, ``below``)."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=torch.int64, device="meta")
        return torch.randint(below, shape, generator=self._generator).to(self.device)


@dataclass(frozen=True)
class OpSpec:
    """What has to be known of an op to test it and to time it.

    ``samples(t)`` is a generator function: cases are made one at a time, so the list may hold large ones, small ones
    first. Small samples (``small``) are tested in every way, others for their errors only; ``Timed`` ones are timed.
    ``sizes(**arguments)`` takes an op's arguments by name and returns what ``flops``, ``bytes`` and the values of
    ``gradients`` are called with (``bytes`` with the size of an element behind).
    """

    op: Callable[..., torch.Tensor]
    reference: Callable[..., torch.Tensor]  # PyTorch's: in fp64 the truth, at the same dtype the yardstick
    samples: Callable[[TensorMaker], Iterator[Sample]]
    sizes: Callable[..., tuple[int, ...]]
    flops: Callable[..., float]  # of the forward
    bytes: Callable[..., float]  # that the forward must move
    gradients: Mapping[str, Callable[..., float]] = field(default_factory=dict)  # differentiable argument -> its FLOPs
    backward_bytes: Callable[..., float] = lambda *_: 0.0  # that all gradients together must move
    train_bytes: Callable[..., float] | None = None  # that forward and backward must, if that is less than their sum
    dtypes: tuple[torch.dtype, ...] = FLOATS
    grid: Callable[..., Iterator[Sample]] | None = None  # (t, rows=…): sizes where it must never be slower; not tested
    name: str = ""  # the op's, unless given
    kernel: str = ""  # of csrc/kernels.h, without _forward and _backward; the name, unless given

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.op.__name__)
        object.__setattr__(self, "kernel", self.kernel or self.name)

    def __repr__(self) -> str:
        return f"OpSpec({self.name})"

    def dtypes_on(self, device: torch.device | str) -> tuple[torch.dtype, ...]:
        """The dtypes of our kernels; float16 is CUDA's only."""
        return (*self.dtypes, torch.float16) if torch.device(device).type == "cuda" else self.dtypes

    def outline(self, dtype: torch.dtype = torch.float32) -> list[Sample]:
        """Every sample on the meta device: what there is, without its numbers."""
        return list(self.samples(TensorMaker(dtype, "meta")))

    def sample(self, index: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Sample:
        """Sample number ``index`` with numbers; those before it are only outlined."""
        maker = TensorMaker(dtype, "meta", seed)
        cases = self.samples(maker)
        for _ in range(index):
            next(cases)
        maker.device = torch.device(device)
        return next(cases)

    def cost(self, sample: Sample) -> float:
        """A rough time of the forward in float32, in seconds: 100 GFLOP/s and 10 GB/s."""
        sizes = self.sizes(**self.named(sample))
        return self.flops(*sizes) / 1e11 + self.bytes(*sizes, 4) / 1e10

    def small(self, sample: Sample) -> bool:
        """Whether a test may call it hundreds of times."""
        return self.cost(sample) < 2e-4

    def named(self, sample: Sample) -> dict[str, Any]:
        """The sample's arguments by name, those left at their default too."""
        bound = inspect.signature(self.reference).bind(*sample.args, **sample.kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def differentiable(self, sample: Sample) -> tuple[str, ...]:
        """The arguments of this sample that take gradients: those of ``gradients`` that are floating-point tensors."""
        return tuple(name for name, value in self.named(sample).items() if name in self.gradients and is_float(value))


def is_float(value: Any) -> bool:
    """Whether ``value`` is a tensor of a floating-point dtype."""
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def all_specs() -> list[OpSpec]:
    """The ``SPEC`` of every module in fastft/testing/specs, in the order of their names."""
    from fastft.testing import specs

    names = sorted(module.name for module in pkgutil.iter_modules(specs.__path__))
    return [importlib.import_module(f"{specs.__name__}.{name}").SPEC for name in names]


class KernelCalls(TorchDispatchMode):
    """Records the calls of our kernels inside its ``with`` block, the backward's too.

    ``calls`` holds (op, args, kwargs), with ``keep_arguments`` as they were before. Empty: PyTorch's kernels ran.
    """

    def __init__(self, keep_arguments: bool = False) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []
        self._keep = keep_arguments

    @property
    def names(self) -> list[str]:
        """Of the ops, in the order of their calls."""
        return [op.__name__.removesuffix(".default") for op, _, _ in self.calls]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fastft" and func._schema.is_mutable:  # all kernels write into what they are given
            kept = tree_map_only(torch.Tensor, torch.clone, (args, kwargs)) if self._keep else ((), {})
            self.calls.append((func, *kept))
        return func(*args, **kwargs)
