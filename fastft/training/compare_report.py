"""What ``fastft compare`` says: sentences, tables, a JSON object, and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Column, Table
from rich.text import Text

from fastft.models.report import NOT_REPLACED
from fastft.testing.measure import LONG_RATIO
from fastft.training.compare_run import FASTFT, OTHER_SEED, PAIRS, PHASES, REVERSED, STOCK, Parity, Timed
from fastft.training.lines import kernels_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[list[str]]  # the first is the header

GAIN = (
    "Times as fast: stock's time over the variant's, on the same batch. Memory: what the step on the longest batch "
    "adds to weights and optimizer state."
)
NUMBERS = "float64: the same model on the same batch in double precision, taken for the truth."
LOSSES = (
    "Rows in reverse order change nothing but rounding, another seed what dropout draws. fastft draws other random "
    "numbers than stock does, so with dropout its curve differs from stock's as that of another seed does."
)


@dataclass(frozen=True, repr=False)
class CompareResult:
    """What :func:`fastft.compare` found. Prints as tables below :attr:`verdict`.

    Attributes:
        facts: what was trained on what, by name, one line each.
        options: the arguments, with what was assumed where none was given.
        parity: how far results are apart with dropout off, and what ran where.
        losses: of every step, by variant, with ``dropout_off`` and ``dropout_on``.
        times: seconds, by variant.
        tokens: real ones in a batch, on average.
        memory: by variant: bytes ``kept`` for the backward, growth during a ``step``.
        padding: its share in batches, ``grouped`` by length or ``ungrouped``.
        rows: of the job that is projected.
        conditions: machine, versions, date, command.
    """

    facts: dict[str, str]
    options: dict[str, Any]
    parity: Parity
    losses: dict[str, dict[str, list[float]]]
    times: dict[str, Timed]
    tokens: float
    memory: dict[str, dict[str, int | None]]
    padding: dict[str, float]
    rows: int
    conditions: dict[str, Any]

    @property
    def differs(self) -> bool:
        """Whether fastft's results are further from the truth than the error budget allows."""
        return self.parity.differs is not None

    @property
    def slower(self) -> list[str]:
        """The variants that are slower than stock."""
        return [name for name, run in self.times.items() if is_slower(run)]

    @property
    def is_good(self) -> bool:
        """Whether fastft's kernels run, none of its variants is slower and nothing differs."""
        return bool(self.parity.calls) and not self.slower and not self.differs

    @property
    def verdict(self) -> list[str]:
        """Sentences, bad news first."""
        return verdict(self.parity, {name: run for name, run in self.times.items() if name != STOCK})

    @property
    def steps(self) -> int:
        """Of the job that is projected."""
        return self.options["epochs"] * math.ceil(self.rows / self.options["batch_size"])

    def seconds(self, name: str) -> float:
        """That the job's training will take with a variant; reading and validation come on top."""
        return self.steps * self.times[name].mean

    def cost(self, name: str) -> float | None:
        """Of the job, in the currency of the price; None without one."""
        price = self.options["price"]
        return None if price is None else self.seconds(name) / 3600 * price

    def as_dict(self) -> dict[str, Any]:
        """For JSON: times in seconds, memory in bytes, None for numbers that are not finite."""
        variants = {
            name: {
                "step": asdict(run.step),
                "step_times_as_fast": asdict(run.ratio),
                "mean": run.mean,
                "times_as_fast": run.speedup,
                "phases": run.phases,
                "tokens_per_s": self.tokens / run.mean,
                "memory": self.memory[name],
                "projected": {"seconds": self.seconds(name), "cost": self.cost(name)},
            }
            for name, run in self.times.items()
        }
        return _finite(
            {
                "verdict": {"sentences": self.verdict, "differs": self.differs, "slower": self.slower},
                "facts": self.facts,
                "options": self.options,
                "numbers": {**self.parity.numbers, "budget_exceeded": self.parity.differs},
                "losses": self.losses,
                "variants": variants,
                "padding": self.padding,
                "job": {"rows": self.rows, "steps": self.steps},
                "kernels": {"calls": self.parity.calls, **self.parity.report.as_dict()},
                "conditions": self.conditions,
            }
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.verdict[0], style="bold green" if self.is_good else "bold red")
        yield from map(Text, self.verdict[1:])
        yield ""
        facts = Table.grid("", Column(overflow="fold"), padding=(0, 2, 0, 0))
        for fact in self._facts().items():
            facts.add_row(*map(Text, fact))
        yield facts
        for title, (rows, note) in self.tables().items():
            yield Group("", Text(title, style="bold"), _rich_table(rows), Text(note, style="dim"))
        if self.parity.differs:
            yield Group("", Text("Beyond the error budget", style="bold"), Text(self.parity.differs))

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=80, color_system=None, highlight=False)
        console.print(self)
        return "\n".join(map(str.rstrip, console.file.getvalue().rstrip().splitlines()))

    __repr__ = __str__

    def _facts(self) -> dict[str, str]:
        facts = self.conditions
        where = facts["cpu"] if self.conditions["device"] == "cpu" else ", ".join(facts["gpus"])
        return {
            **self.facts,
            "job": f"{self.options['epochs']} epochs of {self.rows:,} rows, {self.steps:,} steps; reading and "
            "validation come on top",
            "kernels": _kernels(self.parity),
            "machine": f"{where}, {facts['threads']} threads; fastft {facts['fastft']}, torch {facts['torch']}, "
            f"transformers {facts['transformers']}",
        }

    def tables(self) -> dict[str, tuple[Rows, str]]:
        """Title -> rows and a note: what both ways of showing them, in a terminal and in HTML, have in common."""
        steps = self.options["steps"]
        return {
            f"Time and memory, {steps} steps of each in turn": (self._gain_rows(), GAIN),
            "Differences with dropout off, beside the mean size of the true values": (self._number_rows(), NUMBERS),
            f"Losses of {steps} steps, beside stock's": (self._loss_rows(), LOSSES),
        }

    def _gain_rows(self) -> Rows:
        def row(title: str, cell: Callable[[Timed], str]) -> list[str]:
            return [title, *map(cell, self.times.values())]

        price = self.options["price"]
        rows = [
            ["", *self.times],
            row("step, median", lambda run: _ms(run.step.median)),
            row("  quartiles", lambda run: f"{run.step.low * 1e3:.4g} - {run.step.high * 1e3:.4g} ms"),
            row("  times as fast", lambda run: f"{run.ratio.median:.2f}"),
            row("  quartiles", lambda run: f"{run.ratio.low:.2f} - {run.ratio.high:.2f}"),
            row("step, mean", lambda run: _ms(run.mean)),
            row("  times as fast", lambda run: f"{run.speedup:.2f}"),
            *(row(f"  {phase}", lambda run, phase=phase: _ms(run.phases[phase])) for phase in PHASES),
            row("tokens/s", lambda run: f"{self.tokens / run.mean:,.0f}"),
            ["memory, longest step", *(_mb(found["step"]) for found in self.memory.values())],
            ["  kept for backward", *(_mb(found["kept"]) for found in self.memory.values())],
            ["job, all steps", *(_clock(self.seconds(name)) for name in self.times)],
        ]
        if price is not None:
            rows.append([f"  cost at {price:g} an hour", *(f"{self.cost(name):.4g}" for name in self.times)])
        return rows

    def _number_rows(self) -> Rows:
        rows = [["", *PAIRS.values(), "size"]]
        for name, row in self.parity.numbers.items():
            rows.append([f"{name}, largest", *(f"{row[pair]['max']:.1e}" for pair in PAIRS), ""])
            rows.append(["  mean", *(f"{row[pair]['mean']:.1e}" for pair in PAIRS), f"{row['size']:.1e}"])
        return rows

    def _loss_rows(self) -> Rows:
        rows = [["", "first", "last", "largest difference"]]
        for key, title in (("dropout_off", "dropout off"), ("dropout_on", "dropout on")):
            curves = self.losses[key]
            for name, curve in curves.items():
                apart = max(abs(a - b) for a, b in zip(curve, curves[STOCK], strict=True))
                shown = "" if name == STOCK else f"{apart:.1e}"
                rows.append([f"{title}: {name}", f"{curve[0]:.6f}", f"{curve[-1]:.6f}", shown])
        return rows


# ---- the verdict


def is_slower(run: Timed) -> bool:
    """Whether a variant breaks the promise to be never slower: by more than that allows over all steps or in the
    median, or by however little in three steps of four."""
    return min(run.speedup, run.ratio.median) < 1 / LONG_RATIO or run.ratio.high < 1


def verdict(parity: Parity, runs: Mapping[str, Timed]) -> list[str]:
    """Sentences about fastft's variants, ``runs`` by name, bad news first."""
    bad, good = [], []
    if parity.differs:
        bad.append("fastft DIFFERS from stock here: its error is beyond the error budget, see the end.")
    for name, run in runs.items():
        steps = f"single steps {run.ratio.low:.2f} to {run.ratio.high:.2f}"
        if is_slower(run):
            least = min(run.speedup, run.ratio.median)
            bad.append(f"{name} is SLOWER than stock here, {least:.2f} times as fast ({steps}).")
        elif run.speedup > 1 and run.ratio.low > 1:
            good.append(f"{name} trains {run.speedup:.2f} times as fast as stock here ({steps}).")
        else:
            good.append(f"{name} is as fast as stock within the noise, {run.speedup:.2f} times ({steps}).")
    if not parity.calls:
        bad.append(f"NONE of fastft's kernels ran here: {_why_none(parity)}.")
    elif not parity.differs:
        good.append("fastft's logits, loss and gradients are as close to float64's as stock's own (error budget).")
    return bad + good


def _why_none(parity: Parity) -> str:
    reasons = Counter(line.reason for line in parity.report.lines if line.reason not in (None, NOT_REPLACED))
    return reasons.most_common(1)[0][0] if reasons else "every call is too small to gain"


def _kernels(parity: Parity) -> str:
    ours, *torchs = kernels_lines(parity.report)
    return "; ".join([f"{ours}, {sum(parity.calls.values())} calls a step", *torchs])


# ---- cells


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"


def _mb(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.1f} MB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _rich_table(rows: Rows) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for index, column in enumerate(rows[0]):
        table.add_column(Text(column), justify="right" if index else "left")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    return table


# ---- JSON and HTML


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222; }}
h1 {{ font-size: 1.5em; color: {color}; }}
h2 {{ font-size: 1.1em; margin: 2em 0 .5em; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2em 1em .2em 0; text-align: right; border-bottom: 1px solid #ddd; white-space: pre; }}
th:first-child, td:first-child {{ text-align: left; }}
.facts td {{ text-align: left; white-space: normal; vertical-align: top; }}
.note {{ color: #666; font-size: .9em; }}
pre {{ background: #f6f6f6; padding: 1em; overflow-x: auto; }}
img {{ max-width: 100%; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def page(result: CompareResult) -> str:
    """The HTML page: verdict, facts, plots, tables, and the whole report of what runs where."""
    parts = [f"<p>{_text(sentence)}</p>" for sentence in result.verdict[1:]]
    facts = {**result._facts(), "command": result.conditions["command"], "date": result.conditions["date"]}
    parts.append(_html_table([list(fact) for fact in facts.items()], kind="facts"))
    image = f"data:image/svg+xml;base64,{_svg(_figure(result))}"
    parts.append(f'<p><img alt="Losses, time of a step, errors" src="{image}"></p>')
    for title, (rows, note) in result.tables().items():
        parts += [f"<h2>{_text(title)}</h2>", _html_table(rows), f'<p class="note">{_text(note)}</p>']
    if result.parity.differs:
        parts += ["<h2>Beyond the error budget</h2>", f"<pre>{_text(result.parity.differs)}</pre>"]
    parts += ["<h2>What runs where</h2>", f"<pre>{_text(str(result.parity.report))}</pre>"]
    color = "#156b2e" if result.is_good else "#b00020"
    return _PAGE.format(title=_text(result.verdict[0]), color=color, body="\n".join(parts))


def _text(text: str) -> str:
    return html.escape(text)


def _html_table(rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table; of the kind "facts" without a header."""
    lines = []
    for index, row in enumerate(rows):
        cell = "td" if kind or index else "th"
        lines.append("<tr>" + "".join(f"<{cell}>{_text(value)}</{cell}>" for value in row) + "</tr>")
    return f'<table class="{kind}">\n' + "\n".join(lines) + "\n</table>"


def _figure(result: CompareResult) -> Figure:
    """Losses without and with dropout, phases of a step, errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    off, on, phases, errors = figure.subplots(2, 2).flat
    styles = ("-", "--", ":", "-.")
    for axes, key, title in ((off, "dropout_off", "loss, dropout off"), (on, "dropout_on", "loss, dropout on")):
        for index, (name, curve) in enumerate(result.losses[key].items()):
            color = "grey" if name in (REVERSED, OTHER_SEED) else f"C{index}"
            axes.plot(range(1, len(curve) + 1), curve, styles[index % 4], color=color, label=name)
        axes.set(title=title, xlabel="step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=8)
    left = [0.0] * len(result.times)
    for phase in PHASES:
        widths = [run.phases[phase] * 1e3 for run in result.times.values()]
        phases.barh(list(result.times), widths, left=left, height=0.5, label=phase)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    phases.invert_yaxis()
    phases.set(title="where the time of a step goes", xlabel="ms, mean")
    phases.legend(fontsize=8, ncols=len(PHASES), loc="upper center", bbox_to_anchor=(0.5, -0.2))
    for index, (pair, label) in enumerate((("stock_exact", STOCK), ("fastft_exact", FASTFT))):
        means = [row[pair]["mean"] / row["size"] for row in result.parity.numbers.values()]
        errors.plot(list(result.parity.numbers), means, ("o", "x")[index], color=f"C{index}", label=label)
    errors.set(title="mean error against float64 / mean size", yscale="log")
    errors.margins(x=0.3, y=0.3)
    errors.legend(fontsize=8)
    return figure


def _svg(figure: Figure) -> str:
    """In base64, the same bytes for the same figure."""
    import matplotlib

    image = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fastft"}):
        figure.savefig(image, format="svg", metadata={"Date": None})
    return base64.b64encode(image.getvalue()).decode()
