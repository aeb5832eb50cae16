"""Whole models at sizes that nobody tunes for, and calls in an order that nobody plans for."""

import copy
import threading
from concurrent import futures

import pytest
import torch
from small_models import CONFIG, assert_same, batch, build, step

import fastft
from fastft.functional._choice import use_backend
from fastft.models import encoder
from fastft.testing import error


@pytest.fixture(autouse=True)
def ours():
    """A kernel that quietly falls back cannot pass."""
    with use_backend("fastft"):
        yield


SIZES = {  # changes of the configuration, rows, length
    "one token": ({}, 6, 1),
    "three tokens": ({}, 5, 3),
    "511 tokens": ({"max_position_embeddings": 511}, 3, 511),
    "one sequence": ({}, 1, 11),
    "one sequence of one token": ({}, 1, 1),
    "12 heads of 26": ({"hidden_size": 312, "num_attention_heads": 12, "num_hidden_layers": 1}, 4, 11),
    "heads of 128": ({"hidden_size": 256, "num_attention_heads": 2, "num_hidden_layers": 1}, 4, 11),
    "heads of 13": ({"hidden_size": 39, "num_attention_heads": 3}, 6, 11),
    "an inner size of no whole registers": ({"intermediate_size": 99}, 6, 11),
}


@pytest.mark.parametrize("changes, rows, length", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("everything", [False, True], ids=["packed", "padded"])
def test_sizes_of_any_kind_stay_within_the_error_budget(changes, rows, length, autocast, everything):
    options = {"padding_free": False, "cls_only": False} if everything else {}
    budget = error.Budget()
    for seed in range(6):  # a gradient's elements share their few rows' errors: one batch would tell little
        model, inputs = build(seed=seed, **changes), batch(seed, rows, length)
        truth = step(copy.deepcopy(model).double(), inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            theirs = step(copy.deepcopy(model), inputs)
            budget.add(step(fastft.optimize(model, **options), inputs), theirs, truth, seed=seed)
    budget.check()


# ---- orders of calls; activations are large enough for the arena

LARGE = {"max_position_embeddings": 70, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def large(seed=0):
    return fastft.optimize(build(seed=seed, **LARGE).train()), batch(seed, rows=70, length=70)


def seeded_step(model, inputs, seed=3):
    torch.manual_seed(seed)
    return step(model, inputs)


def forward(model, inputs, seed=3):
    torch.manual_seed(seed)
    return model(**inputs).loss


def gradients(model):
    return {f"grad {name}": parameter.grad for name, parameter in model.named_parameters()}


def only_gradients(results):
    return {name: result for name, result in results.items() if name.startswith("grad ")}


@pytest.mark.parametrize("last_first", [True, False])
def test_two_models_interleaved_change_nothing_in_each_other(last_first):
    pairs = [large(0), large(1)]
    expected = [only_gradients(seeded_step(*pair)) for pair in pairs]
    for model, _ in pairs:
        model.zero_grad()
    losses = [forward(*pair) for pair in pairs]
    for loss in reversed(losses) if last_first else losses:
        loss.backward()
    for (model, _), grads in zip(pairs, expected, strict=True):
        assert_same(gradients(model), grads)


@pytest.mark.parametrize("last_first", [True, False])
def test_two_forwards_before_the_backwards(last_first):
    (model, first), (_, second) = large(0), large(1)
    expected = [only_gradients(seeded_step(model, inputs)) for inputs in (first, second)]
    model.zero_grad()
    pairs = [(forward(model, inputs), grads) for inputs, grads in zip((first, second), expected, strict=True)]
    for loss, grads in reversed(pairs) if last_first else pairs:
        model.zero_grad()
        loss.backward()
        assert_same(gradients(model), grads)


def _in_the_embeddings(model, inputs):
    model(**inputs | {"input_ids": inputs["input_ids"].clone().fill_(CONFIG["vocab_size"])})


def _in_a_layer(model, inputs):
    weight = model.bert.encoder.layer[1].output.dense.weight
    model.bert.encoder.layer[1].output.dense.weight = torch.nn.Parameter(weight[:, 1:])
    try:
        model(**inputs)
    finally:
        model.bert.encoder.layer[1].output.dense.weight = weight


def _between_layers(model, inputs):
    _raise_in(model.bert.encoder.layer[1].register_forward_pre_hook, lambda: model(**inputs))


def _behind_the_encoder(model, inputs):
    _raise_in(model.bert.pooler.register_forward_hook, lambda: model(**inputs))


def _in_the_loss(model, inputs):
    model(**inputs | {"labels": inputs["labels"] + CONFIG["num_labels"]})


def _in_the_backward(model, inputs):
    _raise_in(model.bert.encoder.layer[0].output.LayerNorm.weight.register_hook, model(**inputs).loss.backward)


def test_two_threads_run_one_model_at_once(monkeypatch):
    model, _ = large()
    batches = [batch(seed, rows=70, length=70) for seed in range(2)]
    expected = [step(model.eval(), inputs) for inputs in batches]
    between, packing = threading.Barrier(2, timeout=60), encoder.packing

    def both_in_the_middle(*args):
        between.wait()
        found = packing(*args)
        between.wait()
        return found

    def run(inputs):
        with torch.no_grad():
            output = model(**inputs)
        return {"logits": output.logits, "loss": output.loss}

    monkeypatch.setattr(encoder, "packing", both_in_the_middle)
    with futures.ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, batches))
    for got, grads in zip(found, expected, strict=True):
        assert_same(got, {name: grads[name] for name in got})


class _StopError(RuntimeError):
    pass


def _raise_in(register, call):
    def stop(*_):
        raise _StopError

    handle = register(stop)
    try:
        call()
    finally:
        handle.remove()


FAILURES = {
    _in_the_embeddings: IndexError,
    _in_a_layer: (RuntimeError, ValueError),
    _between_layers: _StopError,
    _behind_the_encoder: _StopError,
    _in_the_loss: IndexError,
    _in_the_backward: _StopError,
}


@pytest.mark.parametrize("fails", FAILURES)
def test_after_an_exception_in_the_middle_a_step_is_what_it_was(fails):
    model, inputs = large()
    expected = seeded_step(model, inputs)
    model.zero_grad()
    with pytest.raises(FAILURES[fails]):
        fails(model, inputs)
    assert_same(seeded_step(model, inputs), expected)


# ---- reproducible


def trained(dtype, threads, seed=5):
    """Weights and losses after three steps with dropout, clipping and our optimizer."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = fastft.optimize(build(**LARGE).train(), dtype=dtype)
        optimizer = fastft.optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
        torch.manual_seed(seed)
        losses = []
        for number in range(3):
            losses.append(model(**batch(number, rows=70, length=70)).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        return {"losses": torch.stack(losses).detach(), **model.state_dict()}
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_has_the_same_bits_on_any_number_of_threads_and_again(dtype):
    expected = trained(dtype, threads=2)
    for threads in (2, 1, 3):
        assert_same(trained(dtype, threads), expected)
    assert not torch.equal(trained(dtype, 2, seed=6)["losses"], expected["losses"])
