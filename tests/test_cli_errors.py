"""What a user can get wrong with files and folders, in processes of their own: status 2, one sentence that names the
place, and nothing written; where no model is needed to know it, before torch is imported."""

import functools
import json
import logging
import os
import random
import resource
import shutil

import processes
import pytest
from tiny import make_checkpoint, make_reviews
from transformers import BertTokenizer

from fastft.training import checkpoint, run_folder

GOOD = "text,label\n" + "".join(f"some words {row},{'ab'[row % 2]}\n" for row in range(40))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def assert_one_sentence(done, message):
    assert done.status == 2, done.err
    assert done.err.startswith(f"fastft: {message}") and done.err.count("\n") == 1, done.err
    assert "Traceback" not in done.err and done.out == ""


FILES = [  # name, content, what is said about it
    ("nowhere.csv", None, "nowhere.csv does not exist"),
    ("a.csv", "", "a.csv is empty"),
    ("a.csv", "\ufeff\r\n\n", "a.csv is empty"),
    ("a.csv", "text,label\n", "a.csv: there are no examples in it"),
    ("a.csv", "comment\nfine\n", "a.csv: there is no column for the labels, only 'comment': name the column with "),
    ("a.csv", "text,label,text\na,b,c\n", "a.csv has 2 columns 'text': give each a name of its own"),
    ("a.csv", "text,label\na,x\nb,x\n", "a.csv: every label is 'x', two different ones are needed"),
    ("a.csv", "text,label\na,x\n", "a.csv, line 2 is the only example, two of each of two labels are needed"),
    ("a.csv", GOOD + "odd,c\n", "a.csv: the label 'c' has one example, a split needs at least two (a.csv, line 42)"),
    ("a.csv", "text,label\n ,x\n,y\n", "a.csv: all of its 2 texts are empty"),
    ("a.csv", "text,label\n<br>,x\n&nbsp;,y\n", "a.csv: nothing is left of its 2 texts after cleaning"),
    ("a.csv", "text,label\na,x\nb,\n", "a.csv, line 3: the label is missing"),
    ("a.csv", "text,label\n" + "".join(f"t,{n}\n" for n in range(40)), "a.csv: each of the 40 examples has a label of"),
    ("a.csv", b"text,label\ngood,x\nb\xffd,y\n", "a.csv, line 3: byte 2 of the line is 0xff, which is not UTF-8: nam"),
    ("a.csv", GOOD.encode("utf-16"), "a.csv, line 1: byte 1 of the line is 0xff, which is not UTF-8: name another enco"
     "ding with --encoding utf-16"),
    ("a.csv", b"text,label\na,x\nb\0,y\n", "a.csv, line 3: a NUL at character 2: the file is damaged or not text"),
    ("a.csv", random.Random(0).randbytes(9000), "a.csv, line "),
    ("a.csv", "text,label\na,x\nb,y,z\n", "a.csv, line 3: 3 fields, but the header has 2: a field that holds a delimi"),
    ("a.csv", "text,label\na,x\nb\n", "a.csv, line 3: 1 field, but the header has 2"),
    ("a.csv", 'text,label\na,x\n"b,y\n', "a.csv, line 3: a quote is opened here and never closed"),
    ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"\n', "a.jsonl, line 2: not JSON: "),
    ("a.json", "[]", "a.json ends in '.json', a file ending in .csv, .tsv, .jsonl or a folder is needed"),
    ("a.csv.gz", b"\x1f\x8b\x08", "a.csv.gz ends in '.gz', a file ending in .csv, .tsv, .jsonl or a folder is needed"),
    ("d.csv/a.txt", "text", "d.csv has no sub-folders: one per class is needed"),
    ("mails/spam/a.txt", "text", "mails/spam/a.txt is the only example"),
    ("", "", "data is '', which names no file or folder"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=lambda value: repr(value)[:30])
def test_files_that_nothing_can_be_trained_on(tmp_path, name, content, message):
    if content:
        write(tmp_path / name, content)
    elif content == "" and name:
        write(tmp_path / name, b"")
    done = processes.at_once("finetune", name.split("/")[0], "--model", "m", "--output", "out", cwd=tmp_path)
    assert_one_sentence(done, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.csv", None, "nowhere.csv does not exist"),
        ("a.csv", "text,label\na,x\nb,x\n", "a.csv: every label is 'x', two different ones are needed"),
        ("a.csv", b"text,label\ngood,x\nb\xffd,y\n", "a.csv, line 3: byte 2 of the line is 0xff, which is not UTF-8"),
    ],
)
def test_files_with_which_nothing_can_be_compared(tmp_path, name, content, message):
    if content is not None:
        write(tmp_path / name, content)
    assert_one_sentence(processes.at_once("compare", "--model", "m", "--data", name, cwd=tmp_path), message)


def test_links_that_lead_nowhere(tmp_path):
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    (tmp_path / "gone.csv").symlink_to("nowhere.csv")
    for name in ("loop.csv", "gone.csv"):
        done = processes.at_once("finetune", name, "--model", "m", "--output", "out", cwd=tmp_path)
        assert_one_sentence(done, f"{name} is a link that leads to no file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text", "review"), "good.csv has no column 'review', its columns are 'text', 'label': name the one with"),
        (("--label", "stars"), "good.csv has no column 'stars', its columns are 'text', 'label': name the one with"),
        (("--text", "label", "--label", "label"), "good.csv: --text 'label' and --label 'label' are the same column"),
        (("--encoding", "utf-9"), "--encoding 'utf-9' is none that Python knows"),
        (("--validation", "other.csv"), "other.csv, line 3: the label 'c' is none that the training data has: 'a'"),
        (("--validation", "nowhere.csv"), "nowhere.csv does not exist"),
        (("--validation-share", "0.99"), "--validation-share 0.99 puts 40 of 40 examples aside, but each part needs"),
        (("--output", "good.csv"), "--output 'good.csv' is a file, not a folder"),
        (("--output", "good.csv/out"), "--output 'good.csv/out' cannot be made: good.csv is a file, not a folder"),
        (("--output", "."), "--output '.' is not empty: name another folder or pass --overwrite"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_options_that_do_not_fit_the_data(tmp_path, options, message):
    write(tmp_path / "good.csv", GOOD)
    write(tmp_path / "other.csv", "text,label\nfine,a\nodd,c\n")
    done = processes.at_once("finetune", "good.csv", "--model", "m", "--output", "out", *options, cwd=tmp_path)
    assert_one_sentence(done, message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.csv", "other.csv"]


# ---- models


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("job") / "model").parent
    rows = (f"{text},{label}\n" for text, label in zip(*make_reviews(80, seed=0), strict=True))
    write(folder / "data.csv", "text,label\n" + "".join(rows))
    return folder


def change(**entries):
    def of(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **entries}))

    return of


def remove(name):
    return lambda folder: [path.unlink() for path in folder.glob(name)]


def cut(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def other_tokenizer(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(95))]
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "cannot be loaded: "),
        (remove("config.json"), "cannot be loaded: "),
        (remove("model.safetensors"), "cannot be loaded: "),
        (cut("config.json"), "cannot be loaded: "),
        (cut("model.safetensors"), "cannot be loaded: "),
        (cut("tokenizer.json"), "cannot be loaded: "),
        (remove("tokenizer*"), "holds no tokenizer: there are no tokens but "),
        (other_tokenizer, "has a tokenizer of another model: it knows 100 tokens, the model 23"),
        (change(num_hidden_layers=3), "lacks 16 weights of the encoder that its configuration asks for, the first is "),
        (change(model_type="distilbert"), "lacks "),
        (change(model_type="gpt5"), "cannot be loaded: "),
        (change(hidden_size=48), "lacks 35 weights of the encoder that its configuration asks for, the first is "),
    ],
    ids=[
        *("no folder", "no config", "no weights", "config cut", "weights cut", "tokenizer cut", "no tokenizer"),
        "another tokenizer",
        *("a layer too many", "distilbert", "unknown kind", "another size"),
    ],
)
def test_models_that_cannot_be_trained(job, tmp_path, damage, message):
    folder = shutil.copytree(job / "model", tmp_path / "model")
    damage(folder)
    done = processes.fastft("finetune", job / "data.csv", "--model", folder, "--output", tmp_path / "out")
    assert_one_sentence(done, f"--model '{folder}' {message}")
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder_of_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "model.bin", "weights")
    said = pytest.raises(ValueError, match=r"model='model\.bin' cannot be loaded: it is a file, not a folder$")
    with said, checkpoint.loading("model.bin"):
        pass


@pytest.mark.parametrize("name", ["/no/such/model", "runs/today/model", "./model", "model/", "~/model", ""])
def test_what_names_no_model_on_the_hub_is_not_looked_for_there(name):
    with (
        pytest.raises(ValueError, match=f"model={name!r} cannot be loaded: there is no such folder$"),
        checkpoint.loading(name),
    ):
        pass


def test_a_hub_out_of_reach_is_one_sentence():
    heard = logging.getLogger("huggingface_hub.utils._http")
    level = heard.getEffectiveLevel()
    said = "model='a/b' cannot be loaded: there is no such folder, and the Hugging Face hub: We couldn't connect"
    with pytest.raises(ValueError, match=said), checkpoint.loading("a/b"):
        assert not heard.isEnabledFor(logging.WARNING)  # "Retrying in 1s"
        raise OSError("We couldn't connect to it.\nCheck your connection.")
    assert heard.getEffectiveLevel() == level


# ---- places that cannot be written to


def test_a_folder_that_is_read_only(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(PermissionError, match=r"cannot be written to: the folder .* is read-only"):
        run_folder.check(tmp_path / "a" / "b", resume=False, overwrite=False)


def test_disk_full_from_the_beginning(job, tmp_path):
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1000, 1000))
    out = tmp_path / "out"
    done = processes.fastft("finetune", job / "data.csv", "--model", job / "model", "--output", out, before=limit)
    assert_one_sentence(done, f"--output '{out}': the disk is full; nothing that was saved is lost")


@pytest.mark.parametrize("output", ["/proc/out", "/sys/out"])
def test_output_where_nothing_can_be_made(job, output):
    done = processes.fastft("finetune", job / "data.csv", "--model", job / "model", "--output", output)
    assert_one_sentence(done, output)


# ---- what is odd but no error


@pytest.fixture(scope="module")
def trained(job):
    done = train(job, job / "trained")
    assert done.status == 0, done.err
    return job / "trained"


def train(job, output, *options):
    options = ("--epochs", 1, "--learning-rate", 3e-3, *options)
    return processes.fastft("finetune", job / "data.csv", "--model", job / "model", "--output", output, *options)


def test_batches_and_lengths_larger_than_there_is_use_for(job, tmp_path):
    done = train(job, tmp_path / "out", "--batch-size", 1000, "--max-length", 100_000, "--patience", 1)
    assert done.status == 0 and "Epoch 1/1 1/1" in done.out and "0 texts cut to 64" in done.out, done.err


def test_smoothing_and_weights_go_with_either_head(job, tmp_path):
    options = ("--head", "cls", "--label-smoothing", 0.1, "--class-weights", "balanced")
    assert train(job, tmp_path / "out", *options).status == 0


def test_patience_ends_a_run_early_and_says_so(job, tmp_path):
    done = train(job, tmp_path / "out", "--epochs", 10, "--patience", 1, "--learning-rate", 1.0, "--clip", 0)
    assert done.status == 0 and "Epoch 10/10" not in done.out
    assert "stopped   early, no validation loss was below that of epoch " in done.out


def test_output_inside_the_folder_of_the_data(tmp_path, job):
    data = tmp_path / "data"
    for row, (text, label) in enumerate(zip(*make_reviews(40, seed=0), strict=True)):
        write(data / label / f"{row}.txt", text)
    done = processes.fastft("finetune", data, "--model", job / "model", "--output", data / "out", "--epochs", 1)
    assert_one_sentence(done, f"finetune: --output '{data / 'out'}' is inside the folder of the data")
    assert not (data / "out").exists()


def test_output_of_evaluation_and_prediction(trained, tmp_path):
    write(tmp_path / "a.csv", "text\n" + "good film\n" * 300)
    done = processes.fastft("predict", trained, "--file", tmp_path / "a.csv", "--output", "/proc/a.csv")
    assert_one_sentence(done, "/proc/a.csv cannot be written: ")
    old = write(tmp_path / "b.csv", "old")
    full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1000, 1000))
    done = processes.fastft("predict", trained, "--file", tmp_path / "a.csv", "--output", old, before=full)
    assert_one_sentence(done, f"{old} cannot be written: File too large")
    assert old.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
