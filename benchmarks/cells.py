"""What the benchmarks of whole models have in common: models, batches, training steps."""

import argparse
import contextlib
import importlib.util
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import fastft
from benchmarks import report
from fastft import _library
from fastft.models.mask import with_lengths
from fastft.testing.timing import BeatsPeak, Peaks

MODELS = {  # sizes of BertConfig
    "bert-base": {},
    "bert-large": {
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "minilm": {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536},
    "tiny": {"num_hidden_layers": 1, "hidden_size": 96, "intermediate_size": 192, "vocab_size": 2000},  # no benchmark
}
DTYPES = ("float32", "bfloat16")
PADDING = ("none", "uneven")
ROW = ("model", "batch", "length", "dtype", "padding", "provider")  # what tells rows apart

# Tokens of the movie-review snippets of benchmarks.datasets by MiniLM's tokenizer: every twentieth of them, sorted.
SNIPPET_LENGTHS = (6, 11, 13, 15, 17, 19, 20, 22, 24, 25, 26, 28, 29, 31, 32, 34, 36, 39, 42, 46, 72)


@dataclass(frozen=True)
class Cell:
    """What one row group of a table is about."""

    model: str
    batch: int
    length: int  # of the longest sequence
    dtype: str
    padding: str = "none"

    def config(self):
        from transformers import BertConfig

        return BertConfig(**MODELS[self.model])

    def classifier(self, device: str = "cpu") -> torch.nn.Module:
        """Stock, with random weights: speed does not depend on them. A GPU draws them in no time."""
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(0)
        with torch.device(device):
            return AutoModelForSequenceClassification.from_config(self.config(), attn_implementation="sdpa").to(device)

    def lengths(self) -> list[int]:
        """Of the sequences: all the same, or as uneven as the snippets' are, in no order."""
        if self.padding == "none":
            return [self.length] * self.batch
        drawn = [_quantile(SNIPPET_LENGTHS, (row + 0.5) / self.batch) for row in range(self.batch)]
        lengths = [max(1, round(length / max(drawn) * self.length)) for length in drawn]
        random.Random(0).shuffle(lengths)
        return lengths

    def tensors(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """The arguments of a classifier with two classes."""
        generator = torch.Generator().manual_seed(0)
        shape = self.batch, self.length
        places = torch.arange(self.length).expand(shape)
        tensors = {
            "input_ids": torch.randint(1000, self.config().vocab_size, shape, generator=generator),
            "attention_mask": (places < torch.tensor(self.lengths())[:, None]).long(),
            "labels": torch.randint(2, (self.batch,), generator=generator),
        }
        tensors["attention_mask"] = with_lengths(tensors["attention_mask"], self.lengths())
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def autocast(self, device: str = "cpu") -> torch.autocast:
        """bfloat16 as Trainer(bf16=True) has it."""
        return torch.autocast(device, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def forward_flops(self) -> tuple[float, float]:
        """Of the matrix products and of attention, padding not counted, the last layer whole."""
        c, lengths = self.config(), self.lengths()
        width, layers = c.hidden_size, c.num_hidden_layers
        products = 2 * (4 * width**2 + 2 * width * c.intermediate_size) * sum(lengths) * layers
        return products, 4 * width * sum(length**2 for length in lengths) * layers


def _quantile(sorted_values: Sequence[int], share: float) -> float:
    place = share * (len(sorted_values) - 1)
    low = min(int(place), len(sorted_values) - 2)
    return sorted_values[low] + (place - low) * (sorted_values[low + 1] - sorted_values[low])


def add_options(parser: argparse.ArgumentParser, models: Sequence[str] = ("bert-base", "minilm")) -> None:
    """Those that choose cells; ``models`` are measured where none is named."""
    parser.add_argument("--model", action="append", choices=tuple(MODELS), help=f"repeatable ({', '.join(models)})")
    parser.add_argument("--cell", action="append", metavar="BATCHxLENGTH", type=_size, help="repeatable, like 64x32")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="(both)")
    parser.add_argument("--add", action="store_true", help="keep other cells that were saved before")
    parser.set_defaults(models=models)


def chosen(options: argparse.Namespace, sizes: dict[str, Sequence[str]], padding: Sequence[str] = ("none",)):
    """The cells that the options of :func:`add_options` select; ``sizes`` of each model where none is named."""
    for model in options.model or options.models:
        for size in options.cell or sizes[model]:
            for pattern in padding:
                for dtype in options.dtype or DTYPES:
                    yield Cell(model, *map(int, size.split("x")), dtype, pattern)


def installed(*modules: str) -> bool:
    """Whether all of these can be imported."""
    try:
        return all(importlib.util.find_spec(module) for module in modules)
    except ModuleNotFoundError:  # not even the package around one
        return False


def publish(
    benchmark: str, measured: Sequence[tuple[dict, float, bool | None]], peaks: Peaks, options: argparse.Namespace
) -> int:
    """Prints the table of rows with their shares of the peak, and writes what the options ask for.

    Args:
        measured: rows, each with its FLOPs and whether PyTorch's kernels made them; None where some were left out, so
            that there is no share.
    Returns: 1 if a row beat the peak.
    """
    peaks.finish()
    rows, failures = [], []
    for row, flops, pytorch in measured:
        share = None
        try:
            if pytorch is not None:
                share = peaks.share(flops, 0, row["time"]["median"], getattr(torch, row["dtype"]), pytorch=pytorch)
        except BeatsPeak as error:
            failures.append(f"{row['model']} {row['batch']} x {row['length']}, {row['provider']}: {error}")
        rows.append({**row, "flops": flops, "share": share})
    report.publish(benchmark, rows, limits(peaks), options, add_by=ROW if options.add else ())
    for failure in failures:
        print(f"beats the peak: {failure}", file=sys.stderr)
    return 1 if failures else 0


def limits(peaks: Peaks) -> dict[str, dict]:
    """For the results, by the instruction set they are of."""
    return {_library.isa() if _library.available() else "none": peaks.as_dict()}


def _size(text: str) -> str:
    batch, by, length = text.partition("x")
    if not (by and batch.isdecimal() and length.isdecimal() and int(batch) * int(length)):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 16x128")
    return text


class Training:
    """A model in training, and one step of it: forward, backward, clipping to norm 1 and AdamW, with dropout 0.1.

    ``optimize``: options of fastft.optimize; None leaves the model stock. Stock's AdamW is the fused one; with
    ``our_optimizer`` clipping and update are fastft.optim's, with ``shadow``. ``compiled`` is torch.compile's mode, or
    True for its default. ``converted``: parameters in the cell's dtype and no autocast. ``graphed``: :meth:`step` is a
    fastft.GraphedStep, captured already, with our clipping and PyTorch's fused update; ``loss`` is its last.
    """

    def __init__(
        self,
        cell: Cell,
        optimize: dict | None = None,
        *,
        our_optimizer: bool = False,
        shadow: torch.dtype | None = None,
        compiled: bool | str = False,
        converted: bool = False,
        graphed: bool = False,
        device: str = "cpu",
        lr: float = 2e-5,
    ) -> None:
        self.cell, self.device, self._casts = cell, device, not converted
        self.model = cell.classifier(device).train()
        if converted:
            self.model.to(getattr(torch, cell.dtype))
        if optimize is not None:
            fastft.optimize(self.model, **optimize)
        mode = compiled if isinstance(compiled, str) else None
        self._run: Callable = torch.compile(self.model, mode=mode) if compiled else self.model
        self.parameters = list(self.model.parameters())
        self.batch = cell.tensors(device)
        self._clips = not our_optimizer
        self._graphed = None
        if graphed:
            self.optimizer = fastft.optim.AdamW(self.parameters, lr=lr, max_grad_norm=1.0, fused=True, capturable=True)
            dtype = torch.bfloat16 if self._casts and cell.dtype == "bfloat16" else None
            self._graphed = fastft.GraphedStep(self.model, self.optimizer, dtype=dtype)
            for _ in range(2):
                self.step()
        elif our_optimizer:
            self.optimizer = fastft.optim.AdamW(self.parameters, lr=lr, max_grad_norm=1.0, shadow=shadow)
        else:
            self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, fused=True)

    def forward(self) -> torch.Tensor:
        """The loss."""
        with self.cell.autocast(self.device) if self._casts else contextlib.nullcontext():
            return self._run(**self.batch).loss

    def update(self) -> None:
        """What follows the backward."""
        if self._clips:
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    def step(self) -> None:
        if self._graphed is not None:
            self.loss = self._graphed(self.batch)
            return
        self.forward().backward()
        self.update()
        self.optimizer.zero_grad()
