"""Whether fastft trains as well as stock: the same seeds and batches, paired, beside a control that must not pass.

MiniLM learns snippets of movie reviews for some steps, with dropout. Each run gives the mean loss of its last 50 steps
and the accuracy on texts put aside. Stock and fastft (with fastft.optim's AdamW) start a seed from the same weights and
see the same batches, but drop other elements; so neither figure is equal, and their mean difference over the seeds must
be at most 3 of its standard errors. The control is fastft with dropout 0.3 where the others have 0.1: a test that lets
it pass would not see a wrong dropout at all. A run takes one to three minutes. With --save each run is kept as soon as
it is done; with --add, a command that was interrupted makes what is missing.
"""

import argparse
import itertools
import logging
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from benchmarks import datasets, finetune, report
from fastft.training import tokens

PROVIDERS = {  # whether our kernels run, and the probability of dropout
    report.STOCK: (False, 0.1),
    report.FASTFT: (True, 0.1),
    report.CONTROL: (True, 0.3),
}
RUN = (*report.SETTINGS, "seed", "provider")  # what tells runs apart
TEXTS, HELD_OUT, LAST = 6400, 4000, 50


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the runs that the options select and prints the table; 1 if a test does not end as it must."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    wanted = list(itertools.product(options.seed or range(5), options.only or PROVIDERS))
    settings = {name: getattr(options, name) for name in report.SETTINGS}
    rows = [row for row in (report.saved("accuracy") if options.add else ()) if row.items() >= settings.items()]
    done = {(row["seed"], row["provider"]) for row in rows}
    missing = [run for run in wanted if run not in done]
    if missing:
        model = datasets.minilm()
        data = finetune.read(finetune.JOBS["reviews"], model, options.texts, options.held_out, seed=0)
    for index, (seed, provider) in enumerate(missing):
        start = time.perf_counter()
        rows.append(settings | {"seed": seed, "provider": provider} | _run(data, model, provider, seed, options))
        report.keep("accuracy", rows, options, RUN)
        seconds, left = time.perf_counter() - start, len(missing) - index - 1
        print(f"seed {seed}, {provider}: {seconds:.0f} s, {seconds * left / 60:.0f} minutes to go", file=sys.stderr)
    report.publish("accuracy", rows, {}, options, RUN if options.add else ())
    return 0 if report.trains_as_stock(rows) is not False else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--seed", action="append", type=int, help="repeatable (0 to 4)")
    parser.add_argument("--only", action="append", choices=tuple(PROVIDERS), help="repeatable (all)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--texts", type=int, default=TEXTS, help=f"to train on ({TEXTS})")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help=f"texts for the accuracy ({HELD_OUT})")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--add", action="store_true", help="keep the runs that were saved today, and make none twice")
    report.add_options(parser, rounds=1)
    return parser.parse_args(arguments)


def _run(data: finetune.Data, model, provider: str, seed: int, options: argparse.Namespace) -> dict:
    """The mean of the last losses and the accuracy after the training."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    ours, dropout = PROVIDERS[provider]
    torch.manual_seed(seed)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(data.labels), **rates).train()
    if ours:
        import fastft
        import fastft.optim

        fastft.optimize(network)
        optimizer = fastft.optim.AdamW(network.parameters(), lr=options.learning_rate, max_grad_norm=1.0)
    else:
        optimizer = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=options.steps)
    collate, losses = tokens.collator(AutoTokenizer.from_pretrained(model)), []
    torch.manual_seed(seed)
    for rows in itertools.islice(_batches(len(data.train), options.batch_size, seed), options.steps):
        loss = network(**collate([data.train[row] for row in rows])).loss
        loss.backward()
        if not ours:
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        losses.append(loss.item())
    last = losses[-LAST:]
    return {"loss": sum(last) / len(last), "accuracy": _accuracy(network.eval(), data.held_out, collate)}


def _batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Without end, in an order that depends on the seed only."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        yield from (rows for rows in tokens.batches(order, size) if len(rows) == size or count < size)


@torch.no_grad()
def _accuracy(network: torch.nn.Module, rows: tokens.Tokens, collate) -> float:
    lengths, right = rows.lengths(), 0
    for batch in tokens.batches(sorted(range(len(rows)), key=lengths.__getitem__), 64):
        inputs = collate([rows[row] for row in batch])
        targets = inputs.pop("labels")
        right += int((network(**inputs).logits.argmax(-1) == targets).sum())
    return right / len(rows)


if __name__ == "__main__":
    sys.exit(main())
