"""Turns results into what people read: Markdown tables, plots, and the README's table between its two markers.

A result file is JSON: {"benchmark", "conditions", "peaks", "rows"}. ``--save`` of a benchmark writes it with its table
and plot into benchmarks/results/<machine>-<date>/; ``python -m benchmarks.report FOLDER`` renders them again and writes
the README's part from FOLDER.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastft.testing.timing import conditions, machine_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"

STOCK, FASTFT, CONTROL = "stock", "fastft", "fastft, dropout 0.3"  # what benchmarks.accuracy runs
SETTINGS = ("steps", "batch_size", "texts", "held_out", "learning_rate")  # of its runs, without seed and provider
ERRORS = 3  # standard errors by which means of paired differences may be off

Row = Mapping[str, Any]
Results = dict[str, Any]


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The options that all benchmarks share."""
    parser.add_argument("--rounds", type=int, default=rounds, help=f"samples per provider ({rounds})")
    parser.add_argument("--threads", type=int, help="torch's number of threads (torch's own default)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--save", action="store_true", help="write JSON, table and plot under benchmarks/results/")


def publish(
    benchmark: str,
    rows: Sequence[Row],
    peaks: Mapping[str, Row],
    options: argparse.Namespace,
    add_by: Sequence[str] = (),
) -> None:
    """Prints a benchmark's table, and writes what the options ask for.

    add_by: a saved row that differs from all of these rows in one of these fields is kept, so that a long benchmark can
        be measured in pieces.
    """
    results = _results(benchmark, rows, peaks)
    print(render(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.save:
        print(f"saved to {_save(results, add_by).relative_to(ROOT)}", file=sys.stderr)


def keep(benchmark: str, rows: Sequence[Row], options: argparse.Namespace, add_by: Sequence[str]) -> None:
    """Saves, where that was asked for, what there is so far of a benchmark that takes long; nothing is printed."""
    if options.save:
        _save(_results(benchmark, rows, {}), add_by)


def _results(benchmark: str, rows: Sequence[Row], peaks: Mapping[str, Row]) -> Results:
    return {"benchmark": benchmark, "conditions": conditions(), "peaks": dict(peaks), "rows": list(rows)}


def _save(results: Results, add_by: Sequence[str]) -> Path:
    """The folder that the results, their table and their plot were written to."""
    folder, benchmark = _folder(results["conditions"]), results["benchmark"]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{benchmark}.json"
    if add_by and file.is_file():
        results = _together(json.loads(file.read_text()), results, add_by)
    file.write_text(json.dumps(results, indent=1) + "\n")
    write(folder, benchmark)
    return folder


def _folder(facts: Mapping[str, Any]) -> Path:
    return RESULTS / f"{machine_name(facts)}-{facts['date']}"


def saved(benchmark: str) -> list[Row]:
    """The rows that were saved on this machine today."""
    file = _folder(conditions()) / f"{benchmark}.json"
    return json.loads(file.read_text())["rows"] if file.is_file() else []


def _together(earlier: Results, now: Results, add_by: Sequence[str]) -> Results:
    """The rows of both, of two measurements of the same the later one; peaks are the better ones."""
    rows = {tuple(row[name] for name in add_by): row for results in (earlier, now) for row in results["rows"]}
    peaks = earlier["peaks"] | {
        isa: {name: max(value, earlier["peaks"].get(isa, {}).get(name, value)) for name, value in found.items()}
        for isa, found in now["peaks"].items()
    }
    commands = dict.fromkeys((*earlier["conditions"]["command"].split("; "), now["conditions"]["command"]))
    conditions = {**now["conditions"], "command": "; ".join(commands)}
    return {**now, "conditions": conditions, "peaks": peaks, "rows": list(rows.values())}


def write(folder: Path, benchmark: str) -> None:
    """The table and the plot of one result file in a folder of results."""
    results = json.loads((folder / f"{benchmark}.json").read_text())
    (folder / f"{benchmark}.md").write_text(render(results))
    if benchmark not in NO_PLOT:
        plot(results, folder / f"{benchmark}.png")


# ---- tables


def render(results: Results) -> str:
    """Markdown: the table, and below it the conditions that its figures depend on."""
    rows, benchmark = results["rows"], results["benchmark"]
    if benchmark == "grid":
        slower = [_grid_cells(row) for row in rows if row["slower"]]
        text = (table(slower) if slower else "") + _grid_summary(rows) + _grid_overview(rows)
    else:
        text = table(TABLES[benchmark](rows))
    return text + "\n" + _conditions(results) + "\n"


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown with aligned columns; the keys of the first row are the header."""
    if not rows:
        return "nothing measured\n"
    lines = [list(rows[0]), *([row[name] for name in rows[0]] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([text[0], rule, *text[1:]]) + "\n"


def _ops_cells(row: Row) -> dict[str, str]:
    return {
        "op": row["op"],
        "shape": row["sample"],
        "pass": row["path"],
        "dtype": row["dtype"],
        "kernel": row["kernel"],
        "fastft ms": _time(row["fastft"]),
        "torch ms": _time(row["torch"]),
        "x torch": _ratio(row["ratio"]),
        "alone ms": _time(row["alone"]) if row["alone"] else "-",
        "% of floor: alone": _percent(row["shares"]["alone"]),
        "fastft": _percent(row["shares"]["fastft"]),
        "torch": _percent(row["shares"]["torch"]),
        "kept MB": _pair(row["kept"]),
    }


def _grid_cells(row: Row) -> dict[str, str]:
    ours, theirs = row["fastft"]["median"], row["torch"]["median"]
    cells = _ops_cells(row)
    shown = {
        name: cells[name] for name in ("op", "shape", "pass", "dtype", "kernel", "fastft ms", "torch ms", "x torch")
    }
    return {**shown, "us more": f"{(ours - theirs) * 1e6:.1f}"}


def _grid_summary(rows: Sequence[Row]) -> str:
    slower = sum(row["slower"] for row in rows)
    ours = sum(row["kernel"] != "torch" for row in rows)
    return (
        f"\n{slower} of {len(rows)} cells are slower than allowed: above 1.03 x PyTorch's time, or above 10 us more "
        f"where that is below 100 us. Our kernel ran in {ours} of them all, PyTorch's in {len(rows) - ours}.\n\n"
    )


def _grid_overview(rows: Sequence[Row]) -> str:
    """Every cell in a few characters: a line per size, a column per dtype and pass."""
    lines: dict[tuple, dict[str, str]] = {}
    columns = dict.fromkeys(f"{row['dtype']} {row['path']}" for row in rows)
    for row in rows:
        of_size = lines.setdefault(
            (row["isa"], row["op"], row["sample"]),
            {"isa": row["isa"], "op": row["op"], "shape": row["sample"], **dict.fromkeys(columns, "-")},
        )
        marks = (" torch" if row["kernel"] == "torch" else "") + (" SLOWER" if row["slower"] else "")
        of_size[f"{row['dtype']} {row['path']}"] = f"{row['ratio']['median']:.2f}{marks}"
    legend = 'Times faster than PyTorch\'s op; "torch": its kernel ran.'
    return f"{legend}\n\n{table(list(lines.values()))}"


def _cell_of(row: Row) -> dict[str, str]:
    uneven = ", uneven" if row.get("padding") == "uneven" else ""
    return {
        "model": row["model"],
        "batch x length": f"{row['batch']} x {row['length']}{uneven}",
        "dtype": row["dtype"],
        "runs": row["provider"],
    }


def _step_cells(row: Row) -> dict[str, str]:
    return {
        **_cell_of(row),
        "step ms": _time(row["time"]),
        "x stock": _ratio(row["ratio"]),
        "tokens/s": f"{row['batch'] * row['length'] / row['time']['median']:,.0f}",
        "% of FMA peak": _percent(row["share"]),
        "goal": _percent(row.get("goal")),
        "activations MB": f"{row['kept'] / 1e6:,.0f}" if row["kept"] is not None else "-",
    }


def _step_rows(rows: Sequence[Row]) -> list[dict[str, str]]:
    shown = [_step_cells(row) for row in rows]
    if not any(row.get("goal") for row in rows):
        for cells in shown:
            del cells["goal"]
    return shown


def _parts_cells(row: Row) -> dict[str, str]:
    return {
        **_cell_of(row),
        "part": row["part"],
        "ms": f"{row['seconds'] * 1e3:.1f}",
        "% of step": _percent(row["seconds"] / row["step"]),
        "floor ms": f"{row['floor'] * 1e3:.1f}" if row["floor"] else "-",
        "% of floor": _percent(row["floor"] / row["seconds"]) if row["floor"] and row["seconds"] > 0 else "-",
    }


def _memory_cells(row: Row) -> dict[str, str]:
    return {
        **_cell_of(row),
        "activations MB": f"{row['growth'] / 1e6:,.0f}",
        "% of stock": _percent(row["share"]),
        "goal": _percent(row["goal"]),
        "step ms": _time(row["time"]) if "time" in row else "-",
        "x stock": _ratio(row["ratio"]) if "ratio" in row else "-",
    }


def _inference_cells(row: Row) -> dict[str, str]:
    return {
        **_cell_of(row),
        "ms": _time(row["time"]),
        "x stock": _ratio(row["ratio"]),
        "% of FMA peak": _percent(row["share"]),
    }


def _peers_cells(row: Row) -> dict[str, str]:
    return {
        "op": row["op"],
        "shape": row["sample"],
        "dtype": row["dtype"],
        "runs": row["provider"],
        "forward+backward ms": _time(row["time"]),
        "x torch": _ratio(row["ratio"]),
    }


def _finetune_rows(rows: Sequence[Row]) -> list[dict[str, str]]:
    """With ratios to what runs of the same job have in common with each."""
    seconds = {_finetune_key(row): row["seconds"] for row in rows}

    def times(row: Row, base: str) -> str:
        other = seconds.get(_finetune_key({**row, "provider": base}))
        return f"{other / row['seconds']:.2f}" if other else "-"

    return [
        {
            "job": f"{row['job']}, {row['texts']} texts",
            "dtype": row["dtype"],
            "runs": row["provider"],
            "training s": f"{row['seconds']:.1f}",
            "x Trainer": times(row, "Trainer"),
            "x Trainer, by length": times(row, "Trainer, by length"),
            "padding": _percent(row["padding"]),
            "accuracy": f"{row['accuracy']:.3f}",
        }
        for row in rows
    ]


def _finetune_key(row: Row) -> tuple:
    return tuple(row[name] for name in ("job", "texts", "dtype", "provider", "batch_size"))


def _accuracy_rows(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Means over seeds, and how far from stock's they are, with the standard error of the paired differences."""
    shown = []
    for of in _accuracy_settings(rows):
        for provider in dict.fromkeys(row["provider"] for row in of):
            runs = [row for row in of if row["provider"] == provider]
            line = {"steps x batch": f"{runs[0]['steps']} x {runs[0]['batch_size']}"}
            line |= {"runs": provider, "seeds": str(len(runs))}
            for name in ("loss", "accuracy"):
                mean, error = paired(of, provider, name)
                line[name] = f"{statistics.mean(row[name] for row in runs):.4f}"
                line[f"{name} - stock's"] = "-" if error is None else f"{mean:+.4f} ± {error:.4f}"
                agrees = "-" if error is None else "yes" if _agrees(mean, error) else "no"
                line[f"{name} as stock's"] = agrees
            shown.append(line)
    return shown


def _accuracy_settings(rows: Sequence[Row]) -> list[list[Row]]:
    """Runs that differ in seed and provider only belong together."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in SETTINGS)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def paired(rows: Sequence[Row], provider: str, name: str) -> tuple[float, float | None]:
    """The mean over seeds of what a provider's runs have more than stock's, and its standard error, None where there
    are fewer than two pairs."""
    found = {(row["provider"], row["seed"]): row[name] for row in rows}
    seeds = [seed for of, seed in found if of == provider and (STOCK, seed) in found]
    if provider == STOCK or len(seeds) < 2:
        return 0.0, None
    differences = [found[provider, seed] - found[STOCK, seed] for seed in seeds]
    return statistics.mean(differences), statistics.stdev(differences) / len(seeds) ** 0.5


def _agrees(mean: float, error: float) -> bool:
    return abs(mean) <= ERRORS * error


def trains_as_stock(rows: Sequence[Row]) -> bool | None:
    """Whether fastft's losses and accuracies agree with stock's and the control's do not; None: too few runs to say."""
    wanted = [(provider, name) for provider in (FASTFT, CONTROL) for name in ("loss", "accuracy")]
    found = {key: paired(rows, *key) for key in wanted}
    if any(error is None for _, error in found.values()):
        return None
    return all(_agrees(*found[key]) == (key[0] == FASTFT) for key in wanted)


def _scaling_cells(row: Row) -> dict[str, str]:
    names = ("model", "tokens", "layer", "pass", "dtype")
    counts = row["threads"].items()
    return {name: str(row[name]) for name in names} | {
        f"{count} threads": f"{share['busiest']:.3f} + {share['serial']:.1%}" for count, share in counts
    }


def _each(cells: Callable[[Row], dict[str, str]]) -> Callable[[Sequence[Row]], list[dict[str, str]]]:
    return lambda rows: [cells(row) for row in rows]


TABLES = {
    "ops": _each(_ops_cells),
    "grid": _each(_grid_cells),
    "scaling": _each(_scaling_cells),
    "step": _step_rows,
    "parts": _each(_parts_cells),
    "memory": _each(_memory_cells),
    "inference": _each(_inference_cells),
    "finetune": _finetune_rows,
    "accuracy": _accuracy_rows,
    "peers": _each(_peers_cells),
    "gpu": _each(dict),
}
NO_PLOT = ("gpu",)


def _time(spread: Row) -> str:
    half = (spread["high"] - spread["low"]) / 2 / spread["median"]
    return f"{spread['median'] * 1e3:.4g} ± {half:.1%}"


def _ratio(spread: Row) -> str:
    return f"{spread['median']:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _pair(kept: Sequence[int] | None) -> str:
    return "-" if kept is None else f"{kept[0] / 1e6:.1f} (torch {kept[1] / 1e6:.1f})"


def _conditions(results: Results) -> str:
    facts = results["conditions"]
    where = ", ".join(facts["gpus"]) if "--device cuda" in facts["command"] else facts["cpu"]
    peaks = "; ".join(f"{name}: {_limits(rates)}" for name, rates in results["peaks"].items())
    measured = f"Peaks of the same run: {peaks}. Medians of interleaved rounds ± half the distance of the quartiles."
    return (
        f"{where}, {facts['threads']} threads; fastft {facts['fastft']}, torch {facts['torch']}, "
        f"transformers {facts['transformers']}; {facts['date']}; `{facts['command']}`\n{measured if peaks else ''}"
    )


def _limits(rates: Mapping[str, float]) -> str:
    single, half = rates["float32_per_s"], max(rates["float32_per_s"], rates["bfloat16_per_s"])
    text = f"{single / 1e9:.0f} GFLOP/s float32, {half / 1e9:.0f} bfloat16"
    if tile := rates.get("tile_float32_per_s"):
        text += f" (a register tile in L1: {_percent(tile / single)}, {_percent(rates['tile_bfloat16_per_s'] / half)})"
    return f"{text}, copy {rates['copy_per_s'] / 1e9:.1f} GB/s"


# ---- plots


def plot(results: Results, path: Path) -> None:
    """What the results look like."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in results["rows"] if row.get("provider") != "stock"]
    if draw := PLOTS.get(results["benchmark"]):
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        draw(axes, results["rows"])
    else:
        figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.28 * len(rows)), layout="constrained")
        _bars(axes, rows, LABELS[results["benchmark"]])
    axes.set_title(results["conditions"]["cpu"], fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bars(axes, rows: Sequence[Row], label: Callable[[Row], str]) -> None:
    """A bar per row: how many times faster than PyTorch, with quartiles."""
    ratios = [row["ratio"] for row in rows]
    medians = [ratio["median"] for ratio in ratios]
    spread = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
    colors = ["tab:blue" if median >= 1 else "tab:red" for median in medians]
    bars = axes.barh([label(row) for row in rows], medians, xerr=spread, color=colors, height=0.7)
    axes.bar_label(bars, [f"{median:.2f}" for median in medians], padding=6, fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.set_xlabel("times faster than PyTorch in the same run")


def _grid_plot(axes, rows: Sequence[Row]) -> None:
    """A dot per cell over PyTorch's time; those slower than allowed are red."""
    for slower, color in ((False, "tab:blue"), (True, "tab:red")):
        cells = [row for row in rows if row["slower"] == slower]
        times, ratios = [row["torch"]["median"] for row in cells], [row["ratio"]["median"] for row in cells]
        axes.scatter(
            times, ratios, s=8, color=color, label=f"{len(cells)} {'slower than allowed' if slower else 'fine'}"
        )
    axes.axhline(1, color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="PyTorch's time, s", ylabel="times faster than PyTorch in the same run")
    axes.legend()


def _scaling_plot(axes, rows: Sequence[Row]) -> None:
    """The busiest thread over the number of threads: a line per product, a color per number of tokens."""
    for color, tokens in enumerate(sorted({row["tokens"] for row in rows})):
        lines = [row["threads"] for row in rows if row["tokens"] == tokens]
        for line in lines:
            label = f"{tokens} tokens" if line is lines[0] else None
            axes.plot(
                list(map(int, line)), [s["busiest"] for s in line.values()], color=f"C{color}", lw=0.7, label=label
            )
    axes.set(xscale="log", xlabel="threads", ylabel="busiest thread's time over the mean")
    axes.legend()


def _parts_plot(axes, rows: Sequence[Row]) -> None:
    """A bar per provider and cell, its parts side by side, and below it their floors."""
    bars: dict[str, list[Row]] = {}
    for row in rows:
        bars.setdefault(_cell_label(row), []).append(row)
    colors = {part: f"C{index}" for index, part in enumerate(dict.fromkeys(row["part"] for row in rows))}
    for place, parts in enumerate(bars.values()):
        for name, offset, alpha in (("seconds", -0.2, 1.0), ("floor", 0.2, 0.5)):
            left = 0.0
            for row in parts:
                label = row["part"] if place == 0 and name == "seconds" else None
                axes.barh(place + offset, row[name], 0.38, left, color=colors[row["part"]], alpha=alpha, label=label)
                left += row[name]
    axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a step; pale: floors")
    axes.legend(fontsize=8)


def _memory_plot(axes, rows: Sequence[Row]) -> None:
    """A bar per provider and cell."""
    bars = axes.barh([_cell_label(row) for row in rows], [row["growth"] / 1e6 for row in rows], color="tab:blue")
    axes.bar_label(bars, [f"{row['share']:.0%}" for row in rows], padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.set_xlabel("MB of activations, and their share of stock's")


def _finetune_plot(axes, rows: Sequence[Row]) -> None:
    """A bar per run."""
    names = [f"{row['job']}, {row['dtype']}, {row['provider']}" for row in rows]
    ours = ["tab:blue" if row["provider"].startswith("fastft") else "tab:gray" for row in rows]
    bars = axes.barh(names, [row["seconds"] for row in rows], color=ours)
    axes.bar_label(bars, [f"{row['seconds']:.0f} s" for row in rows], padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.set_xlabel("seconds of training")


def _accuracy_plot(axes, rows: Sequence[Row]) -> None:
    """A dot per figure: the mean difference to stock's, and what it may be."""
    for provider in (FASTFT, CONTROL):
        for name in ("loss", "accuracy"):
            mean, error = paired(_accuracy_settings(rows)[-1], provider, name)
            if error is not None:
                axes.errorbar([mean], [f"{provider}: {name}"], xerr=[ERRORS * error], fmt="o", capsize=4)
    axes.axvline(0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel(f"mean paired difference to stock's, ± {ERRORS} standard errors")


def _cell_label(row: Row) -> str:
    return ", ".join(list(_cell_of(row).values()))


PLOTS = {
    "grid": _grid_plot,
    "scaling": _scaling_plot,
    "parts": _parts_plot,
    "memory": _memory_plot,
    "finetune": _finetune_plot,
    "accuracy": _accuracy_plot,
}
LABELS = {
    "ops": lambda row: f"{row['op']} {row['sample']}, {row['path']}, {row['dtype']}, {row['kernel']}",
    "step": _cell_label,
    "inference": _cell_label,
    "peers": lambda row: f"{row['op']} {row['sample']}, {row['dtype']}, {row['provider']}",
}


# ---- the README


README_ROWS = {  # of a folder that has them, those that the README shows
    "model": ("bert-base",),
    "batch": (16,),
    "length": (128,),
    "padding": ("none",),
    "provider": (STOCK, "fastft, first"),
}


def update_readme(folder: Path, readme: Path) -> None:
    """Writes the training step's table of a folder of results between the README's markers.

    Raises: ValueError: ``README.md needs one <!-- benchmarks:begin --> before one <!-- benchmarks:end -->``
    """
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme.name} needs one {BEGIN} before one {END}")
    results = json.loads((folder / "step.json").read_text())
    of_readme = [row for row in results["rows"] if all(row[name] in README_ROWS[name] for name in README_ROWS)]
    results["rows"] = of_readme or results["rows"]
    conditions, cell = results["conditions"], "x".join(str(README_ROWS[name][0]) for name in ("batch", "length"))
    measured = [command for command in conditions["command"].split("; ") if f"--cell {cell} " in command]
    conditions["command"] = measured[-1] if measured else conditions["command"]  # --save --add: what was added last
    shown = folder.relative_to(readme.parent).as_posix()
    block = f"{BEGIN}\n{render(results)}\n![Speed-up of a training step]({shown}/step.png)\n{END}"
    readme.write_text(text[: text.index(BEGIN)] + block + text[text.index(END) + len(END) :])


def main() -> int:
    """Renders a folder of results again and writes the README's part from it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("folder", type=Path, help="benchmarks/results/<machine>-<date>")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args()
    found = [name for name in TABLES if (options.folder / f"{name}.json").is_file()]
    if not found:
        parser.error(f"{options.folder} holds none of {', '.join(f'{name}.json' for name in TABLES)}")
    for name in found:
        write(options.folder, name)
    if "step" in found:
        update_readme(options.folder.resolve(), options.readme.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
