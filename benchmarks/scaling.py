"""How evenly 1 to 128 threads share the matrix products of a training step, asked of the partition without running it.

Tasks go in order to whichever thread is free, in two phases with a barrier between them: packing the second operand,
then computing. "busiest" is the time of both on the thread that takes longest, over the mean of all threads' work;
"serial" is the part of a product's time in which one thread decides how to cut it, measured here, while others wait;
all other time is taken to be the work at this machine's peak per core.

    python -m benchmarks.scaling --tokens 4096 --threads 64 --threads 128
"""

import argparse
import heapq
import itertools
import sys
import timeit
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import report
from fastft import _library

LAYERS = {  # inputs and outputs of the linear layers of one encoder layer
    "bert-base": ((768, 768), (768, 3072), (3072, 768)),
    "minilm": ((384, 384), (384, 1536), (1536, 384)),
}
TOKENS = (256, 2048, 4096)
THREADS = (1, 2, 4, 8, 16, 32, 64, 128)
DTYPES = ("float32", "bfloat16")
PASSES = ("forward", "grad input", "grad weight")


def main() -> int:
    """Asks for what the options select and prints the table."""
    options = _options()
    if not _library.available():
        print(f"there is nothing to ask: {_library.why_not()}", file=sys.stderr)
        return 1
    if options.isa:
        _library.set_isa(options.isa)
    rate = {"float32": torch.ops.fastft.peak_f32(0.2), "bfloat16": torch.ops.fastft.peak_bf16(0.2)}
    rate = {name: max(rate["float32"], per_s) / torch.get_num_threads() for name, per_s in rate.items()}
    rows = [
        {
            "model": model,
            "tokens": tokens,
            "layer": f"{inputs}->{outputs}",
            "pass": path,
            "dtype": dtype,
            "threads": {
                str(threads): share(product(path, tokens, inputs, outputs), dtype, threads, rate[dtype])
                for threads in options.threads or THREADS
            },
        }
        for model in options.model or LAYERS
        for tokens in options.tokens or TOKENS
        for (inputs, outputs), path, dtype in itertools.product(LAYERS[model], PASSES, options.dtype or DTYPES)
    ]
    report.publish("scaling", rows, {}, options)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", action="append", choices=tuple(LAYERS), help="(both)")
    parser.add_argument("--tokens", action="append", type=int, help=f"repeatable ({', '.join(map(str, TOKENS))})")
    parser.add_argument("--threads", action="append", type=int, help=f"repeatable ({', '.join(map(str, THREADS))})")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="(both)")
    parser.add_argument("--isa", choices=_library.ISAS, help="this instruction set (the best)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--save", action="store_true", help="write JSON, table and plot under benchmarks/results/")
    return parser.parse_args()


Product = tuple[int, int, int, bool, bool]  # M, N, K; whether the operands lie in memory as (K, M) and (K, N)


def product(path: str, tokens: int, inputs: int, outputs: int) -> Product:
    """The matrix product of one pass of a linear layer."""
    if path == "forward":
        return tokens, outputs, inputs, False, False
    if path == "grad input":
        return tokens, inputs, outputs, False, True
    return outputs, inputs, tokens, True, True


def share(of: Product, dtype: str, threads: int, flops_per_s: float) -> dict[str, float]:
    """How a product is shared by so many threads, each of a rate of ``flops_per_s``."""
    phases = [tasks(of, dtype, threads, phase) for phase in (0, 1)]
    mean = sum(map(sum, phases)) / threads
    M, N, K, *_ = of
    parallel_s = 2 * M * N * K / flops_per_s / threads
    serial_s = _ask_s(of, dtype, threads) - _ask_s((1, 1, 1, False, True), dtype, threads)  # less the call itself
    return {
        "tasks": len(phases[1]),
        "busiest": sum(finish(phase, threads) for phase in phases) / mean,
        "serial": max(0.0, serial_s) / (max(0.0, serial_s) + parallel_s) if threads > 1 else 0.0,
    }


def _ask_s(of: Product, dtype: str, threads: int) -> float:
    nothing = torch.empty(0, dtype=torch.float64)
    return min(timeit.repeat(lambda: _ask(nothing, of, dtype, threads, 1), number=20, repeat=5)) / 20


def tasks(of: Product, dtype: str, threads: int, phase: int) -> list[float]:
    """The work of each task of a product's phase, in the order in which threads take them."""
    work = torch.empty(1 << 16, dtype=torch.float64)
    return work[: _ask(work, of, dtype, threads, phase)].tolist()


def _ask(work: torch.Tensor, of: Product, dtype: str, threads: int, phase: int) -> int:
    M, N, K, *depth_major = of
    return torch.ops.fastft.gemm_tasks(work, M, N, K, dtype == "bfloat16", *depth_major, threads, phase)


def finish(work: Sequence[float], threads: int) -> float:
    """When the last of the tasks is done, each begun in order by the first thread that is free."""
    free = [0.0] * threads
    for task in work:
        heapq.heapreplace(free, free[0] + task)
    return max(free)


if __name__ == "__main__":
    sys.exit(main())
