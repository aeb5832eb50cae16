"""The only timer: providers of the same result side by side, and the machine's own limits measured in the same run.

>>> peaks = Peaks()
>>> times = compare({"fastft": ours, "torch": theirs}, peaks=peaks)         # doctest: +SKIP
>>> times.ratio("fastft", "torch").median                                   # doctest: +SKIP
1.31
>>> peaks.share(flops, nbytes, times["fastft"].median, torch.float32)       # doctest: +SKIP
0.93
"""

import datetime
import gc
import itertools
import math
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastft import _library, environment

Run = Callable[[], Any]

SAMPLE_S = 2e-3  # shorter calls are repeated until a sample takes this long
ROUNDS = 21
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of what was measured once per round: seconds, or a ratio."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = sorted(values)
        low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        return cls(median, low, high, len(values))

    @property
    def relative(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        return (self.high - self.low) / 2 / self.median


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` returns; ``times["fastft"]`` is a Spread of seconds per call."""

    samples: Mapping[str, list[float]]

    def __getitem__(self, provider: str) -> Spread:
        return Spread.of(self.samples[provider])

    def ratio(self, provider: str, to: str) -> Spread:
        """How many times faster ``provider`` is than ``to``, round by round: drift of the machine cancels."""
        return Spread.of(b / a for a, b in zip(self.samples[provider], self.samples[to], strict=True))


def compare(
    providers: Mapping[str, Run],
    *,
    rounds: int = ROUNDS,
    peaks: "Peaks | None" = None,
    device: torch.device | str = "cpu",
    sample_s: float = SAMPLE_S,
    budget_s: float = math.inf,
    each_round: Callable[[int], None] | None = None,
    untimed: int = 0,
) -> Comparison:
    """Times the providers in turns, one sample of each per round, in alternating order.

    Args:
        providers: name -> what to call; its result is dropped.
        rounds: samples per provider; their medians and quartiles count.
        peaks: measured between the rounds, so that they see the same machine.
        device: CUDA's is synchronised around a sample.
        sample_s: a sample repeats its call until it takes about this long.
        budget_s: fewer rounds, but not less than three, where they take longer than this.
        each_round: called with the number of a round before it, after the calls that warm up.
        untimed: calls before each sample. What the provider before left behind is not this one's: GB that it gave back
            and the system still cleans slow the next training step down by 4 %, which follows its own in earnest.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else _nothing
    calls = {name: _calls(run, wait, sample_s) for name, run in providers.items()}
    samples: dict[str, list[float]] = {name: [] for name in providers}
    collecting = gc.isenabled()
    gc.disable()  # as timeit does: a collection would hit one provider or the other
    try:
        start = time.perf_counter()
        for turn in range(rounds):
            if turn >= LEAST_ROUNDS and time.perf_counter() - start > budget_s:
                break
            if each_round is not None:
                each_round(turn)
            if peaks is not None:
                peaks.between_rounds()
            for name in list(providers)[:: 1 if turn % 2 == 0 else -1]:
                for _ in range(untimed):
                    providers[name]()
                samples[name].append(_time(providers[name], calls[name], wait))
            if sum(s[-1] * calls[name] for name, s in samples.items()) > 1:
                gc.collect()
    finally:
        if collecting:
            gc.enable()
    return Comparison(samples)


def _nothing() -> None:
    pass


def _calls(run: Run, wait: Run, sample_s: float) -> int:
    """Calls per sample; warms up, so that what a first call prepares does not count."""
    run()
    calls = 1
    while (seconds := _time(run, calls, wait) * calls) < sample_s:
        calls = min(10 * calls, math.ceil(calls * 1.2 * sample_s / max(seconds, 1e-7)))
    return calls


def _time(run: Run, calls: int, wait: Run) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return (time.perf_counter() - start) / calls


class Laps:
    """Splits one call into phases: ``laps("forward")`` ends the phase of that name, which began where the last ended.

    On CUDA by events, which make nothing wait.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def __call__(self, name: str) -> None:
        self._marks.append((name, self._now()))

    def seconds(self) -> dict[str, float]:
        """Of each phase by name; on CUDA after the work is done."""
        pairs = itertools.pairwise(self._marks)
        if self._cuda:
            return {name: start.elapsed_time(end) / 1e3 for (_, start), (name, end) in pairs}
        return {name: end - start for (_, start), (name, end) in pairs}

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class BeatsPeak(AssertionError):
    """A measured rate is above the machine's own limit: one of the two is wrong."""


@dataclass
class Peaks:
    """The machine's limits, best of at least five windows spread over a run, on torch's threads.

    FLOP/s of the multiply-add units of the instruction set in use (``csrc/cpu/peak.cpp``; 0 without a native library),
    on CUDA of a large matrix product; what of it is left in the register tile of our matrix products, its operands in
    L1; bytes read plus written per second by a copy, and by an update in place, of memory that no cache holds.
    """

    device: str = "cpu"
    seconds: float = 0.1  # of one window, per dtype
    every: float = 2.0  # seconds between windows
    windows: int = 0
    float32: float = 0.0
    bfloat16: float = 0.0
    tile_float32: float = 0.0
    tile_bfloat16: float = 0.0
    copy: float = 0.0
    update: float = 0.0  # may exceed a copy, which on many CPUs reads what it overwrites
    capped: bool = field(default_factory=lambda: _capped())  # to less than PyTorch's own kernels may use
    _last: float = field(default=-math.inf, repr=False)
    _buffers: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, repr=False)

    COPIED = 256 << 20  # bytes of one buffer
    WINDOWS = 5

    def between_rounds(self) -> None:
        """Opens a window if the last one is some time ago."""
        if time.perf_counter() - self._last >= self.every:
            self.window()

    def window(self) -> None:
        """Measures every limit once more."""
        if self._buffers is None:
            self._buffers = tuple(torch.zeros(self.COPIED // 4, device=self.device) for _ in range(2))
        source, target = self._buffers
        wait = torch.cuda.synchronize if self.device == "cuda" else _nothing
        for _ in range(2):
            self.copy = max(self.copy, 2 * self.COPIED / _time(lambda: target.copy_(source), 1, wait))
            self.update = max(self.update, 2 * self.COPIED / _time(lambda: target.add_(1.0), 1, wait))
        if self.device == "cuda":
            self.float32 = max(self.float32, _matmul_rate(torch.float32, wait))
            self.bfloat16 = max(self.bfloat16, _matmul_rate(torch.bfloat16, wait))
        elif _library.available():
            self.float32 = max(self.float32, torch.ops.fastft.peak_f32(self.seconds))
            self.bfloat16 = max(self.bfloat16, torch.ops.fastft.peak_bf16(self.seconds))
            self.tile_float32 = max(self.tile_float32, torch.ops.fastft.tile_f32(self.seconds))
            self.tile_bfloat16 = max(self.tile_bfloat16, torch.ops.fastft.tile_bf16(self.seconds))
        self.windows += 1
        self._last = time.perf_counter()

    def finish(self) -> "Peaks":
        """At least five windows, whatever happened before."""
        while self.windows < self.WINDOWS:
            self.window()
        return self

    def flops(self, dtype: torch.dtype) -> float:
        """FLOP/s that can be reached in ``dtype``: of the faster of the two units for bfloat16, half for float64."""
        if dtype == torch.float64:
            return self.float32 / 2
        return self.float32 if dtype == torch.float32 else max(self.float32, self.bfloat16)

    def share(
        self, flops: float, nbytes: float, seconds: float, dtype: torch.dtype, *, pytorch: bool = False
    ) -> float | None:
        """The floor as a share of ``seconds``: time at the peak FLOP/s or at a copy's bandwidth, whichever is longer.

        Bytes count only where no cache holds them: from four times its size on. None: no floor is known, as for
        PyTorch's kernels (``pytorch``) where the instruction set of ours is capped.
        Raises: BeatsPeak: more FLOP/s than the peak, or more bytes/s than a copy and an update.
        """
        if pytorch and self.capped:
            return None
        peak = self.flops(dtype)
        in_memory = self.device == "cuda" or nbytes >= 4 * last_level_cache()
        computing = flops / peak if peak else 0.0
        moving = nbytes / self.copy if in_memory else 0.0
        if computing > seconds:
            raise BeatsPeak(f"{flops / seconds / 1e9:.1f} GFLOP/s in {dtype}, the peak of this run is {peak / 1e9:.1f}")
        if in_memory and nbytes / max(self.copy, self.update) > seconds:
            limit = max(self.copy, self.update)
            raise BeatsPeak(f"{nbytes / seconds / 1e9:.1f} GB/s, the peak of this run is {limit / 1e9:.1f}")
        return max(computing, moving) / seconds or None

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        rates = ("float32", "bfloat16", "tile_float32", "tile_bfloat16", "copy", "update")
        return {"windows": self.windows, **{f"{name}_per_s": round(getattr(self, name)) for name in rates}}

    def __str__(self) -> str:
        rates = f"{self.float32 / 1e9:.0f} GFLOP/s float32, {self.flops(torch.bfloat16) / 1e9:.0f} bfloat16"
        return f"{rates}, copy {self.copy / 1e9:.1f} GB/s (best of {self.windows} windows)"


def _capped() -> bool:
    """Whether ours may use less than this CPU's best instruction set, by FASTFT_ISA or ``set_isa``."""
    return _library.available() and bool(os.environ.get("FASTFT_ISA") or _library.isa() != _library.isas()[-1])


def _matmul_rate(dtype: torch.dtype, wait: Run) -> float:
    n = 8192
    a = torch.randn(n, n, device="cuda", dtype=dtype)
    return 2 * n**3 / _time(lambda: a @ a, 1, wait)


def last_level_cache() -> int:
    """Bytes of the CPU's largest cache; 32 MB where the system does not tell."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=32 << 20)


def kept_for_backward(forward: Callable[[], torch.Tensor], inputs: Iterable[torch.Tensor]) -> int:
    """Bytes that ``forward()`` keeps alive until the backward: its output and what autograd saves, without ``inputs``.

    Each storage counts once. Scratch memory inside a kernel is not seen.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # held, so that no other gets its address
        storages[storage.data_ptr()] = storage
        return tensor.detach()  # an output that its own node saves would keep the whole graph for ever

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        keep(forward())
    for tensor in inputs:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in storages.values())


def conditions() -> dict[str, Any]:
    """What a figure depends on: machine, versions, threads, date, command."""
    return {
        **environment.describe(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *_command()]),
    }


def _command() -> list[str]:
    main = sys.modules["__main__"].__spec__
    return ["-m", main.name.removesuffix(".__main__"), *sys.argv[1:]] if main else sys.argv


def machine_name(facts: Mapping[str, Any]) -> str:
    """A folder name for results: ``amd-epyc-family-25-model-17-2-threads``."""
    return re.sub(r"[^a-z0-9]+", "-", f"{facts['cpu']} {facts['threads']} threads".lower()).strip("-")
