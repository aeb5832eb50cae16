"""What ``fastft compare`` measures: the same model on the same batches, stock and with fastft."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import gc
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import fastft
from fastft import optim
from fastft.testing import error, timing
from fastft.testing.spec import KernelCalls

CGROUP = Path("/sys/fs/cgroup")  # of a container
LEARNING_RATE, WEIGHT_DECAY, CLIP = 5e-5, 0.01, 1.0  # what finetune takes when it is not told
STOCK, FASTFT, OWN_OPTIMIZER = "stock", "fastft", "fastft + fastft.optim"
REVERSED, OTHER_SEED = "stock, rows reversed", "stock, another seed"
AUTOCAST = {"auto": None, "float32": None, "bfloat16": torch.bfloat16}
PHASES = ("forward", "backward", "clip", "optimizer")

Batch = Mapping[str, torch.Tensor]
Tick = Callable[[], None]  # called after each pass or step, for a progress bar


@dataclass(frozen=True)
class Variant:
    """One way to train: ``prepare`` puts its kernels into a model, in place."""

    name: str
    prepare: Callable[[torch.nn.Module], object]
    own_optimizer: bool = False  # fastft.optim.AdamW instead of torch's with fused=True


@dataclass(frozen=True)
class Recipe:
    """What all variants share: under which autocast (None: in the parameters' dtype), from which seed."""

    autocast: torch.dtype | None
    seed: int


def variants() -> list[Variant]:
    """Stock first; both train with torch's fused AdamW and clipping, a third with fastft.optim."""
    return [
        Variant(STOCK, prepare=lambda model: model),
        Variant(FASTFT, prepare=fastft.optimize),
        Variant(OWN_OPTIMIZER, prepare=fastft.optimize, own_optimizer=True),
    ]


class Training:
    """A copy of ``network`` that one variant trains step by step.

    Dropout draws the same for every variant: each step starts from a seed of its own. Without dropout the model is in
    evaluation mode, which turns off every kind of it in every architecture.
    """

    def __init__(self, network: torch.nn.Module, variant: Variant, recipe: Recipe, dropout: bool):
        self.network, self.recipe = network, recipe
        self.model = copy.deepcopy(network).train(dropout)
        variant.prepare(self.model)
        self._losses: list[torch.Tensor] = []
        self._laps: list[timing.Laps] = []
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        options = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
        self._clips_itself = variant.own_optimizer
        if variant.own_optimizer:
            self.optimizer = optim.AdamW(self._parameters, max_grad_norm=CLIP, **options)
        else:
            self.optimizer = torch.optim.AdamW(self._parameters, fused=True, **options)

    @property
    def losses(self) -> list[float]:
        """Of every step so far."""
        return torch.stack(self._losses).tolist()

    @property
    def phases(self) -> dict[str, float]:
        """Mean seconds of each phase of a step."""
        laps = [lap.seconds() for lap in self._laps]
        return {name: sum(lap.get(name, 0.0) for lap in laps) / len(laps) for name in PHASES}

    def forward(self, batch: Batch) -> torch.Tensor:
        """The mean loss ()."""
        device = self._parameters[0].device.type
        with torch.autocast(device, self.recipe.autocast or torch.bfloat16, enabled=self.recipe.autocast is not None):
            return self.model(**batch).loss

    def step(self, batch: Batch) -> None:
        torch.manual_seed(self.recipe.seed + len(self._losses))
        laps = timing.Laps(self._parameters[0].device)
        loss = self.forward(batch)
        laps("forward")
        loss.backward()
        laps("backward")
        if not self._clips_itself:
            torch.nn.utils.clip_grad_norm_(self._parameters, CLIP)
            laps("clip")
        self.optimizer.step()
        self.optimizer.zero_grad()
        laps("optimizer")
        self._losses.append(loss.detach().float())
        self._laps.append(laps)

    def restart(self) -> None:
        """As if no step had been, but everything stays allocated."""
        self.model.load_state_dict(self.network.state_dict())
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        self._losses.clear()
        self._laps.clear()


@contextlib.contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Random numbers from ``seed`` on; afterwards the caller's are as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        transformers.set_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


# ---- numbers


@dataclass(frozen=True)
class Parity:
    """Results of one batch with dropout off: stock's, fastft's and those of a float64 copy of the model.

    Attributes:
        numbers: for "logits", "loss" and "gradients" the ``size`` of the true ones, mean absolute value, and for each
            pair of :data:`PAIRS` ``max`` and ``mean``, the largest and the mean absolute difference.
        differs: None, or what the error budget finds too far from the truth.
        calls: how often each of fastft's kernels ran, by name.
        report: what runs where, of fastft's model.
    """

    numbers: dict[str, dict[str, Any]]
    differs: str | None
    calls: dict[str, int]
    report: fastft.Report


PAIRS = {"fastft_stock": "fastft - stock", "stock_exact": "stock - float64", "fastft_exact": "fastft - float64"}


def parity(network: torch.nn.Module, ours: Variant, batches: Sequence[Batch], recipe: Recipe, tick: Tick) -> Parity:
    """Logits, loss and gradients of ``network`` on the first batch, and the error budget's verdict about them."""
    numbers: dict[str, dict[str, Any]] = {}
    calls: Counter[str] = Counter()

    def evaluate(seed: int) -> tuple[error.Results, error.Results, error.Results]:
        batch = batches[seed % len(batches)]
        stock = _results(network, batch, recipe.autocast)
        tick()
        swapped = copy.deepcopy(network)
        ours.prepare(swapped)
        with KernelCalls() as kernels:
            own = _results(swapped, batch, recipe.autocast)
        tick()
        exact = _results(*_in_float64(network, batch))
        tick()
        if not numbers:
            numbers.update(_numbers(own, stock, exact))
            calls.update(kernels.names)
        return own, stock, exact

    differs = _beyond_budget(evaluate)
    swapped = copy.deepcopy(network)
    ours.prepare(swapped)
    return Parity(numbers, differs, dict(calls), fastft.report(swapped))


def _beyond_budget(evaluate: Callable[[int], tuple[error.Results, error.Results, error.Results]]) -> str | None:
    """What of ``evaluate(seed)``, as for :func:`error.check`, exceeds the error budget.

    All gradients of a batch share the rounding of its loss, so their errors may be larger by luck: what exceeds the
    budget with one batch is judged again with eight.
    """
    budget, exceeded, seed = error.Budget(), None, 0
    for wanted in (1, error.SEEDS):
        try:
            while seed < wanted or not budget.enough:
                budget.add(*evaluate(seed), seed=seed)
                seed += 1
            budget.check()
            return None
        except error.BudgetExceeded as found:
            exceeded = str(found)
    return exceeded


def _results(model: torch.nn.Module, batch: Batch, autocast: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    results = error.run_model(model.eval(), batch, autocast)
    return {name: result.detach().cpu() for name, result in results.items()}


def _in_float64(network: torch.nn.Module, batch: Batch) -> tuple[torch.nn.Module, Batch]:
    device = next(network.parameters()).device
    device = device if device.type in ("cpu", "cuda") else torch.device("cpu")  # not every accelerator has float64
    model = copy.deepcopy(network).to(device, torch.float64)
    return model, {name: values.to(device) for name, values in batch.items()}


def _numbers(own: error.Results, stock: error.Results, exact: error.Results) -> dict[str, dict[str, Any]]:
    groups = {"logits": ["logits"], "loss": ["loss"], "gradients": [name for name in exact if name.startswith("grad ")]}
    sides = {"fastft_stock": (own, stock), "stock_exact": (stock, exact), "fastft_exact": (own, exact)}
    found: dict[str, dict[str, Any]] = {}
    for group, names in groups.items():
        count = sum(exact[name].numel() for name in names)
        found[group] = {"size": sum(exact[name].abs().sum().item() for name in names) / count}
        for pair, (left, right) in sides.items():
            apart = [(left[name].double() - right[name].double()).abs() for name in names if exact[name].numel()]
            found[group][pair] = {
                "max": max(difference.max().item() for difference in apart),
                "mean": sum(difference.sum().item() for difference in apart) / count,
            }
    return found


def losses_without_dropout(
    network: torch.nn.Module, compared: Sequence[Variant], batches: Sequence[Batch], recipe: Recipe, tick: Tick
) -> dict[str, list[float]]:
    """The loss of every step by variant, and once more stock's with the rows of each batch in reverse order.

    The same batch in another order has the same loss and gradients up to rounding, so the last tells how far apart
    rounding alone drives two runs of this job.
    """
    turned = [{name: values.flip(0) for name, values in batch.items()} for batch in batches]
    curves = {}
    for name, variant, its_batches in [*((v.name, v, batches) for v in compared), (REVERSED, compared[0], turned)]:
        training = Training(network, variant, recipe, dropout=False)
        for batch in its_batches:
            training.step(batch)
            tick()
        curves[name] = training.losses
    return curves


def losses_of_another_seed(
    network: torch.nn.Module, stock: Variant, batches: Sequence[Batch], recipe: Recipe, tick: Tick
) -> list[float]:
    """Stock's losses with dropout as :func:`timed` finds them, but for what dropout draws: how far apart that alone
    drives two runs."""
    training = Training(network, stock, replace(recipe, seed=recipe.seed + len(batches)), dropout=True)
    for batch in batches:
        training.step(batch)
        tick()
    return training.losses


# ---- time and memory


@dataclass(frozen=True)
class Timed:
    """Of one variant, in seconds.

    Attributes:
        step, ratio: median and quartiles over batches of uneven length: of a step, and of how many times as fast as
            stock's it was on the same batch.
        mean, speedup: of a step, and how many times as fast as stock all of them were.
        phases: the mean of each.
        losses: of every step.
    """

    step: timing.Spread
    ratio: timing.Spread
    mean: float
    speedup: float
    phases: dict[str, float]
    losses: list[float]


def timed(
    network: torch.nn.Module,
    compared: Sequence[Variant],
    longest: Batch,
    batches: Sequence[Batch],
    recipe: Recipe,
    tick: Tick,
) -> dict[str, Timed]:
    """Trains all variants side by side with dropout, a step on each of ``batches`` in turn; ``longest`` warms up."""
    trainings = {v.name: Training(network, v, recipe, dropout=True) for v in compared}
    current = longest

    def next_batch(turn: int) -> None:
        nonlocal current
        current = batches[turn]
        if turn == 0:
            for training in trainings.values():
                training.restart()

    def step(training: Training) -> None:
        training.step(current)
        tick()

    times = timing.compare(
        {name: functools.partial(step, training) for name, training in trainings.items()},
        rounds=len(batches),
        device=next(network.parameters()).device,
        sample_s=0,  # one step, short or not
        each_round=next_batch,
    )
    return {
        name: Timed(
            step=times[name],
            ratio=times.ratio(name, STOCK),
            mean=statistics.fmean(times.samples[name]),
            speedup=sum(times.samples[STOCK]) / sum(times.samples[name]),
            phases=training.phases,
            losses=training.losses,
        )
        for name, training in trainings.items()
    }


def memory(
    network: torch.nn.Module, compared: Sequence[Variant], batch: Batch, recipe: Recipe, tick: Tick
) -> dict[str, dict[str, int | None]]:
    """By variant, in bytes: ``kept``, what the forward of ``batch`` keeps for the backward, and ``step``, by how much
    the memory in use grows at most during a step, above weights and optimizer state (None: the system does not tell).
    """
    found = {}
    for variant in compared:
        one_row = {name: values[:1] for name, values in batch.items()}
        training = Training(network, variant, recipe, dropout=True)
        training.step(one_row)  # creates the optimizer's state
        step = peak_growth(lambda training=training: training.step(batch), next(network.parameters()).device)
        tick()
        given = [*training.model.parameters(), *training.model.buffers(), *batch.values()]
        kept = timing.kept_for_backward(lambda training=training: training.forward(batch), given)
        tick()
        found[variant.name] = {"kept": kept, "step": step}
    return found


def peak_growth(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which the memory in use grows at most while ``run()`` runs: resident memory of the process, or what is
    allocated on a CUDA device. None where the system does not tell (it does on Linux)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not Path("/proc/self/clear_refs").exists():
        run()
        return None
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's: freed memory that it kept would hide growth
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak, VmHWM, to what is resident now
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not Path("/proc/meminfo").exists():
        return None
    free = [_field(Path("/proc/meminfo"), "MemAvailable")]
    if (CGROUP / "memory.max").exists() and (limit := (CGROUP / "memory.max").read_text().strip()) != "max":
        held = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        cached = int(held.get("inactive_file", 0))  # files that were read: the system takes it back when it is needed
        free.append(max(0, int(limit) - int((CGROUP / "memory.current").read_text()) + cached))
    return min(free)


def require_memory(network: transformers.PreTrainedModel, variants: int) -> None:
    """Raises MemoryError where weights, gradients and optimizer states alone do not fit."""
    size = sum(parameter.numel() for parameter in network.parameters())
    training = 4 + 12 * variants + 4  # ours; weights and two moments for each; the gradients of the one that steps
    judging = 4 + 8 + 8 + 2 * 4  # ours; float64 weights and gradients; gradients of stock and fastft
    needed, free = size * max(training, judging), free_memory(network.device)
    if free is not None and needed > free:
        raise MemoryError(
            f"compare: the model has {size:,} parameters, training it {variants} times side by side takes "
            f"{needed / 1e9:.1f} GB and more, {free / 1e9:.1f} GB are free on {network.device}"
        )


def _status(name: str) -> int:
    return _field(Path("/proc/self/status"), name)


def _field(path: Path, name: str) -> int:
    """Bytes in a line like ``VmRSS:     13576 kB``."""
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10
