"""Each op beside PyTorch's: time, share of the floor, memory, for every benchmark shape of its spec.

The floor is the time at the machine's own FMA peak or at the bandwidth of a memory copy, whichever is longer, both
measured in the same run. A row above 100 % fails the run.
"""

import argparse
import sys

import torch

from benchmarks import report
from fastft import _library
from fastft.testing import OpSpec, Timed, all_specs
from fastft.testing.measure import PASSES, Measurement, measure, paths
from fastft.testing.timing import ROUNDS, BeatsPeak, Peaks


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
        peaks[isa] = Peaks(device=options.device)
        measured = [
            _measure(spec, index, getattr(torch, dtype), path, peaks[isa], options)
            for spec in (specs[name] for name in options.op or specs)
            for dtype in options.dtype or ("float32", "bfloat16")
            for index, path in _cases(spec, options)
        ]
        peaks[isa].finish()  # shares are of the whole run's peak
        for row in measured:
            try:
                share, torch_share = row.shares(peaks[isa])
            except BeatsPeak as error:
                share = torch_share = None
                failures.append(f"{_label(row)}: {error}")
            rows.append({**row.as_dict(), "share": share, "torch_share": torch_share})
    report.publish("ops", rows, {isa: p.as_dict() for isa, p in peaks.items()}, options)
    for failure in failures:
        print(f"beats the peak: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _options(names: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__)
    parser.add_argument("--op", action="append", choices=names, help="only this op (repeatable)")
    parser.add_argument("--shape", default="", help="only samples whose name contains this, those of tests too")
    parser.add_argument(
        "--pass", dest="path", action="append", help=f"{', '.join(PASSES)} or 'grad <argument>' (repeatable)"
    )
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16", "float64", "float16"))
    parser.add_argument("--isa", choices=("all", *_library.ISAS), help="this instruction set, or each one in turn")
    parser.add_argument("--quick", action="store_true", help="five rounds, the first shape of each op")
    report.add_options(parser, ROUNDS)
    options = parser.parse_args()
    if options.quick:
        options.rounds = 5
    return options


def _isas(wanted: str | None) -> list[str]:
    if not _library.available():
        return ["none"]
    return _library.isas() if wanted == "all" else [wanted or _library.isa()]


def _cases(spec: OpSpec, options: argparse.Namespace) -> list[tuple[int, str]]:
    """(index of a sample, pass) of what the options select."""
    outline = list(enumerate(spec.outline()))
    if options.shape:
        chosen = [(i, sample) for i, sample in outline if options.shape in sample.why]
    else:
        chosen = [(i, sample) for i, sample in outline if isinstance(sample, Timed)]
    wanted = options.path or PASSES
    return [(i, p) for i, sample in chosen[: 1 if options.quick else None] for p in paths(spec, sample) if p in wanted]


def _measure(
    spec: OpSpec, index: int, dtype: torch.dtype, path: str, peaks: Peaks, options: argparse.Namespace
) -> Measurement:
    row = measure(spec, index, dtype, path, device=options.device, rounds=options.rounds, peaks=peaks)
    print(f"{_label(row)}: {row.fastft.median * 1e3:.4g} ms, {row.ratio.median:.2f} x torch", file=sys.stderr)
    return row


def _label(row: Measurement) -> str:
    return f"{row.op} {row.sample}, {row.path}, {str(row.dtype).removeprefix('torch.')}"


if __name__ == "__main__":
    sys.exit(main())
