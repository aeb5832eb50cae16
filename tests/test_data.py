"""Reading texts and labels: every kind of file, the columns that are found, the split, and what is refused how."""

import csv
import json
import random
import subprocess
import sys

import numpy as np
import pytest

from fastft.training import data, readers

TEXTS = ["plain", 'quotes "and", commas', "two\nlines", "tab\there", "semi;colon", "Grüße 北京", "", "x" * 200_000]
LABELS = ["a", "b"] * 4


def write(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def write_table(path, rows, encoding="utf-8", delimiter=","):
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


# ---- files that are read


@pytest.mark.parametrize("suffix", readers.SUFFIXES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_files_of_every_kind_give_the_same_examples(tmp_path, suffix, encoding):
    path = tmp_path / f"data{suffix.upper()}"
    if suffix == ".jsonl":
        rows = ({"label": label, "text": text} for text, label in zip(TEXTS, LABELS, strict=True))
        write(path, "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding)
    else:
        rows = ((label, "7", text) for text, label in zip(TEXTS, LABELS, strict=True))
        write_table(path, [("label", "id", "text"), *rows, ()], encoding, readers.DELIMITERS[suffix])
    read = data.load(path)
    assert (read.texts, read.labels) == (TEXTS, LABELS)
    assert read.fingerprint() == data.load((TEXTS, LABELS)).fingerprint()
    assert data.load(path, labels=False).texts == TEXTS


def test_a_folder_per_class_with_hidden_and_loose_files(tmp_path):
    for name in ("spam/2.txt", "spam/1", "ham/1.txt", "spam/.hidden", ".git/config", "README.md"):
        write(tmp_path / name, f"\ufeff{name}\r\nsecond line")
    read = data.load(tmp_path)
    assert read.labels == ["ham", "spam", "spam"]
    assert read.texts == [f"{name}\nsecond line" for name in ("ham/1.txt", "spam/1", "spam/2.txt")]
    assert read.place(1) == str(tmp_path / "spam" / "1")
    assert len(data.load(tmp_path, labels=False)) == 4  # whatever the files stand for


def test_semicolons_of_a_spreadsheet_bars_and_lines_of_an_old_mac(tmp_path):
    assert data.load(write(tmp_path / "a.csv", "text;label\r\na, b;1,5\r\n")).texts == ["a, b"]
    assert data.load(write(tmp_path / "a.csv", "text|label\na, b|1\n")).texts == ["a, b"]
    assert data.load(write(tmp_path / "b.csv", "text,label\rone,1\rtwo,2\r")).texts == ["one", "two"]


def test_another_encoding_is_taken_by_name(tmp_path):
    for encoding in ("latin-1", "utf-16"):
        path = write_table(tmp_path / "a.csv", [("text", "label"), ("Grüße", "ö")], encoding)
        read = data.load(path, encoding=encoding)
        assert (read.texts, read.labels) == (["Grüße"], ["ö"])


def test_a_line_of_many_megabytes_is_read(tmp_path):
    long = "word " * 4_000_000
    read = data.load(write(tmp_path / "a.csv", f"text,label\n{long},1\nshort,2\n"))
    assert [len(text) for text in read.texts] == [len(long), 5]


def test_a_field_without_end_stops_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_FIELD", 1000)
    limit = csv.field_size_limit()
    path = write(tmp_path / "a.csv", 'text,label\ngood,1\n"bad,0\n' + "fine,1\n" * 500)
    with pytest.raises(ValueError, match=r"a\.csv, line 3: a field is longer than 1,000 characters: is a quote"):
        data.load(path)
    assert csv.field_size_limit() == limit, "the limit is everybody's: it is given back"
    _, first = readers._table(path, "utf-8")
    _, second = readers._table(path, "utf-8")
    assert next(first) == next(second) == (2, ["good", "1"])
    assert csv.field_size_limit() == limit, "also while a file is being read"


def test_reading_holds_no_second_copy_of_the_file(tmp_path):
    row = "some words of a text " * 50
    path = write(tmp_path / "a.csv", "text,label\n" + f"{row},x\n" * 20_000)
    code = (
        "import resource, sys; from fastft.training import data\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); examples = data.load(sys.argv[1])\n"
        "print(peak() - before - sum(map(sys.getsizeof, examples.texts)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < path.stat().st_size / 2


# ---- memory


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (np.array([10, 9, 1]), ["1", "9", "10"]),
        ([True, False], ["False", "True"]),
        ([2.0, 1.0], ["1", "2"]),
        (["b", " a ", "10"], ["10", "a", "b"]),
        (["01", "1"], ["01", "1"]),
        (["1.0", "0.0", "10", "-1."], ["-1", "0", "1", "10"]),
        (["1.0", "1.5"], ["1.0", "1.5"]),
        (["1.0", "x"], ["1.0", "x"]),
    ],
)
def test_label_names_are_sorted_and_strings(labels, names):
    examples = data.load((["text"] * len(labels), labels))
    assert data.label_names(examples.labels) == names


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (7, "data is a int; a path or a pair (texts, labels) is needed"),
        ((["a"], []), "data: 1 texts, but 0 labels"),
        (([], []), "data: there are no examples in it"),
        (([" ", ""], [0, 1]), "data: all of its 2 texts are empty"),
        ((["a", 5], [0, 1]), "data, row 1: the text is 5 (int), not a string"),
        ((["a", "b"], [0, None]), "data, row 1: the label is missing"),
        ((["a", "b"], [0, float("nan")]), "data, row 1: the label is missing"),
        ((["a", "b"], ["x", " "]), "data, row 1: the label is missing"),
        ((["a", "b"], ["x", "\ud83d"]), "data, row 1: the label '\\ud83d' holds half a character"),
        ((["a", "b"], [0, 0.5]), "data, row 1: the label is 0.5 (float), not a string, integer or boolean"),
    ],
    ids=str,
)
def test_what_is_no_pair_is_named_with_the_row(given, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        data.load(given)
    assert str(caught.value) == message


def test_columns_of_a_pair_are_refused():
    with pytest.raises(ValueError, match="data: text='review' names a column of a file, but this is none"):
        data.load((["a"], ["b"]), text="review")


def test_texts_alone_are_any_sequence():
    assert data.load(np.array(["a", "b"]), labels=False).texts == ["a", "b"]
    for wrong in (5, b"text", {"text": "a"}):
        with pytest.raises(TypeError, match="a path or a sequence of texts is needed"):
            data.load(wrong, labels=False)


# ---- which columns


REVIEW = "I liked this film number {}"


def table_of(tmp_path, rows=40, **columns):
    """A CSV with a column for each argument: a function of the row's number."""
    rows = [[str(value(row)) for value in columns.values()] for row in range(rows)]
    return write_table(tmp_path / "a.csv", [list(columns), *rows])


@pytest.mark.parametrize(
    ("columns", "text", "label"),
    [
        ({"text": str, "label": str}, "text", "label"),  # the names decide, whatever is in them
        ({"Review": str, "Sentiment": str, "id": str}, "Review", "Sentiment"),
        ({"content": str, "text": str, "category": str, "label": str}, "text", "label"),
        ({"stars": str, "review": str}, "review", "stars"),  # one of two leaves the other
        ({"q": REVIEW.format, "n": lambda row: row % 5}, "q", "n"),
        ({"id": str, "q": REVIEW.format, "n": lambda row: row % 5, "same": lambda row: "x"}, "q", "n"),
        ({"q": REVIEW.format, "date": "2020-01-01 10:{}".format, "n": lambda row: "ab"[row % 2]}, "q", "n"),
        ({"q": REVIEW.format, "score": lambda row: (row % 7) / 8, "n": lambda row: row % 3}, "q", "n"),
        ({"q": "这部电影很好看{}".format, "id": str, "n": lambda row: row % 3}, "q", "n"),
        (
            {"title": "Film {} it is".format, "q": lambda row: REVIEW.format(row) * 4, "n": lambda row: row % 2},
            "q",
            "n",
        ),
        ({"q": REVIEW.format, "n": lambda row: ("very good", "very bad")[row % 2], "url": str}, "q", "n"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_columns_are_found(tmp_path, columns, text, label):
    assert data.load(table_of(tmp_path, **columns)).columns == f"text column {text!r}, label column {label!r}"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"q": REVIEW.format, "n": lambda row: row % 2, "m": lambda row: row % 3},
            ": the labels may be in 'n', 'm': name the column with label=COLUMN",
        ),
        (
            {"q": REVIEW.format, "r": REVIEW.format, "label": str},
            ": the texts may be in 'q', 'r': name the column with text=COLUMN",
        ),
        (
            {"q": REVIEW.format, "n": str, "m": str},
            ": no column looks like labels, there are 'n', 'm': name the column with label=COLUMN",
        ),
        ({"text": REVIEW.format}, ": there is no column for the labels, only 'text': name the column with"),
        (
            {"I liked this film": REVIEW.format, "pos": lambda row: ("pos", "neg")[row % 2]},
            ": its first line is no header, for 'pos' is a value of the column too",
        ),
        ({"1": str, "2.2667": str, "A fine film": REVIEW.format}, ": its first line is no header, '2.2667' names no"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_columns_that_could_be_others_are_asked_for(tmp_path, columns, message):
    path = table_of(tmp_path, **columns)
    with pytest.raises(ValueError) as caught:
        data.load(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_columns_are_taken_by_name(tmp_path):
    path = write(tmp_path / "a.tsv", "stars\treview\ttext\n5\tgood\tx\n1\tbad\ty\n")
    read = data.load(path, text="review", label="stars")
    assert (read.texts, read.labels) == (["good", "bad"], ["5", "1"])
    with pytest.raises(ValueError, match="text='text' and label='text' are the same column"):
        data.load(path, text="text", label="text")


def test_keys_of_json_lines_are_found_like_columns(tmp_path):
    rows = [{"meta": {"a b": row}, "q": REVIEW.format(row), "n": row % 2, "score": row / 8} for row in range(10)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert data.load(path).columns == "text column 'q', label column 'n'"
    assert data.load(path, labels=False).columns == "text column 'q'"


# ---- files that are refused


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"text", "a.txt ends in '.txt', a file ending in .csv, .tsv, .jsonl or a folder is needed"),
        ("a.csv", b"", "a.csv is empty"),
        ("a.csv", b"\r\n\n", "a.csv is empty"),
        ("a.jsonl", b"\n\n", "a.jsonl: there are no examples in it"),
        ("a.csv", b"text,label\n", "a.csv: there are no examples in it"),
        ("a.csv", b"a,b\n", "a.csv: there are no examples in it"),
        ("a.csv", b"text,label,text\na,b,c\n", "a.csv has 2 columns 'text'"),
        ("a.csv", b"text,label\na,b\na\n", "a.csv, line 3: 1 field, but the header has 2"),
        ("a.csv", b"text,label\na, really,b\n", "a.csv, line 2: 3 fields, but the header has 2: a field that holds a"),
        ("a.csv", b'text,label\n"a\nb",1\nc\n', "a.csv, line 4: 1 field"),
        ("a.csv", b"text,label\na,\n", "a.csv, line 2: the label is missing"),
        ("a.csv", b"text,label\n ,1\n,2\n", "a.csv: all of its 2 texts are empty (text column 'text', label column"),
        ("a.csv", b'text,label\na,1\n"a,b\nc,2\n', "a.csv, line 3: a quote is opened here and never closed"),
        ("a.csv", b'text,label\n"a,b\n"c",2\n', "a.csv, line 2: a quote inside a quoted field is not doubled"),
        ("a.csv", b"text,label\na,1\nb\xff,b\n", "a.csv, line 3: byte 2 of the line is 0xff, which is not UTF-8"),
        (
            "a.csv",
            "text,label\na,1\n".encode("utf-16"),
            "a.csv, line 1: byte 1 of the line is 0xff, which is not UTF-8",
        ),
        ("a.csv", b"text,label\na,1\nb\0,1\n", "a.csv, line 3: a NUL at character 2: the file is damaged or not text"),
        ("a.csv", random.Random(0).randbytes(50_000), "a.csv, line "),
        ("a.jsonl", random.Random(0).randbytes(50_000), "a.jsonl, line "),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text"\n', "a.jsonl, line 2: not JSON: "),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: '[1]' is not a JSON object"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: maximum recursion depth"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "a.jsonl, line 1: Exceeds the limit"),
        ("a.jsonl", b'{"text": "a"}\n', "a.jsonl: there is no column for the labels, only 'text': name"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "a"}\n', "a.jsonl, line 2: no key 'label', its keys"),
        ("a.jsonl", b'{"text": null, "label": 1}\n', "a.jsonl, line 1: the text is None (NoneType), not a string"),
        ("a.jsonl", b'{"text": "a", "label": [1]}\n', "a.jsonl, line 1: the label is [1] (list), not a string"),
        ("f/a.txt", b"text", "f has no sub-folders: one per class is needed"),
        ("f/g/h/a.txt", b"text", "f/g holds 'h', which is no file: it must hold texts, one in each file"),
        ("f/g/.hidden", b"text", "f/g is empty: the folder of a class holds its texts"),
        ("f/g/a.txt", b"one\n\xe4", "f/g/a.txt, line 2: byte 1 of the line is 0xe4, which is not UTF-8: name another"),
        ("f/g/a.txt", b"\0", "f/g/a.txt, line 1: a NUL at character 1"),
    ],
    ids=lambda value: str(value[:30]),
)
def test_bad_files_are_named_with_the_line(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name, content)
    with pytest.raises((ValueError, TypeError)) as caught:
        data.load(name.split("/")[0])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_paths_that_are_no_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv does not exist"):
        data.load(tmp_path / "nowhere.csv")
    with pytest.raises(OSError, match="null is not a regular file"):
        data.load("/dev/null")
    with pytest.raises(ValueError, match="text='a' names a column of a file, but this is a folder"):
        data.load(tmp_path, text="a")
    path = write_table(tmp_path / "a.csv", [("text", "label"), ("a", "b")])
    with pytest.raises(ValueError, match=r"has no column 'stars', its columns are 'text', 'label': name the one"):
        data.load(path, label="stars")
    with pytest.raises(ValueError, match="encoding='utf-9' is none that Python knows"):
        data.load(path, encoding="utf-9")
    with pytest.raises(ValueError, match=r"a\.csv is not utf-16: "):
        data.load(path, encoding="utf-16")


def test_a_file_that_is_no_data_is_told_without_importing_torch(tmp_path):
    code = (
        "import sys; from fastft.training import data, preprocess\n"
        "preprocess.prepare(data.load((['a', 'b'], [0, 1])))\n"
        "assert not {'torch', 'sklearn', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- labels and the split


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0], "data, row 0 is the only example"),
        ([1, 1], "data: every label is '1', two different ones are needed"),
        ([0, 1], "data: the label '0' has one example, a split needs at least two (data, row 0)"),
        ([0, 0, 1], "data: the label '1' has one example, a split needs at least two (data, row 2)"),
        (range(20), "data: each of the 20 examples has a label of its own, '0', '1', '2', '3', '4', '5'"),
        ([0, 1] * 4, "validation_share=0.1 puts 1 of 8 examples aside, but each part needs one of each of the 2"),
    ],
)
def test_labels_that_cannot_be_split(labels, message):
    with pytest.raises(ValueError) as caught:
        data.split(data.load((["a"] * len(labels), list(labels))), 0.1, seed=0)
    assert str(caught.value).startswith(message)


def test_a_split_that_leaves_nothing_to_learn_a_label_from_is_refused():
    everything = data.load(([str(row) for row in range(100)], ["a", "b"] * 49 + ["rare"] * 2))
    with pytest.raises(ValueError, match=r"^validation_share=0.95 leaves no example of the label 'rare' to train on$"):
        data.split(everything, 0.95, seed=0)


def test_split_keeps_the_share_of_every_label():
    labels = ["rare"] * 20 + ["common"] * 180
    everything = data.load(([str(row) for row in range(200)], labels))
    train_part, held_out = data.split(everything, 0.1, seed=3)
    assert held_out.counts() == {"common": 18, "rare": 2} and train_part.counts() == {"common": 162, "rare": 18}
    assert sorted(map(int, train_part.texts + held_out.texts)) == list(range(200))
    assert [held_out.place(row) for row in (0, 1)] == [f"data, row {text}" for text in held_out.texts[:2]]
    assert data.split(everything, 0.1, seed=3)[1].texts == held_out.texts
    assert data.split(everything, 0.1, seed=4)[1].texts != held_out.texts


def test_an_unknown_label_is_named_with_its_line(tmp_path):
    examples = data.load(write(tmp_path / "a.csv", "text,label\na,x\n\nb,mixed\n"))
    with pytest.raises(ValueError, match=r"a\.csv, line 4: the label 'mixed' is none that the model has: 'x', 'y'"):
        data.require_known(examples, ["x", "y"], "the model")
