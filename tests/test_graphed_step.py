"""fastft.GraphedStep, with a stand-in for CUDA's graphs (graphs.py)."""

import copy
import itertools

import graphs
import pytest
import small_models
import torch
from transformers import BertConfig, BertForTokenClassification

import fastft
from fastft.models import encoder
from fastft.models.mask import with_lengths
from fastft.testing import error

LR = 2.0**-10  # as float32, which replays read, and float64 have it


@pytest.fixture
def packed(monkeypatch):
    """A GPU's way through the encoder, whose kernels that pack have a stand-in: the numbers of tokens that they got."""
    sizes = []

    def places(present, tokens):
        return torch.argsort(~present.flatten(), stable=True)[:tokens]

    def pack(padded, present, cu_seqlens, tokens):
        sizes.append(tokens)
        return padded.flatten(0, 1).index_select(0, places(present, tokens))

    def unpack(rows, cu_seqlens, shape):
        present = torch.arange(shape[1]) < cu_seqlens.diff()[:, None]
        return rows.new_zeros(shape).flatten(0, 1).index_copy(0, places(present, len(rows)), rows).view(shape)

    monkeypatch.setattr(encoder, "pack", pack)
    monkeypatch.setattr(encoder, "unpack", unpack)
    return sizes


@pytest.fixture
def captured(packed, monkeypatch):
    """The graphs that are captured."""
    return graphs.stand_in(monkeypatch)


def build(**changes):
    options = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 64}
    return fastft.optimize(small_models.build(**options | changes).train())


def adamw(model, lr=LR, **options):
    return fastft.optim.AdamW(model.parameters(), lr, max_grad_norm=0.1, fused=True, capturable=True, **options)


def batch(seed, lengths):
    """As the collator of fastft.finetune makes it."""
    made = small_models.batch(seed, len(lengths), max(lengths))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return made | {"input_ids": made["input_ids"] * mask, "attention_mask": with_lengths(mask, lengths)}


def assert_same(model, other):
    for (name, parameter), of_other in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, of_other), name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_steps_are_ordinary_steps_under_a_schedule(dtype, captured, packed):
    """To the bit, dropout included: batches that are a size by themselves."""
    models = [build(), build()]
    ours, theirs = map(adamw, models)
    schedules = [torch.optim.lr_scheduler.LambdaLR(of, lambda number: (number + 1) / 8) for of in (ours, theirs)]
    step = fastft.GraphedStep(models[0], ours, dtype=dtype)
    batches = [batch(seed, [32] * 4) for seed in range(6)]
    torch.manual_seed(1)
    losses = []
    for inputs, number in zip(batches, range(6), strict=True):
        losses.append(step(inputs))
        schedules[0].step()
        assert ours.param_groups[0]["lr"] == LR * (number + 2) / 8
    torch.manual_seed(1)
    for inputs, loss in zip(batches, losses, strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            expected = models[1](**inputs).loss
        expected.backward()
        theirs.step()
        theirs.zero_grad()
        schedules[1].step()
        assert torch.equal(loss, expected) and not loss.requires_grad
    assert_same(*models)
    assert step.captures == len(captured) == 1 and captured[0].replays == 5 and not packed
    assert all(parameter.grad is None for parameter in models[0].parameters())


UNEVEN = [[5, 31, 7], [30, 3, 2], [9, 20, 33], [7, 7, 32], [40, 12, 1], [31, 5, 6], [3, 9, 1], [32, 32, 32], [1, 2, 3]]


def test_batches_of_a_size_are_captured_when_they_come_again(captured, packed):
    """Lengths up to 32 and 64, tokens up to multiples of that: to the bit what runs where nothing is captured."""
    models = [build(), build()]
    optimizers = [adamw(model) for model in models]
    step = fastft.GraphedStep(models[0], optimizers[0])
    batches = [batch(seed, lengths) for seed, lengths in enumerate(UNEVEN * 2)]
    torch.manual_seed(1)
    losses = [step(inputs) for inputs in batches]
    replayed = list(packed)
    packed.clear()
    torch.manual_seed(1)
    for inputs, loss in zip(batches, losses, strict=True):
        assert torch.equal(fastft.GraphedStep(models[1], optimizers[1])(inputs), loss)
    assert_same(*models)
    # (rows, length, tokens): (4, 32, 64), (4, 64, 64), (3, 32, 96) and (4, 32, 32), the first for four of the batches
    expected = [64, 64, 64, 64, 64, 64, 32, None, 32]
    assert packed == [tokens for tokens in expected * 2 if tokens]
    assert sorted(replayed) == [32, 32, 64, 64, 64, 64]  # one as usual and one captured of each, without the whole one
    assert step.captures == 4 and sum(graph.replays for graph in captured) == len(batches) - 4


@pytest.mark.parametrize("kind", ["stock", "padded", "packed", "tokens"])
def test_loss_and_gradients_are_those_of_the_batch(kind, captured, packed):
    """What makes its size whole has no part in them."""
    stock = small_models.build(max_position_embeddings=64).train()
    if kind == "tokens":
        stock = BertForTokenClassification(BertConfig(**small_models.CONFIG | {"max_position_embeddings": 64})).train()
    ours = copy.deepcopy(stock)
    if kind != "stock":
        fastft.optimize(ours, padding_free=kind != "padded")

    class Keeping(torch.optim.SGD):
        """Changes nothing."""

        def step(self):
            with torch.no_grad():
                for name, parameter in ours.named_parameters():
                    if parameter.grad is not None:
                        kept.setdefault(f"grad {name}", torch.empty_like(parameter)).copy_(parameter.grad)

    kept = {}
    optimizer = Keeping(ours.parameters())
    optimizer.param_groups[0]["capturable"] = True
    step = fastft.GraphedStep(ours, optimizer)

    def inputs(seed):
        made = batch(seed, UNEVEN[seed % 2])
        if kind == "tokens":
            made["labels"] = torch.where(made["attention_mask"] != 0, made["input_ids"] % 3, -100)
        return made

    def of_stock(model, made):
        results = error.run_model(model, made)
        results.pop("logits")
        return results

    def evaluate(seed):
        loss = step(inputs(seed))
        made = {name: tensor.as_subclass(torch.Tensor) for name, tensor in inputs(seed).items()}
        results = {"loss": loss, **{name: grad.clone() for name, grad in kept.items()}}
        return results, of_stock(stock, made), of_stock(exact, made)

    exact = copy.deepcopy(stock).double()
    for seed in range(4):
        step(inputs(seed))
    assert step.captures == 1
    error.check(evaluate)
    assert step.captures == 1 and bool(packed) == (kind in ("packed", "tokens"))


def test_dropout_moves_on_between_replays(captured):
    model = build()
    step, inputs = fastft.GraphedStep(model, adamw(model, lr=0.0)), batch(0, UNEVEN[0])
    losses = [float(step(inputs)) for _ in range(6)]
    assert captured[0].replays == 5 and len(set(losses)) == 6


def test_replays_raise_the_version_of_what_they_change(captured):
    model = build()
    step, versions = fastft.GraphedStep(model, adamw(model)), []
    for _ in range(4):
        step(batch(0, UNEVEN[0]))
        versions.append([parameter._version for parameter in model.parameters()])
    assert captured[0].replays == 3
    for before, after in itertools.pairwise(versions):
        assert all(old < new for old, new in zip(before, after, strict=True))


def test_a_loss_is_not_overwritten_by_the_next(captured):
    model = build()
    step = fastft.GraphedStep(model, adamw(model))
    losses = [step(batch(seed, UNEVEN[0])) for seed in range(4)]
    assert len({float(loss) for loss in losses}) == 4


def _moved(model, optimizer):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


CHANGES = {
    "optimizer loaded": lambda model, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "without dropout": lambda model, optimizer: model.eval(),
    "frozen": lambda model, optimizer: model.bert.embeddings.requires_grad_(False),
    "moved": _moved,
    "another decay": lambda model, optimizer: optimizer.param_groups[0].update(weight_decay=0.3),
    "weights loaded": lambda model, optimizer: model.load_state_dict(small_models.build(seed=3, **LONGER).state_dict()),
}
LONGER = {"max_position_embeddings": 64}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_followed(change, captured):
    models = [build(), build()]
    optimizers = [adamw(model) for model in models]
    step, inputs = fastft.GraphedStep(models[0], optimizers[0]), batch(0, UNEVEN[0])

    def run(number, take_step):
        torch.manual_seed(1)
        for _ in range(3):
            take_step()
        CHANGES[change](models[number], optimizers[number])
        for _ in range(3):
            take_step()

    run(0, lambda: step(inputs))
    run(1, lambda: fastft.GraphedStep(models[1], optimizers[1])(inputs))
    assert_same(*models)
    assert step.captures == (1 if change == "weights loaded" else 2)


def test_options_are_judged(captured, monkeypatch):
    model = build()
    optimizer = adamw(model)
    cases = {
        "dtype is torch.float16, must be": {"dtype": torch.float16},
        "multiple is 0, must be at least 1": {"multiple": 0},
    }
    for sentence, options in cases.items():
        with pytest.raises(ValueError, match=sentence):
            fastft.GraphedStep(model, optimizer, **options)
    with pytest.raises(ValueError, match="AdamW counts its steps on the host: give it capturable=True"):
        fastft.GraphedStep(model, fastft.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="the loss of regression has no label that does not count"):
        fastft.GraphedStep(build(num_labels=1), optimizer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="a step of several processes cannot be captured"):
        fastft.GraphedStep(model, optimizer)


def test_a_model_on_the_cpu_is_refused():
    model = build()
    with pytest.raises(ValueError, match="the model is on cpu, graphs are of CUDA devices"):
        fastft.GraphedStep(model, adamw(model))


def test_batches_are_judged(captured):
    model, inputs = build(), batch(0, UNEVEN[0])
    step = fastft.GraphedStep(model, adamw(model))
    mask = inputs["attention_mask"].as_subclass(torch.Tensor)
    cases = {
        "labels are not there": {"labels": None},
        "labels are torch.float32": {"labels": inputs["labels"].float()},
        "the attention mask is on meta: leave it on the CPU, or hand its lengths over": {
            "attention_mask": mask.to("meta")
        },
        "is not one up to each length": {"attention_mask": mask.flip(1)},
        "sequence 1 has no token": {"attention_mask": mask * torch.tensor([[1], [0], [1]])},
        r"labels is \(2,\), input_ids are \(3, 31\)": {"labels": inputs["labels"][:2]},
    }
    step({**inputs, "attention_mask": mask})
    for sentence, changes in cases.items():
        with pytest.raises(ValueError, match=sentence):
            step({name: column for name, column in {**inputs, **changes}.items() if column is not None})
    step({name: column for name, column in inputs.items() if name != "attention_mask"})
    assert [key[:3] for key in step._sizes] == [(4, 32, 64), (4, 32, 96)]


def test_positions_bound_the_length(captured):
    model = build(max_position_embeddings=40)
    step = fastft.GraphedStep(model, adamw(model))
    step(batch(0, [33, 39]))
    assert [key[:3] for key in step._sizes] == [(3, 40, 80)]


def test_a_model_that_waits_is_told_what_to_do(captured):
    model = build()
    optimizer = adamw(model)
    step, inputs = fastft.GraphedStep(model, optimizer), batch(0, UNEVEN[0])
    model.classifier.register_forward_hook(lambda module, args, output: output.sum().item() and None)
    step(inputs)
    with pytest.raises(
        RuntimeError, match=r"must not wait for the GPU, as .*\(operation not .*: _local_scalar_dense\)"
    ):
        step(inputs)
    assert optimizer.param_groups[0]["lr"] == LR


def test_lack_of_memory_stays_what_it_is(captured, monkeypatch):
    """Which accelerate's batch finder looks for."""
    model = build()
    step, inputs = fastft.GraphedStep(model, adamw(model)), batch(0, UNEVEN[0])
    step(inputs)
    lacking = torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(model, "forward", lambda **kwargs: (_ for _ in ()).throw(lacking))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        step(inputs)
