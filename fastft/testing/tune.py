"""Measures which kernel is faster for which sizes on this machine, and writes it down for fastft/functional/_tuning.py.

Where the two are within 5 % of each other the shipped rule is kept: facts differ from it for a reason, not by noise.
"""

import functools
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from fastft import _library
from fastft.functional import _choice, _tuning
from fastft.testing.measure import measure
from fastft.testing.spec import KernelCalls, OpSpec, all_specs
from fastft.testing.specs import linear_act
from fastft.testing.timing import compare

ROWS = (2, 8, 32, 128, 512, 2048)  # the middles of the facts' ranges of rows; the last one stands for more, too
DTYPES = (torch.float32, torch.bfloat16)
MARGIN = 1.05
CELL_S, ROUNDS = 0.04, 9  # of one cell, the fewer and the shorter of the two
FIRST_S = 4.0  # what the first optimize on a machine may take
FIRST_ROWS = (512, 32)


@dataclass(frozen=True)
class Task:
    """One cell to be measured: sample number ``index`` of ``spec``, and its sizes."""

    spec: OpSpec
    index: int
    sizes: tuple[int, ...]
    dtype: torch.dtype
    path: str


def tasks() -> list[Task]:
    """What ``fastft bench --tune`` measures: of every op that has a grid, the grid's sizes with :data:`ROWS`."""
    gridded = (replace(spec, samples=functools.partial(spec.grid, rows=ROWS)) for spec in all_specs() if spec.grid)
    return [task for spec in gridded for task in _tasks(spec, DTYPES)]


def measured(tasks: Iterable[Task], device: str = "cpu") -> Iterator[_tuning.Cell]:
    """A cell for each task, as soon as it is known; the caller's random numbers stay what they were."""
    for task in tasks:
        yield _cell(task, device)


def write(cells: Iterable[_tuning.Cell], device: str = "cpu") -> bool:
    """Puts the cells, and how bfloat16 is multiplied, into the user's file; False, with a warning, if it refuses."""
    how = _library.bf16() if device == "cpu" and _library.isa() == "avx512_bf16" else None
    facts = _tuning.Facts(tuple(cells), how)
    return _tuning.store(facts, device, torch.get_num_threads())


def first_time(model: torch.nn.Module) -> None:
    """Measures the linear layers of ``model`` if nothing is known of this machine yet; seconds, announced in one line.

    Only on the CPU, in a process of its own, with FASTFT_BACKEND=auto, and if the file can be written.
    """
    layers = Counter((m.in_features, m.out_features) for m in model.modules() if isinstance(m, torch.nn.Linear))
    if not layers or not _is_first(model):
        return
    most = [layer for layer, _ in layers.most_common(8)]
    spec = replace(linear_act.SPEC, samples=functools.partial(linear_act.grid, rows=FIRST_ROWS, layers=most))
    dtypes = dict.fromkeys((*(p.dtype for p in model.parameters() if p.dtype in DTYPES), torch.bfloat16))
    print(
        f"fastft: finding out which kernels are faster here: once, {FIRST_S:.0f} s at most, kept in {_tuning.path()} "
        "(FASTFT_TUNE=0 leaves it)",
        file=sys.stderr,
    )
    cells, end = [], time.perf_counter() + FIRST_S
    choose_bf16()
    for cell in measured(_tasks(spec, dtypes)):
        cells.append(cell)
        if time.perf_counter() > end:
            break
    write(cells)


def _is_first(model: torch.nn.Module) -> bool:
    return (
        _tuning.enabled()
        and _library.available()
        and _choice.backend() == "auto"
        and not _tuning.in_group()
        and all(parameter.device.type == "cpu" for parameter in model.parameters())
        and not _choice.facts()
        and _tuning.writable()
    )


def _tasks(spec: OpSpec, dtypes: Iterable[torch.dtype]) -> list[Task]:
    sizes = [spec.sizes(**spec.named(sample)) for sample in spec.outline()]
    return [
        Task(spec, index, of, dtype, path)
        for path in reversed(_tuning.PATHS)  # training first
        for dtype in dtypes
        for index, of in enumerate(sizes)
    ]


@torch.inference_mode(False)
@torch.enable_grad()
def _cell(task: Task, device: str) -> _tuning.Cell:
    with torch.random.fork_rng(), torch.autocast(device, enabled=False):
        with _choice.use_backend("fastft"):
            row = measure(
                task.spec,
                task.index,
                task.dtype,
                task.path,
                device=device,
                rounds=ROUNDS,
                budget_s=CELL_S,
                op_only=True,
            )
        shipped = _shipped(task, device)
    times = {"fastft": row.fastft.median, "torch": row.torch.median}
    other = "torch" if shipped == "fastft" else "fastft"
    return _tuning.Cell(
        op=task.spec.name,
        dtype=str(task.dtype).removeprefix("torch."),
        path=task.path,
        sizes=task.sizes,
        runs=other if times[other] * MARGIN < times[shipped] else shipped,
        fastft_us=round(times["fastft"] * 1e6, 2),
        torch_us=round(times["torch"] * 1e6, 2),
    )


def _shipped(task: Task, device: str) -> str:
    """Which kernel the shipped rule runs."""
    arguments = task.spec.named(task.spec.sample(task.index, task.dtype, device))
    if task.path == "train":
        for name in task.spec.gradients:
            if isinstance(arguments[name], torch.Tensor) and arguments[name].is_floating_point():
                arguments[name].requires_grad_()
    with _choice.use_backend("auto"), _choice.use_facts({}), KernelCalls() as kernels:
        task.spec.op(**arguments)
    return "fastft" if kernels.calls else "torch"


def choose_bf16(device: str = "cpu") -> None:
    """Has the CPU's kernels multiply bfloat16 in the faster way from now on; before cells are measured."""
    if device == "cpu" and _library.isa() == "avx512_bf16":
        _library.set_bf16(_faster_products())


def _faster_products() -> str:
    """How a layer of usual size is multiplied faster: by VDPBF16PS ("dot"), or widened to float32."""
    input, weight = (torch.ones(size, 768, dtype=torch.bfloat16) for size in (512, 768))
    output = torch.empty_like(input)

    def run(how: str) -> None:
        _library.set_bf16(how)
        torch.ops.fastft.linear_act_forward(output, None, input, weight, None, 0)

    with _library.use_bf16(_library.bf16()):
        times = compare({how: functools.partial(run, how) for how in _tuning.BF16}, rounds=ROUNDS)
    return min(_tuning.BF16, key=lambda how: times[how].median)
