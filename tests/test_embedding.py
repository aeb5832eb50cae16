"""Tables of rows: torch.nn.Embedding with a gradient of ours, and three of them with LayerNorm and dropout."""

import copy

import philox
import pytest
import simt
import small_models
import torch
from small_models import ARCHITECTURES, assert_same, batch, build, each_architecture, step

import fastft
from fastft.functional import _choice, _dropout
from fastft.functional import embedding as module
from fastft.functional.embedding import embedding, embeddings
from fastft.testing import error
from fastft.testing.spec import KernelCalls, TensorMaker

V, H = 50, 8


@pytest.fixture(autouse=True)
def ours():
    """A kernel that quietly falls back cannot pass."""
    with _choice.use_backend("fastft"):
        yield


# ---- one table


def lookups(function, dtype, padding_idx, shape):
    """Output and gradient."""
    draw = torch.Generator().manual_seed(1)
    indices = torch.randint(0, 6, shape, generator=draw)
    weight = torch.randn(V, H, generator=draw).to(dtype).requires_grad_()
    output = function(indices, weight, padding_idx)
    output.backward(torch.randn(*shape, H, generator=draw).bfloat16().to(dtype))
    return {"output": output, "gradient": weight.grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_values_and_gradients_have_pytorchs_bits(dtype, padding_idx):
    for shape in ((4, 7), (1,), (0,), ()):
        found, expected = (lookups(f, dtype, padding_idx, shape) for f in (embedding, torch.nn.functional.embedding))
        assert_same(found, expected)


def test_sums_of_bfloat16_are_rounded_once():
    shape = 300, 7
    found = lookups(embedding, torch.bfloat16, None, shape)["gradient"]
    exact = lookups(torch.nn.functional.embedding, torch.float64, None, shape)["gradient"]
    assert ((found.double() - exact).abs() <= error.ulps(exact, torch.bfloat16)).all()


def test_second_derivatives_are_pytorchs():
    weight = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[1, 1, 4]])
    assert torch.autograd.gradcheck(lambda w: embedding(indices, w, 4)[:, :2].sum(-1), weight)
    assert torch.autograd.gradgradcheck(lambda w: embedding(indices, w).square().sum(-1), weight)


def test_optimize_takes_it_and_gives_it_back():
    model = torch.nn.Sequential(torch.nn.Embedding(V, H, padding_idx=0))
    fastft.optimize(model)
    model(torch.tensor([[1, 0]])).sum().backward()
    assert model[0].weight.grad[1].tolist() == [1] * H and not model[0].weight.grad[0].any()
    assert type(fastft.restore(model)[0]) is torch.nn.Embedding


def test_what_is_unusual_is_pytorchs_and_reported():
    model = fastft.optimize(torch.nn.Sequential(torch.nn.Embedding(V, H, sparse=True)))
    model(torch.tensor([1])).sum().backward()
    assert model[0].weight.grad.is_sparse
    assert fastft.report(model).as_dict()["modules"]["0"]["reason"] == "its sparse is set"


# ---- three, LayerNorm and dropout

M, SIZES, SEED, THRESHOLD = 130, (11, 7, 3), torch.tensor([-987654321987654321]), 20000


def arguments(dtype, seed=0, width=150):
    t = TensorMaker(dtype, seed=seed)
    ids = [t.indices(size, M) for size in SIZES]
    tables = {name: t(size, width) for name, size in zip(("word", "position", "type"), SIZES, strict=True)}
    return ids, {**tables, "weight": t(width) + 1, "bias": t(width)}


def dropout(dtype):
    """Raises where the kernel drops anything but what the rule says, forward or backward."""
    factors = torch.from_numpy(philox.factors(int(SEED), 0, THRESHOLD, M, 150))

    def evaluate(seed):
        ids, given = arguments(dtype, seed)

        def kernel(**tensors):
            return module._run(1e-12, (SEED, THRESHOLD, 0), (None,) * 3, ids, list(tensors.values()))

        def composition(**tensors):
            output = module.reference(*ids, *tensors.values(), 0.0)
            return output * factors.to(output.dtype)

        def grad(*sizes):
            return TensorMaker(dtype, seed=seed + 10**6)(*sizes)

        theirs = error.cast(given, torch.float32 if dtype == torch.float64 else dtype)
        return (
            error.run(kernel, given, given, grad),
            error.run(composition, theirs, given, grad),
            error.run(composition, error.cast(given, torch.float64), given, grad),
        )

    error.check(evaluate, double=dtype == torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_kernel_drops_what_the_rule_says_in_both_directions(each_isa, dtype):
    dropout(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_cuda_kernel_drops_what_the_rule_says_in_both_directions(dtype):
    with simt.cuda_on_cpu() as names:
        dropout(dtype)
    assert {name.rpartition("_")[0].partition("_")[2] for name in names} == {"forward", "backward", "scatter"}


def test_second_derivatives_see_the_same_mask():
    ids, given = arguments(torch.float64, width=12)
    leaves = [tensor.requires_grad_() for tensor in given.values()]

    def kernel(*tensors):
        return module._run(1e-12, (SEED, THRESHOLD, 0), (None,) * 3, ids, tensors)

    assert torch.autograd.gradcheck(kernel, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(kernel, leaves, fast_mode=True)


@pytest.mark.parametrize("which", range(3))
def test_a_padding_row_gets_no_gradient_and_nothing_else_changes(which):
    ids, given = arguments(torch.float32)
    paddings = [2 if index == which else None for index in range(3)]
    name = list(given)[which]
    without, found = (
        error.run(
            lambda p=p, **tensors: embeddings(*ids, *tensors.values(), 0.0, padding_idx=p), given, given, torch.ones
        )
        for p in ((None,) * 3, paddings)
    )
    assert without[f"grad {name}"][2].any() and not found[f"grad {name}"][2].any()
    without[f"grad {name}"][2] = 0
    assert_same(found, without)


def test_rows_that_nobody_took_get_zeros_in_memory_that_was_used_before():
    word = torch.randn(30_000, 16, requires_grad=True)  # as large as the arena's blocks
    ids, given = arguments(torch.float32, width=16)
    for rows in (torch.arange(M), torch.arange(M) + 1000):
        word.grad = None
        embeddings(rows, *ids[1:], word, *list(given.values())[1:], 0.0).square().sum().backward()
        taken = torch.zeros(len(word), dtype=torch.bool).index_fill(0, rows, True)
        assert word.grad[taken].any(1).all() and not word.grad[~taken].any()


def test_without_rows_gradients_are_zeros():
    given = arguments(torch.float32)[1]
    ids = [torch.zeros(2, 0, dtype=torch.int64)] * 3
    results = error.run(lambda **tensors: embeddings(*ids, *tensors.values()), given, given, torch.ones)
    assert results.pop("output").shape == (2, 0, 150)
    assert not any(grad.any() for grad in results.values()) and len(results) == 5


@pytest.mark.parametrize("which, name", list(enumerate(("input", "position_ids", "type_ids"))))
@pytest.mark.parametrize("wrong", [-1, 11])
@pytest.mark.parametrize("grad", [True, False])
def test_an_id_out_of_range_is_named(which, name, wrong, grad):
    ids, given = arguments(torch.float32)
    ids[which][77] = wrong
    tensors = [tensor.requires_grad_(grad) for tensor in given.values()]
    with pytest.raises(IndexError, match=rf"^embeddings: {name} has {wrong}, must be in \[0, {SIZES[which]}\)$"):
        embeddings(*ids, *tensors)


@pytest.mark.parametrize("which, name", list(enumerate(("input", "position_ids", "type_ids"))))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8], ids=str)
def test_ids_that_are_no_integers_are_named_not_rounded(which, name, dtype):
    ids, given = arguments(torch.float32)
    ids[which] = ids[which].to(dtype)
    with pytest.raises(ValueError, match=rf"^embeddings: {name} is {dtype}, must be torch.int64 or torch.int32$"):
        embeddings(*ids, *given.values())


def test_no_id_reaches_foreign_memory_from_the_raw_ops():
    wrong, zeros = torch.full((M,), 11), torch.zeros(M, 150)
    with pytest.raises(RuntimeError, match="tensor 'ids' has an index out of range"):
        torch.ops.fastft.embedding_scatter(torch.zeros(11, 150), wrong, None, zeros, -1)
    (_, *ids), (word, position, type, weight, _) = arguments(torch.float32)[0], arguments(torch.float32)[1].values()
    statistics, grads = (torch.zeros(M), torch.ones(M)), (zeros, None, None, None)
    with pytest.raises(RuntimeError, match="tensor 'ids' has an index out of range"):
        tensors = word, position, type, weight
        torch.ops.fastft.embedding_backward(*grads, zeros, *statistics, wrong, *ids, *tensors, None, 0, 0)


# ---- in models


@each_architecture
def test_the_embeddings_of_every_architecture_are_one_kernel_s(architecture):
    with KernelCalls() as kernels:
        step(fastft.optimize(build(architecture)), batch())
    names = [name for name in kernels.names if "embedding" in name]
    tables = sum(isinstance(module, torch.nn.Embedding) for module in build(architecture).modules())
    assert names == ["embedding_forward", "embedding_backward", *["embedding_scatter"] * tables]


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_positions_and_types_may_be_given(architecture):
    extra = {"position_ids": torch.arange(11).flip(0)[None].expand(6, -1) + 2}
    if "token_type_ids" in architecture.forward.__code__.co_varnames or architecture is fastft.TextClassifier:
        extra["token_type_ids"] = (torch.arange(11) > 4).long().expand(6, -1)

    def evaluate(seed):
        model, inputs = build(architecture, seed, type_vocab_size=2), batch(seed) | extra
        theirs, truth = step(copy.deepcopy(model), inputs), step(copy.deepcopy(model).double(), inputs)
        return step(fastft.optimize(model), inputs), theirs, truth

    error.check(evaluate)


def test_embeddings_may_be_given_in_place_of_words():
    model, inputs = build().eval(), {"attention_mask": batch()["attention_mask"]}
    inputs["inputs_embeds"] = torch.randn(6, 11, 64)
    expected = model(**inputs).logits
    with _choice.use_backend("auto"):
        found = fastft.optimize(model)(**inputs).logits
    assert (found - expected).abs().max() < 1e-5


def _foreign(embeddings):
    embeddings.word_embeddings = torch.nn.EmbeddingBag(101, 64)


def _hook(embeddings):
    embeddings.position_embeddings.register_forward_hook(lambda *_: None)


def _max_norm(embeddings):
    embeddings.token_type_embeddings.max_norm = 1.0


def _norm(embeddings):
    embeddings.LayerNorm = torch.nn.LayerNorm(64, bias=False)


REASONS = {
    _foreign: "its word_embeddings is torch.nn.modules.sparse.EmbeddingBag, not torch.nn.Embedding",
    _hook: "its position_embeddings has a hook",
    _max_norm: "token_type_embeddings: its max_norm is set",
    _norm: "its LayerNorm has no weight or no bias",
}


@pytest.mark.parametrize("change", REASONS)
def test_what_keeps_embeddings_on_pytorch_is_reported(change):
    model = fastft.optimize(build())
    name = "bert.embeddings"
    assert fastft.report(model).as_dict()["modules"][name]["reason"] is None
    change(model.bert.embeddings)
    assert fastft.report(model).as_dict()["modules"][name] == {"runs": "torch", "reason": REASONS[change]}
    with pytest.raises(RuntimeError, match="but BertEmbeddings would run on PyTorch"):
        model(**batch())


@pytest.mark.parametrize("trained", [True, False])
def test_inputs_may_be_made_to_require_gradients(trained):
    """As transformers and peft do by a hook, for checkpointed layers behind frozen embeddings."""
    model = fastft.optimize(build())
    model.bert.embeddings.requires_grad_(trained)
    model.enable_input_require_grads()
    assert model.bert.embeddings(batch()["input_ids"]).requires_grad
    with torch.no_grad():
        assert not model.bert.embeddings(batch()["input_ids"]).requires_grad


def test_dropout_comes_from_the_generator_s_seed():
    model = fastft.optimize(build(hidden_dropout_prob=0.25)).train().bert.embeddings
    input = torch.randint(0, 101, (40, 30))

    def dropped(seed):
        torch.manual_seed(seed)
        return model(input) == 0

    first, again, other = dropped(1), dropped(1), dropped(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    share, n = float(first.double().mean()), first.numel()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / n) ** 0.5
    torch.manual_seed(1)
    expected = _dropout.factors(_dropout.draw_seed("cpu"), 0, 16384, 1200, 64) == 0
    assert torch.equal(first.view(-1, 64), expected)


def test_a_model_s_embeddings_are_called_by_earlier_names_too():
    """Of transformers before 5.24, whose models pass ``past_key_values_length``."""
    embeddings = fastft.optimize(small_models.build().eval()).bert.embeddings
    ids = torch.arange(22).view(2, 11)
    assert torch.equal(embeddings(input_ids=ids, past_key_values_length=0), embeddings(input_ids=ids))
