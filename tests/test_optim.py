"""fastft.optim: torch.optim.AdamW's and clip_grad_norm_'s numbers."""

import pytest
import simt
import torch
from optimizers import DTYPES, SHAPES, Clipped, assert_same, evaluate, make, native, train

from fastft import _library
from fastft.functional import _choice
from fastft.optim import AdamW, clip_grad_norm_
from fastft.testing import error

OPTIONS = {
    "defaults": {},
    "decay": {"lr": 2e-3, "weight_decay": 0.3},
    "no decay": {"weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-3},
    "little momentum": {"betas": (0.3, 0.95)},
    "maximize": {"maximize": True},
    "clipped": {"max_grad_norm": 1.0},
    "not clipped": {"max_grad_norm": 1e6},
}


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


def with_grads(grads, place=error.guard):
    params = []
    for grad in grads:
        params.append(torch.nn.Parameter(torch.empty_like(grad)))
        params[-1].grad = place(grad.clone())
    return params


@native
def test_a_gradient_that_is_given_twice_is_torchs():
    found = []
    for function in (clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        (param,) = with_grads([torch.ones(1 << 16)])
        found.append((function([param, param], 1.0), param.grad))
    assert all(map(torch.equal, *found))
    with _choice.use_backend("fastft"), pytest.raises(RuntimeError, match="two tensors are in the same memory"):
        clip_grad_norm_([param, param], 1.0)


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
