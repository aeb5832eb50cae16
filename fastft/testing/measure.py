"""One sample of an op, ours beside PyTorch's, timed and put beside its floor.

Two times of ours: of the op as it is called, which may run PyTorch's kernel and always allocates its results, and of
our kernels alone, into the same results again and again, which is what the floor is for.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from fastft import _library
from fastft.functional import _choice
from fastft.testing.spec import KernelCalls, OpSpec, Sample
from fastft.testing.timing import ROUNDS, Peaks, Spread, compare, kept_for_backward

PASSES = ("forward", "backward", "train")  # without autograd; gradients alone; forward and backward

# What "never slower" allows: a ratio where PyTorch needs 100 us, below that the cost of a check.
SHORT_S, SHORT_MORE_S, LONG_RATIO = 100e-6, 10e-6, 1.03


@dataclass(frozen=True)
class Measurement:
    """A row of ``python -m benchmarks.ops``. Times in seconds, memory in bytes; ``kernel`` says what ran as fastft."""

    op: str
    sample: str
    path: str  # one of PASSES, or "grad <argument>"
    dtype: torch.dtype
    kernel: str
    fastft: Spread
    torch: Spread
    ratio: Spread  # times faster than torch
    alone: Spread | None  # our kernels' time; None where they cannot run
    flops: float
    bytes: float
    kept: tuple[int, int] | None  # for the backward, by fastft and by torch

    @property
    def slower(self) -> bool:
        """Whether fastft breaks its promise to be never slower than PyTorch, as far as this measurement tells."""
        if self.torch.median < SHORT_S:
            return self.fastft.median > self.torch.median + SHORT_MORE_S
        return self.ratio.median < 1 / LONG_RATIO

    def shares(self, peaks: Peaks) -> dict[str, float | None]:
        """Of the floor, by our kernels alone, by fastft and by torch; BeatsPeak if one is above 1."""
        work = self.flops, self.bytes
        return {
            "alone": self.alone and peaks.share(*work, self.alone.median, self.dtype),
            "fastft": peaks.share(*work, self.fastft.median, self.dtype, pytorch=self.kernel == "torch"),
            "torch": peaks.share(*work, self.torch.median, self.dtype, pytorch=True),
        }

    def as_dict(self) -> dict:
        """For JSON."""
        return {**asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}


def measure(
    spec: OpSpec,
    index: int,
    dtype: torch.dtype,
    path: str = "train",
    *,
    device: str = "cpu",
    rounds: int = ROUNDS,
    peaks: Peaks | None = None,
    budget_s: float = math.inf,
    op_only: bool = False,
) -> Measurement:
    """Times one pass of sample number ``index`` of an op.

    Args:
        path: "forward" (no autograd), "backward" (all gradients), "train" (both), or "grad <argument>" (that gradient).
        rounds, budget_s: see :func:`fastft.testing.timing.compare`.
        peaks: measured meanwhile.
        op_only: neither our kernels alone nor memory.
    Raises: ValueError: ``linear_act has no gradient of 'x' in 'no bias', only of input, weight``
    """
    sample = spec.sample(index, dtype, device)
    wanted = _wanted(spec, sample, path)
    arguments, leaves = _leaves(spec, sample, wanted)
    # One for all: where in memory it lies makes a difference of a tenth to some passes.
    grad_output = torch.randn_like(spec.reference(**arguments)) if wanted else None
    runs = {
        "fastft": _run(spec.op, arguments, leaves, grad_output, path),
        "torch": _run(spec.reference, arguments, leaves, grad_output, path),
    }
    with KernelCalls() as ours:
        runs["fastft"]()
    if not op_only and (alone := _alone(spec.op, arguments, leaves, grad_output, path)):
        runs["alone"] = alone
    times = compare(runs, rounds=rounds, peaks=peaks, device=device, budget_s=budget_s)
    flops, nbytes = _work(spec, sample, wanted, path, dtype.itemsize)
    return Measurement(
        op=spec.name,
        sample=sample.why,
        path=path,
        dtype=dtype,
        kernel=_library.isa() if ours.calls and device == "cpu" else "cuda" if ours.calls else "torch",
        fastft=times["fastft"],
        torch=times["torch"],
        ratio=times.ratio("fastft", "torch"),
        alone=times["alone"] if "alone" in runs else None,
        flops=flops,
        bytes=nbytes,
        kept=_kept(spec, sample, wanted) if path == "train" and not op_only else None,
    )


def paths(spec: OpSpec, sample: Sample) -> list[str]:
    """Every pass that :func:`measure` can time of a sample."""
    wanted = spec.differentiable(sample)
    return [*PASSES, *(f"grad {name}" for name in wanted if len(wanted) > 1)] if wanted else ["forward"]


def _wanted(spec: OpSpec, sample: Sample, path: str) -> tuple[str, ...]:
    if path == "forward":
        return ()
    wanted = spec.differentiable(sample)
    if path in PASSES:
        return wanted
    name = path.removeprefix("grad ")
    if name not in wanted:
        raise ValueError(f"{spec.name} has no gradient of {name!r} in {sample.why!r}, only of {', '.join(wanted)}")
    return (name,)


def _leaves(spec: OpSpec, sample: Sample, wanted: tuple[str, ...]) -> tuple[dict, list[torch.Tensor]]:
    arguments = spec.named(sample)
    arguments |= {name: arguments[name].detach().requires_grad_() for name in wanted}
    return arguments, [arguments[name] for name in wanted]


def _run(
    function: Callable,
    arguments: dict,
    leaves: list[torch.Tensor],
    grad_output: torch.Tensor | None,
    path: str,
) -> Callable[[], object]:
    if not leaves:
        return torch.no_grad()(lambda: function(**arguments))
    if path == "train":

        def step():  # as in training: gradients are new, and the leaves' own
            function(**arguments).backward(grad_output)
            for leaf in leaves:
                leaf.grad = None

        return step
    output = function(**arguments)
    return lambda: torch.autograd.grad(output, leaves, grad_output, retain_graph=True)


def _alone(op: Callable, *how) -> Callable[[], object] | None:
    """Our kernels of a pass, called again with the tensors of their first call; None where they cannot run."""
    with _choice.use_backend("fastft"):
        try:
            run = _run(op, *how)
            for _ in range(2):  # an op may go by what it has seen
                run()
            with KernelCalls(keep_arguments=True) as kernels:
                run()
        except RuntimeError as error:
            if str(error).startswith("FASTFT_BACKEND=fastft"):
                return None
            raise
    calls = [(op, args) for op, args, _ in kernels.calls]

    def again() -> None:
        for op, args in calls:
            op(*args)

    return again


def _work(spec: OpSpec, sample: Sample, wanted: tuple[str, ...], path: str, size: int) -> tuple[float, float]:
    """FLOPs and bytes of a pass."""
    sizes = spec.sizes(**spec.named(sample))
    flops = sum(spec.gradients[name](*sizes) for name in wanted)
    nbytes = spec.backward_bytes(*sizes, size) if path in ("backward", "train") else 0.0
    if path in ("forward", "train"):
        flops, nbytes = flops + spec.flops(*sizes), nbytes + spec.bytes(*sizes, size)
    if path == "train" and spec.train_bytes:
        nbytes = spec.train_bytes(*sizes, size)
    return flops, nbytes


def _kept(spec: OpSpec, sample: Sample, wanted: tuple[str, ...]) -> tuple[int, int]:
    arguments, _ = _leaves(spec, sample, wanted)
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    ours, theirs = (kept_for_backward(lambda f=f: f(**arguments), tensors) for f in (spec.op, spec.reference))
    return ours, theirs
