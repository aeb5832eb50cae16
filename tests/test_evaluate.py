"""evaluate and predict, as functions and as commands: right numbers in the right order, and what is refused how."""

import csv
import errno
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from rich.cells import cell_len
from sklearn.metrics import accuracy_score, f1_score
from tiny import BAD, GOOD, OTHER, make_checkpoint, make_reviews
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from typer.testing import CliRunner

import fastft
from fastft.cli.main import app
from fastft.functional._choice import use_backend
from fastft.testing import error
from fastft.training import checkpoint, files, preprocess, trained
from fastft.training.classifier import TextClassifier
from fastft.training.predict import Predictions

CLASSES = 20


def texts_of(rows, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(GOOD + BAD + OTHER, k=draw.randint(1, 40))) for _ in range(rows)]


def save_classifier(folder, labels, model_class=AutoModelForSequenceClassification, seed=0):
    """A folder as transformers writes it, which fastft did not train; random weights."""
    config = AutoConfig.from_pretrained(make_checkpoint(folder))
    if labels is not None:
        config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    torch.manual_seed(seed)
    make = getattr(model_class, "from_config", model_class)
    model = make(config)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("foreign"), [f"class {index}" for index in range(CLASSES)])


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """What finetune leaves, of texts that needed cleaning; and the scores of its validation."""
    texts, labels = make_reviews(200, seed=0)
    reviews = ([f"<p>{text.title()}</p>" for text in texts], labels)
    output = tmp_path_factory.mktemp("run") / "output"
    options = {"epochs": 2, "learning_rate": 3e-3, "batch_size": 16, "lower_case": True, "stock": True, "quiet": True}
    fastft.finetune(reviews, make_checkpoint(tmp_path_factory.mktemp("model")), output, validation=reviews, **options)
    return output, reviews


def fastft_command(*arguments, input=None, **environment):
    result = CliRunner(env={"COLUMNS": "80", **environment}).invoke(app, [*map(str, arguments)], input=input)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# ---- numbers


PIPELINE = """
import json, sys
sys.modules["fastft"] = None
from transformers import pipeline
classify = pipeline("text-classification", sys.argv[1], top_k=None)
print(json.dumps(classify(json.load(sys.stdin), batch_size=32)))
"""


@pytest.fixture(scope="module")
def piped(foreign):
    """(texts, what transformers' pipeline says of them in a process that has no fastft)."""
    texts = texts_of(error.ENOUGH // CLASSES)
    command = [sys.executable, "-c", PIPELINE, str(foreign)]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return texts, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "fastft"])
def test_scores_are_those_of_the_pipeline_in_a_process_without_fastft(foreign, piped, stock):
    texts, rows = piped
    with use_backend("fastft"):  # nothing may fall back quietly
        found = fastft.predict(foreign, texts, top=CLASSES, stock=stock, quiet=True)
    model = AutoModelForSequenceClassification.from_pretrained(foreign, dtype=torch.float64)
    batch = AutoTokenizer.from_pretrained(foreign)(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        truth = model(**batch).logits.softmax(-1)
    names = [f"class {index}" for index in range(CLASSES)]

    def table(rows):
        return torch.tensor([[scores[name] for name in names] for scores in map(dict, rows)])

    theirs = table([(score["label"], score["score"]) for score in row] for row in rows)
    budget = error.Budget()
    budget.add({"scores": table(found.top)}, {"scores": theirs}, {"scores": truth})
    budget.check()
    assert all(scores == sorted(scores, reverse=True) for scores in ([s for _, s in row] for row in found.top))


def test_evaluation_repeats_what_training_said_of_its_validation(ours):
    folder, reviews = ours
    said = json.loads((folder / "metrics.json").read_text())
    found = fastft.evaluate(folder, reviews, quiet=True)
    assert found.metrics["accuracy"] > 0.9, "the tags and capitals that training cleaned away are gone here too"
    assert {**found.metrics, "loss": 0} == {**said, "loss": 0}


def test_metrics_are_those_of_the_predictions(ours):
    folder, _ = ours
    texts, labels = make_reviews(60, seed=1)
    labels = labels[30:] + labels[:30]
    found = fastft.evaluate(folder, (texts, labels), quiet=True)
    predicted = fastft.predict(folder, texts, quiet=True).labels
    assert [found.labels[index] for index in found.predictions] == predicted
    assert found.metrics["accuracy"] == accuracy_score(labels, predicted)
    assert found.metrics["f1"] == f1_score(labels, predicted, average="macro")
    assert found.as_dict()["examples"] == 60 and json.dumps(found.as_dict())
    for expected in ("60 examples from data", "accuracy", "negative", "weighted", "predicted as"):
        assert expected in str(found)


def test_results_come_in_the_order_of_the_texts(foreign, monkeypatch):
    texts = texts_of(50, seed=1)
    one_by_one = [fastft.predict(foreign, [text], quiet=True).labels[0] for text in texts[:5]]
    monkeypatch.setattr(trained, "WINDOW", 2)  # several windows of several batches
    found = fastft.predict(foreign, np.array(texts), batch_size=7, quiet=True)
    assert found.labels[:5] == one_by_one and list(found.texts) == texts
    assert found.labels[::-1] == fastft.predict(foreign, texts[::-1], batch_size=4, quiet=True).labels


def test_memory_holds_the_tokens_of_a_window_only(foreign, monkeypatch):
    from fastft.training import tokens

    sizes, encode = [], tokens.encode
    monkeypatch.setattr(tokens, "encode", lambda t, part, *rest: (sizes.append(len(part)), encode(t, part, *rest))[1])
    fastft.predict(foreign, texts_of(300), batch_size=2, quiet=True)
    assert sizes == [128, 128, 44]


def test_another_model_sees_texts_as_they_are(foreign):
    known = trained.describe(foreign)
    assert known.preprocessing is None and known.clean(["<b>A</b>"]) == (["<b>A</b>"], {})


@pytest.mark.parametrize(
    ("names", "labels", "indices"),
    [
        (["negative", "positive"], ["positive", "negative"], [1, 0]),
        (["NEGATIVE", "POSITIVE"], ["positive", "Negative"], [1, 0]),
        (["a", "A"], ["A", "a"], [1, 0]),
        (None, [1, 0, 1], [1, 0, 1]),  # LABEL_0, LABEL_1
        (["5", "6"], [6, 5], [1, 0]),  # names before indices
        (["1.0", "2.0"], ["2.0", "1"], [1, 0]),  # as integers
        (["0", "1"], ["1.0", "0.0"], [1, 0]),
    ],
)
def test_labels_are_names_or_else_indices(tmp_path, names, labels, indices):
    folder = save_classifier(tmp_path, names)
    found = fastft.evaluate(folder, (["good"] * len(labels), labels), quiet=True)
    matrix = np.array(found.metrics["confusion_matrix"])
    assert matrix.sum(axis=1).tolist() == [indices.count(0), indices.count(1)]
    assert ("labels" in found.facts) == (names is None)


def test_a_text_classifier_of_ours_is_taken(tmp_path):
    folder = save_classifier(tmp_path, ["x", "y"], TextClassifier)
    assert set(fastft.predict(folder, texts_of(8), quiet=True).labels) <= {"x", "y"}


def test_texts_are_cut_at_the_length_of_training(ours, tmp_path):
    folder = shutil.copytree(ours[0], tmp_path / "copy")
    files.write_json(folder / preprocess.FILE, preprocess.options(lower_case=True, max_length=8))
    long = ["good " * 30, "bad"]
    for options, cut, length in (({}, 1, 8), ({"max_length": 20}, 1, 20), ({"max_length": 500}, 0, 64)):
        found = fastft.evaluate(folder, (long, ["positive", "negative"]), quiet=True, **options)
        assert found.facts["tokens"] == f"{cut} texts cut to {length}"


def test_a_long_text_stays_within_the_positions_of_roberta(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=23, max_position_embeddings=16, pad_token_id=0, **sizes)
    tokenizer = AutoTokenizer.from_pretrained(make_checkpoint(tmp_path))
    tokenizer.model_max_length = 10**30  # what a tokenizer says that does not know
    tokenizer.save_pretrained(tmp_path)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    found = fastft.evaluate(tmp_path, (["good " * 100, "bad"], [0, 1]), quiet=True)
    assert found.facts["tokens"] == "1 texts cut to 15"


# ---- the commands


def test_predict_prints_a_json_object_per_text_into_a_pipe(foreign):
    texts = ["good film", 'a "quoted"\nline', "Grüße"]
    done = fastft_command("predict", foreign, *texts, "--top", 2)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["text"] for row in rows] == texts and "\x1b" not in done.output
    assert [row["label"] for row in rows] == fastft.predict(foreign, texts, quiet=True).labels
    assert all(row["top"][0] == {"label": row["label"], "score": row["score"]} for row in rows)


def test_predict_reads_lines_from_a_pipe(foreign):
    done = fastft_command("predict", foreign, input="good\r\n\nbad")
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == ["good", "", "bad"]


def test_predict_does_not_take_the_name_of_a_file_for_a_text(foreign, tmp_path):
    (tmp_path / "new.csv").write_text("text\ngood\n")
    done = fastft_command("predict", foreign, tmp_path / "new.csv")
    assert done.exit_code == 2
    assert (
        done.stderr
        == f"fastft: TEXT '{tmp_path}/new.csv' is a file: --file {tmp_path}/new.csv classifies the texts in it\n"
    )


def test_predict_writes_what_it_read_from_a_file(foreign, tmp_path):
    texts = ["good, film", 'a "quoted"\nline', "", "Grüße \ud83d"]
    (tmp_path / "new.jsonl").write_text("\n".join(json.dumps({"id": 1, "text": text}) for text in texts))
    for name in ("out.csv", "out.jsonl"):
        done = fastft_command(
            "predict", foreign, "--file", tmp_path / "new.jsonl", "--output", tmp_path / name, "--top", 2
        )
        assert done.stdout == f"4 predictions written to {tmp_path / name}\n"
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text(encoding="utf-8"))))
    assert list(rows[0]) == ["text", "label", "score", "label_2", "score_2"]
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").open(encoding="utf-8")]
    assert [row["text"] for row in rows] == [row["text"] for row in written] == [*texts[:3], "Grüße ?"]
    assert [float(row["score_2"]) for row in rows] == [row["top"][1]["score"] for row in written]


def test_predictions_print_as_lines_that_fit(foreign):
    found = fastft.predict(foreign, [*texts_of(30), "x" * 500], quiet=True)
    lines = str(found).splitlines()
    assert len(lines) == 21 and lines[-1] == "… and 11 more" and max(map(len, found.lines(60))) <= 60


def test_a_line_holds_nothing_that_a_terminal_obeys_and_counts_wide_characters():
    texts = ["\x1b[2Jgone \ud83d\u202e", "这家餐厅非常好吃" * 9, "\U0001f600" * 50]
    found = Predictions(texts, [[("\x1b[31mred", 0.5), ("北京", 0.25)]] * 3)
    lines = list(found.lines(40))
    assert max(map(cell_len, lines)) <= 40 and not any(set(line) & set("\x1b\ud83d\u202e") for line in lines)
    assert lines[0] == "[31mred 0.5000  北京    0.2500  [2Jgone"


def test_evaluate_prints_one_screen_and_writes_json(ours, tmp_path):
    folder, (texts, labels) = ours
    with (tmp_path / "test.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(
            [("id", "review", "stars"), *zip("ab" * 100, texts, labels, strict=True)]
        )
    arguments = ("evaluate", folder, tmp_path / "test.tsv", "--label", "stars")
    done = fastft_command(*arguments, "--json", tmp_path / "scores.json", NO_COLOR="1")
    assert done.exit_code == 0 and "\x1b" not in done.stdout
    assert "text column 'review', label column 'stars'" in done.stdout
    assert max(map(len, done.stdout.replace(str(tmp_path), "").replace(str(folder), "").splitlines())) <= 80
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["accuracy"] > 0.9 and scores["per_class"]["negative"]["support"] == 100
    printed = json.loads(fastft_command(*arguments, "--json", "-").stdout)
    assert printed["confusion_matrix"] == scores["confusion_matrix"]


# ---- what is refused, before torch is imported where it can be


def damage(folder, how):
    path = Path(folder)
    if how == "config":
        (path / "config.json").write_text('{"architectures": [')
    elif how == "list":
        (path / "config.json").write_text("[]")
    elif how == "labels":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "id2label": {"0": "a", "2": "b"}}))
    elif how == "regression":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "id2label": {"0": "LABEL_0"}}))
    elif how == "weights":
        (path / "model.safetensors").unlink()
    elif how == "truncated":
        content = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif how == "garbage":
        (path / "model.safetensors").write_bytes(b"no tensors at all")
    elif how == "tokenizer":
        (path / "tokenizer.json").write_text('{"version": ')
    elif how == "size":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))
    elif how == "layers":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    elif how == "encoder":
        BertModel(AutoConfig.from_pretrained(path)).save_pretrained(path)
    elif how == "preprocessing":
        (path / preprocess.FILE).write_text('{"version": 0}')
    elif how == "interrupted":
        (path / "config.json").unlink()
        (path / ".fastft").mkdir()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("config", "{}/config.json is damaged: JSONDecodeError: "),
        ("list", "{}/config.json is damaged: AttributeError: "),
        ("labels", "{}/config.json is damaged: KeyError: '1'"),
        ("regression", "{} does not choose one of several classes: its config.json says '1 class'"),
        ("weights", "{} holds no weights: model.safetensors or pytorch_model.bin is missing"),
        ("truncated", "{} cannot be loaded: SafetensorError: "),
        ("garbage", "{} cannot be loaded: SafetensorError: "),
        ("tokenizer", "{} cannot be loaded: "),
        ("size", "{} cannot be loaded: RuntimeError: "),
        ("layers", "{} lacks 16 weights of the model, the first is bert.encoder.layer.2."),
        ("encoder", "{} holds a BertModel, which is no text classifier: fine-tune it first"),
        ("preprocessing", "{}/preprocessing.json was not written by this version of fastft"),
        ("interrupted", "{} holds an interrupted run and no model yet: finish it with fastft finetune --resume"),
    ],
)
def test_a_damaged_folder_is_one_sentence(foreign, tmp_path, how, message):
    folder = shutil.copytree(foreign, tmp_path / "copy")
    damage(folder, how)
    done = fastft_command("predict", folder, "good film")
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith("fastft: " + message.format(folder)) and done.stderr.count("\n") == 1


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_weights_that_would_run_code_are_not_unpickled(foreign, tmp_path):
    folder = shutil.copytree(foreign, tmp_path / "copy")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert fastft.predict(folder, ["good"], quiet=True).labels == fastft.predict(foreign, ["good"], quiet=True).labels
    for save in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))):
        save({**model.state_dict(), "bomb": Bomb(tmp_path / "exploded")}, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="cannot be loaded: "):
            fastft.predict(folder, ["good"], quiet=True)
        with pytest.raises(ValueError, match="cannot be loaded: "):
            checkpoint.load_classifier(folder, "pooler", ["a", "b"], None)
    assert not (tmp_path / "exploded").exists()


def test_code_of_a_folder_is_not_run(foreign, tmp_path):
    folder = shutil.copytree(foreign, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": code}))
    with pytest.raises(ValueError, match="cannot be loaded: "):
        fastft.predict(folder, ["good"], quiet=True)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "nowhere", "x"], "nowhere does not exist: the folder of a trained model is needed"),
        (["predict", "a.csv", "x"], "a.csv is a file: the folder of a trained model is needed"),
        (["predict", ".", "x"], ". holds no config.json: it is not the folder of a trained model"),
        (["predict", "MODEL"], "standard input is empty: there are no texts"),
        (["predict", "MODEL", "x", "--file", "a.csv"], "1 TEXT and --file a.csv are given"),
        (["predict", "MODEL", "x", "--text", "a"], "--text a names a column of --file, which is not given"),
        (["predict", "MODEL", "x", "--top", "0"], "predict: --top 0; a whole number from 1 is needed"),
        (["predict", "MODEL", "x", "--top", "99"], "predict: --top 99; the model has 20 classes"),
        (["predict", "MODEL", "x", "--batch-size", "-1"], "predict: --batch-size -1; a whole number from 1"),
        (["predict", "MODEL", "x", "--max-length", "1"], "predict: --max-length 1; None or a whole number from 3"),
        (["predict", "MODEL", "x", "--output", "a.txt"], "a.txt ends in '.txt', a file ending in .csv or .jsonl can"),
        (["predict", "MODEL", "x", "--output", "no/a.csv"], "no/a.csv cannot be written: there is no folder no"),
        (["predict", "MODEL", "x", "--output", "d.csv"], "d.csv is not a regular file, it cannot be written"),
        (["predict", "MODEL", "--file", "a.csv", "--output", "a.csv"], "a.csv is the file that is read: name another"),
        (
            ["predict", "MODEL", "--file", "b.csv"],
            "b.csv: the texts may be in 'p', 'q': name the column with --text COL",
        ),
        (["predict", "MODEL", "--file", "no.csv"], "no.csv does not exist"),
        (["evaluate", "MODEL", "a.csv", "--batch-size", "0"], "evaluate: --batch-size 0; a whole number from 1"),
        (["evaluate", "MODEL", "a.csv", "--max-length", "2"], "evaluate: --max-length 2; None or a whole number from"),
        (["evaluate", "MODEL", "no.csv"], "no.csv does not exist"),
        (["evaluate", "MODEL", "a.csv"], "a.csv, line 3: the label 'mixed' is none that the model has: 'class 0', 'cl"),
        (["evaluate", "MODEL", "a.csv", "--label", "x"], "a.csv has no column 'x', its columns are 'text', 'label'"),
        (["evaluate", "MODEL", "b.csv"], "b.csv: the texts may be in 'p', 'q': name the column with --text COLUMN"),
        (["evaluate", "MODEL", "a.csv", "--json", "/dev/null"], "/dev/null is not a regular file, it cannot be"),
        (["evaluate", "MODEL", "a.csv", "--encoding", "utf-9"], "--encoding 'utf-9' is none that Python knows"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refuses_in_one_sentence_with_status_2(foreign, tmp_path, arguments, message):
    (tmp_path / "a.csv").write_text("text,label\ngood,class 1\nbad,mixed\n")
    (tmp_path / "b.csv").write_text("p,q\n" + "some words,more words\n" * 4)
    (tmp_path / "d.csv").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    words = [str(foreign) if word == "MODEL" else word for word in arguments]
    done = processes.at_once(*words, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert done.status == 2 and done.out == ""
    assert done.err.startswith(f"fastft: {message}") and done.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_debug_shows_where_an_error_came_from(foreign):
    done = fastft_command("predict", foreign, "--file", "no.csv", "--debug")
    assert (
        done.exit_code == 2 and "Traceback" in done.stderr and done.stderr.endswith("fastft: no.csv does not exist\n")
    )


def test_a_full_disk_leaves_the_old_file(foreign, tmp_path, monkeypatch):
    path = tmp_path / "out.csv"
    path.write_text("old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    found = fastft.predict(foreign, ["good"], quiet=True)
    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match=r"out\.csv cannot be written: No space left on device"):
        found.write(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_wrong_data_is_told_by_the_real_command_without_torch(foreign, tmp_path, command):
    (tmp_path / "a.csv").write_bytes(b"text,label\ngood,class 1\nb\xffd,class 2\n")
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    data = ("--file", "a.csv") if command == "predict" else ("a.csv",)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "fastft", command, str(foreign), *data],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "fastft: a.csv, line 3: byte 2 of the line is 0xff, which is not UTF-8: "
        "name another encoding with --encoding latin-1, if the file is text\n"
    )
