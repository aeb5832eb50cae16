"""The swap: same numbers, nothing to migrate, never silent, and everything undone by restore."""

import copy
import functools
import inspect
import io
import pickle
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    Trainer,
    TrainingArguments,
)

import fastft
from fastft.functional._choice import use_backend
from fastft.models.swap import Swapped, watched
from fastft.testing import error

CONFIG = dict(
    **dict(vocab_size=101, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=112),
    **dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3, max_position_embeddings=32),
)
ARCHITECTURES = (BertModel, BertForSequenceClassification, fastft.TextClassifier)
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture(autouse=True)
def ours():
    """A kernel that quietly falls back cannot pass."""
    with use_backend("fastft"):
        yield


def build(architecture=BertForSequenceClassification, seed=0, **changes):
    torch.manual_seed(seed)
    model = architecture(BertConfig(**{**CONFIG, **changes}))
    for name, parameter in model.named_parameters():  # biases start at zero: a bias left out would not be seen
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def batch(seed=0, rows=6, length=11):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (rows, 1), generator=generator)
    return {
        "input_ids": torch.randint(1, CONFIG["vocab_size"], (rows, length), generator=generator),
        "attention_mask": (torch.arange(length) < lengths).long(),
        "labels": torch.randint(CONFIG["num_labels"], (rows,), generator=generator),
    }


def step(model, inputs):
    """Outputs and the gradients of all parameters, by name."""
    model.zero_grad()
    if isinstance(model, BertModel):
        output = model(**{key: value for key, value in inputs.items() if key != "labels"})
        results = {"hidden": output.last_hidden_state, "pooled": output.pooler_output}
        generator = torch.Generator().manual_seed(1)
        loss = sum((torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) * r).sum() for r in results.values())
    else:
        output = model(**inputs)
        results, loss = {"logits": output.logits, "loss": output.loss}, output.loss
    loss.backward()
    grads = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: result.detach() for name, result in (results | grads).items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


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


@pytest.mark.parametrize("change", [_numpy_view, _data, _new_storage, _copy, _load_state_dict, _optimizer])
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
    for left, right in zip(tuple(expected)[:2] if return_dict is False else expected.to_tuple(), found, strict=True):
        assert torch.equal(left, found[right] if isinstance(right, str) else right)


def test_labels_may_be_positional_and_return_dict_the_configuration_s():
    model, inputs = fastft.optimize(build().eval()), batch()
    loss = model(**inputs).loss
    model.config.return_dict = False
    found = model(inputs["input_ids"], inputs["attention_mask"], None, None, None, inputs["labels"])
    assert isinstance(found, tuple) and torch.equal(found[0], loss)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_number(reentrant):
    model, inputs = fastft.optimize(build().train()), batch()
    expected = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(step(model, inputs), expected)


class _Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        row = {key: value[0] for key, value in batch(seed=index, rows=1).items()}
        return row | {"comment": "no argument of forward"}


def _train(model, folder, **options):
    options = dict(max_steps=3, per_device_train_batch_size=8, report_to="none", use_cpu=True, disable_tqdm=True) | options
    arguments = TrainingArguments(folder, save_strategy="no", logging_steps=1, **options)
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


@each_architecture
def test_every_forward_has_the_signature_of_the_one_it_replaces(architecture):
    for module in fastft.optimize(build(architecture)).modules():
        if isinstance(module, Swapped):
            stock = type(module).__bases__[1]
            assert inspect.signature(type(module).forward) == inspect.signature(stock.forward)
            assert type(module).forward.__wrapped__ is stock.forward


def test_compiles_in_one_graph():
    model, inputs = fastft.optimize(build()), batch()
    expected = step(model, inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    compiled(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[f"grad {name}"]), name


# ---- nothing to migrate


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


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
    run = subprocess.run([sys.executable, "-c", program, tmp_path / "model.pt"], capture_output=True, text=True, check=True)
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
    with pytest.raises(ValueError, match=r"^optimize: dtype is .*, must be one of 'auto', torch.bfloat16, torch.float32$"):
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


# ---- never silent


def found(model, name):
    line = fastft.report(model).as_dict()["modules"][name]
    assert line["runs"] == ("torch" if line["reason"] else "fastft")
    return line["reason"]


@each_architecture
def test_the_report_has_a_line_for_all_that_computes(architecture):
    model = build(architecture)
    before = fastft.report(model).as_dict()["modules"]
    assert {line["runs"] for line in before.values()} == {"torch"}
    modules = fastft.report(fastft.optimize(model)).as_dict()["modules"]
    assert modules.keys() == before.keys()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert modules[name] == {"runs": "fastft", "reason": None}
        elif isinstance(module, torch.nn.LayerNorm | torch.nn.Embedding):
            assert modules[name] == {"runs": "torch", "reason": "fastft has no replacement for it"}
    ours = {name.split(".")[-1] for name, line in modules.items() if line["runs"] == "fastft"}
    assert {"intermediate", "intermediate_act_fn"} <= ours


def test_the_report_prints_as_a_table_with_one_row_for_equal_layers():
    text = str(fastft.report(fastft.optimize(build())))
    lines = text.splitlines()
    assert lines[0] == "BertForSequenceClassification: fastft runs 20 of the 39 modules that compute something"
    assert lines[1:3] == ["fastft", "  (the model)".ljust(61) + "BertForSequenceClassification"]
    assert sum("bert.encoder.layer.{0-1}.output.dense " in line for line in lines) == 1
    assert repr(fastft.report(build())).startswith("BertForSequenceClassification: fastft runs 0 of")


def test_the_report_says_when_the_backend_is_pytorch_s():
    model = fastft.optimize(build())
    with use_backend("torch"):
        assert found(model, "classifier") == found(model, "") == "FASTFT_BACKEND is torch"


def test_a_loss_that_is_no_cross_entropy_is_reported():
    assert found(fastft.optimize(build(num_labels=1)), "") == "the loss of regression is PyTorch's"


INTERMEDIATE = "bert.encoder.layer.1.intermediate"


def _hook(model):
    model.get_submodule(INTERMEDIATE).dense.register_forward_hook(lambda *_: None)


def _activation_hook(model):
    model.get_submodule(INTERMEDIATE).intermediate_act_fn.register_forward_pre_hook(lambda *_: None)


def _wrapped_forward(model):
    dense = model.get_submodule(INTERMEDIATE).dense
    dense.forward = functools.partial(type(dense).forward, dense)


class _Adapter(torch.nn.Module):
    """A low-rank update of a linear layer, wrapped around it as LoRA's are."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.down = torch.nn.Linear(base_layer.in_features, 4, bias=False)
        self.up = torch.nn.Linear(4, base_layer.out_features, bias=False)

    def forward(self, input):
        return self.base_layer(input) + self.up(self.down(input))


def _adapter(model):
    module = model.get_submodule(INTERMEDIATE)
    module.dense = _Adapter(module.dense)


class _Scaled(torch.nn.Linear):
    """A layer made from torch.nn.Linear that computes something else, as quantised ones do."""

    def forward(self, input):
        return 2 * super().forward(input)


def _foreign(model):
    model.get_submodule(INTERMEDIATE).dense = _Scaled(CONFIG["hidden_size"], CONFIG["intermediate_size"])


def _parametrized(model):
    parametrizations.weight_norm(model.get_submodule(INTERMEDIATE).dense)


def _other_activation(model):
    model.get_submodule(INTERMEDIATE).intermediate_act_fn = torch.nn.LeakyReLU(0.3)


CHANGES = {
    _hook: "its linear layer has a hook",
    _activation_hook: "its activation has a hook",
    _wrapped_forward: "its linear layer has a wrapped forward",
    _adapter: "its linear layer is {name}, not torch.nn.Linear",
    _foreign: "its linear layer is {name}, not torch.nn.Linear",
    _parametrized: "its linear layer is torch.nn.utils.parametrize.ParametrizedLinear, not torch.nn.Linear",
    _other_activation: "its activation LeakyReLU(negative_slope=0.3) is none of fastft's",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("optimized_first", [True, False])
def test_what_a_fused_module_would_skip_keeps_it_on_pytorch_with_the_reason(change, optimized_first):
    model, inputs = build(), batch()
    if optimized_first:
        fastft.optimize(model)
    torch.manual_seed(1)
    change(model)
    stock = fastft.restore(copy.deepcopy(model)) if change is not _parametrized else None
    fastft.optimize(model)
    dense = type(model.get_submodule(INTERMEDIATE).dense)
    reason = CHANGES[change].format(name=f"{dense.__module__}.{dense.__qualname__}")
    assert found(model, INTERMEDIATE) == reason
    assert found(model, INTERMEDIATE.replace("1", "0")) is None
    with pytest.raises(RuntimeError, match="FASTFT_BACKEND=fastft, but BertIntermediate would run on PyTorch: its "):
        model(**inputs)
    with use_backend("auto"):
        model(**inputs).loss.backward()
    if stock is not None:
        with use_backend("torch"):
            assert torch.equal(model(**inputs).logits, stock(**inputs).logits)


def test_a_hook_that_comes_and_goes_is_called_and_costs_only_while_it_is_there():
    model, inputs, seen = fastft.optimize(build()), batch(), []
    intermediate = model.get_submodule(INTERMEDIATE)
    own = intermediate.register_forward_hook(lambda *_: seen.append("module"))
    inner = intermediate.dense.register_forward_hook(lambda *_: seen.append("dense"))
    with use_backend("auto"):
        model(**inputs)
    assert seen == ["dense", "module"]
    inner.remove()
    assert found(model, INTERMEDIATE) is None
    model(**inputs)
    assert seen == ["dense", "module", "module"]
    own.remove()


def test_capturing_hooks_that_are_left_behind_do_not_count():
    model = build().eval()
    model.set_attn_implementation("eager")
    attention = model.bert.encoder.layer[0].attention.self
    model(**batch(), output_attentions=True)
    assert attention._forward_hooks and watched(attention) is None
    attention.register_forward_hook(lambda *_: None)
    assert watched(attention) == "has a hook"


def test_layers_made_from_linear_are_left_alone():
    model = fastft.optimize(torch.nn.Sequential(torch.nn.Linear(8, 8), _Scaled(8, 8)))
    assert type(model[1]) is _Scaled
    assert found(model, "1") == "fastft knows Linear, not _Scaled, which is made from it"


def test_of_an_unknown_model_the_linear_layers_are_swapped_and_the_report_says_so():
    model = fastft.optimize(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh()))
    assert fastft.report(model).as_dict()["modules"] == {
        "": {"runs": "torch", "reason": "fastft does not know Sequential: only the linear layers in it are swapped"},
        "0": {"runs": "fastft", "reason": None},
        "1": {"runs": "torch", "reason": "fastft has no replacement for it"},
    }
    assert model(torch.randn(40, 64)).shape == (40, 64)


def test_what_is_known_inside_an_unknown_model_is_swapped():
    model = fastft.optimize(build(BertForMaskedLM))
    assert found(model, "") == "fastft does not know BertForMaskedLM, only what is inside it"
    assert found(model, INTERMEDIATE) is None
    assert found(model, "cls.predictions.decoder") is None
    model(batch()["input_ids"]).logits.sum().backward()


def test_a_module_added_after_optimize_is_reported_and_taken_in_by_calling_it_again():
    model = fastft.optimize(build())
    model.classifier = torch.nn.Linear(64, 5)
    assert found(model, "classifier") == "not swapped: call fastft.optimize"
    assert found(fastft.optimize(model), "classifier") is None


# ---- wrappers around the whole model


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_s_wrapper_around_our_forward_survives_restore_around_the_original_one(accelerator):
    model, inputs = build(), batch()
    stock = accelerator.prepare(copy.deepcopy(model))
    fastft.optimize(model)
    accelerator.prepare(model)
    assert found(model, "") is None
    twin = copy.deepcopy(model)
    wrapped = step(model, inputs)
    fastft.restore(model)
    assert model._original_forward.__func__ is BertForSequenceClassification.forward
    assert_same(step(model, inputs), step(stock, inputs))
    assert found(twin, "") is None  # a copy shares the wrappers that the original had
    assert_same(step(twin, inputs), wrapped)


def test_a_model_that_accelerate_wrapped_first_is_reported(accelerator):
    model = fastft.optimize(accelerator.prepare(build()))
    assert found(model, "") == "wrapped: optimize first"
    assert found(model, INTERMEDIATE) is None
    step(model, batch())
    assert type(fastft.restore(model)) is BertForSequenceClassification


def test_a_forward_that_cannot_be_given_back_is_an_error_and_nothing_is_changed():
    model = fastft.optimize(build())
    model.forward = torch.compile(model.forward, backend="eager")
    before = classes(model)
    with pytest.raises(RuntimeError, match=r"^restore: the forward of the model was wrapped after optimize; undo that first$"):
        fastft.restore(model)
    assert classes(model) == before
    del model.forward
    assert type(fastft.restore(model)) is BertForSequenceClassification


def test_a_parametrization_has_to_go_before_restore():
    model = fastft.optimize(build())
    parametrizations.weight_norm(model.classifier)
    with pytest.raises(RuntimeError, match=r"^restore: 'classifier' was made a ParametrizedLinear after optimize; undo"):
        fastft.restore(model)
    parametrize.remove_parametrizations(model.classifier, "weight")
    assert type(fastft.restore(model).classifier) is torch.nn.Linear


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _shard(model):
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


@pytest.mark.usefixtures("process_group")
def test_fully_shard_after_optimize_runs_on_our_kernels_and_cannot_be_restored():
    model, inputs = build(), batch()
    expected = step(fastft.optimize(model), inputs)
    _shard(model)
    assert found(model, "") is None and found(model, INTERMEDIATE) is None and found(model, "classifier") is None
    results = {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in step(model, inputs).items()}
    assert_same(results, expected)
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == 3
    with pytest.raises(RuntimeError, match=r"^restore: fully_shard was applied to the model after optimize and cannot be undone$"):
        fastft.restore(model)


@pytest.mark.usefixtures("process_group")
def test_fully_shard_before_optimize_is_reported_and_left_alone():
    model = _shard(build())
    before = classes(model)
    fastft.optimize(model)
    assert classes(model) == before
    for name in ("", "classifier", INTERMEDIATE):
        assert found(model, name) == "fully_shard came first: call optimize before it"


def test_lora_before_and_after_optimize_trains_on_our_kernels():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapters = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights="gaussian")
    before = fastft.optimize(peft.get_peft_model(build(), adapters))
    after = fastft.optimize(peft.get_peft_model(fastft.optimize(build()), adapters))
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer"
    for model in (before, after):
        assert found(model, name) is None
        assert any("lora" in grad for grad in step(model, batch()))
