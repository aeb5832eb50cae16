"""Without padding, and the last layer for first tokens only: the same numbers, whenever a batch allows it."""

import copy

import pytest
import torch
from small_models import ARCHITECTURES, CONFIG, batch, build, step
from transformers import BertForQuestionAnswering, BertModel, RobertaForQuestionAnswering

import fastft
from fastft.functional._choice import use_backend
from fastft.models import encoder, swap
from fastft.models.mask import with_lengths
from fastft.testing import error
from fastft.testing.spec import KernelCalls

LENGTH = 11


@pytest.fixture(autouse=True)
def ours():
    with use_backend("fastft"):
        yield


def rows_of(model, inputs):
    """The rows that each layer's attention and its second half compute: ``[(queries, rows), …]``."""
    with KernelCalls(keep_arguments=True) as kernels:
        step(model, inputs)
    names = [(op.__name__, args) for op, args, _ in kernels.calls]
    queries = [args[2].numel() // CONFIG["hidden_size"] for name, args in names if "attention_forward" in name]
    norms = [len(args[4]) for name, args in names if "layer_norm_forward" in name and args[5] is not None]
    return list(zip(queries, norms[::2], strict=True))


def with_mask(mask, seed=0):
    return batch(seed, rows=len(mask), length=LENGTH) | {"attention_mask": torch.tensor(mask)}


def ones(count, at=0):
    return [0] * at + [1] * count + [0] * (LENGTH - count - at)


UNEVEN = [ones(11), ones(3), ones(7), ones(1)]
HOLES = [ones(11), [1, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0], ones(4)]
LEFT = [ones(11), ones(5, at=6), ones(4)]
FIRST_MASKED = [ones(11), [0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0], ones(4)]
NOTHING = [ones(11), ones(0), ones(4)]


@pytest.mark.parametrize("mask", [UNEVEN, HOLES], ids=["uneven", "holes"])
def test_padding_is_left_out_and_the_last_layer_computes_first_tokens_only(mask):
    present, inputs = sum(map(sum, mask)), with_mask(mask)
    model = fastft.optimize(build().train())
    assert rows_of(model, inputs) == [(present, present), (len(mask), len(mask))]
    model = fastft.optimize(build().train(), cls_only=False)
    assert rows_of(model, inputs) == [(present, present)] * 2
    model, every = fastft.optimize(build().train(), padding_free=False), len(mask) * LENGTH
    assert rows_of(model, inputs) == [(every, every), (len(mask), len(mask))]
    model = fastft.optimize(build().train(), padding_free=False, cls_only=False)
    assert rows_of(model, inputs) == [(every, every)] * 2


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_padding_is_not_embedded_unless_somebody_looks(architecture):
    model, inputs = fastft.optimize(build(architecture).train()), with_mask(UNEVEN)

    def embedded():
        with KernelCalls(keep_arguments=True) as kernels:
            step(model, inputs)
        return [len(args[0]) for op, args, _ in kernels.calls if "embedding_forward" in op.__name__]

    present, every = sum(map(sum, UNEVEN)), len(UNEVEN) * LENGTH
    between = hasattr(model.base_model, "embeddings_project")
    assert embedded() == [every if between else present]
    seen = []
    hook = model.base_model.embeddings.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert embedded() == [every] and seen[0].shape[:2] == (len(UNEVEN), LENGTH) and not seen[0].isnan().any()
    hook.remove()


def test_an_encoder_that_gets_something_else_than_packed_embeddings_says_so():
    inner = fastft.optimize(build()).bert.encoder
    handed = encoder.Handed(None, False, True, inner.layer, plan=encoder.Plan(None, None, False))
    message = "BertEncoder: something came between the embeddings and the encoder"
    with swap.told({inner: handed}), pytest.raises(RuntimeError, match=message):
        inner(torch.zeros(1, 2, 64))


@pytest.mark.parametrize("mask", [LEFT, FIRST_MASKED, NOTHING], ids=["left", "first masked", "nothing"])
def test_a_batch_in_which_a_first_token_is_masked_runs_padded(mask):
    rows = rows_of(fastft.optimize(build().train(), cls_only=False), with_mask(mask))
    assert rows == [(len(mask) * LENGTH,) * 2] * 2


@pytest.mark.parametrize("mask", [UNEVEN, HOLES, LEFT, FIRST_MASKED, NOTHING], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_any_mask_gives_stock_s_numbers(architecture, mask, autocast):
    def evaluate(seed):
        model, inputs = build(architecture, seed), with_mask(mask, seed)
        truth = step(copy.deepcopy(model).double(), inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            theirs = step(copy.deepcopy(model), inputs)
            return step(fastft.optimize(model), inputs), theirs, truth

    error.check(evaluate)


def test_a_bare_encoder_returns_zeros_at_padding_or_stock_s_numbers_on_request():
    model, inputs = build(BertModel).eval(), with_mask(UNEVEN)
    inputs.pop("labels")
    present = inputs["attention_mask"].bool()
    packed = fastft.optimize(model)(**inputs).last_hidden_state
    padded = fastft.optimize(model, padding_free=False)(**inputs).last_hidden_state
    assert (packed[~present] == 0).all() and torch.equal(packed[present], padded[present])
    assert (padded[~present] != 0).all()


@pytest.mark.parametrize("architecture", [BertForQuestionAnswering, RobertaForQuestionAnswering])
def test_question_answering_whose_loss_reads_padding_computes_it(architecture):
    model = fastft.optimize(build(architecture, num_labels=2).eval())
    assert "padding:" not in str(fastft.report(model))
    inputs, positions = with_mask(UNEVEN), torch.zeros(len(UNEVEN), dtype=torch.int64)
    inputs = {"start_positions": positions, "end_positions": positions, **inputs}
    del inputs["labels"]
    found = model(**inputs).loss
    assert torch.equal(found, fastft.optimize(model, padding_free=False)(**inputs).loss)


def test_who_asks_for_hidden_states_gets_them_all():
    model, inputs = build().eval(), with_mask(UNEVEN)
    found = fastft.optimize(model)(**inputs, output_hidden_states=True).hidden_states
    expected = fastft.optimize(model, padding_free=False, cls_only=False)(**inputs, output_hidden_states=True)
    assert len(found) == 3
    for left, right in zip(found, expected.hidden_states, strict=True):
        assert left.shape == (len(UNEVEN), LENGTH, CONFIG["hidden_size"]) and torch.equal(left, right)


@pytest.mark.parametrize("where", ["bert", "bert.encoder", "bert.encoder.layer.0", "bert.pooler"])
def test_who_hooks_a_module_sees_what_it_would_of_stock(where):
    model, inputs, seen = fastft.optimize(build().eval()), with_mask(UNEVEN), []

    def hook(module, args, kwargs, output):
        first = next(iter(output.values())) if isinstance(output, dict) else output
        seen.extend([args[0].shape if args else None, first.shape])

    model.get_submodule(where).register_forward_hook(hook, with_kwargs=True)
    model(**inputs)
    assert torch.Size([len(UNEVEN), 1, CONFIG["hidden_size"]]) not in seen
    if where == "bert.encoder.layer.0":
        assert seen == [torch.Size([len(UNEVEN), LENGTH, CONFIG["hidden_size"]])] * 2


def test_options_are_checked_and_forgotten_by_restore():
    with pytest.raises(ValueError, match="cls_only is True, but BertModel has no head that reads first tokens only"):
        fastft.optimize(build(BertModel), cls_only=True)
    with pytest.raises(ValueError, match="cls_only is 'yes', must be one of 'auto', True, False"):
        fastft.optimize(build(), cls_only="yes")
    with pytest.raises(ValueError, match="padding_free is 'no', must be True or False"):
        fastft.optimize(build(), padding_free="no")
    model = fastft.optimize(build().train(), padding_free=False, cls_only=False)
    assert "padding" not in str(fastft.report(model))
    fastft.optimize(fastft.restore(model), cls_only=True)
    assert rows_of(model, with_mask(UNEVEN))[-1] == (len(UNEVEN),) * 2


def test_the_report_tells_what_is_left_out():
    notes = fastft.report(fastft.optimize(build())).notes
    assert [note.partition(":")[0] for note in notes] == ["first tokens only", "padding"]
    assert fastft.report(build()).notes == ()


def test_dropout_differs_between_layers_and_steps_and_repeats_with_the_seed():
    model, inputs = fastft.optimize(build(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train()), batch()

    def loss(seed):
        torch.manual_seed(seed)
        return model(**inputs).loss, model(**inputs).loss

    first, again, other = loss(1), loss(1), loss(2)
    assert first == again and first[0] != first[1] and first[0] != other[0]


def test_a_mask_with_lengths_says_without_looking_whether_all_are_there():
    mask = torch.tensor(UNEVEN)
    assert not with_lengths(mask, [11, 3, 7, 1]).to(torch.bool).all()
    assert with_lengths(torch.ones_like(mask), [LENGTH] * 4).bool().all()
    with pytest.raises(RuntimeError, match="the attention mask has other lengths than it came with"):
        with_lengths(mask, [LENGTH] * 4).all()
