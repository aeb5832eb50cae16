"""The error budget, fastft's only tolerance: our error against a float64 reference is judged by PyTorch's own.

For each result, over at least 10 000 elements (more seeds where one call gives fewer)::

    mean |ours - truth| <= 1.1 * mean |torch - truth| + mean ulp
    each |ours - truth| <= 2   * max  |torch - truth| + its ulp

where an ulp is the spacing of the result's dtype at the truth's magnitude. For float64 results PyTorch's float32 error
times 2^-29 is the yardstick: 4 times that plus 4 ulp, mean and maximum alike.

A result that stays small (a scalar loss, a bias gradient) is pooled with the other small ones, and with larger ones
where these are too few, each measured in its own unit, PyTorch's mean error plus a mean ulp, so that none drowns in
another's magnitude.
"""

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastft import _library
from fastft.testing.spec import OpSpec, TensorMaker, is_float

ENOUGH = 10_000  # elements
SEEDS = 8  # that a case is repeated with before its small results are pooled with other cases'
CHUNK = 1 << 22  # elements compared at a time, 200 MB of float64

Results = Mapping[str, torch.Tensor]


class BudgetExceeded(AssertionError):
    """A result is further from the truth than the budget allows; the text names the worst element."""


@dataclass(frozen=True)
class _Place:
    """Where a chunk of a result begins."""

    shape: torch.Size
    start: int
    seed: int

    def describe(self, i: int, ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor) -> str:
        """The element ``i`` of the chunk: its index in the result, and its three values."""
        index = tuple(int(k) for k in torch.unravel_index(torch.tensor(self.start + i), self.shape))
        found = (("ours", ours), ("PyTorch", theirs), ("truth", truth))
        values = ", ".join(f"{name} {tensor[i].item():.9g}" for name, tensor in found)
        return f"worst element {index} of seed {self.seed}: {values}"


@dataclass
class _Errors:
    """Of one result, summed up over seeds; everything the budget needs, and the worst element for the message."""

    what: str
    dtype: torch.dtype
    count: int = 0
    ours: float = 0.0  # sums of absolute errors and of ulps
    theirs: float = 0.0
    ulp: float = 0.0
    excess: float = -torch.inf  # largest |ours - truth| less the allowed ulps
    theirs_max: float = 0.0
    worst: str = ""

    @property
    def factors(self) -> tuple[float, float, float]:
        """Of PyTorch's mean error, of its maximum, of the ulp."""
        return (4 * 2**-29, 4 * 2**-29, 4.0) if self.dtype == torch.float64 else (1.1, 2.0, 1.0)

    @property
    def unit(self) -> float:
        mean, _, ulps = self.factors
        # Zero where all elements are exempt: nothing is judged then, and any error beyond zero counts as infinite.
        return (mean * self.theirs + ulps * self.ulp) / self.count or math.ulp(0.0)

    def add(self, ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor, seed: int) -> None:
        flat = [tensor.reshape(-1) for tensor in (ours, theirs, truth)]
        for start in range(0, truth.numel(), CHUNK):
            self._add(*(tensor[start : start + CHUNK] for tensor in flat), _Place(truth.shape, start, seed))

    def _add(self, ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor, place: "_Place") -> None:
        rounded = truth.to(self.dtype)
        overflow = ~theirs.isfinite()  # in PyTorch's intermediate results; ours may do the same or better
        exempt = ~rounded.isfinite() | (overflow & _same(ours, theirs.to(self.dtype)))
        wrong = exempt & ~_same(ours, rounded) & ~_same(ours, theirs.to(self.dtype))
        if wrong.any():
            raise BudgetExceeded(f"{self.what}\n  {place.describe(int(wrong.nonzero()[0]), ours, theirs, truth)}")
        ours_error = (ours.double() - truth).abs().masked_fill(exempt, 0)
        theirs_error = (theirs.double() - truth).abs().masked_fill(exempt | overflow, 0)
        ulp = ulps(truth, self.dtype).masked_fill(exempt, 0)
        self.count += truth.numel()
        self.ours += ours_error.sum().item()
        self.theirs += theirs_error.sum().item()
        self.ulp += ulp.sum().item()
        self.theirs_max = max(self.theirs_max, theirs_error.max().item())
        excess = ours_error - self.factors[2] * ulp
        worst = int(excess.argmax())  # of a NaN, if there is one
        if not excess[worst].item() <= self.excess:
            self.excess = excess[worst].item()
            self.worst = place.describe(worst, ours, theirs, truth)

    def verdict(self) -> str | None:
        """None, or what is exceeded, with the worst element."""
        mean_factor, max_factor, ulp_factor = self.factors
        mean, theirs, ulp = self.ours / self.count, self.theirs / self.count, self.ulp / self.count
        found = []
        if not mean <= mean_factor * theirs + ulp_factor * ulp:
            found.append(
                f"mean {mean:.3g} > {mean_factor:.3g} x {theirs:.3g} of PyTorch + {ulp_factor:g} ulp, {ulp:.3g}"
            )
        if not self.excess <= max_factor * self.theirs_max:
            theirs = f"{max_factor:.3g} x {self.theirs_max:.3g} of PyTorch"
            found.append(f"maximum, less {ulp_factor:g} ulp, {self.excess:.3g} > {theirs}")
        return f"{self.what}, {self.count} elements: error's {' and '.join(found)}\n  {self.worst}" if found else None


class Budget:
    """Collects results of the same computation in three versions, then judges: ``add`` … ``add``, ``check``.

    Args:
        double: our results are float64, PyTorch's (the yardstick's) float32.
    """

    def __init__(self, double: bool = False) -> None:
        self._double = double
        self._errors: dict[tuple[str, str], _Errors] = {}

    def add(self, ours: Results, theirs: Results, truth: Results, *, case: str = "", seed: int = 0) -> None:
        """One computation's named results.

        Args:
            ours: fastft's.
            theirs: PyTorch's on the same input, at the same dtype (float32 if ``double``).
            truth: PyTorch's in float64.
            case: results of different cases are judged apart, of different seeds together.
        Raises: BudgetExceeded: names, shapes, dtypes, or infinite values and NaNs, differ from PyTorch's.
        """
        if not ours.keys() == theirs.keys() == truth.keys():
            raise BudgetExceeded(f"{case}: results {list(ours)}, PyTorch's {list(theirs)}, the truth's {list(truth)}")
        for name, result in ours.items():
            result, other, true = (t[name].detach().cpu() for t in (ours, theirs, truth))
            dtype = true.dtype if self._double else other.dtype
            what = f"{case}: {name}" if case else name
            if result.shape != true.shape or result.dtype != dtype:
                raise BudgetExceeded(
                    f"{what} is {tuple(result.shape)} {result.dtype}, PyTorch's {tuple(true.shape)} {dtype}"
                )
            if result.numel():
                errors = self._errors.setdefault((case, name), _Errors(f"{what} ({dtype})", dtype))
                errors.add(result, other, true, seed)

    def short(self, case: str) -> bool:
        """Whether more seeds would tell more: a result has fewer than 10 000 elements, the case not many more."""
        counts = [errors.count for (of, _), errors in self._errors.items() if of == case]
        return min(counts, default=ENOUGH) < ENOUGH and sum(counts) < 10 * ENOUGH

    @property
    def enough(self) -> bool:
        """Whether there are 10 000 elements, or none at all: every result is empty."""
        return not 0 < self._count < ENOUGH

    @property
    def _count(self) -> int:
        return sum(errors.count for errors in self._errors.values())

    def check(self) -> None:
        """Raises: BudgetExceeded: with every result that exceeds it."""
        if not self.enough:
            raise ValueError(f"{self._count} elements are too few to judge, add other seeds")
        rising = sorted(self._errors.values(), key=lambda errors: errors.count)
        alone = [errors for errors in rising if errors.count >= ENOUGH]
        pool = rising[: len(rising) - len(alone)]
        for errors in alone:
            if pool and sum(small.count for small in pool) < ENOUGH:
                pool.append(errors)
        judged = [*alone, *([_pooled(pool)] if pool else [])]
        if failures := [verdict for errors in judged if (verdict := errors.verdict())]:
            raise BudgetExceeded("error budget exceeded\n" + "\n".join(failures))


def check(evaluate: Callable[[int], tuple[Results, Results, Results]], double: bool = False) -> None:
    """Judges ``evaluate(seed)``, which returns ours, PyTorch's and the true results, with as many seeds as it takes;
    ``double`` as for :class:`Budget`.

    Raises: BudgetExceeded: see :class:`Budget`.
    """
    budget = Budget(double)
    for seed in itertools.count():
        budget.add(*evaluate(seed), seed=seed)
        if budget.enough:
            return budget.check()


def check_op(
    spec: OpSpec,
    indices: Iterable[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    isas: Iterable[str] = (),
    seeds: int = SEEDS,
) -> None:
    """The budget for outputs and gradients of the samples ``indices`` of an op, all with their ``seeds``.

    ``isas``: the CPU's instruction sets to judge, each alone; none: the one in use.
    Raises: BudgetExceeded: see :class:`Budget`.
    """
    budgets = {isa: Budget(dtype == torch.float64) for isa in (*isas,) or (None,)}
    outline, left, shortest = spec.outline(dtype), list(indices), next(iter(budgets.values()))
    for seed in itertools.count():
        for index in left:
            every, theirs, truth = evaluate_op(spec, index, dtype, device, seed, budgets)
            for isa, budget in budgets.items():
                budget.add(every[isa], theirs, truth, case=outline[index].why, seed=seed)
        left = [index for index in left if shortest.short(outline[index].why)]  # all have counted the same
        if (seed + 1 >= seeds or not left) and shortest.enough:
            break
    for isa, budget in budgets.items():
        try:
            budget.check()
        except BudgetExceeded as error:
            raise BudgetExceeded(f"{isa}: {error}" if isa else str(error)) from None


def evaluate_op(
    spec: OpSpec, index: int, dtype: torch.dtype, device: torch.device | str, seed: int, isas: Iterable[str | None]
) -> tuple[Mapping[str | None, Results], Results, Results]:
    """One sample's output and gradients: by our op from awkward buffers in each instruction set (None: the one in use),
    by PyTorch's, in float64."""
    sample = spec.sample(index, dtype, device, seed)
    arguments, wanted = spec.named(sample), spec.differentiable(sample)
    yardstick = torch.float32 if dtype == torch.float64 else dtype

    def grad_output(*shape: int) -> torch.Tensor:
        return TensorMaker(dtype, device, seed + 1_000_000)(*shape)

    ours = {}
    for isa in isas:
        awkward = {
            name: guard(value) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
        }
        with _library.use_isa(isa) if isa else contextlib.nullcontext():
            ours[isa] = run(spec.op, awkward, wanted, lambda *shape: guard(grad_output(*shape)))
    theirs = run(spec.reference, cast(arguments, yardstick), wanted, grad_output)
    truth = run(spec.reference, cast(arguments, torch.float64), wanted, grad_output)
    return ours, theirs, truth


def run(
    function: Callable[..., torch.Tensor],
    arguments: Mapping[str, Any],
    wanted: Iterable[str],
    grad_output: Callable[..., torch.Tensor],
) -> dict[str, torch.Tensor]:
    """``output`` and ``grad <name>`` for each wanted argument of ``function(**arguments)``.

    ``grad_output(*shape)`` makes the gradient that the backward starts from.
    """
    leaves = {name: arguments[name].detach().requires_grad_() for name in wanted}
    output = function(**{**arguments, **leaves})
    results = {"output": output}
    if leaves:
        grads = torch.autograd.grad(output, list(leaves.values()), grad_output(*output.shape).to(output.dtype))
        results |= {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


def cast(arguments: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments with floating-point tensors in ``dtype``."""
    return {name: value.to(dtype) if is_float(value) else value for name, value in arguments.items()}


def check_model(
    ours: torch.nn.Module, stock: torch.nn.Module, batch: Callable[[int], dict], autocast: torch.dtype | None = None
) -> None:
    """The budget for a whole model: loss, logits and the gradient of every parameter.

    Args:
        ours: the model that fastft optimized, in training mode, with dropout off.
        stock: PyTorch's, with the same weights; a float64 copy of it gives the truth.
        batch: seed -> keyword arguments of the models, labels among them.
        autocast: dtype that both are run under.
    Raises: BudgetExceeded: see :class:`Budget`.
    """
    exact = copy.deepcopy(stock).double()

    def evaluate(seed: int) -> tuple[Results, Results, Results]:
        inputs = batch(seed)
        return run_model(ours, inputs, autocast), run_model(stock, inputs, autocast), run_model(exact, inputs)

    check(evaluate)


def run_model(
    model: torch.nn.Module, inputs: Mapping[str, Any], autocast: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """``loss``, ``logits`` and ``grad <parameter>`` of one forward and backward; the gradients are not left behind."""
    device = next(model.parameters()).device.type
    with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        output = model(**inputs)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(output.loss, list(parameters.values()), allow_unused=True)
    results = {"loss": output.loss, "logits": output.logits}
    return results | {f"grad {name}": grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}


def ulps(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The spacing of ``dtype`` at each of the float64 ``values``: 2^-7 for 1.0 in bfloat16."""
    limits = torch.finfo(dtype)
    exponent = torch.frexp(values.double()).exponent - 1
    spacing = torch.ldexp(torch.full_like(values, limits.eps, dtype=torch.float64), exponent)
    return spacing.masked_fill(values == 0, 0).clamp(min=limits.smallest_normal * limits.eps)


def guard(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides in an awkward place: one element off alignment, NaN (or the least integer, or True)
    before, between and behind its elements, so that whatever reads a neighbour shows."""
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    if tensor.dtype.is_floating_point:
        poison = torch.nan
    else:
        poison = True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min
    line, item = 64, tensor.element_size()
    buffer = torch.full((span + 3 * line,), poison, dtype=tensor.dtype, device=tensor.device)
    aligned = -buffer.data_ptr() % line // item
    offset = aligned + line + 1
    once = [1 if s == 0 and n else n for n, s in zip(tensor.shape, tensor.stride(), strict=True)]  # where expanded
    buffer.as_strided(once, tensor.stride(), offset).copy_(tensor[tuple(slice(n) for n in once)])
    return buffer.as_strided(tensor.shape, tensor.stride(), offset)


def _same(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _pooled(group: list[_Errors]) -> _Errors:
    """Several results as one, each in its own unit."""
    worst = max(group, key=lambda errors: errors.excess / errors.unit)
    return _Errors(
        f"small results together, {worst.what} the worst",
        worst.dtype,
        count=sum(e.count for e in group),
        ours=sum(e.ours / e.unit for e in group),
        theirs=sum(e.theirs / e.unit for e in group),
        ulp=sum(e.ulp / e.unit for e in group),
        excess=worst.excess / worst.unit,
        theirs_max=max(e.theirs_max / e.unit for e in group),
        worst=worst.worst,
    )
