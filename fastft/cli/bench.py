"""``fastft bench``: what each op gains on this machine, and the measuring that chooses its kernels."""

from typing import Annotated

import typer

from fastft.cli._errors import reporting
from fastft.cli._options import flag, option
from fastft.training.options import numbers, whole

DTYPES = ("float32", "bfloat16")


def bench(
    tune: Annotated[bool, flag("--tune", "Find the faster kernels, which run from then on")] = False,
    op: Annotated[list[str], option("NAME", "Only this op, such as linear_act; repeatable")] = (),
    shape: Annotated[str, option("PART", "Only shapes whose name has this, 2048x or gelu")] = "",
    dtype: Annotated[list[str], option("DTYPE", "float32 or bfloat16; both unless given")] = (),
    rounds: Annotated[int, option("N", "Times that each op is measured (5)")] = 5,
    threads: Annotated[int, option("N", "Of torch; 0 is its own default (0)")] = 0,
    device: Annotated[str, option("DEVICE", "cpu or cuda (cpu)")] = "cpu",
    as_json: Annotated[bool, flag("--json", "One JSON object instead of a table")] = False,
    debug: Annotated[bool, flag("--debug", "Show tracebacks of errors")] = False,
):
    """Time every op, forward and backward, beside PyTorch's (minutes).

    Example: fastft bench --op linear_act --shape 2048x768

    Example: fastft bench --tune
    """
    with reporting(debug, ("rounds", "threads")):
        numbers("bench", locals(), {"rounds": whole(1), "threads": whole(0)})
        import json

        import torch

        from fastft import _library
        from fastft.testing import all_specs
        from fastft.testing.timing import Peaks, conditions

        _check("--op", op, [spec.name for spec in all_specs()])
        _check("--dtype", dtype, DTYPES)
        _check("--device", [device], ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
        if threads:
            torch.set_num_threads(threads)
        if tune:
            if (why_not := _library.why_not()) is not None:
                typer.echo(f"There is nothing to choose from: {why_not}", err=True)
                raise typer.Exit(1)
            raise typer.Exit(_tune(device))
        cases = _cases(op, shape, dtype or DTYPES)
        if not cases:
            raise ValueError(f"--shape {shape!r} is in the name of no shape that is measured")
        peaks = Peaks(device=device)
        rows = _measure(cases, rounds, device, peaks)
        if as_json:
            found = [{**row.as_dict(), "shares": row.shares(peaks)} for row in rows]
            typer.echo(json.dumps({"conditions": conditions(), "peaks": peaks.as_dict(), "rows": found}, indent=1))
        else:
            _show(rows, peaks)


def _check(option, values, allowed):
    for value in values:
        if value not in allowed:
            raise ValueError(f"{option} {value!r} is not one of {', '.join(allowed)}")


def _tune(device):
    """Measures and writes; the exit status."""
    from fastft.functional import _tuning
    from fastft.testing import tune

    tasks = tune.tasks()
    if not _tuning.enabled():
        typer.echo("FASTFT_TUNE is 0: what is measured would not be used", err=True)
        return 1
    tune.choose_bf16(device)
    cells = list(_progress(tune.measured(tasks, device), len(tasks), "finding out which kernels are faster here"))
    if not tune.write(cells, device):
        return 1
    ours = sum(cell.runs == "fastft" for cell in cells)
    typer.echo(
        f"{len(cells)} facts in {_tuning.path()}: fastft's kernel runs in {ours}, PyTorch's in {len(cells) - ours}"
    )
    return 0


def _cases(ops, shape, dtypes):
    """Every shape that is timed as (spec, index of the sample, dtype)."""
    import torch

    from fastft.testing import Timed, all_specs

    return [
        (spec, index, getattr(torch, dtype))
        for spec in all_specs()
        if not ops or spec.name in ops
        for dtype in dtypes
        for index, sample in enumerate(spec.outline())
        if isinstance(sample, Timed) and shape in sample.why
    ]


def _measure(cases, rounds, device, peaks):
    """Rows of the benchmark: forward and backward of every case."""
    from fastft.testing.measure import measure

    rows = (measure(*case, device=device, rounds=rounds, peaks=peaks) for case in cases)
    rows = list(_progress(rows, len(cases), "measuring"))
    peaks.finish()
    return rows


def _progress(steps, total, what):
    from rich.console import Console
    from rich.progress import track

    return track(steps, f"{what}:", total, console=Console(stderr=True), transient=True)


def _show(rows, peaks):
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("shape", "dtype", "runs"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "torch ms", "x torch", "floor"):
        table.add_column(name, justify="right", no_wrap=True)
    for previous, row in zip([None, *rows], rows, strict=False):
        if previous is None or previous.op != row.op:
            table.add_row(f"[bold]{row.op}")
        share = row.shares(peaks)["alone"]
        table.add_row(
            row.sample,
            str(row.dtype).removeprefix("torch."),
            "torch" if row.kernel == "torch" else "fastft",
            f"{row.fastft.median * 1e3:.4g}",
            f"{row.torch.median * 1e3:.4g}",
            f"{row.ratio.median:.2f}",
            "-" if share is None else f"{share:.0%}",
        )
    Console().print(table)
    typer.echo(
        "Forward and backward, medians. Floor: the time at this machine's peak as a share of our kernels' own.\n"
        f"Peak: {peaks}."
    )
