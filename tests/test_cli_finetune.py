"""``fastft finetune`` as a new user meets it, in processes of its own."""

import inspect
import json
import os
import re
import subprocess
import sys
import time

import processes
import pytest
import typer
from tiny import make_checkpoint, make_reviews

import fastft
from fastft.cli import _errors
from fastft.cli.finetune import finetune as command


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("job"))
    rows = (f'"{text}",{label}' for text, label in zip(*make_reviews(200, seed=0), strict=True))
    (folder / "data.csv").write_text("\n".join(["review,stars", *rows]))
    return folder


def finetune(job, output, *options, **how):
    return processes.fastft(
        "finetune", job / "data.csv", "--model", job, "--output", output, "--learning-rate", 3e-3, *options, **how
    )


# ---- help


def test_help_comes_within_half_a_second():
    def seconds():
        started = time.perf_counter()
        assert subprocess.run([sys.executable, "-m", "fastft", "--help"], capture_output=True).returncode == 0
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) <= 0.5


def test_options_are_the_arguments_of_the_function_with_its_defaults():
    ours = inspect.signature(command).parameters
    theirs = inspect.signature(fastft.finetune).parameters
    assert set(ours) - {"debug"} == set(theirs)
    assert {name: ours[name].default for name in theirs} == {name: theirs[name].default for name in theirs}


# ---- a run


def test_a_run_into_a_pipe_is_plain_text(job, tmp_path):
    done = finetune(job, tmp_path / "output")
    assert done.status == 0 and done.err == ""
    assert "\x1b" not in done.out and "\r" not in done.out and "━" not in done.out
    assert [line[:9] for line in done.out.splitlines() if line.startswith("Epoch")] == [
        "Epoch 1/3",
        "Epoch 2/3",
        "Epoch 3/3",
    ]
    assert "'review'" in done.out and "'stars'" in done.out, "the columns that were found are named"
    for said in ("duplicates, left out", "macro", "weighted", "predicted as", str(tmp_path / "output")):
        assert said in done.out
    options = json.loads((tmp_path / "output" / "run.json").read_text())["options"]
    assert options["learning_rate"] == 3e-3 and options["patience"] is None


def test_a_terminal_has_a_bar_without_colours_where_they_are_unwanted(job, tmp_path):
    done = finetune(job, tmp_path / "output", "--epochs", 1, before=no_color, terminal=True)
    assert done.status == 0 and "━" in done.out
    assert not re.search(r"\x1b\[[0-9;]*\b(3[0-7]|38|9[0-7])\b[0-9;]*m", done.out)


def no_color():
    os.environ.update(NO_COLOR="1", TERM="xterm-256color")


def test_quiet_prints_nothing(job, tmp_path):
    done = finetune(job, tmp_path / "output", "--epochs", 1, "--quiet")
    assert (done.status, done.out, done.err) == (0, "", "")


# ---- errors: status 2 and one sentence


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epochs", 0), "--epochs 0; a whole number from 1 is needed"),
        (("--batch-size", -1), "--batch-size -1; a whole number from 1"),
        (("--max-length", 2), "--max-length 2; a whole number from 3"),
        (("--learning-rate", 0), "--learning-rate 0.0; a number above 0"),
        (("--learning-rate", "nan"), "--learning-rate nan; a number above 0"),
        (("--warmup", 1), "--warmup 1.0; a share of the steps"),
        (("--weight-decay", "inf"), "--weight-decay inf; a number from 0"),
        (("--l1", -1), "--l1 -1.0; a number from 0"),
        (("--dropout", 1), "--dropout 1.0; None or a probability"),
        (("--label-smoothing", 1), "--label-smoothing 1.0; a number from 0"),
        (("--clip", -1), "--clip -1.0; a number from 0"),
        (("--patience", 0), "--patience 0; None or a whole number from 1"),
        (("--seed", 2**32), "--seed 4294967296; a whole number from 0"),
        (("--validation-share", 1.5), "--validation-share 1.5; a number between 0 and 1"),
        (("--resume", "--overwrite"), "--resume goes on with a run, --overwrite replaces it: pass one of them"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_options_out_of_range_are_told_at_once(tmp_path, options, message):
    done = processes.at_once("finetune", "data.csv", "--model", "m", "--output", tmp_path / "output", *options)
    assert done.status == 2, done.err
    assert done.err.startswith(f"fastft: finetune: {message}") and done.err.count("\n") == 1
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "options",
    [("--epochs", "x"), ("--head", "mean"), ("--schedule", "step"), ("--dtype", "f"), ("--class-weights", "a")],
)
def test_options_of_the_wrong_kind_are_refused(tmp_path, options):
    done = processes.at_once("finetune", "data.csv", "--model", "m", "--output", tmp_path / "output", *options)
    assert done.status == 2 and done.err.startswith(f"fastft: {options[0]}") and repr(options[1]) in done.err


def test_a_folder_that_is_not_empty_is_refused_at_once(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for more in ((), ("--resume",)):
        done = processes.at_once("finetune", "data.csv", "--model", "m", "--output", tmp_path, *more)
        assert done.status == 2 and done.err.startswith(f"fastft: --output '{tmp_path}' ")
        assert "--overwrite" in done.err and done.err.count("\n") == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "{job}/data.csv"), "--output '{job}/data.csv' is a file, not a folder"),
        (
            ("--output", "{job}/data.csv/under"),
            "--output '{job}/data.csv/under' cannot be made: {job}/data.csv",
        ),
        (("--output", "/proc/fastft/output"), "/proc/fastft: No such file or directory"),
        (("--model", "{job}/nowhere"), "--model '{job}/nowhere' cannot be loaded: "),
        (("--label", "nowhere"), "{job}/data.csv has no column 'nowhere'"),
    ],
    ids=["file", "under a file", "unwritable", "no model", "no column"],
)
def test_errors_are_one_sentence(job, tmp_path, options, message):
    options = [option.format(job=job) for option in options]
    done = finetune(job, tmp_path / "output", *options)
    assert done.status == 2 and "Traceback" not in done.err, done.err
    assert done.err.startswith("fastft: " + message.format(job=job)) and done.err.count("\n") == 1
    assert done.out == "" and not (tmp_path / "output").exists()


def test_debug_shows_the_traceback_too(job, tmp_path):
    done = finetune(job, tmp_path / "output", "--model", job / "nowhere", "--debug")
    assert done.status == 2 and "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith(f"fastft: --model '{job / 'nowhere'}' cannot be loaded: ")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("pass resume=True"), 130, "pass --resume"),
        (MemoryError("compare: the model has 9 parameters"), 2, "compare: the model has 9 parameters"),
        (MemoryError(), 2, "out of memory, a smaller --batch-size or --max-length needs less: MemoryError"),
        (RuntimeError("CUDA out of memory. Tried"), 2, "out of memory, a smaller --batch-size or --max-length needs"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (FileNotFoundError(2, "No such file or directory", "a.csv"), 2, "a.csv: No such file or directory"),
        (FloatingPointError("the loss became nan"), 2, "the loss became nan"),
        (ValueError("\nfirst line\nsecond"), 2, "first line"),
        (ValueError(), 2, "ValueError"),
    ],
)
def test_sentences_and_statuses(capsys, error, status, said):
    with pytest.raises(typer.Exit) as caught, _errors.reporting(False, ("resume", "batch_size", "max_length")):
        raise error
    printed = capsys.readouterr().err
    assert caught.value.exit_code == status
    assert printed.startswith(f"fastft: {said}") and printed.count("\n") == 1


@pytest.mark.parametrize("bug", [RuntimeError("a bug"), KeyError("a bug"), BrokenPipeError(32, "Broken pipe")])
def test_bugs_are_not_dressed_up(bug):
    with pytest.raises(type(bug)), _errors.reporting():
        raise bug
