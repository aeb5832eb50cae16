"""TextClassifier: transformers' conventions around any encoder, and no random weights where a checkpoint has none."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    DistilBertConfig,
    ElectraConfig,
    RobertaConfig,
    pipeline,
)

import fastft
from fastft import TextClassifier
from fastft.training.classifier import TextClassifierConfig

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
NAMES = {0: "bad", 1: "fine", 2: "good"}
LABELLED = {"id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()}}
INPUT = torch.randint(1, 40, (5, 7), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 1, 0])


def bert(**changes):
    return BertConfig(**SMALL, **changes)


@pytest.fixture
def checkpoint(tmp_path):
    """The folder of a pre-trained encoder."""
    torch.manual_seed(0)
    BertModel(bert()).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_the_head_is_linear_on_the_dropped_out_first_row():
    model = TextClassifier(bert(num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    torch.manual_seed(1)
    model.dropout.p = 0.5
    found = model(INPUT, labels=LABELS)
    torch.manual_seed(1)
    hidden = model.encoder(INPUT).last_hidden_state[:, 0]
    logits = model.classifier(torch.nn.functional.dropout(hidden, 0.5))
    assert torch.equal(found.logits, logits)
    assert torch.equal(found.loss, torch.nn.functional.cross_entropy(logits, LABELS))
    assert found.hidden_states is None and list(found) == ["loss", "logits"]


def test_every_parameter_gets_a_gradient():
    model = TextClassifier(bert(num_labels=3))
    model(INPUT, labels=LABELS).loss.backward()
    assert model.encoder.pooler is None
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", [AlbertConfig, BertConfig, DistilBertConfig, ElectraConfig, RobertaConfig])
def test_any_encoder_will_do(kind):
    config = kind(**SMALL, num_labels=3, max_position_embeddings=20)
    model = fastft.optimize(TextClassifier(config).eval())
    assert model(INPUT, torch.ones_like(INPUT), labels=LABELS).logits.shape == (5, 3)
    assert model(inputs_embeds=torch.randn(2, 4, model.get_input_embeddings().embedding_dim)).logits.shape == (2, 3)
    assert len(model(INPUT, output_hidden_states=True).hidden_states) == 3


def test_outputs_that_the_configuration_asks_for_are_returned():
    model = TextClassifier(TextClassifierConfig(bert(), output_hidden_states=True))
    assert len(model(INPUT).hidden_states) == 3
    assert model(INPUT, output_hidden_states=False).hidden_states is None
    assert len(TextClassifier(bert(output_hidden_states=True))(INPUT).hidden_states) == 3


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"classifier_dropout": 0.4}, 0.4),
        ({"classifier_dropout": 0.0}, 0.0),
        ({"encoder": bert(classifier_dropout=0.3)}, 0.3),
        ({"encoder": bert(hidden_dropout_prob=0.2)}, 0.2),
        ({"encoder": DistilBertConfig(dim=32, n_heads=2, n_layers=1, seq_classif_dropout=0.25)}, 0.25),
    ],
    ids=["given", "none", "the encoder's head", "the encoder's", "under another name"],
)
def test_dropout_is_the_configuration_s_or_the_encoder_s(options, expected):
    assert TextClassifier(TextClassifierConfig(**{"encoder": bert(), **options})).dropout.p == expected


# ---- folders


@pytest.mark.parametrize("load", [TextClassifier, AutoModelForSequenceClassification])
@pytest.mark.parametrize("optimized", [False, True])
def test_a_saved_folder_loads_as_it_was(load, optimized, tmp_path):
    config = TextClassifierConfig(bert(), classifier_dropout=0.3, **LABELLED)
    model = TextClassifier(config).eval()
    (fastft.optimize(model) if optimized else model).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "fastft_text_classifier" and saved["architectures"] == ["TextClassifier"]
    assert saved["encoder"]["model_type"] == "bert"
    loaded = load.from_pretrained(tmp_path)
    assert type(loaded) is TextClassifier and type(loaded.config.encoder) is BertConfig
    assert loaded.config.id2label == NAMES and loaded.num_labels == 3 and loaded.dropout.p == 0.3
    assert torch.equal(loaded(INPUT).logits, fastft.restore(model)(INPUT).logits)
    assert type(AutoConfig.from_pretrained(tmp_path)) is TextClassifierConfig


def test_a_saved_folder_works_in_transformers_pipeline(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    TextClassifier(bert(**LABELLED)).save_pretrained(tmp_path)
    (scores,) = pipeline("text-classification", str(tmp_path), top_k=None)(["good film"])
    assert {score["label"] for score in scores} == set(NAMES.values())


def test_fields_of_the_configuration_can_be_changed_while_loading(tmp_path):
    TextClassifier(bert()).save_pretrained(tmp_path)
    model = TextClassifier.from_pretrained(tmp_path, classifier_dropout=0.5, attn_implementation="eager")
    assert model.dropout.p == 0.5
    assert len(model(INPUT, output_attentions=True).attentions) == 2


# ---- other checkpoints


def test_the_encoder_of_another_checkpoint_is_taken_and_the_head_is_new(checkpoint):
    model, info = TextClassifier.from_pretrained(checkpoint, num_labels=3, output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"} and not info["mismatched_keys"]
    saved = load_file(checkpoint / "model.safetensors")
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, saved[name]), name
    assert model.classifier.weight.abs().sum() > 0 and not model.training
    assert model(INPUT, labels=LABELS).logits.shape == (5, 3)
    assert model.name_or_path == model.config.name_or_path == str(checkpoint)


def test_the_encoder_of_a_sequence_classifier_is_found(tmp_path):
    stock = BertForSequenceClassification(bert(**LABELLED))
    stock.save_pretrained(tmp_path)
    model = TextClassifier.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.config.id2label == NAMES
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} == {model.config.dtype}
    assert torch.equal(
        model.encoder.get_input_embeddings().weight, stock.get_input_embeddings().weight.to(torch.bfloat16)
    )


@pytest.mark.parametrize("whole", [True, False])
def test_a_given_configuration_is_used_and_not_changed(whole, checkpoint):
    config = bert(**LABELLED, problem_type="single_label_classification")
    config = TextClassifierConfig(config) if whole else config
    before = config.to_dict()
    model = TextClassifier.from_pretrained(checkpoint, config=config)
    assert model.config.id2label == NAMES and model.config.problem_type == "single_label_classification"
    assert config.to_dict() == before


def test_labels_of_the_whole_configuration_win_over_the_encoder_s():
    config = TextClassifierConfig(bert(num_labels=5), num_labels=3)
    assert config.num_labels == 3 and TextClassifier(config).classifier.out_features == 3
    assert TextClassifierConfig(bert(num_labels=5)).num_labels == 5
    assert TextClassifierConfig().num_labels == 2 and TextClassifierConfig().encoder.model_type == "bert"


def damage(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _forget(weights):
    for name in list(weights):
        if "layer.1.output.dense" in name:
            del weights[name]


def _shrink(weights):
    for name in list(weights):
        if "layer.1.output.dense" in name:
            weights[name] = weights[name][:-1].clone()


@pytest.mark.parametrize("change", [_forget, _shrink])
@pytest.mark.parametrize("own", [False, True])
def test_missing_weights_of_the_encoder_are_named(change, own, checkpoint, tmp_path):
    folder, prefix = checkpoint, ""
    if own:
        folder, prefix = tmp_path / "own", "encoder."
        TextClassifier(bert()).save_pretrained(folder)
    damage(folder, change)
    with pytest.raises(ValueError, match="lacks weights of the encoder") as raised:
        TextClassifier.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert str(raised.value) == (
        f"TextClassifier: {str(folder)!r} lacks weights of the encoder, 2 in number: "
        f"{prefix}encoder.layer.1.output.dense.bias, {prefix}encoder.layer.1.output.dense.weight"
    )


def test_a_head_of_other_size_may_be_replaced(tmp_path):
    TextClassifier(bert(num_labels=5)).save_pretrained(tmp_path)
    model, info = TextClassifier.from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert model.classifier.out_features == 3
    assert {key for key, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
