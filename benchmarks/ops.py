"""Each op beside PyTorch's: time, share of the floor, memory, for every benchmark shape of its spec.

The floor is the time at the machine's own FMA peak or at the bandwidth of a memory copy, whichever is longer, both
measured in the same run; a row above 100 % fails the run.
"""

import argparse
import sys

import torch

from benchmarks import report
from fastft import _library
from fastft.functional._choice import backend
from fastft.testing import OpSpec, all_specs
from fastft.testing.measure import PASSES, Measurement, measure, paths
from fastft.testing.timing import ROUNDS, BeatsPeak, Peaks

COLUMNS = ("op", "shape", "pass", "dtype", "kernel", "fastft ms", "torch ms", "x torch", "% of floor", "torch %", "kept MB")


def main() -> int:
    """Measures what the options select, prints the table as it grows; 1 if a row beat the peak."""
    options = _parser().parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    specs = {spec.name: spec for spec in all_specs()}
    chosen = [specs[name] for name in options.op or specs]
    isas = _library.isas() if options.isa == "all" else [options.isa] if options.isa else [None]
    dtypes = [getattr(torch, name) for name in options.dtype]
    rows: list[tuple[Measurement, Peaks]] = []
    all_peaks = {}
    for isa in isas:
        if isa:
            _library.set_isa(isa)
        peaks = Peaks(device=options.device)
        all_peaks[isa or (_library.isa() if _library.available() else "torch")] = peaks
        for spec in chosen:
            for dtype in dtypes:
                for index, path in _cases(spec, dtype, options):
                    row = measure(
                        spec, index, dtype, path, device=options.device, rounds=options.rounds, peaks=peaks
                    )
                    rows.append((row, peaks))
                    print(_progress(row), file=sys.stderr)
        peaks.finish()
    table, failures = [], []
    for row, peaks in rows:
        try:
            shares = row.shares(peaks)
        except BeatsPeak as error:
            failures.append(f"{row.op}, {row.sample}, {row.path}: {error}")
            shares = (None, None)
        table.append({**row.as_dict(), "share": shares[0], "torch_share": shares[1]})
    report.publish(
        "ops", table, {name: peaks.as_dict() for name, peaks in all_peaks.items()}, options, backend=backend()
    )
    for failure in failures:
        print(f"beats the peak: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__)
    names = [spec.name for spec in all_specs()]
    parser.add_argument("--op", action="append", choices=names, help="only this op (repeatable)")
    parser.add_argument("--shape", default="", help="only shapes whose name contains this; test cases too then")
    parser.add_argument("--pass", dest="path", action="append", help=f"{', '.join(PASSES)} or 'grad <argument>' (repeatable)")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16", "float64", "float16"))
    parser.add_argument("--isa", choices=("all", *_library.ISAS), help="this instruction set, or each one in turn")
    parser.add_argument("--quick", action="store_true", help="five rounds, the first shape of each op")
    report.add_options(parser, rounds=ROUNDS)
    return parser


def _cases(spec: OpSpec, dtype: torch.dtype, options: argparse.Namespace) -> list[tuple[int, str]]:
    """(index of the sample, pass) of what the options select."""
    outline = spec.outline(dtype)
    found = [
        index
        for index, sample in enumerate(outline)
        if (options.shape in sample.why if options.shape else not spec.small(sample))
    ]
    wanted = options.path or PASSES
    return [(i, path) for i in found[: 1 if options.quick else None] for path in paths(spec, outline[i]) if path in wanted]


def _progress(row: Measurement) -> str:
    return f"{row.op} | {row.sample} | {row.path} | {row.dtype} | {row.fastft.median * 1e3:.3f} ms | x {row.ratio.median:.2f}"


if __name__ == "__main__":
    sys.exit(main())
