"""How a product is cut for more threads than this machine has, asked without running it."""

import itertools
import json
import sys

import pytest
import torch

from benchmarks import scaling
from fastft import _library

pytestmark = pytest.mark.skipif(not _library.available(), reason=f"no native library: {_library.why_not()}")

SIZES = ((4096, 768, 768), (1, 1, 1), (37, 101, 19), (768, 3072, 4096), (31, 7, 5000), (5, 3, 0))
THREADS = (1, 3, 64, 128)


def test_tasks_are_taken_in_order_by_whoever_is_free():
    assert scaling.finish([3, 1, 1, 1], threads=2) == 3
    assert scaling.finish([1, 1, 1, 3], threads=2) == 4
    assert scaling.finish([2, 2], threads=8) == 2
    assert scaling.finish([], threads=8) == 0


@pytest.mark.parametrize("dtype", scaling.DTYPES)
def test_the_parts_are_the_whole_whatever_the_number_of_threads(each_isa, dtype):
    """Tasks differ with the number of threads, what they compute together does not, but for copies of operands."""
    for size in SIZES:
        of = {
            threads: [scaling.tasks((*size, False, True), dtype, threads, phase) for phase in (0, 1)]
            for threads in THREADS
        }
        packed = {round(sum(packing), 6) for packing, _ in of.values()}
        assert len(packed - {0}) <= 1  # once, in a phase of its own, or by the tasks that compute
        once = max(packed)
        computed = {threads: sum(work) - (0 if packing else once) for threads, (packing, work) in of.items()}
        for threads, (_, work) in of.items():
            assert min(work) > 0 and computed[1] <= computed[threads] * 1.000001
            # What a task of one tile copies takes less than half of a large tile, and than a small one.
            large = each_isa.startswith("avx512")
            assert computed[threads] < (1.5 * computed[1] + 1 if large else 2 * computed[1])


@pytest.mark.parametrize("path", scaling.PASSES)
def test_every_thread_of_a_large_machine_has_its_share(each_isa, path):
    """4096 tokens: the busiest of 64 threads does at most 1.10 times what they do on average, and of 128 with AVX-512's
    tiles. MiniLM's 384 -> 384 has too few tiles for that."""
    threads = (64, 128) if each_isa.startswith("avx512") else (64,)
    layers = [layer for layers in scaling.LAYERS.values() for layer in layers if layer != (384, 384)]
    for layer, dtype, number in itertools.product(layers, scaling.DTYPES, threads):
        found = scaling.share(scaling.product(path, 4096, *layer), dtype, number, flops_per_s=1e11)
        assert found["busiest"] <= 1.10, (layer, dtype, number)


def test_nothing_to_compute_is_no_task():
    assert scaling.tasks((0, 5, 5, False, True), "float32", 4, 1) == []
    assert scaling.tasks((5, 0, 5, False, False), "float32", 4, 0) == []


def test_the_three_products_of_a_layer():
    assert scaling.product("forward", 100, 3, 7) == (100, 7, 3, False, False)
    assert scaling.product("grad input", 100, 3, 7) == (100, 3, 7, False, True)
    assert scaling.product("grad weight", 100, 3, 7) == (7, 3, 100, True, True)


def test_the_command_prints_a_table(monkeypatch, capsys, tmp_path):
    file = tmp_path / "scaling.json"
    options = ("--model", "minilm", "--tokens", "256", "--threads", "1", "--threads", "8", "--json", str(file))
    monkeypatch.setattr(sys, "argv", ["scaling", *options])
    assert scaling.main() == 0
    printed = capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 3 * 3 * 2 and "| 8 threads " in printed
    for row in rows:
        assert row["threads"]["1"]["busiest"] == pytest.approx(1) and row["threads"]["8"]["busiest"] > 0.999
        assert 0 <= row["threads"]["8"]["serial"] < 1


def test_the_op_writes_no_further_than_it_may():
    work = torch.full((8,), -1.0, dtype=torch.float64)
    count = torch.ops.fastft.gemm_tasks(work[:3], 4096, 768, 768, False, False, True, 64, 1)
    assert count > 8 and (work[:3] > 0).all() and (work[3:] == -1).all()
