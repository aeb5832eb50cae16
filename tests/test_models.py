"""The swap: the same numbers, nothing to migrate, and everything undone by restore."""

import copy
import functools
import inspect
import io
import os
import pickle
import subprocess
import sys
import unittest.mock

import pytest
import torch
from small_models import ARCHITECTURES, CONFIG, assert_same, batch, build, classes, distance, each_architecture, step
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import fastft
from fastft.functional import _dropout
from fastft.functional._choice import use_backend
from fastft.models.swap import Swapped
from fastft.testing import error
from fastft.testing.spec import KernelCalls


@pytest.fixture(autouse=True)
def ours():
    """A kernel that quietly falls back cannot pass."""
    with use_backend("fastft"):
        yield


# ---- the same numbers


@each_architecture
@pytest.mark.parametrize("how", ["float32", "autocast", "bfloat16"])
def test_outputs_and_gradients_are_within_the_error_budget(architecture, how):
    bfloat16 = functools.partial(torch.autocast, "cpu", torch.bfloat16)

    def evaluate(seed):
        model, inputs = build(architecture, seed), batch(seed)
        with bfloat16(enabled=how != "float32"):
            theirs = step(copy.deepcopy(model), inputs)
        truth = step(copy.deepcopy(model).double(), inputs)
        fastft.optimize(model, dtype=torch.bfloat16 if how == "bfloat16" else "auto")
        with bfloat16(enabled=how == "autocast"):
            ours = step(model, inputs)
        if how == "bfloat16":  # outside autocast the outputs are those of a float32 model
            theirs = {name: result.float() for name, result in theirs.items()}
        return ours, theirs, truth

    error.check(evaluate)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_bert_base_is_within_the_error_budget(autocast):
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    stock = BertForSequenceClassification(BertConfig(num_labels=CONFIG["num_labels"], **rates)).train()
    ours = fastft.optimize(copy.deepcopy(stock))
    error.check_model(ours, stock, lambda seed: batch(seed, rows=8, length=64), autocast)


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu", "silu", "gelu_python"])
def test_the_activation_is_the_configuration_s(hidden_act):
    def evaluate(seed):
        model, inputs = build(seed=seed, hidden_act=hidden_act, num_hidden_layers=1), batch(seed)
        theirs, truth = step(copy.deepcopy(model), inputs), step(copy.deepcopy(model).double(), inputs)
        return step(fastft.optimize(model), inputs), theirs, truth

    error.check(evaluate)


def _numpy_view(model, _):
    for parameter in model.parameters():
        parameter.detach().numpy()[...] *= 1.25


def _data(model, _):
    for parameter in model.parameters():
        parameter.data.mul_(1.25)


def _new_storage(model, _):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.25


@torch.no_grad()
def _copy(model, _):
    for parameter in model.parameters():
        parameter.copy_(parameter * 1.25)


def _load_state_dict(model, _):
    model.load_state_dict({name: value * 1.25 for name, value in model.state_dict().items()})


def _optimizer(model, optimizer):
    optimizer.step()


def _our_optimizer(model, _):
    fastft.optim.AdamW(model.parameters(), lr=0.1).step()


CHANGES = [_numpy_view, _data, _new_storage, _copy, _load_state_dict, _optimizer, _our_optimizer]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_a_weight_changed_between_two_steps_is_seen(change, dtype):
    model, inputs = fastft.optimize(build(), dtype=dtype), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    before = step(model, inputs)
    change(model, optimizer)
    fresh = build(seed=1)
    fresh.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    after = step(model, inputs)
    assert not torch.equal(after["logits"], before["logits"])
    assert_same(after, step(fastft.optimize(fresh, dtype=dtype), inputs))


# ---- transformers' calls


@each_architecture
def test_hidden_states_and_attentions_are_returned_as_by_stock(architecture):
    model = build(architecture).eval()
    model.set_attn_implementation("eager")
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    with use_backend("torch"):  # whose numbers are stock's to the bit
        stock = model(**inputs, output_hidden_states=True, output_attentions=True)
        fastft.optimize(model)
        model.set_attn_implementation("eager")
        ours = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert list(ours) == list(stock)
    assert len(ours.hidden_states) == 3 and len(ours.attentions) == 2
    for name in stock:
        for left, right in zip(stock[name], ours[name], strict=True):
            assert torch.equal(left, right), name


@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification"])
@pytest.mark.parametrize("return_dict", [True, False, None])
@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_losses_and_output_types_are_stock_s(architecture, problem, return_dict):
    inputs = batch()
    if problem != "single_label_classification":
        inputs["labels"] = torch.rand(len(inputs["labels"]), CONFIG["num_labels"])
    model = build(architecture, problem_type=problem if problem == "regression" else None).eval()
    ours = fastft.optimize(copy.deepcopy(model))
    with use_backend("torch"):
        expected = model(**inputs, return_dict=return_dict)
        found = ours(**inputs, return_dict=return_dict)
    assert type(found) is type(expected)
    assert ours.config.problem_type == model.config.problem_type == problem
    assert list(found) == list(expected) if return_dict is not False else len(found) == len(expected)
    for index in range(len(expected)):
        assert torch.equal(found[index], expected[index])


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_a_classifier_s_product_and_loss_are_one_op(architecture):
    model, inputs = fastft.optimize(build(architecture)), batch()
    with KernelCalls() as kernels:
        step(model, inputs)
    assert {"head_forward", "head_backward"} <= set(kernels.names)
    assert "cross_entropy_forward" not in kernels.names


def test_a_classifier_drops_in_training_only_and_what_the_seed_says():
    model, inputs = fastft.optimize(build(classifier_dropout=0.5)), batch()
    torch.manual_seed(7)
    found = model(**inputs)
    torch.manual_seed(7)
    factors = _dropout.factors(_dropout.draw_seed("cpu"), 0, 32768, 6, 64).float()
    pooled = model.bert(**{key: value for key, value in inputs.items() if key != "labels"}).pooler_output
    torch.testing.assert_close(found.logits, model.classifier(pooled * factors))
    torch.testing.assert_close(found.loss, torch.nn.functional.cross_entropy(found.logits, inputs["labels"]))
    torch.testing.assert_close(model.eval()(**inputs).logits, model.classifier(pooled))


def test_a_label_out_of_range_is_an_error_and_the_next_step_is_as_ever():
    model, inputs = fastft.optimize(build(classifier_dropout=0.5)), batch()
    torch.manual_seed(0)
    expected = step(model, inputs)
    with pytest.raises(IndexError, match=r"cross_entropy: target\[0\] is 9, must be in \[0, 3\)"):
        model(**inputs | {"labels": torch.full_like(inputs["labels"], 9)})
    torch.manual_seed(0)
    assert_same(step(model, inputs), expected)


def test_labels_may_be_positional_and_return_dict_the_configuration_s():
    model, inputs = fastft.optimize(build().eval()), batch()
    loss = model(**inputs).loss
    model.config.return_dict = False
    found = model(inputs["input_ids"], inputs["attention_mask"], None, None, None, inputs["labels"])
    assert isinstance(found, tuple) and torch.equal(found[0], loss)


def test_outputs_may_be_changed_in_place():
    model, input = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(inplace=True)), torch.randn(3, 40, 64)
    assert (fastft.optimize(model)(input) >= 0).all()


@pytest.mark.parametrize("before", [True, False], ids=["enabled before optimize", "after"])
@pytest.mark.parametrize("whole", [True, False], ids=["layers", "modules"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_keeps_less_and_changes_no_number(reentrant, whole, before):
    def kept(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(**inputs)
        return sum(sizes) - sum(p.numel() for p in model.parameters())

    model, inputs = build().train(), batch()
    if not whole:
        for layer in model.bert.encoder.layer:
            layer.chunk_size_feed_forward = 11
    options = {"padding_free": False, "cls_only": False}
    expected, everything = step(fastft.optimize(model, **options), inputs), kept(model)
    if before:
        fastft.restore(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(step(fastft.optimize(model, **options), inputs), expected)
    if whole or not reentrant:  # whose first pass is recorded by nobody
        assert kept(model) < everything
    assert fastft.restore(model).bert.encoder.layer[0].gradient_checkpointing is True


@pytest.mark.parametrize("memory", ["low", "lowest"])
def test_activation_memory_changes_no_number(memory):
    model, inputs = build().train(), batch()
    expected = step(fastft.optimize(model), inputs)
    assert_same(step(fastft.optimize(model, activation_memory=memory), inputs), expected)
    with pytest.raises(ValueError, match="activation_memory is 'least', must be one of 'fast', 'low', 'lowest'"):
        fastft.optimize(model, activation_memory="least")


class _Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        row = {key: value[0] for key, value in batch(seed=index, rows=1).items()}
        return row | {"comment": "no argument of forward"}


def _train(model, folder, **options):
    arguments = TrainingArguments(
        folder,
        max_steps=3,
        per_device_train_batch_size=8,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=_Rows())
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_trainer_sees_the_same_signature_and_the_same_losses(architecture, options, tmp_path):
    with use_backend("torch"):
        stock = _train(build(architecture), tmp_path, **options)
        assert _train(fastft.optimize(build(architecture)), tmp_path, **options) == stock
    assert len(_train(fastft.optimize(build(architecture)), tmp_path, **options)) == 3


COMPILE = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, COMPILE], ids=["accumulation", "compiled"])
def test_trainer_ends_as_near_to_float64_as_stock(options, tmp_path):
    def trained(model, options=options):
        with unittest.mock.patch.dict(os.environ):  # where Trainer leaves what it compiles with
            _train(model, tmp_path, **options)
        return model.state_dict()

    small = functools.partial(build, num_hidden_layers=1)
    exact = trained(small().double(), {} if options is COMPILE else options)
    stock, ours = trained(small()), trained(fastft.optimize(small()))
    assert distance(ours, exact) <= 2 * distance(stock, exact) < distance(small().state_dict(), exact) / 1e3


@each_architecture
def test_every_forward_has_the_signature_of_the_one_it_replaces(architecture):
    for module in fastft.optimize(build(architecture)).modules():
        if isinstance(module, Swapped):
            stock = type(module).__bases__[1]
            assert inspect.signature(type(module).forward) == inspect.signature(stock.forward)
            assert stock.forward in _wrapped(type(module).forward)


def _wrapped(function):
    """What a function stands for, directly and in turn."""
    while function := getattr(function, "__wrapped__", None):
        yield function


def test_compiles_in_one_graph():
    # Compiled, padding is computed and so are all tokens: other sums in other orders.
    model, inputs = fastft.optimize(build(num_hidden_layers=1), padding_free=False, cls_only=False), batch()
    expected = step(model, inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    compiled(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[f"grad {name}"]), name


@torch._dynamo.config.patch(recompile_limit=1)
def test_each_architecture_is_compiled_by_itself():
    torch._dynamo.reset()
    for architecture in (BertForSequenceClassification, DistilBertForSequenceClassification):
        model, inputs = fastft.optimize(build(architecture, num_hidden_layers=1).eval(), padding_free=False), batch()
        with torch.no_grad():
            compiled = torch.compile(model, backend="eager", fullgraph=True)(**inputs)
            assert torch.equal(compiled.logits, fastft.optimize(model, cls_only=False)(**inputs).logits)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_model_is_right_for_other_masks():
    model = fastft.optimize(build(return_dict=False).eval())
    ids, mask = (batch()[name] for name in ("input_ids", "attention_mask"))
    with use_backend("auto"), torch.no_grad():
        traced = torch.jit.trace(model, (ids, mask))
        for other in (mask, mask.flip(0), torch.ones_like(mask)):
            (logits,), (expected,) = traced(ids, other), fastft.restore(copy.deepcopy(model))(ids, other)
            assert torch.equal(logits, expected)


# ---- nothing to migrate


@each_architecture
def test_restore_gives_the_exact_classes_back(architecture):
    model = build(architecture)
    before, attributes = classes(model), {name: set(vars(module)) for name, module in model.named_modules()}
    assert fastft.optimize(model, dtype=torch.bfloat16) is model
    swapped = classes(model)
    for name, kind in swapped.items():
        assert kind.__name__ == before[name].__name__ and issubclass(kind, before[name])
        assert getattr(sys.modules[kind.__module__], kind.__name__) is kind
    assert sum(kind is not before[name] for name, kind in swapped.items()) >= 15
    assert fastft.restore(model) is model
    assert classes(model) == before
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert fastft.restore(model) is model


@each_architecture
def test_parameters_and_state_dict_are_untouched(architecture):
    model = build(architecture)
    parameters, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    for change in (fastft.optimize, fastft.restore):
        change(model)
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert_same(model.state_dict(), state)


@each_architecture
def test_saved_folders_are_stock_s(architecture, tmp_path):
    model, inputs = build(architecture).eval(), batch()
    model.save_pretrained(tmp_path / "stock")
    fastft.optimize(model).save_pretrained(tmp_path / "ours")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    loaded = architecture.from_pretrained(tmp_path / "ours")
    assert classes(loaded) == classes(fastft.restore(copy.deepcopy(model)))
    assert_same(step(fastft.optimize(loaded), inputs), step(model, inputs))


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@each_architecture
@pytest.mark.parametrize("make", [copy.deepcopy, _pickled, _saved])
@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_copies_run_on_our_kernels_and_can_be_restored(architecture, make, dtype):
    model, inputs = fastft.optimize(build(architecture), dtype=dtype), batch()
    twin = make(model)
    assert classes(twin) == classes(model)
    assert_same(step(twin, inputs), step(model, inputs))
    fastft.restore(twin)
    assert isinstance(model, Swapped) and not isinstance(twin, Swapped)


def test_a_pickled_model_works_in_a_process_that_never_called_optimize(tmp_path):
    torch.save(fastft.optimize(build()), tmp_path / "model.pt")
    program = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False)\n"
        "print(len(model(torch.ones(2, 5, dtype=torch.long), output_hidden_states=True).hidden_states))"
    )
    command = [sys.executable, "-c", program, tmp_path / "model.pt"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == "3\n"


def _replica(module):
    """What torch.nn.parallel.replicate makes for one device, which has to be a GPU."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(replica, name, None if child is None else _replica(child))
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.clone())
    replica._former_parameters = {}
    return replica


@each_architecture
@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_replicas_of_data_parallel_run_on_our_kernels(architecture, dtype):
    model = fastft.optimize(build(architecture), dtype=dtype)
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    found, expected = (tuple(m(**inputs).to_tuple()) for m in (_replica(model), model))
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    sum(result.sum() for result in found).backward()
    assert model.get_input_embeddings().weight.grad is not None


# ---- dtype


def test_bfloat16_gives_float32_outputs_and_gradients():
    model = fastft.optimize(build(), dtype=torch.bfloat16)
    output = model(**batch(), output_hidden_states=True)
    output.loss.backward()
    tensors = [output.loss, output.logits, *output.hidden_states, *(p.grad for p in model.parameters())]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    with use_backend("auto"):
        assert not torch.equal(output.logits, fastft.optimize(model)(**batch()).logits)


@pytest.mark.parametrize("make", [build, lambda: torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.Linear(80, 64))])
def test_float32_computes_in_float32_under_autocast(make):
    model = fastft.optimize(make(), dtype=torch.float32)
    arguments = ((), batch()) if isinstance(model, BertForSequenceClassification) else ((torch.randn(40, 64),), {})
    expected = model(*arguments[0], **arguments[1])
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*arguments[0], **arguments[1])
    logits = (expected.logits, found.logits) if hasattr(found, "logits") else (expected, found)
    assert logits[1].dtype == torch.float32 and torch.equal(*logits)


def test_bfloat16_of_single_linear_layers_is_autocast_s_rounded_at_each():
    model, input = torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.Linear(80, 64)), torch.randn(40, 64)
    found = fastft.optimize(copy.deepcopy(model), dtype=torch.bfloat16)(input)
    with torch.autocast("cpu", torch.bfloat16):
        expected = fastft.optimize(model)(input)
    assert found.dtype == torch.float32 and torch.equal(found, expected.float())


def test_optimize_again_changes_nothing_but_the_dtype():
    model, inputs = fastft.optimize(build()), batch()
    before, expected = classes(model), step(model, inputs)
    assert_same(step(fastft.optimize(model), inputs), expected)
    assert not torch.equal(step(fastft.optimize(model, dtype=torch.bfloat16), inputs)["logits"], expected["logits"])
    assert_same(step(fastft.optimize(model), inputs), expected)
    assert classes(model) == before


@pytest.mark.parametrize("dtype", ["half", "float32", torch.float16, torch.float64, 16, None, [torch.bfloat16]])
def test_an_unknown_dtype_is_named(dtype):
    message = r"^optimize: dtype is .*, must be one of 'auto', torch.bfloat16, torch.float32$"
    with pytest.raises(ValueError, match=message):
        fastft.optimize(build(), dtype=dtype)


@pytest.mark.parametrize("asked, has", [(torch.bfloat16, torch.float64), (torch.float32, torch.bfloat16)])
def test_parameters_that_cannot_be_masters_are_named_and_nothing_is_swapped(asked, has):
    model = build()
    model.classifier.to(has)
    with pytest.raises(ValueError, match=rf"^optimize: dtype {asked} needs .*, classifier.weight is {has}$"):
        fastft.optimize(model, dtype=asked)
    assert not any(isinstance(module, Swapped) for module in model.modules())


@pytest.mark.parametrize("function", [fastft.optimize, fastft.restore, fastft.report])
def test_what_is_no_module_is_a_type_error(function):
    with pytest.raises(TypeError, match=rf"^{function.__name__}: model must be a torch.nn.Module, got str$"):
        function("bert-base-uncased")
