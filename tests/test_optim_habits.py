"""fastft.optim: torch.optim.AdamW's state and habits."""

import copy
import io
import pickle

import pytest
import torch
from optimizers import Clipped, assert_same, make, native, results, step, train
from small_models import batch, build
from transformers import Trainer, TrainingArguments

import fastft
from fastft.functional import _choice
from fastft.optim import AdamW
from fastft.testing import error

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
