"""A training step of BERT-base and of MiniLM: stock Transformers in its best honest settings, and with fastft.optimize.

A step is forward, backward, clipping to norm 1 and AdamW, with dropout 0.1, on full batches. Stock has SDPA attention
and the fused AdamW; bfloat16 is autocast, as Trainer(bf16=True) has it. Weights are random: speed does not depend on
them. The share of the FMA peak counts the FLOPs of matrix products and attention. "fastft" computes all that stock
does; "fastft, first" the last layer for first tokens only, as fastft.optimize has it by default for classifiers.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from benchmarks import report
from fastft import _library
from fastft.testing.timing import BeatsPeak, Peaks, Spread, compare, kept_for_backward

MODELS = {  # sizes of BertConfig
    "bert-base": {},
    "minilm": {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536},
}
CELLS = {"bert-base": ("16x128",), "minilm": ("32x128",)}
DTYPES = ("float32", "bfloat16")
OPTIMIZE = {"fastft": {"cls_only": False}, "fastft, first": {}}  # options of fastft.optimize


@dataclass(frozen=True)
class Cell:
    """One row group of the table."""

    model: str
    batch: int
    length: int
    dtype: str


def main() -> int:
    """Measures what the options select and prints the table; 1 if a row beat the peak."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    providers = ["stock", *OPTIMIZE, *(["torch.compile"] if options.compile else [])]
    if options.only:
        providers = ["stock", *options.only]
    peaks, measured = Peaks(device=options.device), []
    for model in options.model or MODELS:
        for size in options.cell or CELLS[model]:
            for dtype in options.dtype or DTYPES:
                cell = Cell(model, *map(int, size.split("x")), dtype)
                measured += _measure(cell, providers, peaks, options)
    peaks.finish()
    rows, failures = [], []
    for row, flops in measured:
        try:
            dtype, pytorch = getattr(torch, row["dtype"]), row["provider"] not in OPTIMIZE
            share = None
            if row["provider"] != "fastft, first":  # which leaves some of them out
                share = peaks.share(flops, 0, row["time"]["median"], dtype, pytorch=pytorch)
        except BeatsPeak as error:
            share = None
            failures.append(f"{row['model']} {row['batch']} x {row['length']}, {row['provider']}: {error}")
        rows.append({**row, "flops": flops, "share": share})
    name = _library.isa() if _library.available() else "none"
    report.publish("step", rows, {name: peaks.as_dict()}, options)
    for failure in failures:
        print(f"beats the peak: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--model", action="append", choices=tuple(MODELS), help="(both)")
    parser.add_argument("--cell", action="append", metavar="BATCHxLENGTH", type=_cell, help="repeatable, like 64x32")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="(both)")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the stock model too; takes minutes")
    parser.add_argument("--only", action="append", choices=(*OPTIMIZE, "torch.compile"), help="beside stock")
    report.add_options(parser, rounds=7)
    return parser.parse_args()


def _cell(text: str) -> str:
    batch, by, length = text.partition("x")
    if not (by and batch.isdecimal() and length.isdecimal() and int(batch) * int(length)):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 16x128")
    return text


def _measure(cell: Cell, providers: list[str], peaks: Peaks, options: argparse.Namespace) -> list[tuple[dict, float]]:
    """The table's rows of one cell, each with its FLOPs."""
    trainers = {name: _trainer(name, cell, options.device) for name in providers}
    times = compare(
        {name: step for name, (step, _) in trainers.items()}, rounds=options.rounds, peaks=peaks, device=options.device
    )
    rows = []
    for name, (_, kept) in trainers.items():
        row = {
            **asdict(cell),
            "provider": name,
            "time": asdict(times[name]),
            "ratio": asdict(times.ratio(name, "stock")),
        }
        print(f"{cell}: {name} {_seconds(times[name])}", file=sys.stderr)
        rows.append(({**row, "kept": kept()}, step_flops(cell)))
    return rows


def _seconds(spread: Spread) -> str:
    return f"{spread.median:.3f} s ± {spread.relative:.1%}"


def _trainer(provider: str, cell: Cell, device: str) -> tuple[Callable[[], None], Callable[[], int | None]]:
    """A training step, and what asks for the bytes that its forward keeps for the backward."""
    torch.manual_seed(0)
    config = _config(cell.model)
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").to(device).train()
    if provider in OPTIMIZE:
        import fastft

        model = fastft.optimize(model, **OPTIMIZE[provider])
    run = torch.compile(model) if provider == "torch.compile" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    batch = {
        "input_ids": torch.randint(1000, config.vocab_size, (cell.batch, cell.length), device=device),
        "attention_mask": torch.ones(cell.batch, cell.length, dtype=torch.int64, device=device),
        "labels": torch.randint(2, (cell.batch,), device=device),
    }

    def forward() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=cell.dtype == "bfloat16"):
            return run(**batch).loss

    def step() -> None:
        forward().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def kept() -> int | None:
        if provider == "torch.compile":
            return None
        return kept_for_backward(forward, [*model.parameters(), *batch.values()])

    return step, kept


def _config(model: str):
    from transformers import BertConfig

    return BertConfig(**MODELS[model])


def step_flops(cell: Cell) -> float:
    """Of matrix products and attention, forward and backward."""
    c = _config(cell.model)
    tokens, width = cell.batch * cell.length, c.hidden_size
    products = 6 * (4 * width**2 + 2 * width * c.intermediate_size)  # per token and layer: 2 FLOPs x 3 passes
    attention = 12 * cell.length * width
    return tokens * c.num_hidden_layers * (products + attention)


if __name__ == "__main__":
    sys.exit(main())
