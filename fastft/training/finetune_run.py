"""A run of ``fastft.finetune``, from examples to the folder of a classifier."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
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
from fastft.models.report import Report
from fastft.testing import timing
from fastft.training import checkpoint, files, metrics, plots, preprocess, run_folder, tokens
from fastft.training.data import Examples, label_names
from fastft.training.lines import fact_line
from fastft.training.options import of_the_run
from fastft.training.progress import EpochProgress
from fastft.training.result import FinetuneResult, facts, run_record
from fastft.training.resume import Interrupt, Keeper
from fastft.training.trainer import criterion, make_trainer
from fastft.training.waiting import waiting


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


def run(
    options: dict[str, Any], parts: tuple[Examples, Examples], cleaning: preprocess.Prepared, started: float
) -> FinetuneResult:
    """Fine-tunes with the checked ``options`` on ``parts``, (training, validation), from which texts were left out by
    ``cleaning``; ``started`` is when the reading began."""
    console = Console(quiet=options["quiet"], highlight=False)
    output, resume = options["output"], options["resume"]
    with waiting("loading the model, making tokens", quiet=options["quiet"]):
        job = _prepare(options, parts, cleaning, started)
    with _full_disk_explained(output), run_folder.locked(output) as folder:
        run_folder.check(output, resume, options["overwrite"])  # another run may have been here in the meantime
        found = run_folder.interrupted(folder) if resume else None
        if found is None:
            name = run_folder.begin(folder, job.identity())
        else:
            run_folder.same_run(found, job.identity(), str(output))
            name = found["run"]
        with _choice.use_facts(job.choices if found is None else found["choices"]):
            try:
                return _run(job, folder, name, found, console)
            except KeyboardInterrupt as interrupt:  # one while results are written has nothing to say
                raise KeyboardInterrupt(str(interrupt) or "interrupted; the same with resume=True goes on") from None


def _prepare(
    options: dict[str, Any], parts: tuple[Examples, Examples], cleaning: preprocess.Prepared, started: float
) -> _Job:
    """Loads the model and puts our kernels into it; writes nothing."""
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
    job = (options, parts, cleaning, names, tokenizer, network, fresh, targets, encoded, length)
    return _Job(*job, _choice.facts(), model_sha256, started)


def _run(job: _Job, folder: Path, run: str, found: dict[str, Any] | None, console: Console) -> FinetuneResult:
    """Trains, from the beginning or from where ``found`` stands, and fills the folder."""
    options, network = job.options, job.network
    kernels = None if options["stock"] else fastft.report(network)
    gain = _bfloat16_gain(network, rows=8 * options["batch_size"]) if options["dtype"] == "auto" else None
    told = facts(network, job.fresh, options, gain, kernels, job.parts, job.cleaning, job.encoded, job.length)
    width = console.width if console.is_terminal else None
    for fact in told.items():
        console.print(fact_line(*fact, width), soft_wrap=True, markup=False)
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
    if len(keeper.progress.history) < options["epochs"]:
        told["stopped"] = f"early, no validation loss was below that of epoch {keeper.best['epoch']}"
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
    kernels: Report | None,
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
        "kernels": None if kernels is None else kernels.as_dict(),
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
