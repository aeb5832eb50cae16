"""Fine-tuning a pre-trained encoder as a text classifier: texts and labels in, a Hugging Face folder out."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fastft
from fastft import environment
from fastft.functional import _choice
from fastft.testing import timing
from fastft.training import checkpoint, files, metrics, plots, preprocess, run_folder, tokens
from fastft.training.data import Examples, check_classes, label_names, load, require_known, split
from fastft.training.options import checked, of_the_run
from fastft.training.progress import EpochProgress
from fastft.training.result import FinetuneResult, fact_line, facts, run_record
from fastft.training.resume import Interrupt, Keeper
from fastft.training.trainer import criterion, make_trainer


def finetune(
    data: Any,
    model: str | os.PathLike,
    output: str | os.PathLike,
    *,
    text: str | None = None,
    label: str | None = None,
    encoding: str = "utf-8",
    validation: Any = None,
    validation_share: float = 0.1,
    head: str = "pooler",
    epochs: int = 3,
    batch_size: int = 32,
    max_length: int = 256,
    learning_rate: float = 5e-5,
    schedule: str = "linear",
    warmup: float = 0.06,
    weight_decay: float = 0.01,
    l1: float = 0.0,
    dropout: float | None = None,
    label_smoothing: float = 0.0,
    class_weights: str | None = None,
    clip: float = 1.0,
    patience: int | None = None,
    lower_case: bool = False,
    seed: int = 0,
    dtype: str = "auto",
    stock: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> FinetuneResult:
    """Fine-tunes a pre-trained encoder on labelled texts with transformers' Trainer and our kernels.

    A run can be broken off at any moment, by Ctrl-C, ``kill -9`` or a full disk, and goes on with ``resume`` to the
    same weights, bit for bit. Until it is finished, the folder ``.fastft`` in ``output`` holds for that four times the
    size of the weights, twice that while it is written.

    Args:
        data: path of a CSV, TSV or JSONL file or of a folder with one sub-folder per class, or a pair ``(texts,
            labels)``; labels are strings, integers or booleans.
        model: a folder or a name on the Hugging Face hub.
        output: the folder to create: model.safetensors, config.json and tokenizer, which
            ``transformers.pipeline("text-classification", output)`` loads; metrics.json, history.jsonl, run.json,
            preprocessing.json, learning_curves.png, confusion_matrix.png.
        text, label: columns or keys in ``data`` and ``validation``; None finds them by what is in them.
        encoding: of the files.
        validation: like ``data``; None puts ``validation_share`` of ``data`` aside, the same share of every label.
        head: "pooler" trains the model's own sequence classifier, which loads without fastft; "cls" trains
            :class:`fastft.TextClassifier`.
        epochs, batch_size, learning_rate, weight_decay, seed: of AdamW and the Trainer; the same seed gives the same
            split, the same batches and, on the CPU, the same bits.
        max_length: tokens per text, the rest is cut; at most what the model can take.
        schedule: of the learning rate after warm-up: "linear" or "cosine" to zero, or "constant".
        warmup: share of the steps in which the learning rate rises from zero.
        l1: after each step every weight w becomes ``sign(w) max(|w| - rate l1, 0)``, at the step's learning rate:
            the proximal step for the penalty ``l1 sum |w|``, decoupled as AdamW's weight decay. Biases and LayerNorm
            are exempt from both.
        dropout: every dropout probability of the model; None keeps the checkpoint's.
        label_smoothing: the part of each target that is spread over all classes (Szegedy et al. 2015,
            arXiv:1512.00567).
        class_weights: "balanced" weighs the loss of each class by n / (C * count), as scikit-learn does. The validation
            loss has neither weights nor smoothing.
        clip: largest norm of the gradient; 0 does not clip.
        patience: stop after so many epochs in a row without a lower validation loss, and keep the epoch that had the
            lowest; None trains all epochs and keeps the last.
        lower_case: change all texts to lower case, here and wherever the folder is used.
        dtype: of the computation; "auto" is float32, and tells what bfloat16 would gain. Weights stay float32.
        stock: train without our kernels.
        resume: go on with the run that was interrupted in ``output``, with the options that it was begun with. Where it
            kept nothing yet, it starts anew.
        overwrite: accept an output folder that is not empty; files of the same names are replaced, no others.
        quiet: print nothing.
    Returns: a :class:`FinetuneResult`.
    Raises: ValueError, TypeError, OSError: one sentence that names the argument or place and the value, before any
        training; FloatingPointError: the training loss is no longer finite; KeyboardInterrupt: after Ctrl-C, when the
        best epoch so far is in ``output``.
    """
    options = checked(dict(locals()))
    run_folder.check(output, resume, overwrite)
    if os.path.isdir(model) and Path(model).resolve() == Path(output).resolve():
        raise ValueError(f"finetune: output={str(output)!r} is the folder of the model itself: name another one")
    console = Console(quiet=quiet, highlight=False)
    job = _prepare(options)
    with _full_disk_explained(output), run_folder.locked(output) as folder:
        run_folder.check(output, resume, overwrite)  # another run may have been here while the model was loaded
        found = run_folder.interrupted(folder) if resume else None
        if found is None:
            run = run_folder.begin(folder, job.identity())
        else:
            run_folder.same_run(found, job.identity(), str(output))
            run = found["run"]
        with _choice.use_facts(job.choices if found is None else found["choices"]):
            return _run(job, folder, run, found, console)


@dataclass
class _Job:
    """All that a run needs; ``parts``, ``targets`` and ``encoded`` are (training, validation)."""

    options: dict[str, Any]
    parts: tuple[Examples, Examples]
    cleaning: preprocess.Prepared
    names: list[str]
    tokenizer: PreTrainedTokenizerBase
    network: PreTrainedModel
    fresh: list[str]
    targets: tuple[list[int], list[int]]
    encoded: tuple[tokens.Tokens, tokens.Tokens]
    length: int
    choices: dict[str, Any]
    model_sha256: str
    started: float

    def identity(self) -> dict[str, Any]:
        """What makes this run the one that it is, for :func:`run_folder.same_run`."""
        return {
            "options": of_the_run(self.options),
            "data": self.parts[0].fingerprint(),
            "validation": self.parts[1].fingerprint(),
            "model": self.model_sha256,
            "choices": self.choices,
            "environment": environment.describe(),
        }


def _prepare(options: dict[str, Any]) -> _Job:
    """Reads the data, loads the model and puts our kernels into it; writes nothing."""
    started = time.perf_counter()
    *parts, cleaning = _examples(options)
    names = label_names(parts[0].labels)
    transformers.set_seed(options["seed"])
    tokenizer, network, fresh = checkpoint.load_classifier(options["model"], options["head"], names, options["dropout"])
    model_sha256 = checkpoint.fingerprint(network)
    network.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")  # where the Trainer will have it
    length = tokens.longest_row(tokenizer, network.config, options["max_length"])
    indices = {name: index for index, name in enumerate(names)}
    targets = tuple([indices[name] for name in part.labels] for part in parts)
    encoded = tuple(
        tokens.encode(tokenizer, part.texts, of_part, length) for part, of_part in zip(parts, targets, strict=True)
    )
    if not options["stock"]:
        fastft.optimize(network)
    job = (options, tuple(parts), cleaning, names, tokenizer, network, fresh, targets, encoded, length)
    return _Job(*job, _choice.facts(), model_sha256, started)


def _examples(options: dict[str, Any]) -> tuple[Examples, Examples, preprocess.Prepared]:
    """(training, validation, what was done to the texts); every label of the second occurs in the first."""
    read = functools.partial(load, text=options["text"], label=options["label"], encoding=options["encoding"])
    cleaning = preprocess.prepare(read(options["data"]), lower_case=options["lower_case"])
    if options["validation"] is None:
        return *split(cleaning.examples, options["validation_share"], options["seed"]), cleaning
    check_classes(cleaning.examples)
    held_out = read(options["validation"], argument="validation")
    held_out = preprocess.prepare(held_out, lower_case=options["lower_case"], deduplicate=False).examples
    require_known(held_out, cleaning.examples.counts(), "the training data")
    return cleaning.examples, held_out, cleaning


def _run(job: _Job, folder: Path, run: str, found: dict[str, Any] | None, console: Console) -> FinetuneResult:
    """Trains, from the beginning or from where ``found`` stands, and fills the folder."""
    options, network = job.options, job.network
    kernels = None if options["stock"] else fastft.report(network).as_dict()
    gain = _bfloat16_gain(network, rows=8 * options["batch_size"]) if options["dtype"] == "auto" else None
    told = facts(network, job.fresh, options, gain, kernels, job.parts, job.cleaning, job.encoded, job.length)
    for fact in told.items():
        console.print(fact_line(*fact), soft_wrap=True, markup=False)
    kept = folder / run_folder.KEPT
    files.write_json(
        folder / preprocess.FILE, preprocess.options(lower_case=options["lower_case"], max_length=job.length)
    )
    keep_history = functools.partial(files.write_json_lines, folder / "history.jsonl")
    interrupt = Interrupt(options["quiet"])
    with EpochProgress(console, options["epochs"], on_epoch=keep_history) as progress:
        keeper = Keeper(kept, run, progress, options["patience"], len(job.parts[1]), interrupt, job.started)
        if options["resume"]:
            console.print(_resuming_line(keeper, found), soft_wrap=True, markup=False)
        loss = criterion(options, job.parts[0].counts(), network.device)
        trainer, penalty = make_trainer(
            network, tokens.collator(job.tokenizer), *job.encoded, folder, options, loss, keeper
        )
        try:
            with interrupt:
                trainer.go_on()
        except KeyboardInterrupt:
            if keeper.best is not None:
                keeper.use_best(network)
                _save(job, folder, keeper, kernels, told)
            raise KeyboardInterrupt(_stopped_line(options["output"], keeper)) from None
    if options["patience"] is not None and keeper.best["epoch"] != len(progress.history):
        keeper.use_best(network)
    if penalty is not None:
        told["l1"] = f"{penalty.zeros():.1%} of the weights are zero"
    result = _save(job, folder, keeper, kernels, told, best=options["patience"] is not None)
    run_folder.finish(folder)
    console.print("", *result.score_lines(), sep="\n", soft_wrap=True, markup=False)
    return result


def _save(
    job: _Job,
    folder: Path,
    keeper: Keeper,
    kernels: dict[str, Any] | None,
    told: dict[str, str],
    best: bool = True,
) -> FinetuneResult:
    """Writes the model as it is now, which is that of the best epoch or of the last, and all that is known of it."""
    network, history, predictions = job.network, keeper.progress.history, keeper.predictions
    epoch = keeper.best["epoch"] if best else len(history)
    if not job.options["stock"]:
        fastft.restore(network)
    checkpoint.save_classifier(folder, network, job.tokenizer)
    scores = metrics.classification(job.names, np.array(job.targets[1]), predictions)
    scores = {"loss": history[epoch - 1]["validation_loss"], **scores}
    seconds = {
        "training": sum(record["seconds"] for record in history),
        "validation": sum(record["validation_seconds"] for record in history),
        "total": keeper.seconds(),
    }
    step_losses = keeper.progress.step_losses
    result = FinetuneResult(folder, job.names, history, step_losses, scores, predictions, seconds, told, epoch)
    files.write_json(folder / "metrics.json", scores)
    with files.replacing(folder / "learning_curves.png") as path:
        plots.learning_curves(path, {"training": result})
    with files.replacing(folder / "confusion_matrix.png") as path:
        plots.confusion_matrix(path, job.names, scores["confusion_matrix"])
    record = run_record(job.options, job.parts, job.cleaning, job.encoded, job.length)
    record |= {
        "epoch": epoch,
        "epochs_trained": len(history),
        "kernels": kernels,
        "choices": job.choices,
        "model_sha256": job.model_sha256,
    }
    files.write_json(folder / "run.json", record | {"seconds": seconds})  # the last: with it the run is finished
    return result


# ---- what is said


def _resuming_line(keeper: Keeper, found: dict[str, Any] | None) -> str:
    if keeper.saved is None:
        return fact_line("resume", "nothing was kept yet, the run starts anew")
    line = f"from step {keeper.saved.told['step']}, epoch {len(keeper.progress.history) + 1}"
    if keeper.done:
        line = "training was done, the results are written"
    now = environment.describe()
    changed = [
        f"{name} {found['environment'].get(name)} is {now[name]} now"
        for name in ("fastft", "torch", "transformers", "cpu", "threads", "isa", "gpus", "backend")
        if found["environment"].get(name) != now[name]
    ]
    return fact_line("resume", "; ".join([line, *changed, *(["the last bits may differ"] if changed else [])]))


def _stopped_line(output: str | os.PathLike, keeper: Keeper) -> str:
    epoch = len(keeper.progress.history) + 1
    best = keeper.best
    kept = f"the model of epoch {best['epoch']} (validation loss {best['loss']:.4f})" if best else "no model yet"
    return f"stopped in epoch {epoch}; {str(output)!r} holds {kept}; the same with resume=True goes on"


@contextlib.contextmanager
def _full_disk_explained(output: str | os.PathLike) -> Iterator[None]:
    """One sentence for every library's way of saying that a file could not grow."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    try:
        yield
    except Exception as error:  # safetensors and tokenizers have the number in their message only
        if getattr(error, "errno", None) in numbers or any(f"os error {number}" in str(error) for number in numbers):
            raise OSError(
                errno.ENOSPC,
                f"output={str(output)!r}: the disk is full; nothing that was saved is lost, make room and go on with "
                "resume=True",
            ) from error
        raise


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
