"""The CUDA kernels, run on the CPU by tests/simt: within the error budget, in any order of threads, without a hang.

Here they are watched for races. All of it runs once more in a process where they are under ASan and UBSan."""

import copy
import itertools
import math
import os
import subprocess
import sys

import graphs
import pytest
import simt
import small_models
import test_encoder_layer
import torch

import fastft
import setup
from fastft.functional import _shadow, attention, cross_entropy, linear_act, packing
from fastft.functional.layer_norm import composition as norm_composition
from fastft.functional.layer_norm import normalize
from fastft.models import encoder
from fastft.models.mask import lengths_of, with_lengths
from fastft.testing import error
from fastft.testing.spec import TensorMaker, all_specs

SPECS = [spec for spec in all_specs() if f"{spec.kernel}_forward" in simt.FIELDS]
QKV = ("query", "key", "value")
SANITIZED = simt.SANITIZED in os.environ
SANITIZED_TEST = "test_kernels_are_clean_under_sanitizers"
OF_TEST_OPTIM = ("steps_of_the_cuda_kernels_are", "clipping_by_the_cuda_kernels_is")
LAYER = {"attention", "layer_norm", "linear_act"}  # what an encoder layer is made of
ROWS = {"layer_norm", "embedding", "head"}  # of csrc/cuda/row.cuh
# Of test_optim.py and this file; which order it is changes nothing that sanitizers see.
SELECTED = "(cuda or test_simt.py) and not does_not_change_a_bit"
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """PyTorch's threads would take the time of the other process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def sanitized(request, tmp_path_factory):
    """A process that runs the same tests with sanitized kernels while these run, and its log."""
    if not any(item.originalname == SANITIZED_TEST for item in request.session.items) or SANITIZED:
        yield None
        return
    path = tmp_path_factory.mktemp("simt") / "sanitized.log"
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--durations=30", "-k", SELECTED]
    environment = simt.sanitized_environment() | {"OMP_NUM_THREADS": "1"}
    with path.open("w") as log:
        tests = ["tests/test_optim.py", "tests/test_simt.py"]
        process = subprocess.Popen([*command, *tests], env=environment, cwd=setup.ROOT, stdout=log, stderr=log)
    yield process, path
    process.kill()
    process.wait()


@pytest.fixture
def gpu(monkeypatch):
    """Our ops run their CUDA kernels; gives the names of those that ran."""
    functional = {name: sys.modules[f"fastft.functional.{name}"] for name in ("linear_act", "encoder_layer")}
    for module in functional.values():  # as for tensors on a GPU
        monkeypatch.setattr(module, "rounds_input", lambda input, cast: False)
    monkeypatch.setattr(functional["encoder_layer"], "goes_through_activation", lambda grads, weight: True)
    with simt.cuda_on_cpu() as names:
        yield names


def small(spec, dtype):
    """Indices of the samples to run; of other dtypes than float32 not the largest, in which only loops are longer."""
    most = 2e-4 if dtype == torch.float32 else 1e-5
    return [i for i, sample in enumerate(spec.outline(dtype)) if spec.small(sample) and spec.cost(sample) < most]


def check_op(spec, indices, dtype):
    """The error budget; sanitizers look at memory, for which every case once is enough."""
    if not SANITIZED:
        return error.check_op(spec, indices, dtype, seeds=3)
    for at, index in enumerate(indices):
        sample = spec.sample(index, dtype)
        for widen in (False, True) if dtype.itemsize == 2 else (False,):
            with simt.cuda_on_cpu(at % simt.ORDERS, widen):
                error.run(spec.op, spec.named(sample), spec.differentiable(sample), TensorMaker(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_every_small_case_is_within_the_error_budget(spec, dtype, gpu):
    with simt.cuda_on_cpu(widen=None) as names:
        check_op(spec, small(spec, dtype), dtype)
    if SANITIZED:
        return
    # With float32 parameters in place of half-precision ones where an op has it so.
    suffixes = [simt.SUFFIXES[dtype, other] for other in (dtype, torch.float32) if (dtype, other) in simt.SUFFIXES]
    ways = [{f"{spec.kernel}_{way}_{suffix}" for way in ("forward", "backward")} for suffix in suffixes]
    assert any(way <= set(names) for way in ways)


def same_bits(spec, index, dtype, widen=False, put=torch.clone):
    """The sample's results in all orders of threads, which must be equal."""
    sample = spec.sample(index, dtype)
    arguments = {name: put(x) if isinstance(x, torch.Tensor) else x for name, x in spec.named(sample).items()}

    def results(order):
        torch.manual_seed(0)
        with simt.cuda_on_cpu(order, widen):
            return error.run(spec.op, arguments, spec.differentiable(sample), TensorMaker(dtype))

    expected = results(0)
    for order in range(1, simt.ORDERS):
        for name, result in results(order).items():
            assert torch.equal(result.nan_to_num(nan=7), expected[name].nan_to_num(nan=7)), (sample, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.kernel not in ROWS], ids=repr)
def test_order_of_threads_does_not_change_a_bit(spec, dtype, gpu):
    for index in small(spec, dtype)[:: 2 if dtype == torch.float32 else 1]:
        same_bits(spec, index, dtype)


@pytest.mark.parametrize("place", ["aligned", "one element off"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.kernel in ROWS], ids=repr)
def test_rows_are_the_same_in_any_order_of_threads_wherever_they_begin(spec, dtype, place, gpu):
    for index in small(spec, dtype)[:2]:  # an encoder's, and an odd tail
        for widen in (False, True) if dtype.itemsize == 2 else (False,):
            same_bits(spec, index, dtype, widen, error.guard if place == "one element off" else torch.clone)


each_order = pytest.mark.parametrize("order", range(simt.ORDERS))
each_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@each_order
@each_half
def test_autocast_takes_float32_parameters_into_the_kernel(dtype, order, gpu):
    def stock(input, weight, bias):
        return torch.nn.functional.gelu(torch.nn.functional.linear(input, weight, bias))

    def evaluate(seed):
        t = TensorMaker(torch.float32, seed=seed)
        single = {"input": t(70, 67), "weight": t(66, 67, scale=67**-0.5), "bias": t(66)}
        double = error.cast(single, torch.float64)
        with torch.autocast("cpu", dtype):
            ours, theirs = (error.run(f, single, single, TensorMaker(dtype, seed=-1)) for f in (linear_act, stock))
        return ours, theirs, error.run(stock, double, double, TensorMaker(dtype, seed=-1))

    with simt.cuda_on_cpu(order) as names:
        error.check(evaluate)
    suffix = simt.SUFFIXES[dtype, torch.float32]
    assert {f"linear_act_forward_{suffix}", f"linear_act_backward_{suffix}"} == set(names)


@each_order
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_classes_than_a_warp_takes_are_within_the_error_budget(dtype, smoothing, order, gpu):
    classes = (1025, 1300)[order % 2]

    def evaluate(seed):
        t = TensorMaker(dtype, seed=seed)
        arguments, target = {"input": t(5, classes)}, t.indices(classes, 5)

        def run(function, dtype):
            options = {"target": target, "label_smoothing": smoothing}
            return error.run(lambda input: function(input, **options), error.cast(arguments, dtype), ["input"], one)

        def one(*shape):
            return torch.ones(shape, dtype=dtype)

        stock = torch.nn.functional.cross_entropy
        return (
            run(cross_entropy, dtype),
            run(stock, torch.float32 if dtype == torch.float64 else dtype),
            run(stock, torch.float64),
        )

    for widen in (False, True):
        with simt.cuda_on_cpu(order, widen):
            error.check(evaluate, double=dtype == torch.float64)


@pytest.mark.parametrize(("order", "layout"), list(enumerate(["full", "padded, first", "packed"])))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_whole_encoder_layer_is_its_composition(order, layout, dtype, gpu):
    halves, test = test_encoder_layer.HALVES["layer"], test_encoder_layer
    with simt.cuda_on_cpu(order) as names:
        test.test_outputs_and_gradients_are_the_composition_s_under_the_same_dropout(halves, layout, dtype)
    assert {name[: name.index("_forward")] for name in names if "_forward" in name} == LAYER


def test_a_whole_encoder_layer_under_autocast_is_within_its_budget(gpu):
    halves = test_encoder_layer.HALVES["layer"]
    test_encoder_layer.test_bfloat16_products_with_float32_parameters_stay_within_autocast_s_budget(halves)
    assert {name[: name.index("_forward")] for name in gpu if "_forward" in name} == LAYER


@each_order
@each_half
@pytest.mark.parametrize("head", [104, 137], ids=["large", "too large for tensor cores"])
def test_attention_of_large_heads_is_within_the_error_budget(head, dtype, order, gpu):
    def stock(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    def evaluate(seed):
        t = TensorMaker(dtype, seed=seed)
        single = {name: t(1, 3, 33, head) for name in ("query", "key", "value")}
        ours, theirs = (error.run(f, single, single, TensorMaker(dtype, seed=-1)) for f in (attention, stock))
        return ours, theirs, error.run(stock, error.cast(single, torch.float64), single, TensorMaker(dtype, seed=-1))

    with simt.cuda_on_cpu(order):
        error.check(evaluate)


@each_order
@each_half
@pytest.mark.parametrize("autocast", [False, True])
def test_weight_s_gradient_of_many_rows_comes_out_exactly(autocast, dtype, order, gpu):
    M, N, K = 2100, 16, 8
    exact = [
        torch.arange(math.prod(shape)).remainder(3).sub(1).view(shape).double() for shape in ((M, K), (N, K), (M, N))
    ]
    x, w, dy = (tensor.to(torch.float32 if autocast else dtype) for tensor in exact)
    w.requires_grad_()
    with simt.cuda_on_cpu(order), torch.autocast("cpu", dtype, enabled=autocast):
        y = linear_act(x, w, None, "identity")
        y.backward(dy.to(y.dtype))
    assert torch.equal(w.grad, (exact[2].T @ exact[0]).to(w.dtype))


# ---- packing

LENGTHS = (5, 1, 9)


@each_order
@pytest.mark.parametrize("H", [24, 7], ids=["whole vectors", "odd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_packed_and_unpacked_as_they_are(dtype, H, order):
    present = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    starts = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    padded = torch.randn(3, 9, H).to(dtype).requires_grad_()
    with simt.cuda_on_cpu(order) as names:
        packed = packing.pack(padded, present, starts, sum(LENGTHS))
        back = packing.unpack(packed, starts, padded.shape)
        back.sum().backward()
    assert torch.equal(packed, padded[present])
    assert torch.equal(back, padded * present[..., None])
    assert torch.equal(padded.grad, present[..., None].expand(3, 9, H).to(dtype))
    assert {name[: name.index("_rows")] for name in names} == {"pack", "unpack"}


def test_a_mask_that_is_not_what_its_lengths_say_is_an_error(gpu):
    present = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    starts = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="the attention mask has other lengths than it came with"):
        packing.pack(torch.randn(3, 9, 8), present, starts, sum(LENGTHS) - 1)
    present[0, 1] = False
    with pytest.raises(RuntimeError, match="is not one up to a length and zero behind it"):
        packing.pack(torch.randn(3, 9, 8), present, starts, sum(LENGTHS))


@pytest.mark.parametrize(("cls_only", "autocast"), [(False, None), ("auto", torch.bfloat16)], ids=str)
def test_a_whole_model_packs_by_the_lengths_of_its_mask(cls_only, autocast, gpu, monkeypatch):
    """Loss, logits and gradients, beside stock's."""
    monkeypatch.setattr(encoder, "_is_on_gpu", lambda tensor: True)
    rows = []
    monkeypatch.setattr(encoder, "pack", lambda *args: rows.append(packing.pack(*args)) or rows[-1])

    def batch(seed):
        inputs = small_models.batch(seed)
        lengths = inputs["attention_mask"].sum(1).tolist()
        mask = with_lengths(inputs["attention_mask"], lengths).clone()
        assert lengths_of(mask) == tuple(lengths)
        return inputs | {"attention_mask": mask}

    model = small_models.build()
    error.check_model(fastft.optimize(copy.deepcopy(model), cls_only=cls_only), model, batch, autocast)
    assert rows and all(len(packed) < 66 for packed in rows)  # of 6 sequences of 11
    for kind in ("pack_rows", "unpack_rows", "attention_backward", "layer_norm_backward", "embedding_scatter"):
        assert any(name.startswith(kind) for name in gpu), kind


@pytest.mark.parametrize(("way", "lengths"), [("float32", "uneven"), ("float32", "full"), ("autocast", "uneven")])
def test_the_host_waits_for_nothing_in_a_whole_step(way, lengths, gpu, monkeypatch):
    """As on_fake_gpu.py has it, but for transformers' masks, which it makes of fake tensors in another way."""
    monkeypatch.setattr(encoder, "_is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: pytest.fail("tolist waits"))
    model = small_models.build(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    optimizer = fastft.optim.AdamW(fastft.optimize(model).parameters(), max_grad_norm=1.0)
    inputs, of = small_models.batch(0), [11] * 6 if lengths == "full" else [5, 11, 3, 1, 7, 9]
    inputs["attention_mask"] = with_lengths((torch.arange(11) < torch.tensor(of)[:, None]).long(), of)
    before = [parameter.clone() for parameter in model.parameters()]
    with graphs.NeverWaits(), torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
    assert loss.isfinite() and not all(map(torch.equal, before, model.parameters()))
    assert {"adamw", "attention", "embedding", "grad", "head", "layer"} <= {name.partition("_")[0] for name in gpu}
    assert any(name.startswith("pack_rows") for name in gpu) == (lengths == "uneven")


# ---- the optimizer's passes, apart from test_optim.py's budget


def optimizer(order, gradient, parameter, wide=False):
    """What all three make of the same numbers, and the kernels' names; `wide`: of the numbers in float32."""
    t, shapes = TensorMaker(gradient), [(3,), (0,), (700, 100), (1, 65537)]
    grads, params = ([t(*shape).to(dtype) for shape in shapes] for dtype in (gradient, parameter))
    states = [[torch.full_like(param, value) for param in params] for value in (0.5, 0.25)]
    if wide:
        grads, params, *states = ([tensor.float() for tensor in tensors] for tensors in (grads, params, *states))
    norm, factor = params[0].new_empty(()), torch.tensor(0.75, dtype=torch.promote_types(parameter, torch.float32))
    with simt.cuda_on_cpu(order) as names:
        torch.ops.fastft.grad_norm(norm, None, grads)
        steps = [torch.tensor(3.0) for _ in params]
        torch.ops.fastft.adamw(params, grads, *states, steps, factor, 1e-3, 0.9, 0.99, 1e-8, 0.01, False)
        torch.ops.fastft.scale_grads(grads, params[0].new_full((), 0.75))
    return [norm, *grads, *params, *states[0], *states[1]], names


@pytest.mark.parametrize(("gradient", "parameter"), simt.SUFFIXES, ids=str)
def test_optimizer_s_passes_compute_in_float32_and_in_any_order_the_same(gradient, parameter):
    expected, names = optimizer(0, gradient, parameter)
    suffix = simt.SUFFIXES[gradient, parameter]
    assert names == [f"{op}_{suffix}" for op in ("grad_norm", "adamw", "scale_grads")]
    for order in range(1, simt.ORDERS):
        for result, other in zip(optimizer(order, gradient, parameter)[0], expected, strict=True):
            assert torch.equal(result, other)
    if gradient.itemsize == 2:
        for result, other in zip(optimizer(0, gradient, parameter, wide=True)[0], expected, strict=True):
            assert torch.equal(result.to(other.dtype), other)


@each_order
@pytest.mark.parametrize("place", ["aligned", "one element off"])
@each_half
def test_a_step_rounds_the_new_parameters_into_their_copies(dtype, place, order):
    t, shapes, first = TensorMaker(torch.float32), [(0, 3), (3, 5), (700, 100), (7,), (1, 65537)], 24
    first += place != "aligned"
    for gradient in (torch.float32, dtype):
        params, grads = [t(*shape) for shape in shapes], [t(*shape).to(gradient) for shape in shapes]
        around = [torch.full((param.numel() + 64,), math.nan, dtype=dtype) for param in params]
        low = [memory[first : first + param.numel()] for memory, param in zip(around, params, strict=True)]
        low[3] = low[3][:0]  # it has none
        expected = [param.clone() for param in params]
        for given, written in ((expected, None), (params, low)):
            moments = [[torch.full_like(param, value) for param in params] for value in (0.5, 0.25)]
            steps = [torch.tensor(3.0) for _ in params]
            with simt.cuda_on_cpu(order):
                arguments = given, grads, *moments, steps, None, 1e-3, 0.9, 0.99, 1e-8, 0.01, False
                torch.ops.fastft.adamw(*arguments, written)
        for param, other, rounded, memory in zip(params, expected, low, around, strict=True):
            assert torch.equal(param, other) and torch.equal(rounded, param.flatten().to(dtype)[: len(rounded)])
            assert int(memory.isnan().sum()) == len(memory) - len(rounded)


def test_steps_with_copies_of_the_weights_have_the_bits_of_those_that_convert_them(gpu, monkeypatch):
    """As PyTorch multiplies; once something else than the optimizer writes to them."""
    monkeypatch.setattr(sys.modules["fastft.functional.linear_act"], "_multiplied_by_torch", lambda *_: True)
    monkeypatch.setattr(sys.modules["fastft.functional.encoder_layer"], "goes_through_activation", lambda *_: False)
    monkeypatch.setattr(_shadow, "_is_on_gpu", lambda tensor: True)
    find, found = _shadow._find, []
    monkeypatch.setattr(_shadow, "_find", lambda *args: found.append(find(*args)) or found[-1])
    other = small_models.build(seed=1).state_dict()

    def run(shadow):
        model = fastft.optimize(small_models.build(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train())
        optimizer = fastft.optim.AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0, shadow=shadow)
        torch.manual_seed(0)
        losses, copies = [], []
        for number in range(4):
            if number == 3:
                model.load_state_dict(other)
            found.clear()
            with torch.autocast("cpu", torch.bfloat16):
                losses.append(model(**small_models.batch(number)).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
            copies.append((sum(copy is not None for copy in found), len(found)))
        return [loss.detach() for loss in losses], list(model.parameters()), copies

    with simt.cuda_on_cpu(order=0):
        losses, params, copies = run(torch.bfloat16)
        expected, others, none = run(None)
    assert all(map(torch.equal, losses, expected)) and all(map(torch.equal, params, others))
    # Of both ways: two layers, the pooler; what is side by side is asked for, too, where its parts have none.
    most, asked = 2 * (6 + 6 + 1), 2 * (7 + 7 + 1)
    assert copies == [(0, asked), (0, asked), (most, most), (0, asked)] and none == [(0, asked)] * 4


def test_rows_longer_than_shared_memory_drop_what_the_rule_says(gpu):
    H, seed = 140_008, torch.tensor([3])

    def kernel(rows, residual):
        return normalize(rows, residual, None, None, 1e-12, (seed, 20000, 2))

    def composition(rows, residual):
        return norm_composition(rows, residual, None, None, 1e-12, (seed, 20000, 2))

    def evaluate(number):
        t = TensorMaker(torch.float32, seed=number)
        single = {name: t(1, H) for name in ("rows", "residual")}
        double, grad = error.cast(single, torch.float64), TensorMaker(torch.float32, seed=-1)
        return [error.run(f, x, x, grad) for f, x in ((kernel, single), (composition, single), (composition, double))]

    error.check(evaluate)
    assert set(gpu) == {"layer_norm_forward_f32", "layer_norm_backward_f32"}


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
    check_op(spec, small(spec, dtype), dtype)
    assert SANITIZED or {name.rpartition("_")[0] for name in gpu} == {"linear_act_backward"}


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
    others = {name for name in dir(simt.kernels()) if name.startswith(("_", "planted", "fragments"))}
    assert set(dir(simt.kernels())) - others - {"set_order", "set_last_blocks", "launches"} == named


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
        simt.kernels().linear_act_forward_f32(*[None] * 5, 2**31 * 64, 64, 0, 0, None, None, 0, 0)


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


# (B, C, H): more rows than warps; most classes; more columns than are held
@pytest.mark.parametrize("sizes", [(21, 6, 296), (3, 1023, 17), (2, 5, 2056)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_head_drops_what_the_rule_says(dtype, sizes, gpu):
    op, (B, C, H) = sys.modules["fastft.functional.head"], sizes
    options = -100, (torch.tensor([3]), 20000, 7)

    def evaluate(number):
        t, yardstick = TensorMaker(dtype, seed=number), torch.float32 if dtype == torch.float64 else dtype
        named, target = {"input": t(B, H), "weight": t(C, H, scale=H**-0.5), "bias": t(C)}, t.indices(C, B)
        target[::3] = -100

        def run(function, named):
            def joined(**tensors):
                loss, logits = function(*tensors.values(), target, *options)
                return torch.cat([loss.reshape(1), logits.reshape(-1)])

            return error.run(joined, named, named, TensorMaker(dtype, seed=-1))

        theirs, truth = (run(op.composition, error.cast(named, kind)) for kind in (yardstick, torch.float64))
        return run(op.run, named), theirs, truth

    error.check(evaluate, dtype == torch.float64)
    assert {name.partition("_")[0] for name in gpu} == {"head"}


@pytest.mark.parametrize("outputs", ["loss", "logits"])
@pytest.mark.parametrize("wanted", ["input", "weight", "bias"])
def test_each_gradient_of_a_head_alone_has_the_bits_it_has_with_the_others(wanted, outputs, gpu):
    op, t = sys.modules["fastft.functional.head"], TensorMaker(torch.float32)
    named, target = {"input": t(11, 300), "weight": t(6, 300), "bias": t(6)}, t.indices(6, 11)
    options = -100, (torch.tensor([3]), 20000, 7)

    def output(**tensors):
        return op.run(*tensors.values(), target, *options)[outputs == "logits"]

    alone, together = (
        error.run(output, named, names, lambda *shape: torch.ones(shape)) for names in ((wanted,), named)
    )
    assert torch.equal(alone[f"grad {wanted}"], together[f"grad {wanted}"])


# ---- all of them


def test_every_kernel_ran_in_every_order(request):
    """Last but one: what other tests ran is counted."""
    tests = {item.originalname for item in request.session.items}
    wanted = {name for name, value in globals().items() if name.startswith("test_") and callable(value)}
    wanted |= {f"test_{what}_within_the_error_budget" for what in OF_TEST_OPTIM}
    missing = sorted(wanted - tests - {SANITIZED_TEST})
    if missing and not SANITIZED:
        pytest.skip(f"not all tests that run kernels were asked for: {', '.join(missing)}")
    found = simt.launches()
    assert found.keys() == simt.declared()
    instances = [counts for by_name in found.values() for counts in by_name.values()]
    idle = [
        f"{file}: {name} {counts}"
        for (file, _), by_name in found.items()
        for name, counts in by_name.items()
        if not all(counts)
    ]
    how = "under ASan and UBSan" if SANITIZED else "watched for races"
    total = f"{len(found)} CUDA kernels in {len(instances)} instances, run {sum(map(sum, instances))} times {how}"
    request.config.stash.setdefault(simt.SUMMARY, []).append(total)
    assert not idle, f"{len(idle)} instances did not run in every order of threads\n" + "\n".join(idle)


@pytest.mark.skipif(SANITIZED, reason="already under sanitizers")
def test_kernels_are_clean_under_sanitizers(sanitized, request):
    process, log = sanitized
    process.wait()
    text = log.read_text()
    if process.returncode:
        pytest.fail(text[-8000:], pytrace=False)
    request.config.stash.setdefault(simt.SUMMARY, []).extend(
        line for line in text.splitlines() if "CUDA kernels in" in line
    )
