"""What a run keeps so that it can go on, to the same bits, after Ctrl-C, kill -9 or a full disk.

One safetensors file holds the whole state: ``model.<name>``, ``optimizer.<index>.<key>``, ``rng.<device>``,
``predictions``, and in its header as JSON the step, learning rates, Python's and NumPy's generators and the history.
It is replaced whole at the end of every epoch, and within long ones every few minutes. Another file holds the weights
of the best epoch so far, under its number, so that an older state finds its own. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from fastft.training import checkpoint, files
from fastft.training.progress import EpochProgress

STATE = "state.safetensors"
SAVE_SECONDS = 180.0  # between two states within an epoch
MOST_OF_THE_TIME = 0.02  # that saving these may take: a large model on a slow disk is saved less often


class Interrupt:
    """Within the block the first Ctrl-C only sets ``asked``, so that a step can be finished; the second one raises."""

    def __init__(self, quiet: bool):
        self.asked, self._quiet, self._replaced = False, quiet, False

    def __enter__(self) -> Interrupt:
        # Only Python's own handler is replaced: a program that has another one knows what it wants.
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            signal.signal(signal.SIGINT, self._handle)
            self._replaced = True
        return self

    def __exit__(self, *error: object) -> None:
        if self._replaced:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if not self._quiet:  # print() is not safe here: the interrupted code may be in the middle of one
            os.write(2, b"\nfinishing this step and saving; Ctrl-C once more stops at once\n")


class Keeper(TrainerCallback):
    """Keeps the state of a run and its best epoch; stops it after ``patience`` epochs without a better one, or Ctrl-C.

    Attributes:
        predictions: (validation examples,) of the last validation, filled by the Trainer's metrics function.
        best: ``epoch`` and ``loss`` of the lowest validation loss so far, None before the first.
        done: whether training has come to its end.
        saved: the state that an earlier process left, None when the run starts.
    """

    def __init__(
        self,
        folder: Path,
        run: str,
        progress: EpochProgress,
        patience: int | None,
        rows: int,
        interrupt: Interrupt,
        started: float,
    ):
        self.folder, self.run, self.progress, self.patience = folder, run, progress, patience
        self.interrupt, self._started = interrupt, started
        self.predictions = np.zeros(rows, dtype=np.int64)
        self.best: dict[str, Any] | None = None
        self.done = False
        self.saved = Saved.find(folder / STATE, run)
        self._saved_at, self._cost = time.perf_counter(), 0.0
        if self.saved is not None:
            told = self.saved.told
            progress.restore(told["progress"])
            self._started -= told["seconds"]
            self.best, self.done = told["best"], told["done"]
            self.predictions[:] = self.saved.tensors("predictions")[""].numpy()

    def seconds(self) -> float:
        """Since the run was started, without the time between its processes."""
        return time.perf_counter() - self._started

    def use_best(self, model: torch.nn.Module) -> None:
        """Puts the weights and predictions of the best epoch in place."""
        found = Saved(_best_file(self.folder, self.best["epoch"]))
        _copy(found.tensors("model."), checkpoint.weights(model))
        self.predictions[:] = found.tensors("predictions")[""].numpy()

    def on_train_begin(self, args, state, control, **kwargs):
        self._saved_at = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % (state.max_steps // state.num_train_epochs) == 0:
            return  # the validation that belongs to this epoch is still to come
        waited = time.perf_counter() - self._saved_at
        if self.interrupt.asked or waited >= max(SAVE_SECONDS, self._cost / MOST_OF_THE_TIME):
            self._save(args, state, **kwargs)
        self._stop_if_asked()

    def on_prediction_step(self, args, state, control, **kwargs):
        self._stop_if_asked()

    def on_evaluate(self, args, state, control, **kwargs):
        epoch, loss = len(self.progress.history), self.progress.history[-1]["validation_loss"]
        if self.best is None or loss < self.best["loss"]:
            self.best = {"epoch": epoch, "loss": loss}
            tensors = {f"model.{name}": tensor for name, tensor in checkpoint.weights(kwargs["model"]).items()}
            _write(_best_file(self.folder, epoch), {**tensors, "predictions": torch.from_numpy(self.predictions)}, {})
        out_of_patience = self.patience is not None and epoch - self.best["epoch"] >= self.patience
        self.done = epoch == state.num_train_epochs or out_of_patience
        self._save(args, state, **kwargs)
        for path in self.folder.glob(_best_file(Path(), "*").name):
            if path != _best_file(self.folder, self.best["epoch"]):
                path.unlink()  # only now that no state needs it
        control.should_training_stop = self.done
        if not self.done:
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self.interrupt.asked:
            raise KeyboardInterrupt

    def _save(self, args, state, *, model, optimizer, lr_scheduler, **kwargs) -> None:
        started = time.perf_counter()
        if self.progress.state()["epoch"] is not None:
            self.progress.read(args.learning_rate)  # raises rather than keep weights that are no numbers any more
        optimizing = optimizer.state_dict()
        generators, told_generators = _generators(model.device)
        tensors = {
            **{f"model.{name}": tensor for name, tensor in checkpoint.weights(model).items()},
            **{f"optimizer.{i}.{key}": tensor for i, of in optimizing["state"].items() for key, tensor in of.items()},
            **{f"rng.{device}": generator for device, generator in generators.items()},
            "predictions": torch.from_numpy(self.predictions),
        }
        told = {
            "run": self.run,
            "step": state.global_step,
            "groups": optimizing["param_groups"],
            "schedule": lr_scheduler.state_dict(),
            "generators": told_generators,
            "progress": self.progress.state(),
            "best": self.best,
            "done": self.done,
            "seconds": self.seconds(),
        }
        _write(self.folder / STATE, tensors, told)
        self._saved_at = time.perf_counter()
        self._cost = self._saved_at - started


class Saved:
    """The state in a file, read when it is asked for.

    Raises: ValueError: the file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._open() as file:
            self.told: dict[str, Any] = json.loads(file.metadata()["fastft"])

    @classmethod
    def find(cls, path: Path, run: str) -> Saved | None:
        """What ``path`` holds of the run of this name."""
        if not path.is_file():
            return None
        saved = cls(path)
        return saved if saved.told["run"] == run else None

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors, on the CPU, whose names start with ``prefix``, by the rest of their names."""
        with self._open() as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 — no mapping
            return {name[len(prefix) :]: file.get_tensor(name).clone() for name in names}

    def put_weights(self, model: torch.nn.Module) -> None:
        _copy(self.tensors("model."), checkpoint.weights(model))

    def put_optimizer(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in self.tensors("optimizer.").items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        groups = [{**group, "betas": tuple(group["betas"])} for group in self.told["groups"]]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        scheduler.load_state_dict(self.told["schedule"])

    def put_generators(self) -> None:
        told = self.told["generators"]
        version, numbers, gauss = told["python"]
        random.setstate((version, tuple(numbers), gauss))
        name, numbers, *rest = told["numpy"]
        np.random.set_state((name, np.array(numbers, dtype=np.uint32), *rest))
        for device, state in self.tensors("rng.").items():
            if device == "cpu":
                torch.set_rng_state(state)
            else:
                torch.get_device_module(device).set_rng_state(state)

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                yield file
        except safetensors.SafetensorError as error:
            raise ValueError(f"{self.path} is damaged ({error}): overwrite=True starts anew") from error


def _generators(device: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """States of the generators that may be drawn from: torch's by device, and Python's and NumPy's, ready for JSON."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device.type).get_rng_state()
    name, numbers, *rest = np.random.get_state()
    return states, {"python": random.getstate(), "numpy": [name, numbers.tolist(), *rest]}


def _best_file(folder: Path, epoch: int | str) -> Path:
    return folder / f"best-{epoch}.safetensors"


def _copy(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    if source.keys() != target.keys():
        raise ValueError("the saved state belongs to another model: overwrite=True starts anew")
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def _write(path: Path, tensors: dict[str, torch.Tensor], told: dict[str, Any]) -> None:
    with files.replacing(path) as unfinished:
        held = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(held, unfinished, metadata={"fastft": json.dumps(told)})
