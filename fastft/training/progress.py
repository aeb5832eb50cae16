"""What people know from Keras: per epoch a bar, the time left, loss and accuracy, then the validation's."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text
from transformers import TrainerCallback

REFRESH_SECONDS = 0.5  # how often the running loss is read: each time waits for a GPU to catch up
BAR_WIDTH = 20


class Meter:
    """Loss and accuracy of one epoch so far; the tensors stay where they are until somebody reads."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.losses: list[float] = []  # of every step that has been read
        self._unread: list[torch.Tensor] = []
        self._sizes: list[int] = []
        self._correct: torch.Tensor | int = 0

    def add(self, loss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """One step: the batch's mean loss (), ``logits`` (B, C), ``targets`` (B,)."""
        self._unread.append(loss.detach().float().clone())
        self._sizes.append(targets.numel())
        self._correct = self._correct + (logits.detach().argmax(-1) == targets).sum()

    def read(self) -> tuple[float, float]:
        """(mean loss, accuracy) over all examples added since the last reset."""
        if self._unread:
            self.losses += torch.stack(self._unread).tolist()
            self._unread.clear()
        examples = sum(self._sizes)
        return math.fsum(map(operator.mul, self.losses, self._sizes)) / examples, int(self._correct) / examples

    def state(self) -> dict[str, Any]:
        return {"losses": self.losses, "sizes": self._sizes, "correct": int(self._correct)}

    def restore(self, state: dict[str, Any]) -> None:
        self.reset()
        self.losses, self._sizes, self._correct = list(state["losses"]), list(state["sizes"]), state["correct"]


class EpochProgress(TrainerCallback):
    """Draws the progress of a Trainer on ``console`` and keeps the history. A context manager: leaving it ends the bar.

    Where the console is no terminal there is no bar, but a line at the end of each epoch.

    Attributes:
        meter: to be fed at every training step.
        history: per epoch ``epoch``, ``loss``, ``accuracy``, ``seconds``, ``learning_rate``, ``validation_loss``,
            ``validation_accuracy``, ``validation_seconds``; ``on_epoch`` is called with it after each validation.
        step_losses: the training loss of every step of these epochs.
    """

    def __init__(self, console: Console, epochs: int, on_epoch: Callable[[list[dict[str, float]]], None]):
        self.console, self.epochs, self.on_epoch, self.meter = console, epochs, on_epoch, Meter()
        self.history: list[dict[str, float]] = []
        self.step_losses: list[float] = []
        self._bar: Progress | None = None
        self._indent = 0
        self._started = self._refreshed = 0.0
        self._trained: dict[str, float] = {}  # the record of an epoch whose validation is to come
        self._resumed: dict[str, Any] | None = None

    def __enter__(self) -> EpochProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs, in the middle of an epoch or after its validation; ready for JSON."""
        running = self._bar is not None
        return {
            "history": self.history,
            "step_losses": self.step_losses,
            "epoch": {**self.meter.state(), "seconds": time.perf_counter() - self._started} if running else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.history, self.step_losses = list(state["history"]), list(state["step_losses"])
        self._resumed = state["epoch"]

    def read(self, learning_rate: float) -> tuple[float, float]:
        """(mean loss, accuracy) of the epoch so far.

        Raises: FloatingPointError: the loss is no longer finite.
        """
        loss, accuracy = self.meter.read()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"finetune: the training loss became {loss} in epoch {len(self.history) + 1}: "
                f"lower learning_rate (it is {learning_rate})"
            )
        return loss, accuracy

    def on_epoch_begin(self, args, state, control, **kwargs):
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            self.meter.reset()
        else:
            self.meter.restore(resumed)
        self._bar = self._new_bar(TextColumn("{task.fields[scores]}"))
        title, steps = f"Epoch {len(self.history) + 1}/{self.epochs}", math.ceil(state.max_steps / self.epochs)
        self._bar.add_task(title, total=steps, completed=len(self.meter.losses), scores="")
        width = BAR_WIDTH + 1 if not self._bar.disable else 0
        self._indent = len(f"{title} {steps}/{steps}") + width  # puts the validation's scores below the training's
        self._bar.start()
        self._refreshed = time.perf_counter()
        self._started = self._refreshed - (resumed["seconds"] if resumed else 0.0)

    def on_step_end(self, args, state, control, **kwargs):
        task = self._bar.tasks[0]
        if time.perf_counter() - self._refreshed > REFRESH_SECONDS:
            self._bar.update(task.id, scores=_scores(*self.read(args.learning_rate)))
            self._refreshed = time.perf_counter()
        self._bar.advance(task.id)

    def on_epoch_end(self, args, state, control, **kwargs):
        loss, accuracy = self.read(args.learning_rate)
        seconds = time.perf_counter() - self._started
        task = self._bar.tasks[0]
        self._bar.update(task.id, scores=_scores(loss, accuracy))
        if self._bar.disable:
            steps = f"{len(self.meter.losses)}/{len(self.meter.losses)}"
            self._print(f"{task.description} {steps} {_clock(seconds):>5} {_scores(loss, accuracy)}")
        self._close()
        record = {"epoch": len(self.history) + 1, "loss": loss, "accuracy": accuracy, "seconds": seconds}
        self._trained = record | {"learning_rate": kwargs["lr_scheduler"].get_last_lr()[0]}

    def on_prediction_step(self, args, state, control, eval_dataloader, **kwargs):
        if self._bar is None:
            self._bar = self._new_bar(transient=True)
            self._bar.add_task("validation", total=len(eval_dataloader))
            self._bar.start()
        self._bar.advance(self._bar.tasks[0].id)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self._close()
        record = self._trained
        record["validation_loss"] = metrics["eval_loss"]
        record["validation_accuracy"] = metrics["eval_accuracy"]
        record["validation_seconds"] = metrics["eval_runtime"]
        self.history.append(record)  # not before: an epoch whose validation is broken off is none
        self.step_losses += self.meter.losses
        scores = _scores(record["validation_loss"], record["validation_accuracy"])
        self._print(f"{'validation':>{self._indent}} {_clock(record['validation_seconds']):>5} {scores}")
        self.on_epoch(self.history)

    def _new_bar(self, *columns: ProgressColumn, transient: bool = False) -> Progress:
        terminal = self.console.is_terminal and not self.console.is_dumb_terminal
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=BAR_WIDTH),
            MofNCompleteColumn(),
            _TimeColumn(),
            *columns,
            console=self.console,
            refresh_per_second=2,  # drawing takes time from the kernels' threads
            transient=transient,
            disable=not (terminal or self.console.is_jupyter),
        )

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _TimeColumn(ProgressColumn):
    """The time left while the bar moves, then the time taken."""

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(f"{_clock(task.finished_time or 0.0):>5}")
        left = task.time_remaining
        return Text("" if left is None else f"{_clock(left):>5} left")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _scores(loss: float, accuracy: float) -> str:
    return f"loss {loss:.4f}  accuracy {accuracy:.4f}"
