"""Each op beside PyTorch's: time, share of the floor, memory, for every benchmark shape of its spec.

The floor is the time at the machine's own FMA peak or at the bandwidth of a memory copy, whichever is longer, both
measured in the same run; a row above 100 % fails the run. "alone" is the time of our kernels, called again with results
that are there already; "fastft" that of the whole op, its results new each time, on the kernel that `auto` chooses.

``--grid`` measures the promise to be never slower instead: many sizes, the smallest among them, forward and
forward+backward. A cell is slower than allowed above 1.03 x PyTorch's time, or above 10 us more where that is below
100 us; one that seems so is measured once more behind all the others, when whatever disturbed the machine may be over,
with five times the rounds, which decides.

    python -m benchmarks.ops --op linear_act --shape 2048x --pass forward --pass "grad input" --pass "grad weight"
    python -m benchmarks.ops --isa all --shape 2048x384
    python -m benchmarks.ops --grid
    python -m benchmarks.ops --grid --op linear_act --shape 64x --save --add
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks import report
from fastft import _library
from fastft.testing import OpSpec, Timed, all_specs
from fastft.testing.measure import PASSES, Measurement, measure, paths
from fastft.testing.timing import ROUNDS, BeatsPeak, Peaks

SHOWN = ("forward", "train", "grad input", "grad weight")
GRID_PASSES = ("forward", "train")
GRID_S = 0.5  # seconds of one cell, whose rounds are fewer if they take longer
COLUMNS = ("isa", "op", "sample", "path", "dtype")  # what tells rows apart
AGAIN = 5  # times as many for a cell that fails

Cell = tuple[OpSpec, int, torch.dtype, str]  # what :func:`measure` is to be called with


def main() -> int:
    """Measures what the options select and prints the table; 1 if a row beat the peak."""
    specs = {spec.name: spec for spec in all_specs()}
    options = _options(list(specs))
    if options.threads:
        torch.set_num_threads(options.threads)
    rows, peaks, failures = [], {}, []
    for isa in _isas(options.isa):
        if isa != "none":
            _library.set_isa(isa)
        peaks[isa] = Peaks(device=options.device, every=20 if options.grid else 2)
        selected = [specs[name] for name in options.op or specs]
        measured = list((_grid if options.grid else _table)(selected, peaks[isa], options))
        peaks[isa].finish()  # shares are of the whole run's peak
        for row in measured:
            try:
                shares = row.shares(peaks[isa])
            except BeatsPeak as error:
                shares = dict.fromkeys(("alone", "fastft", "torch"))
                failures.append(f"{_label(row)}: {error}")
            rows.append({**row.as_dict(), "isa": isa, "slower": row.slower, "shares": shares})
    limits = {isa: found.as_dict() for isa, found in peaks.items()}
    report.publish("grid" if options.grid else "ops", rows, limits, options, add_by=COLUMNS if options.add else ())
    for failure in failures:
        print(f"beats the peak: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _options(names: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", action="append", choices=names, help="only this op (repeatable)")
    parser.add_argument("--shape", default="", help="only samples whose name contains this, those of tests too")
    parser.add_argument(
        "--pass", dest="path", action="append", help=f"{', '.join(PASSES)} or 'grad <argument>' (repeatable)"
    )
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16", "float64", "float16"))
    parser.add_argument("--isa", choices=("all", *_library.ISAS), help="this instruction set, or each one in turn")
    parser.add_argument("--grid", action="store_true", help="measure where we are slower than PyTorch; minutes")
    parser.add_argument("--quick", action="store_true", help="five rounds, the first shape of each op")
    parser.add_argument("--add", action="store_true", help="with --save: beside the rows that were saved before")
    report.add_options(parser, ROUNDS)
    options = parser.parse_args()
    if options.quick:
        options.rounds = 5
    return options


def _isas(wanted: str | None) -> list[str]:
    if not _library.available():
        return ["none"]
    return _library.isas() if wanted == "all" else [wanted or _library.isa()]


def _table(specs: list[OpSpec], peaks: Peaks, options: argparse.Namespace) -> Iterator[Measurement]:
    for cell in _cells(specs, options, SHOWN):
        row = measure(*cell, device=options.device, rounds=options.rounds, peaks=peaks)
        _print(row)
        yield row


def _grid(specs: list[OpSpec], peaks: Peaks, options: argparse.Namespace) -> list[Measurement]:
    gridded = [replace(spec, samples=spec.grid) for spec in specs if spec.grid]

    def measured(cell: Cell, times: int) -> Measurement:
        rounds, budget_s = times * options.rounds, times * GRID_S
        row = measure(*cell, device=options.device, rounds=rounds, peaks=peaks, budget_s=budget_s, op_only=True)
        _print(row)
        return row

    first = [(cell, measured(cell, 1)) for cell in _cells(gridded, options, GRID_PASSES)]
    return [measured(cell, AGAIN) if row.slower else row for cell, row in first]


def _cells(specs: list[OpSpec], options: argparse.Namespace, default: tuple[str, ...]) -> Iterator[Cell]:
    """All that the options select."""
    for spec in specs:
        for dtype in options.dtype or ("float32", "bfloat16"):
            for index, path in _cases(spec, options, default):
                yield spec, index, getattr(torch, dtype), path


def _cases(spec: OpSpec, options: argparse.Namespace, default: tuple[str, ...]) -> list[tuple[int, str]]:
    """(index of a sample, pass) of what the options select."""
    outline = list(enumerate(spec.outline()))
    if options.shape:
        chosen = [(i, sample) for i, sample in outline if options.shape in sample.why]
    else:
        chosen = [(i, sample) for i, sample in outline if isinstance(sample, Timed)]
    wanted = options.path or default
    return [(i, p) for i, sample in chosen[: 1 if options.quick else None] for p in paths(spec, sample) if p in wanted]


def _print(row: Measurement) -> None:
    alone = f", kernel {row.alone.median * 1e3:.4g} ms" if row.alone else ""
    mark = " SLOWER" if row.slower else ""
    print(
        f"{_label(row)}: {row.fastft.median * 1e3:.4g} ms{alone}, {row.ratio.median:.2f} x torch{mark}",
        file=sys.stderr,
        flush=True,
    )


def _label(row: Measurement) -> str:
    return f"{row.op} {row.sample}, {row.path}, {str(row.dtype).removeprefix('torch.')}"


if __name__ == "__main__":
    sys.exit(main())
