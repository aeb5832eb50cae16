"""Whole fine-tuning jobs on real text: transformers' Trainer, as it is and with batches by length, and with fastft.

MiniLM, one epoch, on a stratified part of 20 Newsgroups (very uneven texts, cut at 512 tokens) and on snippets of movie
reviews. All runs have the same texts, seed, batch size and settings, the Trainer's defaults otherwise; "fastft" is the
same Trainer after fastft.optimize(model), one line. Time is that of Trainer.train(); accuracy that on texts put aside.
Runs follow one another; each can be made alone with --job and --only, and added to what was saved with --add.
"""

import argparse
import itertools
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks import cells, datasets, report
from fastft.training import tokens

PROVIDERS = {  # whether our kernels run, how the Trainer samples
    "Trainer": (False, "random"),
    "Trainer, by length": (False, "group_by_length"),
    "fastft": (True, "random"),
    "fastft, by length": (True, "group_by_length"),
}
HELD_OUT = 500  # at most; a quarter of fewer texts


@dataclass(frozen=True)
class Job:
    """What is trained on."""

    read: Callable[[], tuple[Sequence[str], Sequence[str]]]
    texts: int
    max_length: int


JOBS = {
    "newsgroups": Job(lambda: datasets.newsgroups(), 2000, 512),
    "reviews": Job(lambda: datasets.movie_reviews(), 4000, 256),
}


class Data(NamedTuple):
    """A job's texts as tokens."""

    train: tokens.Tokens
    held_out: tokens.Tokens
    labels: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the options select and prints the table."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows, model = [], datasets.minilm()
    for name in options.job or JOBS:
        job = JOBS[name]
        texts = options.texts or job.texts
        data = read(job, model, texts, min(HELD_OUT, texts // 4), options.seed)
        for dtype, provider in itertools.product(options.dtype or cells.DTYPES[:1], options.only or PROVIDERS):
            row = {"job": name, "texts": len(data.train), "dtype": dtype, "provider": provider}
            row |= {"batch_size": options.batch_size, "max_length": job.max_length}
            row |= _run(data, model, provider, dtype, options)
            print(f"{name}, {dtype}, {provider}: {row['seconds']:.1f} s", file=sys.stderr)
            rows.append(row)
    report.publish("finetune", rows, {}, options, add_by=("job", "texts", "dtype", "provider") if options.add else ())
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune", description=__doc__)
    parser.add_argument("--job", action="append", choices=tuple(JOBS), help="(both)")
    parser.add_argument("--only", action="append", choices=tuple(PROVIDERS), help="(all)")
    parser.add_argument("--dtype", action="append", choices=cells.DTYPES, help="(float32)")
    defaults = ", ".join(f"{job.texts} {name}" for name, job in JOBS.items())
    parser.add_argument("--texts", type=int, help=f"to train on ({defaults})")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--add", action="store_true", help="keep other runs that were saved before")
    report.add_options(parser, rounds=1)
    return parser.parse_args(arguments)


def read(job: Job, model, texts: int, held_out: int, seed: int) -> Data:
    """``texts`` of a job to train on and ``held_out`` others, or as many as there are, each label in its share."""
    from sklearn.model_selection import train_test_split
    from transformers import AutoTokenizer

    given, names = job.read()
    labels = sorted(set(names))
    targets = [labels.index(name) for name in names]
    rest = min(held_out, len(given) - texts)
    parts = train_test_split(range(len(given)), train_size=texts, test_size=rest, stratify=targets, random_state=seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    train, other = (
        tokens.encode(tokenizer, [given[row] for row in part], [targets[row] for row in part], job.max_length)
        for part in parts
    )
    return Data(train, other, labels)


def _run(data: Data, model, provider: str, dtype: str, options: argparse.Namespace) -> dict:
    """Seconds of the training, the accuracy after it, and how much of the batches was padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

    ours, sampling = PROVIDERS[provider]
    torch.manual_seed(options.seed)
    network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(data.labels))
    if ours:
        import fastft

        fastft.optimize(network)
    collate, seen = tokens.collator(AutoTokenizer.from_pretrained(model)), Padding()

    def collator(rows):
        batch = collate(rows)
        seen.count(batch["attention_mask"])
        return batch

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            train_sampling_strategy=sampling,
            seed=options.seed,
            bf16=dtype == "bfloat16",
            use_cpu=options.device == "cpu",
            dataloader_pin_memory=options.device != "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(network, arguments, data_collator=collator, train_dataset=data.train)
        start = time.perf_counter()
        trainer.train()
        seconds, share = time.perf_counter() - start, seen.share
        found = trainer.predict(data.held_out)  # in the order of its batches, which may be by length
    right = (found.predictions.argmax(-1) == found.label_ids).mean()
    return {"seconds": seconds, "padding": share, "accuracy": float(right)}


class Padding:
    """Counts it in the batches that it is shown."""

    def __init__(self) -> None:
        self.places = self.tokens = 0

    def count(self, mask: torch.Tensor) -> None:
        self.places += mask.numel()
        self.tokens += int(mask.sum())

    @property
    def share(self) -> float:
        return 1 - self.tokens / self.places


if __name__ == "__main__":
    sys.exit(main())
