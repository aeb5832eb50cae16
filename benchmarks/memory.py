"""Memory of activations in a training step, stock and at each level of fastft's activation_memory, and what it costs.

Each figure is the growth of the resident set's maximum (ru_maxrss) over two steps, in a process of its own in which
everything else is there already: imports, weights, gradients, the optimizer's state. Gradients are zeroed in place, so
that they stay there. All of the last layer is computed. Times are of whole steps, interleaved, in another process.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import cells, report
from benchmarks.cells import Cell, Training
from fastft.functional.encoder_layer import MEMORY
from fastft.testing.timing import compare

SIZES = {"bert-base": ("16x128",), "minilm": ("32x128",)}
STOCK = "stock"
GOALS = {"fast": 0.45, "low": 0.30, "lowest": 0.15}  # of stock's


def main() -> int:
    """Measures what the options select and prints the table."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.one:
        cell, provider = Cell(**json.loads(options.one[0])), options.one[1]
        print(json.dumps(growth(cell, provider)))
        return 0
    rows = []
    for cell in cells.chosen(options, SIZES):
        rows += _measure(cell, options)
    report.publish("memory", rows, {}, options, add_by=cells.ROW if options.add else ())
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    cells.add_options(parser, models=("bert-base",))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a cell as JSON and a provider: in a fresh process
    report.add_options(parser, rounds=3)
    options = parser.parse_args()
    if options.device != "cpu" or not sys.platform.startswith("linux"):
        parser.error("what is measured is the CPU's memory, as Linux tells it")
    return options


def _measure(cell: Cell, options: argparse.Namespace) -> list[dict]:
    providers = (STOCK, *MEMORY)
    grown = {provider: in_a_process(cell, provider) for provider in providers}
    print(f"{cell}: {', '.join(f'{name} {size / 1e6:,.0f} MB' for name, size in grown.items())}", file=sys.stderr)
    rows = [
        {
            **asdict(cell),
            "provider": provider,
            "growth": grown[provider],
            "share": grown[provider] / grown[STOCK],
            "goal": GOALS.get(provider),
        }
        for provider in providers
    ]
    if options.rounds:
        runs = {name: _training(cell, name).step for name in providers}
        times = compare(runs, rounds=options.rounds, untimed=1)
        for row in rows:
            row |= {"time": asdict(times[row["provider"]]), "ratio": asdict(times.ratio(row["provider"], STOCK))}
    return rows


def in_a_process(cell: Cell, provider: str) -> int:
    command = [sys.executable, "-m", "benchmarks.memory", "--one", json.dumps(asdict(cell)), provider]
    command += ["--threads", str(torch.get_num_threads())]
    found = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, cwd=report.ROOT, env={**os.environ, "FASTFT_TUNE": "0"}
    )
    return json.loads(found.stdout)


def _training(cell: Cell, provider: str) -> Training:
    return Training(cell, None if provider == STOCK else {"cls_only": False, "activation_memory": provider})


def growth(cell: Cell, provider: str) -> int:
    """Bytes, in a fresh process."""
    _load_code(cell, provider)
    training = _training(cell, provider)
    for parameter in training.parameters:
        parameter.grad = torch.zeros_like(parameter).fill_(0.0)  # written, or the pages are not there
    training.update()
    before = _largest_resident_set()
    for _ in range(2):
        training.forward().backward()
        training.update()
        training.optimizer.zero_grad(set_to_none=False)
    return _largest_resident_set() - before


def _load_code(cell: Cell, provider: str) -> None:
    """Imports what a step imports when it needs it, with a model too small to leave memory behind."""
    small = replace(cell, model="tiny", batch=2, length=32)
    _training(small, provider).step()


def _largest_resident_set() -> int:
    """Bytes: ru_maxrss, but of this program alone; that one begins with what the process had been before exec."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    sys.exit(main())
