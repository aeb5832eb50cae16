"""A training step of BERT-base and of MiniLM: stock Transformers in its best honest settings, and with fastft.optimize.

A step is forward, backward, clipping to norm 1 and AdamW, with dropout 0.1, on full batches and on batches as uneven as
snippets of movie reviews are. Stock has SDPA attention and the fused AdamW; bfloat16 is autocast, as Trainer(bf16=True)
has it. Weights are random: speed does not depend on them. A step that is timed follows one of its own kind. The share
of the FMA peak counts the FLOPs of matrix products and attention, none of padding. "fastft" computes all that stock
does, with stock's optimizer; "fastft, AdamW" has fastft.optim's; "fastft, first" computes the last layer for first
tokens only, as fastft.optimize has it by default for classifiers. Where they are installed, keras-hub on JAX and ONNX
Runtime's training are measured too (contenders.py has the command for each). With --parts: where the time goes, each
part beside its own floor.
"""

import argparse
import gc
import sys
from dataclasses import asdict

import torch

from benchmarks import cells, contenders, parts, report
from benchmarks.cells import Cell, Training
from fastft import environment
from fastft.testing.timing import Peaks, Spread, compare, kept_for_backward

SIZES = {"bert-base": ("16x128",), "minilm": ("32x128",)}
STOCK, OURS, FIRST, COMPILE = "stock", "fastft, AdamW", "fastft, first", "torch.compile"
PROVIDERS = {  # arguments of Training
    STOCK: {},
    "fastft": {"optimize": {"cls_only": False}},
    OURS: {"optimize": {"cls_only": False}, "our_optimizer": True},
    FIRST: {"optimize": {}},
    COMPILE: {"compiled": True},
}
# Shares of the FMA peak, float32 and bfloat16, that OURS is to reach in BERT-base, by what names the CPU; where a
# register tile in L1 alone stays below 95 %, in proportion to that.
GOAL_SIZES = ("16x128", "64x32", "8x512", "2x128")
GOALS = {
    ("AMD", "family 26"): ((0.82, 0.73), (0.85, 0.76), (0.78, 0.65), (0.57, 0.43)),  # Zen 5
    ("AMD", "family 25"): ((0.86, 0.76), (0.88, 0.79), (0.81, 0.70), (0.65, 0.50)),  # Zen 4
    ("Intel", "family 6"): ((0.80, 0.75), (0.82, 0.77), (0.76, 0.72), (0.58, 0.50)),  # without AMX
}


def main() -> int:
    """Measures what the options select and prints the table; 1 if a row beat the peak."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.goals:
        options.model, options.cell, options.padding = ["bert-base"], GOAL_SIZES, ("none",)
        options.only = options.only or [OURS, FIRST]
    providers = [STOCK, *(options.only or [name for name in PROVIDERS if name not in (STOCK, COMPILE)])]
    providers += [COMPILE] if options.compile and COMPILE not in providers else []
    peaks, measured = Peaks(device=options.device), []
    measure = _parts if options.parts else _measure
    for cell in cells.chosen(options, SIZES, options.padding or cells.PADDING):
        measured += measure(cell, providers, peaks, options)
        gc.collect()  # models that are in a cycle, several GB
    if not options.parts:
        return cells.publish("step", measured, peaks, options)
    peaks.finish()
    report.publish("parts", [found.row(peaks) for found in measured], cells.limits(peaks), options)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    cells.add_options(parser)
    parser.add_argument("--padding", action="append", choices=cells.PADDING, help="(both)")
    parser.add_argument("--goals", action="store_true", help="the table of BERT-base beside its goals; 25 minutes")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the stock model too; takes minutes")
    parser.add_argument("--only", action="append", choices=[n for n in PROVIDERS if n != STOCK], help="beside stock")
    parser.add_argument("--parts", action="store_true", help="where the time goes instead of how long it is")
    report.add_options(parser, rounds=5)
    return parser.parse_args()


def _measure(cell: Cell, providers: list[str], peaks: Peaks, options: argparse.Namespace) -> list[tuple]:
    """What cells.publish takes of one cell."""
    trainings = {name: Training(cell, **PROVIDERS[name], device=options.device) for name in providers}
    others = contenders.installed(cell) if options.device == "cpu" else []
    runs = {name: training.step for name, training in trainings.items()}
    times = compare(
        runs | {name: contenders.step(name, cell) for name in others},
        rounds=options.rounds,
        peaks=peaks,
        device=options.device,
        untimed=1,
    )
    rows = []
    for name in (*trainings, *others):
        print(f"{cell}: {name} {_seconds(times[name])}", file=sys.stderr)
        row = {
            **asdict(cell),
            "provider": name,
            "time": asdict(times[name]),
            "ratio": asdict(times.ratio(name, STOCK)),
            "kept": None,
            "goal": goal(cell, environment.cpu_model()) if name == OURS else None,
        }
        if name in trainings and name != COMPILE:
            training = trainings[name]
            given = [*training.parameters, *training.batch.values()]
            row["kept"] = kept_for_backward(training.forward, given)
        pytorch = None if name == FIRST else "optimize" not in PROVIDERS.get(name, {})  # FIRST leaves some FLOPs out
        rows.append((row, step_flops(cell), pytorch))
    return rows


def goal(cell: Cell, cpu: str) -> float | None:
    """Of :data:`GOALS`; None where there is none for the cell or the CPU."""
    size = f"{cell.batch}x{cell.length}"
    if cell.model != "bert-base" or cell.padding != "none" or size not in GOAL_SIZES:
        return None
    goals = next((goals for names, goals in GOALS.items() if all(name in cpu for name in names)), None)
    return goals[GOAL_SIZES.index(size)][cells.DTYPES.index(cell.dtype)] if goals else None


def _parts(cell: Cell, providers: list[str], peaks: Peaks, options: argparse.Namespace) -> list[parts.Measured]:
    found = []
    for name in providers:
        if name != COMPILE:
            training = Training(cell, **PROVIDERS[name], device=options.device)
            found += parts.measure(training, name, options.rounds, peaks)
            print(f"{cell}: {name}", file=sys.stderr)
    return found


def _seconds(spread: Spread) -> str:
    return f"{spread.median:.3f} s ± {spread.relative:.1%}"


def step_flops(cell: Cell) -> float:
    """Of matrix products and attention, forward and backward."""
    return 3 * sum(cell.forward_flops())


if __name__ == "__main__":
    sys.exit(main())
