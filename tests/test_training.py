"""finetune from texts to folder, on a tiny BERT with random weights and words that decide the label."""

import errno
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn import metrics as sklearn_metrics
from sklearn.utils.class_weight import compute_class_weight
from tiny import make_checkpoint, make_reviews
from transformers import AutoConfig, AutoTokenizer, BatchEncoding, BertConfig, BertModel, Trainer, TrainingArguments

import fastft
from fastft.functional._choice import use_backend
from fastft.training import data, files, tokens, trainer
from fastft.training.classifier import TextClassifierConfig
from fastft.training.waiting import waiting

REVIEWS = make_reviews(300, seed=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def train(model, output, reviews=REVIEWS, **options):
    options = {"epochs": 2, "learning_rate": 3e-3, "batch_size": 16, "quiet": True, **options}
    with use_backend("fastft"):  # nothing may fall back quietly
        return fastft.finetune(reviews, model, output, **options)


@pytest.fixture(scope="module", params=[True, False], ids=["stock", "fastft"])
def result(request, model, tmp_path_factory):
    return train(model, tmp_path_factory.mktemp("run") / "output", stock=request.param)


# ---- the run


def test_learns_and_keeps_the_history(result):
    first, last = result.history
    assert last["loss"] < first["loss"] and last["validation_accuracy"] > 0.9
    assert len(result.step_losses) == 2 * -(-270 // 16)


def test_epoch_loss_is_the_mean_over_examples(result):
    steps = result.step_losses[: len(result.step_losses) // 2]
    sizes = [16] * (270 // 16) + [270 % 16]
    assert result.history[0]["loss"] == pytest.approx(np.average(steps, weights=sizes))


def test_folder_holds_what_the_result_says(result):
    names = {path.name for path in result.output.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "preprocessing.json", "run.json"} <= names
    assert {"learning_curves.png", "confusion_matrix.png"} <= names
    assert len({path.stat().st_mode for path in result.output.iterdir()}) == 1, "who may read one may read all"
    assert not [name for name in names if name.startswith(".")], "something unfinished was left"
    assert json.loads((result.output / "metrics.json").read_text()) == result.metrics
    assert [json.loads(line) for line in (result.output / "history.jsonl").open()] == result.history
    record = json.loads((result.output / "run.json").read_text())
    assert record["options"]["learning_rate"] == 3e-3 and record["data"]["validation"]["examples"] == 30
    assert record["epoch"] == result.epoch == 2 and record["preprocessing"]["duplicates"] == 0
    assert (record["kernels"] is None) == record["options"]["stock"]


def test_pipeline_gives_the_same_classes_in_a_process_without_fastft(result):
    _, held_out = data.split(data.load(REVIEWS), 0.1, seed=0)
    program = (
        "import json, sys; sys.modules['fastft'] = None\n"
        "from transformers import pipeline\n"
        "classify = pipeline('text-classification', sys.argv[1])\n"
        "print(json.dumps([row['label'] for row in classify(json.load(sys.stdin))]))"
    )
    command = [sys.executable, "-c", program, str(result.output)]
    done = subprocess.run(command, input=json.dumps(held_out.texts), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [result.labels[index] for index in result.predictions]


def test_labels_are_saved_by_name_under_the_class_of_transformers(result):
    config = json.loads((result.output / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert config["label2id"] == {"negative": 0, "positive": 1}


def test_prints_facts_epochs_and_scores(result):
    said = ("270 examples to train on, 30 to validate", "negative (135), positive (135)", "accuracy", "f1", "weighted")
    for expected in (
        *said,
        "duplicates, left out: 0",
        "0 texts cut to 64",
        "of the tokens are padding",
        "predicted as",
    ):
        assert expected in str(result)


def test_metrics_are_those_of_the_predictions(result):
    _, held_out = data.split(data.load(REVIEWS), 0.1, seed=0)
    targets = [result.labels.index(label) for label in held_out.labels]
    assert result.metrics["accuracy"] == sklearn_metrics.accuracy_score(targets, result.predictions)
    assert result.metrics["f1"] == sklearn_metrics.f1_score(targets, result.predictions, average="macro")
    assert result.metrics["accuracy"] == result.history[-1]["validation_accuracy"]


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "fastft"])
def test_same_seed_gives_the_same_bits(model, tmp_path, stock):
    files = []
    for index, seed in enumerate((1, 1, 2)):
        torch.rand(index), random.random()  # whatever was drawn before does not matter
        output = train(model, tmp_path / str(index), seed=seed, epochs=1, stock=stock).output
        files.append((output / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


@pytest.mark.parametrize(
    "options",
    [
        {"head": "cls"},
        {"dtype": "bfloat16"},
        {"schedule": "cosine", "clip": 0},
        {"class_weights": "balanced", "label_smoothing": 0.1},
    ],
    ids=str,
)
def test_variants_learn(model, tmp_path, options):
    assert train(model, tmp_path / "output", **options).metrics["accuracy"] > 0.9


def test_constant_schedule_keeps_the_learning_rate(model, tmp_path):
    history = train(model, tmp_path / "output", schedule="constant", stock=True).history
    assert [record["learning_rate"] for record in history] == [3e-3, 3e-3]


def test_validation_data_is_used_whole(model, tmp_path):
    held_out = make_reviews(40, seed=1)
    run = train(model, tmp_path / "output", validation=held_out, epochs=1, stock=True)
    assert len(run.predictions) == 40 and "300 examples to train on, 40 to validate" in str(run)


def test_dropout_reaches_every_probability(model, tmp_path):
    output = train(model, tmp_path / "output", dropout=np.float32(0.25), epochs=np.int64(1), stock=True).output
    config = AutoConfig.from_pretrained(output)
    assert [config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.classifier_dropout] == [0.25] * 3


def test_progress_is_plain_text_in_a_pipe(model, tmp_path, capsys):
    train(model, tmp_path / "output", quiet=False, stock=True)
    lines = capsys.readouterr().out.splitlines()
    epochs = [line for line in lines if line.startswith("Epoch")]
    assert [line[:9] for line in epochs] == ["Epoch 1/2", "Epoch 2/2"]
    assert all("loss" in line and "accuracy" in line and "\x1b" not in line for line in epochs)
    assert sum(line.lstrip().startswith("validation") for line in lines) == 2


@pytest.mark.parametrize("total", [None, 2])
def test_who_waits_at_a_terminal_is_told_for_what(monkeypatch, capsys, total):
    for terminal, quiet in ((True, False), (True, True), (False, False)):
        monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))
        with waiting("reading", total, quiet) as advance:
            advance()
        shown = capsys.readouterr()
        assert ("reading" in shown.err) is (terminal and not quiet) and shown.out == ""


def test_quiet_prints_nothing(model, tmp_path, capfd):
    train(model, tmp_path / "output", epochs=1, stock=True)
    assert capfd.readouterr() == ("", "")


# ---- losses, penalties, early stopping


def test_balanced_weights_are_those_of_scikit_learn():
    labels = ["a"] * 5 + ["b"] * 2 + ["c"] * 13
    counts = data.load((["text"] * len(labels), labels)).counts()
    assert trainer.balanced(counts) == list(compute_class_weight("balanced", classes=np.array(list(counts)), y=labels))


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "fastft"])
def test_loss_has_weights_and_smoothing(stock):
    options = {"stock": stock, "class_weights": "balanced", "label_smoothing": 0.2}
    loss = trainer.criterion(options, {"a": 1, "b": 3}, torch.device("cpu"))
    logits, targets = torch.tensor([[0.3, -1.0], [2.0, 0.5], [0.0, 1.0]]), torch.tensor([0, 1, 1])
    expected = torch.nn.functional.cross_entropy(logits, targets, torch.tensor([2, 2 / 3]), label_smoothing=0.2)
    assert loss(logits, targets) == expected
    neutral = {"stock": stock, "class_weights": None, "label_smoothing": 0}
    assert trainer.criterion(neutral, {"a": 1, "b": 3}, torch.device("cpu")) is None


def test_l1_is_a_proximal_step_on_weights_only():
    layer = torch.nn.Linear(2, 2)
    penalty = trainer.L1(0.5, layer, Trainer(layer, TrainingArguments(report_to="none", use_cpu=True)))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0], [0.04, -0.06]]))
        layer.bias.fill_(0.01)
    penalty.on_optimizer_step(None, None, None, torch.optim.SGD([layer.weight], lr=0.1))
    expected = torch.tensor([[1.0, -1.0], [0.04, -0.06]]).sign() * torch.tensor([[0.95, 0.95], [0, 0.01]])
    assert (layer.weight - expected).abs().max() <= torch.finfo(torch.float32).eps and layer.weight[1, 0] == 0
    assert (layer.bias == 0.01).all() and penalty.zeros() == 0.25


def test_l1_makes_weights_zero_and_says_how_many(model, tmp_path):
    run = train(model, tmp_path / "output", l1=2.0, epochs=1, stock=True)
    weights = load_file(run.output / "model.safetensors")
    decayed = {name: weight for name, weight in weights.items() if "LayerNorm" not in name and "bias" not in name}
    share = sum(int((w == 0).sum()) for w in decayed.values()) / sum(w.numel() for w in decayed.values())
    assert share > 0.05 and f"{share:.1%} of the weights are zero" in str(run)


def test_patience_stops_early_and_keeps_the_best_epoch(model, tmp_path):
    options = {"epochs": 12, "patience": 2, "learning_rate": 1e-2, "weight_decay": 0.0, "stock": True}
    run = train(model, tmp_path / "output", **options)
    losses = [record["validation_loss"] for record in run.history]
    assert run.epoch == 1 + losses.index(min(losses)) == len(losses) - 2 < 10
    assert run.metrics["loss"] == min(losses)
    assert run.metrics["accuracy"] == run.history[run.epoch - 1]["validation_accuracy"]
    found = fastft.evaluate(run.output, validation_part(), quiet=True)
    assert (found.predictions == run.predictions).all()


def validation_part():
    _, held_out = data.split(data.load(REVIEWS), 0.1, seed=0)
    return held_out.texts, held_out.labels


def test_texts_are_cleaned_before_the_split_and_lower_cased_on_demand(model, tmp_path):
    texts, labels = REVIEWS
    run = train(
        model, tmp_path / "output", ([*texts, f"<p>{texts[0].upper()}</p>"], [*labels, labels[0]]), lower_case=True
    )
    assert "duplicates, left out: 1" in str(run) and len(run.predictions) == 30
    assert json.loads((run.output / "preprocessing.json").read_text())["lower_case"] is True


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "finetune: epochs=0; a whole number from 1 is needed"),
        ({"epochs": 1.5}, "finetune: epochs=1.5 is a float; a whole number from 1 is needed"),
        ({"batch_size": True}, "finetune: batch_size=True is a bool"),
        ({"learning_rate": float("nan")}, "finetune: learning_rate=nan; a number above 0"),
        ({"dropout": 1.0}, "finetune: dropout=1.0; None or a probability"),
        ({"warmup": 6}, "finetune: warmup=6; a share of the steps"),
        ({"validation_share": 0}, "finetune: validation_share=0; a number between 0 and 1"),
        ({"seed": -1}, "finetune: seed=-1; a whole number from 0 to 4294967295"),
        ({"head": "mean"}, "finetune: head='mean' is none of pooler, cls"),
        ({"schedule": "step"}, "finetune: schedule='step' is none of linear, cosine, constant"),
        ({"l1": -1}, "finetune: l1=-1; a number from 0 is needed"),
        ({"label_smoothing": 1}, "finetune: label_smoothing=1; a number from 0 to below 1 is needed"),
        ({"patience": 0}, "finetune: patience=0; None or a whole number from 1 is needed"),
        ({"class_weights": "inverse"}, "finetune: class_weights='inverse' is none of None, balanced"),
        ({"dtype": "float16"}, "finetune: dtype='float16' is none of auto, float32, bfloat16"),
        ({"text": "review"}, "data: text='review' names a column of a file, but this is none"),
        ({"reviews": 7}, "data is a int; a path or a pair (texts, labels) is needed"),
        ({"reviews": (["a"], [])}, "data: 1 texts, but 0 labels"),
        ({"reviews": ([], [])}, "data: there are no examples in it"),
        ({"reviews": (["a", 5], [0, 1])}, "data, row 1: the text is 5 (int), not a string"),
        ({"reviews": (["a", "b"], [0, None])}, "data, row 1: the label is missing"),
        ({"reviews": (["a", "b"], ["x", " "])}, "data, row 1: the label is missing"),
        (
            {"reviews": (["a", "b"], [0, 0.5])},
            "data, row 1: the label is 0.5 (float), not a string, integer or boolean",
        ),
        ({"reviews": (["a", "b"], [1, 1])}, "data: every label is '1', two different ones are needed"),
        ({"reviews": (["a", "b", "c"], [0, 0, 1])}, "data: the label '1' has one example"),
        (
            {"reviews": (list("abcdefghij"), [0, 1] * 5)},
            "validation_share=0.1 puts 1 of 10 examples aside, but each part",
        ),
        ({"validation": (["a"], ["mixed"])}, "validation, row 0: the label 'mixed' is none that the training data has"),
        ({"validation": "nowhere.csv"}, "nowhere.csv does not exist"),
        ({"model": "/no/such/model"}, "model='/no/such/model' cannot be loaded: "),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_refuses_in_one_sentence(model, tmp_path, options, message):
    with pytest.raises((ValueError, TypeError, OSError)) as caught:
        train(**{"model": model, "output": tmp_path / "output", **options})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_refuses_a_folder_that_is_not_empty(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty: name another folder or pass overwrite=True"):
        train(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    train(model, tmp_path, epochs=1, stock=True, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(FileExistsError, match="is a file, not a folder"):
        train(model, tmp_path / "notes.txt")


def test_refuses_the_folder_of_the_model_as_output(model):
    with pytest.raises(ValueError, match="is the folder of the model itself"):
        train(model, model, overwrite=True)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda old: b"{"),
        ("config.json", lambda old: b"[]"),
        ("model.safetensors", lambda old: old[: len(old) // 2]),
        ("model.safetensors", lambda old: b""),
        ("tokenizer.json", lambda old: old[: len(old) // 2]),
    ],
)
def test_damaged_model_folder_is_one_sentence(model, tmp_path, name, change):
    damaged = shutil.copytree(model, tmp_path / "model")
    (damaged / name).write_bytes(change((damaged / name).read_bytes()))
    with pytest.raises(ValueError) as caught:
        train(damaged, tmp_path / "output")
    assert str(caught.value).startswith(f"model='{damaged}' cannot be loaded: ") and "\n" not in str(caught.value)
    assert not (tmp_path / "output").exists()


def test_code_of_a_checkpoint_is_never_run(model, tmp_path):
    foreign = shutil.copytree(model, tmp_path / "model")
    config = json.loads((foreign / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (foreign / "config.json").write_text(json.dumps(config))
    (foreign / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(ValueError, match="cannot be loaded: "):
        train(foreign, tmp_path / "output")
    assert not (tmp_path / "ran").exists()


def test_refuses_a_checkpoint_without_all_of_its_encoder(model, tmp_path):
    config = BertConfig.from_pretrained(model)
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "short")
    BertModel(config).save_pretrained(tmp_path / "short")
    config.num_hidden_layers += 1
    config.save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match=r"lacks 16 weights of the encoder .* the first is bert\.encoder\.layer\.2"):
        train(tmp_path / "short", tmp_path / "output")


def test_diverging_loss_is_an_error(model, tmp_path):
    with pytest.raises(FloatingPointError, match="the training loss became nan in epoch 1: lower learning_rate"):
        train(model, tmp_path / "output", learning_rate=1e30, clip=0, stock=True)


def test_takes_a_classifier_of_another_number_of_classes(model, tmp_path):
    first = train(model, tmp_path / "two", epochs=1, stock=True).output
    texts, labels = REVIEWS
    three = ["even" if index % 3 == 0 else label for index, label in enumerate(labels)]
    assert train(first, tmp_path / "three", (texts, three), epochs=1, stock=True).labels == [
        "even",
        *sorted(set(labels)),
    ]


# ---- tokens


def test_long_texts_are_cut_and_counted(model):
    tokenizer, config = AutoTokenizer.from_pretrained(model), AutoConfig.from_pretrained(model)
    length = tokens.longest_row(tokenizer, config, 256)
    assert length == config.max_position_embeddings
    tokenizer.model_max_length = 10**30  # what a tokenizer says that does not know
    for known in (config, TextClassifierConfig(encoder=config)):
        assert tokens.longest_row(tokenizer, known, 256) == length
    texts = ["good " * words for words in (1, length - 3, length - 2, length - 1, 5000)]
    encoded = tokens.encode(tokenizer, texts, [0, 1, 0, 1, 0], length)
    assert encoded.lengths() == [3, length - 1, length, length, length] and encoded.cut == 2

    def written_in_python(*given, **how):  # and tells nothing but tokens
        return BatchEncoding(dict(tokenizer(*given, **how)))

    assert tokens.encode(written_in_python, texts, [0] * 5, length).cut == 2
    assert [encoded[row]["labels"] for row in range(5)] == [0, 1, 0, 1, 0]


def test_tokens_are_those_of_the_tokenizer_in_one_go(model, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK", 2)
    tokenizer, texts = AutoTokenizer.from_pretrained(model), ["good", "a dull film", "", "fine and nice", "bad " * 90]
    encoded, whole = tokens.encode(tokenizer, texts, range(5), 20), tokenizer(texts, truncation=True, max_length=20)
    assert [encoded[row]["input_ids"] for row in range(5)] == whole["input_ids"] and encoded.cut == 1
    batch = tokens.collator(tokenizer)([encoded[row] for row in (1, 3, 4)])
    expected = tokenizer(texts[1:2] + texts[3:], truncation=True, max_length=20, padding=True, return_tensors="pt")
    assert set(batch) == {*expected, "labels"} and batch["labels"].tolist() == [1, 3, 4]
    assert all(torch.equal(batch[name], values) for name, values in expected.items())


def test_batches_depend_on_seed_and_epoch_only():
    lengths = random.Random(0).choices(range(5, 60), k=500)

    def epoch(seed, number):
        torch.rand(3)
        sampler = tokens.LengthGroupedSampler(lengths, batch_size=8, seed=seed)
        sampler.set_epoch(number)
        return list(sampler)

    first = epoch(0, 0)
    assert sorted(first) == list(range(500)) and first == epoch(0, 0)
    assert first != epoch(0, 1) and first != epoch(1, 0)
    batches = [[lengths[row] for row in first[start : start + 8]] for start in range(0, 500, 8)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    assert padded < 1.1 * sum(lengths), "rows of a batch are of similar length"


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    def half(path, content, **options):
        path.write_bytes(content[: len(content) // 2].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    files.write_json(tmp_path / "a.json", {"epoch": 1})
    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(tmp_path / "a.json", {"epoch": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"epoch": 1}
