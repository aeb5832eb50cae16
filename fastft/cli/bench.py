"""``fastft bench``: what each op gains on this machine, and the measuring that chooses its kernels."""

from typing import Annotated

import typer


def bench(
    tune: bool = typer.Option(
        False, "--tune", help="Measure which kernels are faster for which sizes, and let that choose from now on."
    ),
    op: Annotated[list[str], typer.Option(help="Only this op, linear_act or cross_entropy; repeatable.")] = (),
    shape: str = typer.Option("", help="Only shapes whose name contains this, as 2048x or gelu."),
    dtype: Annotated[list[str], typer.Option(help="float32 or bfloat16; both unless given.")] = (),
    rounds: int = typer.Option(5, min=1, help="Times that each op is measured, in turns with PyTorch's."),
    threads: int = typer.Option(0, min=0, help="torch's number of threads; its own default if 0."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object instead of a table."),
):
    """Time forward and backward of every op beside PyTorch's, about a minute.

    Example: fastft bench --op linear_act --shape 2048x768

    Example: fastft bench --tune
    """
    import json

    import torch

    from fastft import _library
    from fastft.testing import all_specs
    from fastft.testing.timing import Peaks, conditions

    names = [spec.name for spec in all_specs()]
    _check(op, names, "--op")
    _check(dtype, ["float32", "bfloat16"], "--dtype")
    _check([device], ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"], "--device")
    if threads:
        torch.set_num_threads(threads)
    if tune:
        if (why_not := _library.why_not()) is not None:
            typer.echo(f"There is nothing to choose from: {why_not}", err=True)
            raise typer.Exit(1)
        raise typer.Exit(_tune(device))
    peaks = Peaks(device=device)
    rows = _measure(op or names, shape, dtype or ["float32", "bfloat16"], rounds, device, peaks)
    if as_json:
        found = [{**row.as_dict(), "shares": row.shares(peaks)} for row in rows]
        typer.echo(json.dumps({"conditions": conditions(), "peaks": peaks.as_dict(), "rows": found}, indent=1))
    else:
        _show(rows, peaks)


def _check(values, allowed, option):
    for value in values:
        if value not in allowed:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(allowed)}", param_hint=option)


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


def _measure(names, shape, dtypes, rounds, device, peaks):
    """Rows of the benchmark: forward and backward of every shape that is timed."""
    import torch

    from fastft.testing import Timed, all_specs
    from fastft.testing.measure import measure

    cases = [
        (spec, index, getattr(torch, dtype))
        for spec in all_specs()
        if spec.name in names
        for dtype in dtypes
        for index, sample in enumerate(spec.outline())
        if isinstance(sample, Timed) and shape in sample.why
    ]
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
