"""The CUDA kernels, run on the CPU by tests/simt: within the error budget, in any order of threads, without a hang."""

import math
import sys

import numpy
import pytest
import simt
import torch

from fastft.functional import attention, linear_act
from fastft.testing import error
from fastft.testing.spec import TensorMaker, all_specs

SPECS = [spec for spec in all_specs() if f"{spec.kernel}_forward" in simt.FIELDS]
QKV = ("query", "key", "value")
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


@pytest.fixture
def gpu(monkeypatch):
    """Our ops run their CUDA kernels; gives the names of those that ran."""
    module = sys.modules["fastft.functional.linear_act"]
    monkeypatch.setattr(module, "rounds_input", lambda input, cast: False)  # as for tensors on a GPU
    with simt.cuda_on_cpu() as names:
        yield names


@pytest.fixture
def order():
    """Sets the order in which threads take turns."""
    yield simt.kernels().set_order
    simt.kernels().set_order(0)


def small(spec, dtype):
    """Indices of the samples to run; of other dtypes than float32 not the largest, in which only loops are longer."""
    most = 2e-4 if dtype == torch.float32 else 1e-5
    return [i for i, sample in enumerate(spec.outline(dtype)) if spec.small(sample) and spec.cost(sample) < most]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_every_small_case_is_within_the_error_budget(spec, dtype, gpu):
    error.check_op(spec, small(spec, dtype), dtype)
    # With float32 parameters in place of half-precision ones where an op has it so.
    suffixes = [simt.SUFFIXES[dtype, other] for other in (dtype, torch.float32) if (dtype, other) in simt.SUFFIXES]
    assert any({f"{spec.kernel}_{way}_{suffix}" for way in ("forward", "backward")} <= set(gpu) for suffix in suffixes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_order_of_threads_does_not_change_a_bit(spec, dtype, gpu, order):
    for index in small(spec, dtype):
        sample = spec.sample(index, dtype)

        def results(seed, sample=sample):
            order(seed)
            return error.run(spec.op, spec.named(sample), spec.differentiable(sample), TensorMaker(dtype))

        expected = results(0)
        for seed in (1, 2):
            for name, result in results(seed).items():
                assert torch.equal(result.nan_to_num(nan=7), expected[name].nan_to_num(nan=7)), (sample, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_float32_parameters_into_the_kernel(dtype, gpu):
    def stock(input, weight, bias):
        return torch.nn.functional.gelu(torch.nn.functional.linear(input, weight, bias))

    def evaluate(seed):
        t = TensorMaker(torch.float32, seed=seed)
        single = {"input": t(70, 67), "weight": t(66, 67, scale=67**-0.5), "bias": t(66)}
        double = error.cast(single, torch.float64)
        with torch.autocast("cpu", dtype):
            ours, theirs = (error.run(f, single, single, TensorMaker(dtype, seed=-1)) for f in (linear_act, stock))
        return ours, theirs, error.run(stock, double, double, TensorMaker(dtype, seed=-1))

    error.check(evaluate)
    suffix = simt.SUFFIXES[dtype, torch.float32]
    assert {f"linear_act_forward_{suffix}", f"linear_act_backward_{suffix}"} == set(gpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", ["input", "weight", "bias"])
def test_each_gradient_alone_has_the_bits_it_has_with_the_others(wanted, dtype, gpu):
    t = TensorMaker(dtype)
    arguments = {"input": t(131, 130), "weight": t(137, 130), "bias": t(137)}
    alone, together = (error.run(linear_act, arguments, names, torch.ones) for names in ((wanted,), arguments))
    assert torch.equal(alone[f"grad {wanted}"], together[f"grad {wanted}"])


# One of everything; whole tiles; edges; those and rows at multiples of 16 bytes; more steps than stages; sums in parts
WHOLE = [(1, 1, 1), (128, 128, 32), (65, 63, 17), (136, 192, 144), (3, 200, 5), (40, 8, 264), (2100, 16, 8)]


@pytest.mark.parametrize("place", ["aligned", "one element off"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", WHOLE)
def test_whole_numbers_come_out_exactly(sizes, dtype, place, gpu):
    M, N, K = sizes
    shapes = (M, K), (N, K), (N,), (M, N)
    exact = [torch.arange(math.prod(shape)).remainder(7).sub(3).view(shape).double() for shape in shapes]
    put = error.guard if place == "one element off" else torch.clone
    x, w, b, dy = (put(tensor.to(dtype)) for tensor in exact)
    x, w, b = (tensor.requires_grad_() for tensor in (x, w, b))
    y = linear_act(x, w, b, "identity")
    y.backward(dy)
    X, W, B, DY = exact
    for found, true in ((y, X @ W.T + B), (x.grad, DY @ W), (w.grad, DY.T @ X), (b.grad, DY.sum(0))):
        assert torch.equal(found, true.to(dtype))  # rounded once: the sums are below 2^24


def test_the_weights_gradient_of_many_rows_is_summed_in_parts_that_fill_the_gpu():
    module = sys.modules["fastft.functional.linear_act"]
    assert module.splits(2100, 16, 8) > 1  # as tested above
    assert module.splits(64, 768, 768) == 1  # of too few rows to pay
    for N, K in ((768, 768), (768, 3072), (2304, 768), (30522, 768)):
        parts = module.splits(4096, N, K)
        assert parts * N * K * 4 < 16e6 or parts == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_may_be_pytorchs_around_our_kernel(dtype, gpu, monkeypatch):
    module = sys.modules["fastft.functional.linear_act"]
    monkeypatch.setattr(module, "_multiplied_by_torch", lambda *_: True)
    spec = next(spec for spec in SPECS if spec.name == "linear_act")
    error.check_op(spec, small(spec, dtype), dtype)
    assert {name.rpartition("_")[0] for name in gpu} == {"linear_act_backward"}


def test_a_gradient_that_comes_another_way_is_added_to_pytorchs_product(gpu, monkeypatch):
    module = sys.modules["fastft.functional.linear_act"]
    t, results = TensorMaker(torch.float32), []
    x, w, b, dy, z, add = t(30, 20), t(24, 20), t(24), t(30, 24), t(30, 24), t(30, 20)
    for by_torch in (False, True):
        monkeypatch.setattr(module, "_multiplied_by_torch", lambda *_, by_torch=by_torch: by_torch)
        y = torch.empty_like(z)
        results.append((*module.backward(3, z, (True, True, True), dy, x, w, b, add, y), y))
    for ours, around in zip(*results, strict=True):
        torch.testing.assert_close(ours, around)


def test_missing_value_stays_in_its_row(gpu):
    x = torch.randn(70, 20)
    x[3, 19] = x[64, 0] = math.nan  # next to the edge of a tile
    missing = linear_act(x, torch.randn(66, 20), None, "relu").isnan()
    assert missing[3].all() and missing[64].all() and missing.sum() == 2 * 66


def test_every_kernel_of_the_module_can_be_called_through_an_op():
    named = {f"{op}_{suffix}" for op in simt.FIELDS for suffix in simt.SUFFIXES.values()}
    others = {name for name in dir(simt.kernels()) if name.startswith(("_", "set_order", "planted", "fragments"))}
    assert set(dir(simt.kernels())) - others == named


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


# ---- the executor itself, on kernels with a planted bug each (tests/simt/planted.cu)


def planted(name):
    out = numpy.full(80, -1, numpy.float32)
    out = out[-out.ctypes.data % 64 // 4 :][:64]  # at a multiple of 64 bytes
    getattr(simt.kernels(), f"planted_{name}")(out)
    return out.tolist()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent_barrier", r"\(32, 0, 0\) is at a barrier that thread \(0, 0, 0\) is not at, .*planted.cu:\d+"),
        ("exit_before_barrier", r"\(63, 0, 0\) has exited, while others wait at a barrier, .*planted.cu:\d+"),
        ("divergent_shuffle", r"\(0, 0, 0\) waits for lanes of its warp that do not come, .*planted.cu:\d+"),
        ("shuffle_from_exited_lane", r"\((30|62), 0, 0\) shuffles from a lane that .* has exited, .*planted.cu:\d+"),
        ("failed_assertion", r"\(\d+, 0, 0\) fails assertion threadIdx.x < 50 .*planted.cu:\d+"),
        ("too_many_threads", "invalid configuration argument"),
        ("misaligned_copy", r"\(\d+, 0, 0\) gives an address that is no multiple of 16, .*planted.cu:\d+"),
        ("misaligned_row", r"\(\d+, 0, 0\) gives an address that is no multiple of 16, .*planted.cu:\d+"),
        ("row_not_in_shared", r"\(\d+, 0, 0\) gives an address that is not in shared memory, .*planted.cu:\d+"),
        ("lane_missing_from_mma", r"\(0, 0, 0\) waits for lanes of its warp that do not come, .*planted.cu:\d+"),
        ("lane_exited_before_mma", r"\(0, 0, 0\) takes all 32 lanes .* some are not there, .*planted.cu:\d+"),
    ],
)
def test_wrong_kernel_is_named(name, message, seed, order):
    order(seed)
    with pytest.raises(RuntimeError, match=message):
        planted(name)


@pytest.mark.parametrize("name", ["missing_barrier", "unwritten_shared", "read_before_wait", "waits_for_older_groups"])
def test_shared_memory_read_before_it_is_written_is_nan(name):
    assert any(math.isnan(value) for value in planted(name))


def test_shared_memory_overwritten_too_early_changes_the_result():
    assert planted("missing_second_barrier") != [1] * 64


def test_nothing_is_found_in_a_right_kernel(order):
    for seed in range(3):
        order(seed)
        assert planted("none") == [63 - i for i in range(64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_elements_beyond_two_to_the_31_are_found(dtype, gpu):
    """The last of three rows begins 2 GiB of elements behind the first; what lies between is never touched."""
    apart, shape = 2**30 + 8, (1, 1, 3, 16)
    memory = torch.empty(2 * apart + 16, dtype=dtype)
    wide = memory.as_strided(shape, (0, 0, apart, 1))
    wide.copy_(torch.randn(shape))
    dense, other = wide.clone(), torch.randn(shape).to(dtype)
    for of in ([wide, other, other], [other, wide, wide]):
        near = [dense if tensor is wide else tensor for tensor in of]
        results = [error.run(attention, dict(zip(QKV, three, strict=True)), QKV, torch.ones) for three in (of, near)]
        for name, found in results[0].items():
            assert torch.equal(found, results[1][name]), name


def test_a_grid_of_more_blocks_than_cuda_has_is_refused(gpu):
    with pytest.raises(RuntimeError, match="blocks are more than a CUDA grid holds"):
        simt.kernels().linear_act_forward_f32(*[None] * 5, 2**31 * 64, 64, 0, 0, None, None)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_drops_what_the_rule_says(dtype, packed, gpu):
    op = sys.modules["fastft.functional.attention"]
    starts, seed = torch.tensor([0, 5, 39], dtype=torch.int32) if packed else None, torch.tensor([3])
    call = op.Call(scale=0.5, max_q=34, max_k=34, threshold=20000, use=7)

    def kernel(query, key, value):
        return op._Attention.apply(query, key, value, None, starts, seed, call)

    def stock(query, key, value):
        return op.composition(call, (None, starts, starts, seed), query, key, value)

    def evaluate(number):
        shape = (39, 2, 20) if packed else (2, 2, 34, 20)
        t, yardstick = TensorMaker(dtype, seed=number), torch.float32 if dtype == torch.float64 else dtype
        single = {name: t(*shape) for name in ("query", "key", "value")}
        found = error.run(kernel, single, single, TensorMaker(dtype, seed=-1))
        theirs = error.run(stock, error.cast(single, yardstick), single, TensorMaker(dtype, seed=-1))
        return found, theirs, error.run(stock, error.cast(single, torch.float64), single, TensorMaker(dtype, seed=-1))

    error.check(evaluate, dtype == torch.float64)
    assert {name[: name.rindex("_")] for name in gpu} == {"attention_forward", "attention_backward"}
