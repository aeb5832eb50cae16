"""fastft.optim: torch.optim.AdamW's and clip_grad_norm_'s numbers, state and habits."""

import copy
import io
import pickle

import pytest
import simt
import torch
from small_models import batch, build
from transformers import Trainer, TrainingArguments

import fastft
from fastft import _library
from fastft.functional import _choice
from fastft.optim import AdamW, clip_grad_norm_
from fastft.testing import error
from fastft.testing.spec import TensorMaker

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SHAPES = [(300, 40), (77,), (), (0, 3), (70_001,), (1, 1, 5)]  # two chunks of the kernel, and what is small
STEPS = 4
OPTIONS = {
    "defaults": {},
    "decay": {"lr": 2e-3, "weight_decay": 0.3},
    "no decay": {"weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-3},
    "little momentum": {"betas": (0.3, 0.95)},
    "maximize": {"maximize": True},
    "clipped": {"max_grad_norm": 1.0},
    "not clipped": {"max_grad_norm": 1e6},
}

native = pytest.mark.skipif(not _library.available(), reason=f"{_library.why_not()}")


class Clipped(torch.optim.AdamW):
    """torch's, with its own clipping before a step."""

    def __init__(self, params, max_grad_norm=None, **options):
        super().__init__(params, **options)
        self.max_grad_norm = max_grad_norm

    def clipped_step(self):
        if self.max_grad_norm is not None:
            params = [param for group in self.param_groups for param in group["params"]]
            torch.nn.utils.clip_grad_norm_(params, self.max_grad_norm)
        self.step()


def make(shapes, dtype, seed, steps=STEPS):
    """Start values, and gradients of each step."""
    t = TensorMaker(dtype, seed=seed)
    return [t(*shape) for shape in shapes], [[t(*shape) for shape in shapes] for _ in range(steps)]


def train(optimizer_class, values, grads, place=lambda tensor: tensor, **options):
    """Parameters and moments after as many steps as there are gradients."""
    params = [torch.nn.Parameter(place(value.clone())) for value in values]
    optimizer = optimizer_class(params, **options)
    for step_grads in grads:
        step(optimizer, params, step_grads, place)
    return results(optimizer, params)


def step(optimizer, params, grads, place=lambda tensor: tensor):
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else place(grad.clone())
    (optimizer.clipped_step if isinstance(optimizer, Clipped) else optimizer.step)()


def results(optimizer, params):
    found = {}
    for i, param in enumerate(params):
        found[f"parameter {i}"] = param.detach()
        for name, value in optimizer.state[param].items():
            found[f"{name} {i}"] = value.float() if name == "step" else value
    return found


def evaluate(dtype, place=error.guard, shapes=SHAPES, **options):
    """For error.check: ours with FASTFT_BACKEND=fastft, torch's fused one, and torch's in float64."""
    yardstick = torch.float32 if dtype == torch.float64 else dtype

    def of(seed):
        values, grads = make(shapes, dtype, seed)
        with _choice.use_backend("fastft"):
            ours = train(AdamW, values, grads, place, **options)
        single, double = (
            ([value.to(to) for value in values], [[grad.to(to) for grad in some] for some in grads])
            for to in (yardstick, torch.float64)
        )
        theirs = train(Clipped, *single, place, fused=place is error.guard, **options)
        return ours, theirs, train(Clipped, *double, place, **options)

    return of


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# ---- numbers


@native
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_are_within_the_error_budget(dtype, options, each_isa):
    error.check(evaluate(dtype, **options), double=dtype == torch.float64)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_steps_of_the_cuda_kernels_are_within_the_error_budget(dtype, options):
    with simt.cuda_on_cpu() as names:
        error.check(evaluate(dtype, **options), double=dtype == torch.float64)
    clips = {f"grad_norm_{simt.SUFFIXES[dtype, torch.promote_types(dtype, torch.float32)]}"}
    assert set(names) == {f"adamw_{simt.SUFFIXES[dtype, dtype]}"} | (clips if "max_grad_norm" in options else set())


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(dtype):
    values, grads = make([*SHAPES, (3, 65536)], dtype, 0)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with _choice.use_backend("fastft"):
                found.append(train(AdamW, values, grads, max_grad_norm=1.0))
                params = [torch.nn.Parameter(value) for value in values]
                for param, grad in zip(params, grads[0], strict=True):
                    param.grad = grad.clone()
                found[-1]["norm"] = clip_grad_norm_(params, 0.5)
                found[-1] |= {f"grad {i}": param.grad for i, param in enumerate(params)}
    finally:
        torch.set_num_threads(before)
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


@native
def test_many_tensors_at_once():
    shapes = [(i % 37,) for i in range(1100)]
    error.check(evaluate(torch.float32, shapes=shapes, max_grad_norm=1.0))


def test_many_tensors_at_once_on_cuda():
    shapes = [(i % 37,) for i in range(150)]  # more than one launch holds
    with simt.cuda_on_cpu():
        error.check(evaluate(torch.float32, shapes=shapes, max_grad_norm=1.0))


STRIDES = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "with gaps": lambda t: torch.empty(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)[..., ::2].copy_(t),
    "channels last": lambda t: t[:, :, None, None].expand(-1, -1, 2, 2).contiguous(memory_format=torch.channels_last),
}


@native
@pytest.mark.parametrize("place", STRIDES.values(), ids=STRIDES)
def test_parameters_of_any_strides(place):
    error.check(evaluate(torch.float32, place, [(300, 40), (6, 5)], max_grad_norm=1.0))


@native
@pytest.mark.parametrize("of", ["parameter", "gradient"])
def test_gradient_and_parameter_may_differ_in_strides(of):
    values, grads = make([(300, 40)], torch.float32, 0)
    transposed = STRIDES["transposed"]
    expected = train(AdamW, values, grads)
    if of == "parameter":
        values = [transposed(values[0])]
        moved = train(AdamW, [value.clone() for value in values], grads)
    else:
        moved = train(AdamW, values, [[transposed(grad) for grad in some] for some in grads])
    assert_same(expected, moved)


@native
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e38])
def test_what_is_not_finite_spreads_as_torchs_does(value):
    values, grads = make([(5000,), (3, 2)], torch.float32, 0)
    grads[1][0][17] = value
    for options in ({}, {"max_grad_norm": 1.0}):
        ours, theirs = train(AdamW, values, grads, **options), train(Clipped, values, grads, fused=True, **options)
        for name in ours:
            assert torch.equal(ours[name].isnan(), theirs[name].isnan()), name
            assert torch.equal(ours[name].isinf(), theirs[name].isinf()), name


@native
@pytest.mark.parametrize("isa", [*_library.isas(), "cuda"])
def test_without_momentum_a_gradient_counts_whole_however_large_the_one_before(isa):
    grads = [[torch.full((33,), 1e8)], [torch.linspace(0.5, 1, 33)]]
    with simt.cuda_on_cpu() if isa == "cuda" else _library.use_isa(isa):
        ours = train(AdamW, [torch.zeros(33)], grads, betas=(0.0, 0.9))
    assert torch.equal(ours["exp_avg 0"], grads[1][0])


@native
def test_two_parameters_in_the_same_memory_are_torchs():
    memory = torch.zeros(1 << 17)
    optimizer = AdamW([torch.nn.Parameter(memory), torch.nn.Parameter(memory)])
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(memory)
    assert optimizer.report() == [{"runs": "torch", "reason": "two tensors are in the same memory"}]
    optimizer.step()
    assert len(memory.unique()) == 1


# ---- clip_grad_norm_


@native
def test_a_gradient_that_is_given_twice_is_torchs():
    found = []
    for function in (clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        (param,) = with_grads([torch.ones(1 << 16)])
        found.append((function([param, param], 1.0), param.grad))
    assert all(map(torch.equal, *found))
    with _choice.use_backend("fastft"), pytest.raises(RuntimeError, match="two tensors are in the same memory"):
        clip_grad_norm_([param, param], 1.0)


def with_grads(grads, place=error.guard):
    params = []
    for grad in grads:
        params.append(torch.nn.Parameter(torch.empty_like(grad)))
        params[-1].grad = place(grad.clone())
    return params


def evaluate_clip(dtype, max_norm):
    yardstick = torch.float32 if dtype == torch.float64 else dtype

    def clip(function, grads):
        params = with_grads(grads)
        norm = function(params, max_norm)
        assert norm.shape == ()
        return {"norm": norm, **{f"grad {i}": param.grad for i, param in enumerate(params)}}

    def of(seed):
        _, (grads,) = make(SHAPES, dtype, seed, 1)
        with _choice.use_backend("fastft"):
            ours = clip(clip_grad_norm_, grads)
        torchs = torch.nn.utils.clip_grad_norm_
        return ours, *(clip(torchs, [grad.to(to) for grad in grads]) for to in (yardstick, torch.float64))

    return of


@native
@pytest.mark.parametrize("max_norm", [0.3, 1e6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clipping_is_within_the_error_budget(dtype, max_norm, each_isa):
    error.check(evaluate_clip(dtype, max_norm), double=dtype == torch.float64)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_clipping_by_the_cuda_kernels_is_within_the_error_budget(dtype):
    with simt.cuda_on_cpu() as names:
        error.check(evaluate_clip(dtype, 0.3), double=dtype == torch.float64)
    suffix = simt.SUFFIXES[dtype, torch.promote_types(dtype, torch.float32)]
    assert set(names) == {f"grad_norm_{suffix}", f"scale_grads_{suffix}"}


@native
def test_norm_of_many_elements_keeps_its_digits():
    grad = torch.rand(5_000_000)
    param = torch.nn.Parameter(torch.empty_like(grad))
    param.grad = grad
    truth = grad.double().norm()
    norm = clip_grad_norm_(param, 1e9)
    assert abs(norm - truth) <= error.ulps(truth[None], torch.float32)[0]


@native
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)])
def test_norm_over_different_dtypes(dtypes):
    grads = [torch.randn(100).to(dtype) for dtype in dtypes]
    ours, theirs = with_grads(grads), with_grads(grads)
    with _choice.use_backend("fastft"):
        norm = clip_grad_norm_(ours, 1.0)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert norm.dtype == expected.dtype
    truth = torch.cat([grad.double() for grad in grads]).norm()
    assert abs(norm - truth) <= abs(expected - truth) + error.ulps(truth[None], torch.float32)[0]
    assert [param.grad.dtype for param in ours] == list(dtypes)


@pytest.mark.parametrize("options", [{"norm_type": 1.0}, {"norm_type": float("inf")}, {"norm_type": "inf"}])
def test_other_norms_are_torchs(options):
    grads = [torch.randn(50, 3), torch.randn(7)]
    ours, theirs = with_grads(grads), with_grads(grads)
    assert torch.equal(clip_grad_norm_(ours, 0.1, **options), torch.nn.utils.clip_grad_norm_(theirs, 0.1, **options))
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left.grad, right.grad)


def test_a_norm_that_is_not_finite_is_an_error_where_asked():
    (param,) = with_grads([torch.tensor([1.0, float("nan")])])
    with pytest.raises(RuntimeError, match=r"total norm of order 2.0 .* is non-finite"):
        clip_grad_norm_([param], 1.0, error_if_nonfinite=True)
    assert param.grad[0] == 1
    assert clip_grad_norm_([param], 1.0).isnan() and param.grad.isnan().all()


def test_clipping_nothing():
    assert clip_grad_norm_([], 1.0) == 0 and clip_grad_norm_([torch.nn.Parameter(torch.ones(2))], 1.0) == 0
    with pytest.warns(UserWarning, match="empty generator"):
        clip_grad_norm_((p for p in ()), 1.0)


def test_clipping_takes_a_generator_and_a_single_tensor():
    grads = [torch.full((4,), 3.0), torch.full((4,), 4.0)]
    params = with_grads(grads)
    assert clip_grad_norm_((p for p in params), 5.0) == 10
    assert torch.equal(params[1].grad, torch.full((4,), 4.0) * (5.0 / (torch.tensor(10.0) + 1e-6)))
    assert clip_grad_norm_(params[0], 100.0) == params[0].grad.norm()


# ---- state


STOCK = {"fused": {"fused": True}, "foreach": {"foreach": True}, "one by one": {"foreach": False}}


@pytest.mark.parametrize("first", ["ours", "torch's"])
@pytest.mark.parametrize("options", STOCK.values(), ids=STOCK)
def test_state_goes_to_torchs_optimizer_and_back(options, first):
    shapes = [(300, 40), (77,), ()]

    def run(classes, dtype, seed):
        """Two steps with the first, two more with the second, which loads the state of the first."""
        values, grads = make(shapes, torch.float32, seed)
        params = [torch.nn.Parameter(value.to(dtype)) for value in values]
        saved = None
        for number, make_optimizer in enumerate(classes):
            optimizer = make_optimizer(params)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            if saved is not None:
                optimizer.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
            for some in grads[2 * number : 2 * number + 2]:
                step(optimizer, params, [grad.to(dtype) for grad in some])
                scheduler.step()
            file = io.BytesIO()
            torch.save((optimizer.state_dict(), scheduler.state_dict()), file)
            file.seek(0)
            saved = torch.load(file)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 5)
        return results(optimizer, params)

    def ours(params):
        return AdamW(params, max_grad_norm=1e9)

    def theirs(params):
        return torch.optim.AdamW(params, **options)

    order = (ours, theirs) if first == "ours" else (theirs, ours)
    float32, float64 = torch.float32, torch.float64
    error.check(
        lambda seed: (
            run(order, float32, seed),
            run((theirs, theirs), float32, seed),
            run((torch.optim.AdamW, torch.optim.AdamW), float64, seed),
        )
    )


def test_state_dict_has_torchs_keys():
    values, grads = make([(3, 4)], torch.float32, 0)
    found = []
    for optimizer_class in (AdamW, torch.optim.AdamW):
        params = [torch.nn.Parameter(value) for value in values]
        optimizer = optimizer_class(params)
        step(optimizer, params, grads[0])
        state = optimizer.state_dict()
        shapes = {name: (value.shape, value.dtype) for name, value in state["state"][0].items()}
        found.append((shapes, state["param_groups"]))
    assert found[0] == found[1]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_alike(again):
    values, grads = make([(30, 4), (7,)], torch.float32, 0)
    params = [torch.nn.Parameter(value) for value in values]
    optimizer = AdamW(params, lr=1e-2, max_grad_norm=0.5)
    step(optimizer, params, grads[0])
    other = again(optimizer)
    assert other.max_grad_norm == 0.5
    others = other.param_groups[0]["params"]
    assert others[0] is not params[0]
    for some in grads[1:]:
        step(optimizer, params, some)
        step(other, others, some)
    assert_same(results(optimizer, params), results(other, others))


def test_state_loaded_before_a_model_is_moved_is_found_out():
    params = [torch.nn.Parameter(torch.ones(3))]
    optimizer = AdamW(params)
    step(optimizer, params, [torch.ones(3)])
    optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].double()
    assert optimizer.report()[0]["reason"] == "a moment is torch.float64 on cpu, its parameter torch.float32 on cpu"


# ---- habits


@native
def test_parameters_without_gradient_stay_and_count_no_step():
    params = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))]
    optimizer = AdamW(params, lr=0.1)
    step(optimizer, params, [torch.ones(4), None])
    assert torch.equal(params[1], torch.ones(4)) and not optimizer.state[params[1]]
    step(optimizer, params, [torch.ones(4), torch.ones(4)])
    assert [optimizer.state[param]["step"].item() for param in params] == [2, 1]
    AdamW([torch.nn.Parameter(torch.ones(2))], max_grad_norm=1.0).step()


@native
def test_each_group_has_its_own_options():
    def groups(params):
        first, second = params[:2], params[2:]
        return [{"params": first, "weight_decay": 0.5, "lr": 1e-2}, {"params": second, "betas": (0.5, 0.6)}]

    def run(optimizer_class, values, grads, **options):
        return train(lambda params, **o: optimizer_class(groups(params), **o), values, grads, **options)

    def of(seed):
        values, grads = make([(300, 40), (7,), (30, 2), (5,)], torch.float32, seed)
        with _choice.use_backend("fastft"):
            ours = run(AdamW, values, grads, max_grad_norm=1.0)
        double = [value.double() for value in values], [[grad.double() for grad in some] for some in grads]
        return (
            ours,
            run(Clipped, values, grads, fused=True, max_grad_norm=1.0),
            run(Clipped, *double, max_grad_norm=1.0),
        )

    error.check(of)


@native
@pytest.mark.parametrize("betas", [(0.9, 0.999), (torch.tensor(0.9), torch.tensor(0.999))], ids=["numbers", "tensors"])
def test_rates_may_be_tensors(betas):
    values, grads = make([(30, 4)], torch.float64, 0)
    number = train(AdamW, values, grads, lr=1e-2, betas=tuple(float(beta) for beta in betas))
    with _choice.use_backend("fastft"):
        tensor = train(AdamW, values, grads, lr=torch.tensor(1e-2, dtype=torch.float64), betas=betas)
    assert_same(number, tensor)


def test_closure_computes_gradients_and_its_loss_is_returned():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = AdamW([weight], lr=0.5, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4
    assert weight.item() == pytest.approx(1.5)


def test_sparse_gradients_are_torchs_error():
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        AdamW(embedding.parameters()).step()


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "betas"])
def test_wrong_options_are_torchs_errors(name):
    value = (1.5, 0.9) if name == "betas" else -1.0
    params = [torch.nn.Parameter(torch.ones(1))]
    with pytest.raises(ValueError) as theirs:
        torch.optim.AdamW(params, **{name: value})
    with pytest.raises(ValueError) as ours:
        AdamW(params, **{name: value})
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_wrong_max_grad_norm(value):
    with pytest.raises(ValueError, match=r"max_grad_norm is (-1.0|nan), must be at least 0, or None"):
        AdamW([torch.nn.Parameter(torch.ones(1))], max_grad_norm=value)


HANDED = {
    "amsgrad": (torch.float32, {"amsgrad": True}, "amsgrad is PyTorch's"),
    "amsgrad, clipped": (torch.float32, {"amsgrad": True, "max_grad_norm": 0.5}, "amsgrad is PyTorch's"),
    "float16": (torch.float16, {"eps": 1e-3}, "there are no kernels for torch.float16 on 'cpu'"),
    "complex": (torch.complex64, {"foreach": False}, "there are no kernels for torch.complex64 on 'cpu'"),
}


@native
@pytest.mark.parametrize(("dtype", "options", "reason"), HANDED.values(), ids=HANDED)
def test_what_has_no_kernel_is_torchs_and_says_so(dtype, options, reason):
    values, grads = [torch.randn(30, 4, dtype=dtype)], [[torch.randn(30, 4, dtype=dtype)] for _ in range(3)]
    with _choice.use_backend("torch"):  # the clipping, too: the same bits
        theirs = train(Clipped, values, grads, **options)
        assert_same(train(AdamW, values, grads, **options), theirs)
    ours = train(AdamW, values, grads, **options)
    if "max_grad_norm" not in options:
        assert_same(ours, theirs)
    optimizer = AdamW([torch.nn.Parameter(values[0])], **options)
    assert optimizer.report() == [{"runs": "torch", "reason": reason}]
    with _choice.use_backend("fastft"), pytest.raises(RuntimeError, match=f"AdamW would run on PyTorch: {reason}"):
        train(AdamW, values, grads, **options)


@native
def test_report_names_what_runs():
    optimizer = AdamW([torch.nn.Parameter(torch.ones(2))])
    assert optimizer.report() == [{"runs": "fastft", "reason": None}]
    (param,) = optimizer.param_groups[0]["params"]
    assert AdamW([param], differentiable=True).report() == [{"runs": "torch", "reason": "differentiable is PyTorch's"}]
    assert AdamW([param], capturable=True).report() == [{"runs": "torch", "reason": "capturable is PyTorch's"}]
    with _choice.use_backend("torch"):
        assert optimizer.report() == [{"runs": "torch", "reason": "FASTFT_BACKEND is torch"}]


def test_hooks_run_once_and_torchs_own_optimizer_is_left_alone():
    params = [torch.nn.Parameter(torch.ones(2))]
    torch.optim.AdamW(params)  # patches the step of its class
    optimizer, calls = AdamW(params, amsgrad=True), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    step(optimizer, params, [torch.ones(2)])
    assert calls == ["before", "after"]


def test_a_step_between_forward_and_backward_is_found_out():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([weight])
    loss = (weight**2).sum()
    step(optimizer, [weight], [torch.ones(3)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["plain", "fused"])
def test_gradients_of_a_scaler_are_divided_before_they_are_clipped(options):
    def run(scaled):
        weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        optimizer = AdamW([weight], lr=0.1, max_grad_norm=1.0, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for factor in (1.0, float("inf"), 2.0):
            if factor == float("inf") and not scaled:
                continue
            optimizer.zero_grad()
            scaler.scale((weight * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        return weight.detach(), optimizer.grad_norm

    (ours, norm), (expected, expected_norm) = run(True), run(False)
    assert torch.equal(ours, expected) and norm == expected_norm


def test_a_compiled_step_is_torchs():
    class Compiled(AdamW):
        def __init__(self, params):
            super().__init__(params)
            self.step = torch.compile(self.step, backend="eager")

    def of(seed):
        values, grads = make([(12_000,)], torch.float32, seed)
        double = [value.double() for value in values], [[grad.double() for grad in some] for some in grads]
        return train(Compiled, values, grads), train(Clipped, values, grads), train(Clipped, *double)

    error.check(of)


# ---- with transformers


@native
def test_trainer_trains_as_with_torchs(tmp_path):
    rows = [{name: value[0] for name, value in batch(seed=seed, rows=1).items()} for seed in range(8)]

    def run(optimizer, folder, dtype=torch.float32, resume=None):
        model = build(seed=0 if resume is None else 1).to(dtype)
        arguments = TrainingArguments(
            str(folder),
            per_device_train_batch_size=4,
            max_steps=4,
            learning_rate=1e-3,
            weight_decay=0.1,
            max_grad_norm=0.0 if optimizer is AdamW else 0.1,
            save_steps=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        options = {"lr": 1e-3, "eps": 1e-3}  # some gradients are zero but for their rounding
        options |= {"max_grad_norm": 0.1} if optimizer is AdamW else {"fused": True}
        trainer = Trainer(model, arguments, train_dataset=rows, optimizer_cls_and_kwargs=(optimizer, options))
        trainer.train(resume_from_checkpoint=resume)
        assert type(trainer.optimizer.optimizer) is optimizer
        assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.1}
        return {name: param.detach() for name, param in model.named_parameters()}

    ours, theirs = run(AdamW, tmp_path / "ours"), run(torch.optim.AdamW, tmp_path / "theirs")
    truth = run(torch.optim.AdamW, tmp_path / "truth", torch.float64)
    error.check(lambda seed: (ours, theirs, truth))
    assert_same(ours, run(AdamW, tmp_path / "resumed", resume=str(tmp_path / "ours" / "checkpoint-2")))


def test_the_package_names_it_lazily():
    assert fastft.optim.AdamW is AdamW
