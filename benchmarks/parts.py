"""Where the time of a training step goes, part by part, each beside its own floor; ``benchmarks.step --parts``.

Every op that a step calls is timed where PyTorch dispatches it, and counted by its name. Its system time, as a share of
its CPU time, is put down to page faults, of memory that is new or given back. What passes between ops is Python's,
autograd's and the allocator's; what this measurement itself takes is left out as far as it is known. A fused kernel is
one part: activations, biases and their gradients go with the products. How our products pack weights is not seen from
outside: it is what remains of products of 64 rows when that of twice as many shows what rows cost.
"""

import resource
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.cells import Cell, Training
from fastft.functional.linear_act import backward as linear_backward
from fastft.functional.linear_act import forward as linear_forward
from fastft.testing.timing import Peaks, compare

PRODUCTS, ATTENTION, ELEMENTWISE, OPTIMIZER = "products", "attention", "elementwise", "optimizer"
PACKING, FAULTS, PYTHON = "packing, casts, copies", "page faults", "Python"
PARTS = (PRODUCTS, ATTENTION, ELEMENTWISE, OPTIMIZER, PACKING, FAULTS, PYTHON)

_BY_NAME = {
    PRODUCTS: ("addmm", "mm", "linear_act_forward", "linear_act_backward"),
    ATTENTION: ("bmm", "baddbmm", "attention_forward", "attention_backward"),
    PACKING: ("cat", "clone", "copy_", "_to_copy"),
}
_PART = {name: part for part, names in _BY_NAME.items() for name in names}
# Ops that take rows of tables, and which of their arguments is as large as what they take of each at most.
_TAKEN = {"embedding_forward": 0, "embedding_backward": 4}
# Per parameter: itself and two moments read and written, the gradient read twice, for its norm too.
OPTIMIZER_BYTES = 32
FEW = 64  # rows


@dataclass
class Cost:
    """Of some ops: seconds, CPU seconds of all threads, those of them in the system, bytes read and written."""

    seconds: float = 0.0
    cpu: float = 0.0
    system: float = 0.0
    bytes: float = 0.0

    def faults(self) -> float:
        """Seconds of page faults among the seconds."""
        return self.seconds * self.system / self.cpu if self.cpu > 0 else 0.0


class Ops(TorchDispatchMode):
    """Adds up what ops cost inside its ``with`` block; all to one part where ``only`` names it."""

    def __init__(self) -> None:
        super().__init__()
        self.only: str | None = None
        self.costs = {part: Cost() for part in PARTS}
        self.own = 0.0  # seconds of this measurement

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before, (cpu, system), start = time.perf_counter(), _cpu(), time.perf_counter()
        output = func(*args, **(kwargs or {}))
        end, (cpu_after, system_after) = time.perf_counter(), _cpu()
        cost = self.costs[self.only or part_of(func, output)]
        cost.seconds += end - start
        cost.cpu += cpu_after - cpu
        cost.system += system_after - system
        cost.bytes += moved(func, (args, kwargs), output)
        self.own += time.perf_counter() - end + start - before
        return output


def part_of(func, output) -> str:
    """The part that an op counts to, by its name, or by four dimensions: of all tensors only attention's have them."""
    if isinstance(output, torch.Tensor) and output.dim() == 4:
        return ATTENTION
    return _PART.get(_name(func), ELEMENTWISE)


def moved(func, inputs, output) -> float:
    """Bytes that an op has to read and write: none if it only looks at memory otherwise, or does not touch it yet."""
    alias = func._schema.returns[0].alias_info if func._schema.returns else None
    name = _name(func)
    if name.startswith(("empty", "new_empty")) or (alias is not None and not alias.is_write):
        return 0.0
    if name in _TAKEN:
        most = _bytes(inputs[0][_TAKEN[name]])
        return sum(min(_bytes(leaf), most) for leaf in tree_leaves(inputs))
    written = _bytes(output)
    return 2 * written if name == "embedding" else written + _bytes(inputs)


def _bytes(tree) -> float:
    tensors = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _name(func) -> str:
    return func._schema.name.partition("::")[2]


def _cpu() -> tuple[float, float]:
    """CPU seconds of all threads of this process, and those in the system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, usage.ru_stime


@dataclass(frozen=True)
class Measured:
    """One part of one provider's step, in seconds of a step, and the least that it has to do."""

    cell: Cell
    provider: str
    part: str
    seconds: float
    step: float
    flops: float = 0.0
    bytes: float = 0.0

    def row(self, peaks: Peaks) -> dict[str, Any]:
        """For the table."""
        rate = peaks.flops(getattr(torch, self.cell.dtype))
        floor = self.bytes / max(peaks.copy, peaks.update) + (self.flops / rate if rate else 0.0)
        found = {name: getattr(self, name) for name in ("provider", "part", "seconds", "step")}
        return {**asdict(self.cell), **found, "floor": floor}


def measure(training: Training, provider: str, steps: int, peaks: Peaks) -> list[Measured]:
    """The parts of a step: means over ``steps`` of them, after one that warms up."""
    training.step()
    ops, whole = Ops(), Cost()
    for _ in range(steps):
        peaks.between_rounds()
        (cpu, system), start = _cpu(), time.perf_counter()
        with ops:
            training.forward().backward()
            ops.only = OPTIMIZER
            training.update()
            ops.only = None
            training.optimizer.zero_grad()
        whole.seconds += time.perf_counter() - start
        after = _cpu()
        whole.cpu += after[0] - cpu
        whole.system += after[1] - system
    costs = ops.costs
    for name in ("seconds", "cpu", "system"):
        rest = getattr(whole, name) - sum(getattr(cost, name) for cost in costs.values())
        setattr(costs[PYTHON], name, max(0.0, rest - (ops.own if name == "seconds" else 0.0)))
    faults = {part: cost.faults() / steps for part, cost in costs.items()}
    seconds = {part: cost.seconds / steps - faults[part] for part, cost in costs.items()}
    seconds[FAULTS] = sum(faults.values())
    nbytes = {part: costs[part].bytes / steps for part in (ELEMENTWISE, PACKING)}
    nbytes[OPTIMIZER] = OPTIMIZER_BYTES * sum(parameter.numel() for parameter in training.parameters)
    if provider.startswith("fastft"):
        packing, packed = weight_packing(training)
        packing = min(packing, seconds[PRODUCTS])  # of a tiny model, noise can make the difference larger than both
        seconds[PACKING] += packing
        seconds[PRODUCTS] -= packing
        nbytes[PACKING] += packed
    products, attention = (3 * flops for flops in training.cell.forward_flops())
    flops = {PRODUCTS: products, ATTENTION: attention}
    step = sum(seconds.values())
    return [
        Measured(training.cell, provider, part, seconds[part], step, flops.get(part, 0.0), nbytes.get(part, 0.0))
        for part in PARTS
    ]


def weight_packing(training: Training, rounds: int = 5) -> tuple[float, float]:
    """Seconds and bytes of packing every weight for the forward and for the gradient of what it is multiplied with."""
    dtype = getattr(torch, training.cell.dtype)
    linears = [module for module in training.model.modules() if isinstance(module, torch.nn.Linear)]
    weights = [linear.weight.detach() for linear in linears if min(linear.weight.shape) >= FEW]

    def products(rows: int) -> None:
        for weight in weights:
            N, K = weight.shape
            input, grad = (torch.zeros(rows, size, dtype=dtype) for size in (K, N))
            linear_forward(input, weight, None, 0, dtype, keep=False)
            linear_backward(0, None, (True, False, False), grad, input, weight, None)

    times = compare({str(rows): lambda rows=rows: products(rows) for rows in (FEW, 2 * FEW)}, rounds=rounds)
    few, twice = (min(times.samples[str(rows)]) for rows in (FEW, 2 * FEW))
    size = sum(weight.numel() * (weight.element_size() + dtype.itemsize) for weight in weights)
    return max(0.0, 2 * few - twice), 2.0 * size
