"""transformers' Trainer as fine-tuning needs it: batches by length, losses that are ours, runs that can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from fastft import functional
from fastft.training import tokens
from fastft.training.options import SCHEDULES
from fastft.training.progress import Meter
from fastft.training.resume import Keeper

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def balanced(counts: dict[str, int]) -> list[float]:
    """scikit-learn's "balanced" weight of each class, n / (C * count): every class weighs as much as any other."""
    return [sum(counts.values()) / (len(counts) * count) for count in counts.values()]


def criterion(options: dict[str, Any], counts: dict[str, int], device: torch.device) -> Criterion | None:
    """Loss of ``logits`` (B, C) and ``targets`` (B,) with class weights and label smoothing; None if there are none."""
    if options["class_weights"] is None and options["label_smoothing"] == 0:
        return None
    cross_entropy = torch.nn.functional.cross_entropy if options["stock"] else functional.cross_entropy
    weight = None if options["class_weights"] is None else torch.tensor(balanced(counts), device=device)

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits, targets, weight=weight, label_smoothing=options["label_smoothing"])

    return loss


class L1(TrainerCallback):
    """Soft-thresholds the weights after each step: ``w <- sign(w) max(|w| - learning_rate * l1, 0)``.

    The proximal step for the penalty ``l1 * sum |w|``, decoupled from AdamW's scaling of the gradient as its weight
    decay is, so that weights become zero and stay there, which a subgradient in the loss never achieves. Biases and
    LayerNorm are exempt, as they are from weight decay.
    """

    def __init__(self, l1: float, model: PreTrainedModel, trainer: Trainer):
        names = set(trainer.get_decay_parameter_names(model))
        self.l1 = l1
        self.weights = [parameter for name, parameter in model.named_parameters() if name in names]

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        threshold = optimizer.param_groups[0]["lr"] * self.l1  # of the step just taken: the schedule comes after
        with torch.no_grad():
            for weight in self.weights:
                weight.copy_(torch.nn.functional.softshrink(weight, threshold))

    def zeros(self) -> float:
        """The share of these weights that is zero."""
        zero = sum(int((weight == 0).sum()) for weight in self.weights)
        return zero / sum(weight.numel() for weight in self.weights)


class ClassifierTrainer(Trainer):
    """transformers' Trainer with batches that do not depend on what dropout drew, a training accuracy, and a state of
    ours (:mod:`fastft.training.resume`) where it has its own checkpoints."""

    def __init__(self, *args: Any, meter: Meter, loss: Criterion | None, keeper: Keeper, **kwargs: Any):
        self.meter, self.loss, self.keeper = meter, loss, keeper
        super().__init__(*args, **kwargs)

    def go_on(self) -> None:
        """Trains to the end, from the beginning or from where the kept state is."""
        saved = self.keeper.saved
        if saved is None:
            self.train()
            return
        if self.keeper.done:
            saved.put_weights(self.model)
            return
        state = TrainerState(global_step=saved.told["step"], train_batch_size=self.args.train_batch_size)
        state.save_to_json(str(self.keeper.folder / "trainer_state.json"))  # the one file that train() itself reads
        self.train(resume_from_checkpoint=str(self.keeper.folder))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.keeper.saved.put_weights(self.model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        self.keeper.saved.put_optimizer(self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint):
        self.keeper.saved.put_generators()

    def get_train_dataloader(self) -> DataLoader:
        sampler = tokens.LengthGroupedSampler(self.train_dataset.lengths(), self.args.train_batch_size, self.args.seed)
        return self._dataloader(self.train_dataset, self.args.train_batch_size, sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return self._dataloader(self.eval_dataset, self.args.eval_batch_size, sampler=None)

    def _dataloader(self, rows: list, batch_size: int, sampler: Any) -> DataLoader:
        loader = DataLoader(
            rows,
            batch_size,
            sampler=sampler,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # else each epoch and each validation draws from the one that dropout uses
        )
        return self.accelerator.prepare(loader)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        targets = inputs["labels"]
        if model.training and self.loss is not None:
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
            loss = self.loss(outputs["logits"], targets)
        else:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self.meter.add(loss, outputs["logits"], targets)
        return (loss, outputs) if return_outputs else loss


def make_trainer(
    network: PreTrainedModel,
    collator: DataCollatorWithPadding,
    train: tokens.Tokens,
    held_out: tokens.Tokens,
    folder: Path,
    options: dict[str, Any],
    loss: Criterion | None,
    keeper: Keeper,
) -> tuple[ClassifierTrainer, L1 | None]:
    """A Trainer that trains ``network`` in place and tells ``keeper`` the predictions of each validation."""
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
        save_strategy="no",  # the keeper does
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

    def accuracy(evaluation: EvalPrediction) -> dict[str, float]:
        keeper.predictions[order] = evaluation.predictions.argmax(-1)
        return {"accuracy": float(np.mean(keeper.predictions[order] == evaluation.label_ids))}

    trainer = ClassifierTrainer(
        network,
        arguments,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=torch.utils.data.Subset(held_out, order),
        compute_metrics=accuracy,
        callbacks=[keeper.progress, keeper],
        meter=keeper.progress.meter,
        loss=loss,
        keeper=keeper,
    )
    trainer.remove_callback(PrinterCallback)
    penalty = L1(options["l1"], network, trainer) if options["l1"] else None
    if penalty is not None:
        trainer.add_callback(penalty)
    return trainer, penalty
