"""The timer, the machine's peak, and what benchmarks make of them. No test here depends on how fast anything is."""

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
import time
import weakref

import pytest
import torch

from benchmarks import cells, report, step
from fastft import _library
from fastft.testing import all_specs, timing
from fastft.testing.measure import PASSES, Measurement, measure, paths
from fastft.testing.timing import BeatsPeak, Comparison, Peaks, Spread, compare, kept_for_backward

SPECS = all_specs()
FLOAT = torch.float32


def peaks(**rates):
    return Peaks(windows=5, **{"float32": 100e9, "bfloat16": 200e9, "copy": 10e9, "update": 12e9, **rates})


# ---- timer


def test_the_slower_provider_is_measured_to_be_slower():
    times = compare({"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.003)}, rounds=5)
    assert times["short"].median >= 0.001 and times["long"].median >= 0.003
    assert times.ratio("short", "long").median > 1 > times.ratio("long", "short").median


def test_providers_take_turns_in_alternating_order():
    called = []
    runs = {name: lambda name=name: (called.append(name), time.sleep(0.001)) for name in "ab"}
    compare(runs, rounds=4, sample_s=1e-4)
    assert "".join(called[4:]) == "abbaabba"  # the first four warm up and count calls


def test_a_sample_can_follow_calls_of_its_own_kind():
    called = []
    runs = {name: lambda name=name: (called.append(name), time.sleep(0.001)) for name in "ab"}
    times = compare(runs, rounds=2, sample_s=1e-4, untimed=2)
    assert "".join(called[4:]) == "aaabbbbbbaaa" and times["a"].rounds == 2


def test_short_calls_are_repeated_until_a_sample_is_long_enough():
    called = []
    times = compare({"append": lambda: called.append(0)}, rounds=3, sample_s=1e-3)
    assert len(called) > 3 * 100 and times["append"].median < 1e-4 and times["append"].rounds == 3


def test_a_ratio_is_taken_round_by_round():
    """The machine doubles its time from round to round; the ratio stays 2."""
    times = Comparison({"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 4.0, 8.0]})
    assert times.ratio("ours", "theirs") == Spread(2.0, 2.0, 2.0, 3)


def test_garbage_collection_is_on_again_after_an_exception():
    with pytest.raises(ZeroDivisionError):
        compare({"broken": lambda: 1 / 0})
    assert gc.isenabled()


def test_a_budget_leaves_three_rounds_at_least():
    pause = {"pause": lambda: time.sleep(0.002)}
    assert compare(pause, rounds=50, budget_s=0.0)["pause"].rounds == 3
    assert compare(pause, rounds=50, budget_s=0.05)["pause"].rounds < 50
    assert compare(pause, rounds=5)["pause"].rounds == 5


# ---- peak


@pytest.mark.skipif(not _library.available(), reason=f"no native library: {_library.why_not()}")
@pytest.mark.parametrize("isa", _library.isas())
def test_every_instruction_set_has_a_peak(isa):
    with _library.use_isa(isa):
        assert torch.ops.fastft.peak_f32(0.01) > 1e8
        assert (torch.ops.fastft.peak_bf16(0.01) > 1e8) == (isa == "avx512_bf16")
        assert torch.ops.fastft.tile_f32(0.01) > 1e8
        assert torch.ops.fastft.tile_bf16(0.01) > 1e8


def test_a_run_has_at_least_five_windows(monkeypatch):
    monkeypatch.setattr(Peaks, "COPIED", 1 << 20)
    measured = Peaks(seconds=0.001)
    compare({"nothing": lambda: None}, rounds=3, peaks=measured)
    assert measured.windows == 1
    assert measured.finish().windows == 5
    assert measured.copy > 0 and measured.update > 0 and (measured.float32 > 0) == _library.available()


def test_the_share_is_of_the_peak_of_the_dtype():
    assert peaks().share(50e9, 0, 1.0, torch.float32) == 0.5
    assert peaks().share(50e9, 0, 1.0, torch.float64) == 1.0
    assert peaks().share(50e9, 0, 1.0, torch.bfloat16) == 0.25
    assert peaks(bfloat16=50e9).share(50e9, 0, 1.0, torch.bfloat16) == 0.5  # where VDPBF16PS is slower than FMA


def test_bytes_count_where_no_cache_holds_them(monkeypatch):
    monkeypatch.setattr(timing, "last_level_cache", lambda: 1_000_000_000)
    assert peaks().share(10e9, 5e9, 1.0, torch.float32) == 0.5
    assert peaks().share(10e9, 3e9, 0.2, torch.float32) == 0.5


def test_whatever_beats_the_peak_is_an_error():
    with pytest.raises(BeatsPeak, match=r"120\.0 GFLOP/s in torch\.float32, the peak of this run is 100\.0"):
        peaks().share(120e9, 0, 1.0, torch.float32)
    with pytest.raises(BeatsPeak, match=r"13\.0 GB/s, the peak of this run is 12\.0"):
        peaks().share(0, 13e9, 1.0, torch.float32)
    assert peaks().share(0, 11e9, 1.0, torch.float32) > 1  # faster than a copy, which reads what it overwrites


def test_pytorch_is_not_measured_by_a_capped_peak():
    assert peaks(capped=True).share(120e9, 0, 1.0, torch.float32, pytorch=True) is None
    with pytest.raises(BeatsPeak):
        peaks(capped=False).share(120e9, 0, 1.0, torch.float32, pytorch=True)


def test_without_a_floor_there_is_no_share():
    assert peaks(float32=0, bfloat16=0).share(1e9, 0, 1.0, torch.float32) is None


def measured_as(fastft, torch, rounds=3):
    """A Measurement of which only the times matter."""
    spread = {"fastft": Spread(fastft, fastft, fastft, rounds), "torch": Spread(torch, torch, torch, rounds)}
    ratio = Spread(torch / fastft, torch / fastft, torch / fastft, rounds)
    return Measurement(
        "linear_act",
        "64x64->64",
        "forward",
        FLOAT,
        "avx2",
        **spread,
        ratio=ratio,
        alone=None,
        flops=0,
        bytes=0,
        kept=None,
    )


@pytest.mark.parametrize(
    ("fastft", "torch", "slower"),
    (
        (1.029e-3, 1e-3, False),
        (1.031e-3, 1e-3, True),
        (109e-6, 99.5e-6, False),
        (110e-6, 99.5e-6, True),
        (104e-6, 100e-6, True),
        (12e-6, 3e-6, False),
        (14e-6, 3e-6, True),
        (1e-6, 3e-6, False),
    ),
)
def test_never_slower_is_a_ratio_where_calls_are_long_and_a_check_where_they_are_short(fastft, torch, slower):
    assert measured_as(fastft, torch).slower == slower


# ---- memory


def test_memory_kept_for_the_backward_is_the_output_and_what_autograd_saved():
    x = torch.ones(1000, requires_grad=True)
    assert kept_for_backward(lambda: x * 2, [x]) == 4000  # the output
    assert kept_for_backward(lambda: x.sin(), [x]) == 4000  # saves x, which is the caller's
    assert kept_for_backward(lambda: x.sin().cos(), [x]) == 8000  # saves sin(x)
    assert kept_for_backward(lambda: x.exp(), [x]) == 4000  # saves its output


def test_what_was_counted_does_not_stay():
    def counted():
        x = torch.ones(1000, requires_grad=True)
        kept_for_backward(lambda: x.sin().exp(), [x])
        return weakref.ref(x)

    gone = counted()
    gc.collect()
    assert gone() is None


# ---- benchmarks


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_pass_of_an_op_can_be_measured(spec):
    sample = spec.outline()[0]
    measured = {path: measure(spec, 0, torch.float32, path, rounds=1) for path in paths(spec, sample)}
    assert set(PASSES) <= set(measured)
    for path, row in measured.items():
        assert row.fastft.median > 0 and row.torch.median > 0 and row.path == path
        json.dumps(row.as_dict())
    assert measured["train"].flops == measured["forward"].flops + measured["backward"].flops
    assert measured["train"].kept[0] > 0
    assert not _library.available() or all(row.alone.median > 0 for row in measured.values())


def test_the_wrong_gradient_is_refused():
    with pytest.raises(ValueError, match="linear_act has no gradient of 'x' in 'activation identity', only of input, "):
        measure(next(spec for spec in SPECS if spec.name == "linear_act"), 0, torch.float32, "grad x")


def test_flops_of_a_step():
    """Per token 72 H^2 L for the products, 12 S H L for attention."""
    cell = cells.Cell("bert-base", 16, 128, "float32")
    assert step.step_flops(cell) == 16 * 128 * (72 * 768**2 * 12 + 12 * 128 * 768 * 12)


def test_uneven_batches_have_the_longest_sequence_and_no_flops_of_padding():
    cell = cells.Cell("bert-base", 16, 128, "float32", "uneven")
    lengths = cell.lengths()
    assert max(lengths) == 128 and min(lengths) > 0 and len(set(lengths)) > 10 and lengths != sorted(lengths)
    assert cell.tensors()["attention_mask"].sum(1).tolist() == lengths
    assert cell.forward_flops()[1] == 4 * 768 * 12 * sum(length**2 for length in lengths)
    assert cells.Cell("tiny", 1, 5, "float32", "uneven").lengths() == [5]


def rows_of_a_step():
    spread = {"median": 0.5, "low": 0.4, "high": 0.6, "rounds": 7}
    common = {"model": "minilm", "batch": 4, "length": 8, "dtype": "float32", "time": spread, "kept": None}
    twice = {"median": 2.0, "low": 1.9, "high": 2.1, "rounds": 7}
    return [
        {**common, "provider": "stock", "ratio": {**twice, "median": 1.0}, "share": 0.4},
        {**common, "provider": "fastft", "ratio": twice, "share": None},
    ]


@pytest.fixture
def saved(tmp_path, monkeypatch, capsys):
    """The folder of one saved benchmark."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    options = argparse.Namespace(json=tmp_path / "copy.json", save=True)
    report.publish("step", rows_of_a_step(), {"avx2": peaks().as_dict()}, options)
    (folder,) = (tmp_path / "results").iterdir()
    assert (folder / "step.md").read_text().strip() in capsys.readouterr().out
    return folder


def test_saved_results_are_json_a_table_and_a_plot(saved):
    results = json.loads((saved / "step.json").read_text())
    assert results == json.loads((saved.parent.parent / "copy.json").read_text())
    assert {"cpu", "threads", "torch", "date", "command"} <= results["conditions"].keys()
    lines = (saved / "step.md").read_text().splitlines()
    assert len({len(line) for line in lines[:4]}) == 1  # aligned
    assert "| 2.00 " in lines[3] and "500 ± 20.0%" in lines[3] and "| 40% " in lines[2]
    assert (saved / "step.png").read_bytes().startswith(b"\x89PNG")


def test_a_benchmark_can_be_saved_piece_by_piece(saved):
    options = argparse.Namespace(json=None, save=True)
    first, second = rows_of_a_step()
    later = [{**first, "share": 0.8}, {**second, "provider": "fastft, compiled"}]
    report.publish("step", later, {"avx2": peaks().as_dict()}, options, add_by=("provider",))
    rows = json.loads((saved / "step.json").read_text())["rows"]
    assert [(row["provider"], row["share"]) for row in rows] == [
        ("stock", 0.8),
        ("fastft", None),
        ("fastft, compiled", None),
    ]


def test_the_readme_changes_between_its_markers_only(saved):
    readme = saved.parent.parent / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.update_readme(saved, readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n| model") and text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text and text.count(report.BEGIN) == 1
    assert f"results/{saved.name}/step.png" in text


def test_the_readme_shows_one_cell_of_many(saved):
    results = json.loads((saved / "step.json").read_text())
    results["conditions"]["command"] = "a --cell 16x128 --save; b --cell 16x128 --save; c --cell 64x32 --save"
    shown = [results["rows"][0] | {name: values[0] for name, values in report.README_ROWS.items()}]
    (saved / "step.json").write_text(
        json.dumps(results | {"rows": [*results["rows"], shown[0] | {"length": 32}, *shown]})
    )
    readme = saved.parent.parent / "README.md"
    readme.write_text(report.BEGIN + report.END)
    report.update_readme(saved, readme)
    text = readme.read_text()
    assert text.count("\n| bert-base ") == 1 and "`b --cell 16x128 --save`" in text


def grid_rows():
    rows = []
    for fastft, torch_s in ((1e-3, 2e-3), (2e-3, 1e-3)):
        row = measured_as(fastft, torch_s)
        shares = dict.fromkeys(("alone", "fastft", "torch"))
        rows.append({**row.as_dict(), "isa": "avx2", "slower": row.slower, "shares": shares})
    return rows


def test_the_grid_shows_where_we_are_slower_and_keeps_the_rest(tmp_path):
    results = {"benchmark": "grid", "conditions": timing.conditions(), "peaks": {}, "rows": grid_rows()}
    text = report.render(results)
    assert text.splitlines()[2].startswith("| linear_act | 64x64->64 | forward | float32 | avx2   | 2 ± 0.0%")
    assert "1 of 2 cells are slower than allowed" in text and text.count("| 64x64->64 ") == 2
    assert "| avx2 | linear_act | 64x64->64 | 0.50 SLOWER " in text  # the later of the two
    report.plot(results, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.grid], ids=lambda spec: spec.name)
def test_every_cell_of_a_grid_can_be_made(spec):
    gridded = dataclasses.replace(spec, samples=spec.grid)
    sizes = [spec.sizes(**spec.named(sample)) for sample in gridded.outline()]
    assert len(set(sizes)) == len(sizes) >= 20
    row = measure(gridded, 0, torch.float32, "forward", rounds=1, op_only=True)
    assert row.alone is None and row.kept is None and row.sample == gridded.outline()[0].why


@pytest.mark.parametrize("text", ("", report.BEGIN, f"{report.END}{report.BEGIN}", f"{report.BEGIN}{report.END}" * 2))
def test_a_readme_without_its_markers_is_left_alone(saved, text):
    readme = saved.parent.parent / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match=r"README\.md needs one <!-- benchmarks:begin --> before"):
        report.update_readme(saved, readme)
    assert readme.read_text() == text


def test_every_benchmark_is_listed():
    listed = subprocess.run([sys.executable, "-m", "benchmarks"], capture_output=True, text=True, check=True).stdout
    for name in ("finetune", "inference", "memory", "ops", "scaling", "step", "report"):
        assert f"python -m benchmarks.{name} " in listed
