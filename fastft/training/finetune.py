"""Fine-tuning a pre-trained encoder as a text classifier: texts and labels in, a Hugging Face folder out."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

import fastft
from fastft.testing import timing
from fastft.training import checkpoint, metrics, plots, tokens
from fastft.training.data import Examples, label_names, load, split
from fastft.training.progress import EpochProgress, Meter
from fastft.training.result import FinetuneResult, fact_line, facts, run_record

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
DTYPES = ("auto", "float32", "bfloat16")


def finetune(
    data: Any,
    model: str | os.PathLike,
    output: str | os.PathLike,
    *,
    head: str = "pooler",
    text: str | None = None,
    label: str | None = None,
    validation: Any = None,
    validation_share: float = 0.1,
    epochs: int = 3,
    batch_size: int = 32,
    max_length: int = 256,
    learning_rate: float = 5e-5,
    schedule: str = "linear",
    warmup: float = 0.06,
    weight_decay: float = 0.01,
    dropout: float | None = None,
    clip: float = 1.0,
    seed: int = 0,
    dtype: str = "auto",
    stock: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> FinetuneResult:
    """Fine-tunes a pre-trained encoder on labelled texts with transformers' Trainer and our kernels.

    Args:
        data: path of a CSV, TSV or JSONL file, or a pair ``(texts, labels)``; labels are strings, integers or booleans.
        model: a folder or a name on the Hugging Face hub.
        output: the folder to create: model.safetensors, config.json and tokenizer, which
            ``transformers.pipeline("text-classification", output)`` loads; metrics.json, history.jsonl, run.json,
            learning_curves.png.
        head: "pooler" trains the model's own sequence classifier, which loads without fastft; "cls" trains
            :class:`fastft.TextClassifier`.
        text, label: columns or keys in ``data`` and ``validation``; "text" and "label" when None.
        validation: like ``data``; None puts ``validation_share`` of ``data`` aside, the same share of every label.
        epochs, batch_size, learning_rate, weight_decay, seed: of AdamW and the Trainer; the same seed gives the same
            split, the same batches and, on the CPU, the same bits.
        max_length: tokens per text, the rest is cut; at most what the model can take.
        schedule: of the learning rate after warm-up: "linear" or "cosine" to zero, or "constant".
        warmup: share of the steps in which the learning rate rises from zero.
        dropout: every dropout probability of the model; None keeps the checkpoint's.
        clip: largest norm of the gradient; 0 does not clip.
        dtype: of the computation; "auto" is float32, and tells what bfloat16 would gain. Weights stay float32.
        stock: train without our kernels.
        overwrite: accept an output folder that is not empty; files of the same names are replaced.
        quiet: print nothing.
    Returns: a :class:`FinetuneResult`.
    Raises: ValueError, TypeError, OSError: one sentence that names the argument or place and the value, before any
        training; FloatingPointError: the training loss is no longer finite.
    """
    options = _checked(dict(locals()))
    started = time.perf_counter()
    console = Console(quiet=quiet, highlight=False)
    train, held_out = _examples(data, text, label, validation, validation_share, seed)
    names = label_names(train.labels)
    folder = checkpoint.prepare_folder(output, overwrite)

    transformers.set_seed(seed)
    with checkpoint.transformers_quiet():
        tokenizer, network, fresh = checkpoint.load_classifier(model, head, names, options["dropout"])
    network.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")  # where the Trainer will have it
    length = tokens.longest_row(tokenizer, network.config, max_length)
    indices = {name: index for index, name in enumerate(names)}
    train_tokens, held_out_tokens = (
        tokens.encode(tokenizer, part.texts, [indices[name] for name in part.labels], length)
        for part in (train, held_out)
    )
    if not stock:
        fastft.optimize(network)
    kernels = None if stock else fastft.report(network).as_dict()
    gain = _bfloat16_gain(network, rows=8 * batch_size) if dtype == "auto" else None
    told = facts(network, fresh, options, gain, kernels, (train, held_out), (train_tokens, held_out_tokens), length)
    for fact in told.items():
        console.print(fact_line(*fact), soft_wrap=True, markup=False)

    keep_history = functools.partial(checkpoint.write_json_lines, folder / "history.jsonl")
    with EpochProgress(console, epochs, on_epoch=keep_history) as progress:
        predictions = _train(network, tokenizer, train_tokens, held_out_tokens, folder, options, progress)
    if not stock:
        fastft.restore(network)
    with checkpoint.transformers_quiet():
        checkpoint.save_classifier(folder, network, tokenizer)
    history = progress.history
    targets = np.array([indices[name] for name in held_out.labels])
    scores = {"loss": history[-1]["validation_loss"], **metrics.classification(names, targets, predictions)}
    seconds = {
        "training": sum(record["seconds"] for record in history),
        "validation": sum(record["validation_seconds"] for record in history),
        "total": time.perf_counter() - started,
    }
    result = FinetuneResult(folder, names, history, progress.step_losses, scores, predictions, seconds, told)
    checkpoint.write_json(folder / "metrics.json", scores)
    checkpoint.write_json(folder / "run.json", run_record(options, (train, held_out), length, kernels, seconds))
    plots.learning_curves(folder / "learning_curves.png", {"training": result})
    console.print("", *result.score_lines(), sep="\n", soft_wrap=True, markup=False)
    return result


# ---- options

_RULES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "epochs": (int, lambda value: value >= 1, "a whole number from 1"),
    "batch_size": (int, lambda value: value >= 1, "a whole number from 1"),
    "max_length": (int, lambda value: value >= 3, "a whole number from 3"),
    "seed": (int, lambda value: 0 <= value < 2**32, f"a whole number from 0 to {2**32 - 1}"),
    "validation_share": (float, lambda value: 0 < value < 1, "a number between 0 and 1"),
    "learning_rate": (float, lambda value: 0 < value < math.inf, "a number above 0"),
    "warmup": (float, lambda value: 0 <= value < 1, "a share of the steps from 0 to below 1"),
    "weight_decay": (float, lambda value: 0 <= value < math.inf, "a number from 0"),
    "clip": (float, lambda value: 0 <= value < math.inf, "a number from 0"),
    "dropout": (float, lambda value: 0 <= value < 1, "None or a probability from 0 to below 1"),
}
_KINDS = {int: Integral, float: Real}
_CHOICES = {"head": checkpoint.HEADS, "schedule": tuple(SCHEDULES), "dtype": DTYPES}


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """``options`` with Python's own numbers instead of NumPy's, or a sentence about the first one that is wrong."""
    checked = dict(options)
    for name, (kind, holds, wanted) in _RULES.items():
        value = options[name]
        if name == "dropout" and value is None:
            continue
        if not isinstance(value, _KINDS[kind]) or isinstance(value, bool):
            raise TypeError(f"finetune: {name}={value!r} is a {type(value).__name__}; {wanted} is needed")
        if not holds(value):
            raise ValueError(f"finetune: {name}={value!r}; {wanted} is needed")
        checked[name] = kind(value)
    for name, choices in _CHOICES.items():
        if options[name] not in choices:
            raise ValueError(f"finetune: {name}={options[name]!r} is none of {', '.join(choices)}")
    return checked | {name: bool(options[name]) for name in ("stock", "overwrite", "quiet")}


# ---- data


def _examples(
    data: Any, text: str | None, label: str | None, validation: Any, validation_share: float, seed: int
) -> tuple[Examples, Examples]:
    """(training, validation) examples; every label of the second occurs in the first."""
    everything = load(data, text, label)
    counts = everything.counts()
    if len(counts) < 2:
        raise ValueError(f"{everything.source}: every label is {next(iter(counts))!r}, two different ones are needed")
    if validation is None:
        return split(everything, validation_share, seed)
    held_out = load(validation, text, label, argument="validation")
    for row, name in enumerate(held_out.labels):
        if name not in counts:
            raise ValueError(
                f"{held_out.source}: example {row} has the label {name!r}, which the training data lacks: "
                f"it has {', '.join(counts)}"
            )
    return everything, held_out


# ---- training


def _bfloat16_gain(network: PreTrainedModel, rows: int) -> float:
    """How many times as fast the largest linear layer of ``network`` is under bfloat16 autocast, on ``rows`` tokens."""
    layers = (module for module in network.modules() if isinstance(module, torch.nn.Linear))
    layer = max(layers, key=lambda layer: layer.weight.numel())
    input = torch.ones(rows, layer.in_features, device=layer.weight.device)

    def bfloat16() -> torch.Tensor:
        with torch.autocast(input.device.type, torch.bfloat16):
            return layer(input)

    with torch.no_grad():
        times = timing.compare({"float32": lambda: layer(input), "bfloat16": bfloat16}, rounds=5, device=input.device)
    return times.ratio("bfloat16", to="float32").median


class _ClassifierTrainer(Trainer):
    """transformers' Trainer with batches that do not depend on what dropout drew, and a training accuracy."""

    def __init__(self, *args: Any, meter: Meter, **kwargs: Any):
        self.meter = meter
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        lengths = [len(row["input_ids"]) for row in self.train_dataset]
        sampler = tokens.LengthGroupedSampler(lengths, self.args.train_batch_size, self.args.seed)
        return self._dataloader(self.train_dataset, self.args.train_batch_size, sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return self._dataloader(self.eval_dataset, self.args.eval_batch_size, sampler=None)

    def _dataloader(self, rows: list, batch_size: int, sampler: Any) -> DataLoader:
        pin = self.args.dataloader_pin_memory
        loader = DataLoader(rows, batch_size, sampler=sampler, collate_fn=self.data_collator, pin_memory=pin)
        return self.accelerator.prepare(loader)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        targets = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self.meter.add(loss, outputs["logits"], targets)
        return (loss, outputs) if return_outputs else loss


def _train(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: tokens.Tokens,
    held_out: tokens.Tokens,
    folder: Path,
    options: dict[str, Any],
    progress: EpochProgress,
) -> np.ndarray:
    """Trains ``network`` in place; returns the predicted class of each held-out row after the last epoch."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options["epochs"],
        per_device_train_batch_size=options["batch_size"],
        per_device_eval_batch_size=options["batch_size"],
        learning_rate=options["learning_rate"],
        lr_scheduler_type=SCHEDULES[options["schedule"]],
        warmup_steps=options["warmup"],
        weight_decay=options["weight_decay"],
        max_grad_norm=options["clip"],
        seed=options["seed"],
        bf16=options["dtype"] == "bfloat16",
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it hides a loss that is not finite, and waits for the GPU at every step
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process drives one device; the Trainer would wrap the model in nn.DataParallel
    lengths = held_out.lengths()
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])  # batches with little padding
    predictions = np.zeros(len(order), dtype=np.int64)

    def accuracy(evaluation: EvalPrediction) -> dict[str, float]:
        predictions[order] = evaluation.predictions.argmax(-1)
        return {"accuracy": float(np.mean(predictions[order] == evaluation.label_ids))}

    trainer = _ClassifierTrainer(
        network,
        arguments,
        data_collator=tokens.collator(tokenizer),
        train_dataset=train.rows,
        eval_dataset=[held_out.rows[row] for row in order],
        compute_metrics=accuracy,
        callbacks=[progress],
        meter=progress.meter,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return predictions
