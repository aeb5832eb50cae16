"""Small models of every architecture, a batch for them, and one training step: what the tests of the swap share."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertForSequenceClassification,
    ElectraForSequenceClassification,
    RobertaForSequenceClassification,
)

import fastft

CONFIG = {
    "vocab_size": 101,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 112,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
ARCHITECTURES = (
    *(BertModel, BertForSequenceClassification, fastft.TextClassifier),
    *(RobertaForSequenceClassification, ElectraForSequenceClassification, DistilBertForSequenceClassification),
)
DISTILBERT_S_NAMES = {
    "intermediate_size": "hidden_dim",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "hidden_act": "activation",
}
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def build(architecture=BertForSequenceClassification, seed=0, **changes):
    torch.manual_seed(seed)
    options, config = {**CONFIG, **changes}, BertConfig
    if architecture is not fastft.TextClassifier:
        config = architecture.config_class
    if architecture is DistilBertForSequenceClassification:
        options = {DISTILBERT_S_NAMES.get(key, key): value for key, value in options.items()} | {
            "seq_classif_dropout": 0.0
        }
    model = architecture(config(**options))
    for name, parameter in model.named_parameters():  # biases start at zero: a bias left out would not be seen
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def batch(seed=0, rows=6, length=11):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(min(2, length), length + 1, (rows, 1), generator=generator)
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
        present = inputs["attention_mask"][:, :, None]  # hidden states of padding are nobody's business
        results = {"hidden": output.last_hidden_state * present, "pooled": output.pooler_output}
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(result.shape, generator=generator) for result in results.values()]
        loss = sum((w.to(result) * result).sum() for w, result in zip(weights, results.values(), strict=True))
    else:
        output = model(**inputs)
        results, loss = {"logits": output.logits, "loss": output.loss}, output.loss
    loss.backward()
    grads = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: result.detach() for name, result in (results | grads).items()}


def distance(left, right):
    """Root mean square of the differences of two state_dicts."""
    assert left.keys() == right.keys()
    squares = [(left[name].double() - right[name].double()).square().flatten() for name in left]
    return float(torch.cat(squares).mean().sqrt())


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}
