"""The swap is never silent: what runs where and why not, under everything that people wrap around a model."""

import copy
import functools

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small_models import CONFIG, assert_same, batch, build, classes, each_architecture, step
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations, parametrize
from transformers import BertForMaskedLM, BertForSequenceClassification, DistilBertForSequenceClassification

import fastft
from fastft.functional._choice import use_backend
from fastft.models.swap import watched
from fastft.testing import error
from fastft.testing.spec import KernelCalls


@pytest.fixture(autouse=True)
def ours():
    """A kernel that quietly falls back cannot pass."""
    with use_backend("fastft"):
        yield


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
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding) or name.endswith("output.LayerNorm"):
            assert modules[name] == {"runs": "fastft", "reason": None}
    ours = {name.split(".")[-1] for name, line in modules.items() if line["runs"] == "fastft"}
    is_distilbert = architecture is DistilBertForSequenceClassification
    assert ({"ffn", "activation"} if is_distilbert else {"intermediate", "intermediate_act_fn", "output"}) <= ours


def test_the_report_prints_as_a_table_with_one_row_for_equal_layers():
    text = str(fastft.report(fastft.optimize(build())))
    lines = text.splitlines()
    assert lines[0] == "BertForSequenceClassification: fastft runs 48 of the 48 modules that compute something"
    assert lines[1:3] == ["fastft", "  (the model)".ljust(61) + "BertForSequenceClassification"]
    assert sum("bert.encoder.layer.{0-1}.output.dense " in line for line in lines) == 1
    assert repr(fastft.report(build())).startswith("BertForSequenceClassification: fastft runs 0 of")


def test_the_report_says_when_the_backend_is_pytorch_s():
    model = fastft.optimize(build())
    with use_backend("torch"):
        assert found(model, "classifier") == found(model, "") == "FASTFT_BACKEND is torch"


def test_a_loss_that_is_no_cross_entropy_is_reported():
    assert found(fastft.optimize(build(num_labels=1)), "") == "the loss of regression is PyTorch's"


class OtherDropout(torch.nn.Dropout):
    pass


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.classifier.register_forward_hook(lambda *_: None), "its classifier has a hook"),
        (lambda model: model.dropout.register_forward_pre_hook(lambda *_: None), "its dropout has a hook"),
        (
            lambda model: setattr(model, "dropout", OtherDropout()),
            "its dropout is test_report.OtherDropout, not torch.nn",
        ),
        (lambda model: setattr(model, "classifier", torch.nn.Linear(64, 3)), "its classifier is not swapped"),
        (lambda model: setattr(model, "num_labels", 1), "its classifier has 3 outputs, num_labels is 1"),
        (
            lambda model: setattr(model, "classifier", torch.nn.Sequential(model.classifier)),
            "its classifier is torch.nn",
        ),
    ],
)
def test_dropout_classifier_and_loss_run_one_after_the_other_where_somebody_looks(change, reason):
    stock, inputs = build(problem_type="single_label_classification"), batch()
    model = fastft.optimize(copy.deepcopy(stock))
    assert found(model, "dropout") is None and "head_forward" in kernels(model, inputs)
    change(model)
    assert found(model, "dropout").startswith(reason)
    if model.num_labels != 1:
        assert "head_forward" not in kernels(model, inputs) and "cross_entropy_forward" in kernels(model, inputs)


def kernels(model, inputs):
    with KernelCalls() as calls:
        step(model, inputs)
    return calls.names


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


def test_attention_with_fewer_heads_is_done_by_its_modules():
    stock = build()
    attention = stock.bert.encoder.layer[1].attention
    for name in ("query", "key", "value"):
        setattr(attention.self, name, torch.nn.Linear(64, 48))
    attention.output.dense, attention.self.num_attention_heads = torch.nn.Linear(48, 64), 3
    model = fastft.optimize(copy.deepcopy(stock))
    assert found(model, "bert.encoder.layer.1.attention") == "self.query has 64 inputs and 48 outputs"
    with use_backend("auto"):
        error.check_model(model, stock, batch)


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
    assert_same(step(model, inputs), step(stock, inputs))
    assert found(twin, "") is None  # though copies share the wrapper
    assert_same(step(twin, inputs), wrapped)


def test_a_model_that_accelerate_wrapped_first_is_reported(accelerator):
    model = fastft.optimize(accelerator.prepare(build()))
    assert found(model, "") == "wrapped: optimize first"
    assert found(model, INTERMEDIATE) is None
    step(model, batch())
    assert type(fastft.restore(model)) is BertForSequenceClassification


@pytest.mark.parametrize("wrap", [functools.partial(torch.compile, backend="eager"), functools.partial])
def test_any_other_wrapper_leads_to_the_original_forward_after_restore(wrap):
    model, inputs = build(), batch()
    expected = step(model, inputs)
    fastft.optimize(model)
    model.forward = wrap(model.forward)
    fastft.restore(model)
    assert type(model) is BertForSequenceClassification
    assert_same(step(model, inputs), expected)


def test_a_forward_that_no_longer_leads_to_ours_is_reported():
    model = fastft.optimize(build())
    model.forward = functools.partial(BertForSequenceClassification.forward, model)
    assert found(model, "") == "its forward was replaced after optimize"


def test_a_parametrization_has_to_go_before_restore():
    model = fastft.optimize(build())
    parametrizations.weight_norm(model.classifier)
    message = r"^restore: 'classifier' was made a ParametrizedLinear after optimize; undo that first$"
    with pytest.raises(RuntimeError, match=message):
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
    results = step(model, inputs)
    assert_same({name: r.full_tensor() if isinstance(r, DTensor) else r for name, r in results.items()}, expected)
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == 3
    message = r"^restore: fully_shard was applied to the model after optimize and cannot be undone$"
    with pytest.raises(RuntimeError, match=message):
        fastft.restore(model)


@pytest.mark.usefixtures("process_group")
def test_fully_shard_before_optimize_is_reported_and_left_alone():
    model = _shard(build())
    before = classes(model)
    fastft.optimize(model)
    assert classes(model) == before
    for name in ("", "classifier", INTERMEDIATE):
        assert found(model, name) == "fully_shard came first: call optimize before it"


@pytest.mark.parametrize("first", [True, False], ids=["optimize first", "lora first"])
def test_lora_trains_on_our_kernels_as_on_stock_s(first):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer"

    def adapted(model):
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["query", "value"]))
        for adapter, parameter in model.named_parameters():
            if "lora_B" in adapter:  # zeros: the gradients of the others would be, too
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    def evaluate(seed):
        ours = adapted(fastft.optimize(build(seed=seed))) if first else fastft.optimize(adapted(build(seed=seed)))
        assert found(ours, name) is None
        stock = adapted(build(seed=seed))
        exact = copy.deepcopy(stock).double()
        return tuple(step(model, batch(seed)) for model in (ours, stock, exact))

    error.check(evaluate)
