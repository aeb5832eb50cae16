"""tests/simt itself: it finds planted bugs, and only those; what stands in for PTX does what the PTX manual says."""

import json
import os
import subprocess
import sys

import numpy
import pytest
import simt
import torch

import setup

in_this_process = pytest.mark.skipif(simt.SANITIZED in os.environ, reason="of kernels that are watched for races")


@pytest.fixture
def order():
    """Sets the order in which threads take turns."""
    yield simt.kernels().set_order
    simt.kernels().set_order(0)


def planted(name):
    """Runs a kernel of planted.cu."""
    out = numpy.full(80, -1, numpy.float32)
    out = out[-out.ctypes.data % 64 // 4 :][:64]  # at a multiple of 64 bytes
    getattr(simt.kernels(), f"planted_{name}")(out)
    return out.tolist()


RIGHT = {
    "none": [63 - i for i in range(64)],
    "halves_of_words": [63 - i for i in range(64)],
    "lanes_that_sync": [i ^ 1 for i in range(64)],
    "atomics": [64] * 64,
    "dynamic_shared_memory": [63 - i for i in range(64)],
}


@pytest.mark.parametrize("seed", range(simt.ORDERS))
@pytest.mark.parametrize("name", RIGHT)
def test_nothing_is_found_in_a_right_kernel(name, seed, order):
    order(seed)
    assert planted(name) == RIGHT[name]


AT = r"at .*planted\.cu:\d+, .*planted\.cu:\d+$"
RACE = r"shared memory that, with no barrier between, is (written|read) by thread \(\d+, 0, 0\) " + AT
UNDER_WAY = rf"to which a cp.async is under way, of thread \(\d+, 0, 0\) {AT}"
WRONG = {  # in any order of threads
    "divergent_barrier": r"\(32, 0, 0\) is at a barrier that thread \(0, 0, 0\) is not at, .*planted\.cu:\d+",
    "exit_before_barrier": r"\(63, 0, 0\) has exited, while others wait at a barrier, .*planted\.cu:\d+",
    "divergent_shuffle": r"\(0, 0, 0\) waits for lanes of its warp that do not come, .*planted\.cu:\d+",
    "shuffle_from_exited_lane": r"\((30|62), 0, 0\) shuffles from a lane that .* has exited, .*planted\.cu:\d+",
    "failed_assertion": r"\(\d+, 0, 0\) fails assertion threadIdx.x < 50 .*planted\.cu:\d+",
    "too_many_threads": "invalid configuration argument",
    "misaligned_copy": r"\(\d+, 0, 0\) gives an address that is no multiple of 16, .*planted\.cu:\d+",
    "misaligned_row": r"\(\d+, 0, 0\) gives an address that is no multiple of 16, .*planted\.cu:\d+",
    "row_not_in_shared": r"\(\d+, 0, 0\) gives an address that is not in shared memory, .*planted\.cu:\d+",
    "lane_missing_from_mma": r"\(0, 0, 0\) waits for lanes of its warp that do not come, .*planted\.cu:\d+",
    "lane_exited_before_mma": r"\(0, 0, 0\) takes all 32 lanes .* some are not there, .*planted\.cu:\d+",
    "unaligned_vector": r"\(0, 0, 0\) (reads|writes) 16 bytes at an address that is no multiple of that",
    "missing_barrier": rf"(reads|writes) (shared memory that no thread of the block has written|{RACE})",
    "missing_second_barrier": rf"(reads|writes) {RACE}",
    "lanes_that_only_shuffle": rf"(reads|writes) {RACE}",
    "lanes_that_sync_in_halves": rf"(reads|writes) {RACE}",
    "atomic_and_plain": rf"(reads|writes) {RACE}",
    "copy_over_what_is_read": rf"(reads|writes) {RACE}",
    "unwritten_shared": r"reads shared memory that no thread of the block has written, .*planted\.cu:\d+$",
    "read_before_wait": rf"reads shared memory (that no thread .* has written|{UNDER_WAY})",
    "waits_for_older_groups": f"reads shared memory {UNDER_WAY}",
}


@in_this_process
@pytest.mark.parametrize("seed", range(simt.ORDERS))
@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernel_is_named(name, seed, order):
    order(seed)
    with pytest.raises(RuntimeError, match=WRONG[name]):
        planted(name)


def test_every_planted_kernel_is_expected_to_be_found_or_to_be_right():
    kernels = {name.removeprefix("planted_") for name in dir(simt.kernels()) if name.startswith("planted_")}
    assert kernels == {*RIGHT, *WRONG, *BEYOND}


# ---- what only sanitizers see, and what is seen without them or the race detector


@pytest.fixture(scope="module")
def sanitized():
    """Runs Python in a process whose kernels are sanitized."""
    environment = simt.sanitized_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(setup.ROOT), str(setup.ROOT / "tests")])

    def run(code):
        command = [sys.executable, "-c", f"import json, simt, test_simt_executor\n{code}"]
        return subprocess.run(command, env=environment, cwd=setup.ROOT, capture_output=True, text=True)

    return run


BEYOND = {
    "beyond_global": "heap-buffer-overflow",
    "beyond_static_shared": "global-buffer-overflow",
    "beyond_dynamic_shared": "heap-buffer-overflow",
    "unaligned_vector": "misaligned address",
}


@in_this_process
@pytest.mark.parametrize("name", BEYOND)
def test_sanitizers_stop_at(name, sanitized):
    done = sanitized(f"simt.kernels().planted_{name}(test_simt_executor.numpy.ones(64, 'f'))")
    assert done.returncode != 0
    assert BEYOND[name] in done.stderr and "planted.cu" in done.stderr, done.stderr[-4000:]


@in_this_process
def test_poison_and_order_show_what_is_missing(sanitized):
    names = [
        "missing_barrier",
        "missing_second_barrier",
        "unwritten_shared",
        "read_before_wait",
        "waits_for_older_groups",
    ]
    names += RIGHT
    loop = f"for name in {names} for seed in range({simt.ORDERS}) if not simt.kernels().set_order(seed)"
    done = sanitized(f"print(json.dumps([(name, test_simt_executor.planted(name)) {loop}]))")
    assert done.returncode == 0, done.stderr[-4000:]
    results = {}
    for name, result in json.loads(done.stdout.splitlines()[-1]):
        results.setdefault(name, []).append(result)
    assert {name: result[0] for name, result in results.items() if name in RIGHT} == RIGHT
    changing = {name for name, by_seed in results.items() if any(result != by_seed[0] for result in by_seed)}
    assert changing == {"missing_barrier", "missing_second_barrier"}
    missing = {name for name, by_seed in results.items() if all(any(x != x for x in result) for result in by_seed)}
    assert missing >= {"unwritten_shared", "read_before_wait", "waits_for_older_groups"}


# ---- what stands in for PTX (tests/simt/mma_sm80.cuh), against the fragments that the PTX manual draws

LANE = numpy.arange(32)[:, None]
HALVES = numpy.arange(2)
ACCUMULATOR = LANE // 4 + numpy.arange(4) // 2 * 8, LANE % 4 * 2 + numpy.arange(4) % 2  # row, column of a lane's four


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_gives_each_lane_its_two_numbers_of_a_row(transposed):
    rows = numpy.random.default_rng(0).integers(0, 1 << 16, (32, 8), numpy.uint16)
    registers = numpy.zeros((32, 4), numpy.uint32)
    simt.kernels().fragments_ldmatrix(registers, rows, transposed)
    matrices = rows.reshape(4, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    assert numpy.array_equal(
        halves(registers)[:, :, HALVES], matrices[:, LANE // 4, LANE % 4 * 2 + HALVES].swapaxes(0, 1)
    )


def halves(registers):
    """(lanes, registers, 2) numbers of 16 bits, the lower half first."""
    return registers.view(numpy.uint16).reshape(*registers.shape, 2)


def fragments_16(a, b):
    """Registers of A (16, 16) and B (16, 8): four, and two, of two numbers each."""
    at, t = numpy.arange(4), (LANE % 4 * 2)[:, None]
    of_a = a[(LANE // 4 + at % 2 * 8)[:, :, None], t + at[:, None] // 2 * 8 + HALVES]
    of_b = b[t + at[:2, None] * 8 + HALVES, (LANE // 4)[:, None]]
    return [numpy.ascontiguousarray(x).view(numpy.uint32)[..., 0].copy() for x in (of_a, of_b)]


def fragments_32(a, b):
    """Registers of A (16, 8) and B (8, 8): four, and two, of one number each."""
    at = numpy.arange(4)
    of_a, of_b = a[LANE // 4 + at % 2 * 8, LANE % 4 + at // 2 * 4], b[LANE % 4 + at[:2] * 4, LANE // 4]
    return [numpy.ascontiguousarray(x).view(numpy.uint32) for x in (of_a, of_b)]


def stored(matrix, dtype):
    """A torch tensor's numbers as NumPy has them, bfloat16 as uint16."""
    return simt.to_numpy(matrix.to(dtype).contiguous())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_mma_multiplies_the_fragments_and_cuts_the_sum_off(dtype):
    generator = torch.Generator().manual_seed(0)
    K = 8 if dtype == torch.float32 else 16
    a, b, c = (torch.randn(shape, generator=generator) for shape in ((16, K), (K, 8), (16, 8)))
    if dtype == torch.float32:  # tf32 keeps ten bits of the mantissa; what lies below is not looked at
        name, fragments = "mma_tf32", fragments_32(a.numpy(), b.numpy())
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    else:
        name = {torch.bfloat16: "mma_bf16", torch.float16: "mma_f16"}[dtype]
        fragments, (a, b) = fragments_16(stored(a, dtype), stored(b, dtype)), (x.to(dtype) for x in (a, b))
    d = numpy.ascontiguousarray(c.numpy()[ACCUMULATOR])
    getattr(simt.kernels(), f"fragments_{name}")(d, *fragments)
    truth = c.double()
    for half in (slice(K // 2), slice(K // 2, K)):
        truth += a[:, half].double() @ b[half].double()
        truth = (truth.view(torch.int64) & -(1 << 29)).view(torch.float64)  # 24 bits are float32's
    found = torch.empty(16, 8)
    found[ACCUMULATOR] = torch.from_numpy(d)
    assert torch.equal(found.double(), truth)


def test_copies_rows_and_products_together_make_a_matrix_product():
    a, b = (torch.arange(rows * 128).remainder(7).sub(3).view(rows, 128).bfloat16() for rows in (16, 8))
    found = numpy.full((16, 8), numpy.nan, numpy.float32)
    simt.kernels().fragments_product(found, simt.to_numpy(a), simt.to_numpy(b))
    assert torch.equal(torch.from_numpy(found), a.float() @ b.float().T)
