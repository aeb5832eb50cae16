"""Inference of BERT-base: stock Transformers, fastft.optimize, and ONNX Runtime in float32 where it is installed.

A call is the forward of a sequence classifier in evaluation mode under no_grad, on full batches and on one as uneven as
snippets of movie reviews are. Stock has SDPA attention; bfloat16 is autocast over float32 weights, and beside it
weights that were converted to bfloat16. ONNX Runtime needs `pip install onnxruntime onnx onnxscript`; its threads go on
spinning for a while, so that a call that is timed follows one of its own kind.
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import cells, report
from benchmarks.cells import Cell
from fastft.testing.timing import Peaks, compare

SIZES = ("1x128", "32x128")
STOCK, FASTFT, CONVERTED, ONNX = "stock", "fastft", ", converted", "ONNX Runtime"
PACKAGES = ("onnxruntime", "onnx", "onnxscript")


def main() -> int:
    """Measures what the options select and prints the table; 1 if a row beat the peak."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    peaks, measured = Peaks(device=options.device), []
    for cell in _cells(options):
        measured += _measure(cell, peaks, options)
    return cells.publish("inference", measured, peaks, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__)
    cells.add_options(parser, models=("bert-base",))
    report.add_options(parser, rounds=11)
    return parser.parse_args()


def _cells(options: argparse.Namespace) -> list[Cell]:
    found = cells.chosen(options, dict.fromkeys(cells.MODELS, SIZES), cells.PADDING)
    return [cell for cell in found if cell.padding == "none" or cell.batch > 1]


def _measure(cell: Cell, peaks: Peaks, options: argparse.Namespace) -> list[tuple[dict, float, bool]]:
    runs = {STOCK: _pytorch(cell, False, options.device), FASTFT: _pytorch(cell, True, options.device)}
    if cell.dtype == "bfloat16":
        runs |= {
            f"{STOCK}{CONVERTED}": _pytorch(cell, False, options.device, converted=True),
            f"{FASTFT}{CONVERTED}": _pytorch(cell, True, options.device, converted=True),
        }
    elif options.device == "cpu" and cells.installed(*PACKAGES):
        runs[ONNX] = _onnx(cell)
    times = compare(runs, rounds=options.rounds, peaks=peaks, device=options.device, untimed=1)
    rows = []
    for name in runs:
        base = f"{STOCK}{CONVERTED}" if name.endswith(CONVERTED) else STOCK
        row = {**asdict(cell), "provider": name, "time": asdict(times[name])}
        row["ratio"] = asdict(times.ratio(name, base))
        rows.append((row, sum(cell.forward_flops()), not name.startswith(FASTFT)))
        print(f"{cell}: {name} {times[name].median * 1e3:.1f} ms", file=sys.stderr)
    return rows


def _pytorch(cell: Cell, optimize: bool, device: str, converted: bool = False) -> Callable[[], torch.Tensor]:
    model = cell.classifier().to(device).eval()
    if converted:
        model = model.to(torch.bfloat16)
    if optimize:
        import fastft

        fastft.optimize(model)
    batch = _inputs(cell, device)
    cast = replace(cell, dtype="float32") if converted else cell  # no autocast where the weights are in bfloat16

    @torch.no_grad()
    def run() -> torch.Tensor:
        with cast.autocast(device):
            return model(**batch).logits

    return run


def _inputs(cell: Cell, device: str = "cpu") -> dict[str, torch.Tensor]:
    batch = cell.tensors(device)
    del batch["labels"]
    return batch


def _onnx(cell: Cell) -> Callable[[], object]:
    """The stock model in ONNX Runtime, all of its optimizations on, as many threads as torch has."""
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model, batch = cell.classifier().eval(), _inputs(cell)
    model.config.return_dict = False
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        torch.onnx.export(model, (), str(file), kwargs=batch, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [found.name for found in session.get_inputs()]
    fed = {name: batch[name].numpy() for name in names}
    return lambda: session.run(None, fed)


if __name__ == "__main__":
    sys.exit(main())
