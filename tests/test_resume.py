"""Runs that are broken off: by kill -9, Ctrl-C, a full disk, at any moment; and what may not be resumed."""

import functools
import json
import os
import random
import resource
import shutil
import signal
import time

import processes
import pytest
from safetensors import safe_open
from tiny import make_checkpoint, make_reviews
from transformers import AutoModelForSequenceClassification

import fastft
from fastft.training import checkpoint, files, resume, run_folder

REVIEWS = make_reviews(300, seed=0)
STEPS = 17  # of each epoch


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Model and data in a folder; dropout is the checkpoint's 0.1, so the weights depend on the random numbers."""
    folder = make_checkpoint(tmp_path_factory.mktemp("job"))
    lines = (json.dumps({"text": text, "label": label}) for text, label in zip(*REVIEWS, strict=True))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def undisturbed(job):
    done = finetune(job, job / "undisturbed")
    assert done.status == 0, done.err
    return job / "undisturbed"


def finetune(job, output, *options, **how):
    fixed = ("--epochs", 3, "--batch-size", 16, "--learning-rate", 3e-3)
    return processes.fastft("finetune", job / "data.jsonl", "--model", job, "--output", output, *fixed, *options, **how)


def assert_same_run(output, expected):
    """Same bits of the weights, same numbers, same files and nothing else."""
    assert (output / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert (output / "metrics.json").read_bytes() == (expected / "metrics.json").read_bytes()
    assert history(output) == history(expected)
    assert {path.name for path in output.iterdir()} == {path.name for path in expected.iterdir()}
    seconds = json.loads((output / "run.json").read_text())["seconds"]
    assert seconds["total"] > seconds["training"] + seconds["validation"]


def history(output):
    records = [json.loads(line) for line in (output / "history.jsonl").open()]
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in records]


# ---- what happens to a run; each is called in its process before it begins


def save_often(then=None):
    resume.SAVE_SECONDS, resume.MOST_OF_THE_TIME = 0.0, 1e9
    if then is not None:
        then()


def signal_at_step(number, step):
    on_step_end = resume.Keeper.on_step_end

    def hit(self, args, state, control, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), number)
        on_step_end(self, args, state, control, **kwargs)

    resume.Keeper.on_step_end = hit


def signal_in_validation(number, epoch):
    on_prediction_step = resume.Keeper.on_prediction_step

    def hit(self, args, state, control, **kwargs):
        if state.global_step == epoch * STEPS:
            os.kill(os.getpid(), number)
        on_prediction_step(self, args, state, control, **kwargs)

    resume.Keeper.on_prediction_step = hit


def signal_while_saving(number):
    save = checkpoint.save_classifier

    def hit(*arguments):
        os.kill(os.getpid(), number)
        save(*arguments)

    checkpoint.save_classifier = hit


def kill_while_writing(path, time):
    """At the ``time``-th replacement of a file of that name, when half of the new one is on disk."""
    replacing, seen = files.sync, []

    def hit(written):
        if written.name == f".unfinished-{path}":
            seen.append(written)
            if len(seen) == time:
                os.truncate(written, written.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        replacing(written)

    files.sync = hit


def full_disk(free):
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, free))


# ---- kill -9


def test_kills_within_a_step_and_within_a_write_change_no_bit(job, undisturbed, tmp_path):
    output = tmp_path / "output"
    first = finetune(job, output, before=functools.partial(save_often, functools.partial(signal_at_step, 9, 7)))
    assert first.status == -signal.SIGKILL
    kill = functools.partial(kill_while_writing, resume.STATE, 20)
    second = finetune(job, output, "--resume", before=functools.partial(save_often, kill))
    assert second.status == -signal.SIGKILL and "from step 6, epoch 1" in second.out
    last = finetune(job, output, "--resume")
    assert last.status == 0 and last.err == ""
    assert "from step 25, epoch 2" in last.out
    assert_same_run(output, undisturbed)


def test_killed_while_the_results_were_written(job, undisturbed, tmp_path):
    output = tmp_path / "output"
    kill = functools.partial(kill_while_writing, "metrics.json", 1)
    assert finetune(job, output, before=kill).status == -signal.SIGKILL
    for name in (".tmpAb12Cd", f".unfinished-{resume.STATE}"):  # a kill while safetensors writes leaves the first
        (output / run_folder.KEPT / name).write_bytes(b"half")
    last = finetune(job, output, "--resume")
    assert last.status == 0 and "training was done" in last.out
    assert_same_run(output, undisturbed)


def test_killed_before_anything_was_kept_starts_anew_and_says_so(job, undisturbed, tmp_path):
    output = tmp_path / "output"
    kill = functools.partial(signal_at_step, signal.SIGKILL, 3)
    assert finetune(job, output, before=kill).status == -signal.SIGKILL
    last = finetune(job, output, "--resume")
    assert last.status == 0 and "nothing was kept yet, the run starts anew" in last.out
    assert_same_run(output, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--stock",), ("--dtype", "bfloat16"), ("--head", "cls")], ids=str)
def test_five_kills_at_random_times_change_no_bit(job, tmp_path, options):
    options = (*options, "--patience", 20, "--epochs", 40, "--l1", 1e-4, "--class-weights", "balanced")
    started = time.perf_counter()
    done = finetune(job, tmp_path / "undisturbed", *options, before=save_often)
    assert done.status == 0, done.err
    seconds = time.perf_counter() - started
    draw, output = random.Random(0), tmp_path / "output"
    for _ in range(5):
        kill_after = 1 + draw.uniform(0, 0.2) * seconds  # the first of these is spent before training
        done = finetune(job, output, *options, "--resume", before=save_often, kill_after=kill_after)
        assert done.status == -signal.SIGKILL, done.err
    assert finetune(job, output, *options, "--resume").status == 0
    assert_same_run(output, tmp_path / "undisturbed")


# ---- Ctrl-C


def test_ctrl_c_keeps_the_best_epoch_and_says_how_to_go_on(job, undisturbed, tmp_path):
    output = tmp_path / "output"
    stop = functools.partial(signal_at_step, signal.SIGINT, STEPS + 4)
    stopped = finetune(job, output, before=stop)
    assert stopped.status == 130
    assert "stopped in epoch 2" in stopped.err and "holds the model of epoch 1" in stopped.err
    assert "the same with --resume goes on" in stopped.err and "Traceback" not in stopped.err
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["loss"] == history(output)[0]["validation_loss"]
    AutoModelForSequenceClassification.from_pretrained(output)
    last = finetune(job, output, "--resume")
    assert last.status == 0 and f"from step {STEPS + 4}, epoch 2" in last.out
    assert_same_run(output, undisturbed)


def test_ctrl_c_in_the_first_epoch_leaves_no_model_but_can_be_resumed(job, undisturbed, tmp_path):
    output = tmp_path / "output"
    stopped = finetune(job, output, before=functools.partial(signal_at_step, signal.SIGINT, 5))
    assert stopped.status == 130 and "holds no model yet" in stopped.err
    assert finetune(job, output, "--resume").status == 0
    assert_same_run(output, undisturbed)


@pytest.mark.parametrize(("epoch", "kept"), [(1, "no model yet"), (2, "the model of epoch 1")])
def test_ctrl_c_in_a_validation_is_one_in_its_epoch(job, undisturbed, tmp_path, epoch, kept):
    output = tmp_path / "output"
    stopped = finetune(job, output, before=functools.partial(signal_in_validation, signal.SIGINT, epoch))
    assert stopped.status == 130 and "Traceback" not in stopped.err
    last = stopped.err.splitlines()[-1]
    assert last.startswith(f"fastft: stopped in epoch {epoch}; '{output}' holds {kept}")
    assert last.endswith("the same with --resume goes on")
    if epoch > 1:
        assert len(history(output)) == epoch - 1
        AutoModelForSequenceClassification.from_pretrained(output)
    assert finetune(job, output, "--resume").status == 0
    assert_same_run(output, undisturbed)


def test_ctrl_c_while_the_results_are_written(job, undisturbed, tmp_path):
    output = tmp_path / "output"
    stopped = finetune(job, output, before=functools.partial(signal_while_saving, signal.SIGINT))
    assert (stopped.status, stopped.err) == (130, "fastft: interrupted; the same with --resume goes on\n")
    assert finetune(job, output, "--resume").status == 0
    assert_same_run(output, undisturbed)


def test_second_ctrl_c_stops_at_once(capfd):
    interrupt = resume.Interrupt(quiet=False)
    with pytest.raises(KeyboardInterrupt), interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked
        signal.raise_signal(signal.SIGINT)
    assert "Ctrl-C once more stops at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- a full disk


def test_full_disk_is_one_sentence_and_loses_nothing(job, undisturbed, tmp_path):
    output = tmp_path / "output"
    kill = functools.partial(signal_at_step, signal.SIGKILL, 9)
    assert finetune(job, output, before=functools.partial(save_often, kill)).status == -signal.SIGKILL
    for free in (150_000, 2_000):  # less than a state, than the smallest file
        full = finetune(job, output, "--resume", before=functools.partial(full_disk, free))
        assert full.status == 2
        assert full.err.startswith(f"fastft: --output '{output}': the disk is full; nothing that was saved is lost")
        assert full.err.count("\n") == 1
    assert finetune(job, output, "--resume").status == 0
    assert_same_run(output, undisturbed)


# ---- what is refused, and the folder stays as it is


@pytest.fixture(scope="module")
def interrupted(job, tmp_path_factory):
    output = tmp_path_factory.mktemp("interrupted") / "output"
    stop = functools.partial(signal_at_step, signal.SIGKILL, STEPS + 4)
    assert finetune(job, output, before=stop).status == -signal.SIGKILL
    return output


def resumed(job, output, data=REVIEWS, **options):
    options = {"epochs": 3, "batch_size": 16, "learning_rate": 3e-3, "quiet": True, "resume": True, **options}
    return fastft.finetune(data, options.pop("model", job), output, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 4}, "finetune: epochs=4, but the run in output='{}' was begun with epochs=3: resume with that"),
        ({"patience": 2}, "finetune: patience=2, but the run in output='{}' was begun with patience=None"),
        ({"seed": 1}, "finetune: seed=1, but the run"),
        ({"data": make_reviews(300, seed=1)}, "finetune: the data given is not what the run in output='{}' was begun"),
        ({"validation": make_reviews(50, seed=1)}, "finetune: the data given is not what the run"),
        ({"resume": False}, "output='{}' holds an interrupted run: resume=True goes on with it, overwrite=True"),
        ({"overwrite": True}, "finetune: resume=True goes on with a run, overwrite=True replaces it: pass one of them"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_goes_on_as_it_was_begun_or_not_at_all(job, interrupted, options, message):
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    with pytest.raises((ValueError, OSError)) as caught:
        resumed(job, interrupted, **options)
    assert str(caught.value).startswith(message.format(interrupted)) and "\n" not in str(caught.value)
    lock = interrupted / run_folder.LOCK  # was left by the killed run, and is taken away with the first lock after it
    assert {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()} | {lock: b""} == before | {
        lock: b""
    }


def test_another_model_is_not_resumed(job, interrupted, tmp_path):
    with pytest.raises(ValueError, match=r"the model given is not what the run in .* was begun with"):
        resumed(job, interrupted, model=make_checkpoint(tmp_path, seed=1))


def test_a_model_or_data_that_has_moved_is_resumed(job, interrupted, undisturbed, tmp_path):
    model, output = shutil.copytree(job, tmp_path / "model"), shutil.copytree(interrupted, tmp_path / "output")
    resumed(job, output, model=model)
    assert (output / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


def test_nothing_to_resume(job, undisturbed, tmp_path):
    with pytest.raises(FileExistsError, match="holds a run that was finished, there is nothing to resume"):
        resumed(job, undisturbed)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds files, but no interrupted run, there is nothing to resume"):
        resumed(job, tmp_path)


def test_damaged_state_is_named(job, interrupted, tmp_path):
    output = shutil.copytree(interrupted, tmp_path / "output")
    state = output / run_folder.KEPT / resume.STATE
    os.truncate(state, state.stat().st_size - 100)
    with pytest.raises(ValueError, match=r"state.safetensors is damaged \(.*\): overwrite=True starts anew"):
        resumed(job, output)
    os.truncate(output / run_folder.KEPT / "run.json", 10)
    with pytest.raises(ValueError, match=r"run.json is damaged \(.*\): overwrite=True starts anew"):
        resumed(job, output)
    assert resumed(job, output, resume=False, overwrite=True, epochs=1).output == output
    assert not (output / run_folder.KEPT).exists()


def test_one_run_at_a_time_in_a_folder(job, tmp_path):
    with (
        run_folder.locked(tmp_path),
        pytest.raises(BlockingIOError, match=rf"is being written by another run, process {os.getpid()}$"),
    ):
        resumed(job, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [(), ("--resume",), ("--overwrite",)])
def test_a_run_under_way_is_not_taken_for_an_interrupted_one(tmp_path, options):
    rows = "".join(f"some words {row},{'ab'[row % 2]}\n" for row in range(40))
    (tmp_path / "a.csv").write_text(f"text,label\n{rows}")
    with run_folder.locked(tmp_path / "out") as folder:
        run_folder.begin(folder, {})
        done = processes.at_once("finetune", "a.csv", "--model", "m", "--output", "out", *options, cwd=tmp_path)
    said = f"fastft: --output 'out' is being written by another run, process {os.getpid()}\n"
    assert (done.status, done.err) == (2, said)


def test_state_holds_no_pickle(interrupted):
    assert {path.suffix for path in (interrupted / run_folder.KEPT).iterdir()} == {".safetensors", ".json"}
    with safe_open(interrupted / run_folder.KEPT / resume.STATE, "pt") as state:
        assert {name.split(".")[0] for name in state.keys()} == {"model", "optimizer", "rng", "predictions"}  # noqa: SIM118
