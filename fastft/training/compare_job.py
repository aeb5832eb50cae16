"""What ``fastft compare`` trains: a classifier, and batches that stand for a whole epoch of its data."""

from __future__ import annotations

import copy
import inspect
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import fastft
from fastft.training import checkpoint, data, tokens
from fastft.training.classifier import TextClassifierConfig
from fastft.training.tokens import padding_share

TEXTS = 10_000  # that are tokenised; of larger data a random sample of this size
MEGABATCH = 50  # batches among which transformers groups rows by length
MEDIAN_LENGTH, SIGMA = 48, 0.7  # of made-up texts: log-normal, a mean of 61 tokens, one in 120 above 256
ROWS = 10_000  # of the projected job without data

Collate = Callable[[Sequence[int]], dict[str, torch.Tensor]]  # row numbers -> batch


@dataclass(frozen=True)
class Job:
    """A stock classifier on the device it is to be trained on, and the rows for it.

    Attributes:
        rows: of the whole job; ``lengths`` and ``collate`` may know a sample only.
        grouped: an epoch's batches, of similar length, as row numbers.
        padding: share of padding in batches that are ``grouped`` by length, and ``ungrouped``.
        facts: what is trained on what, one line each.
    """

    network: PreTrainedModel
    rows: int
    lengths: list[int]
    collate: Collate
    grouped: list[list[int]]
    padding: dict[str, float]
    facts: dict[str, str]

    def batches(self, steps: int, seed: int) -> list[dict[str, torch.Tensor]]:
        """The longest, then ``steps`` spread evenly over all sizes, in random order: their mean is the epoch's."""
        full = [rows for rows in self.grouped if len(rows) == len(self.grouped[0])]
        rising = sorted(full, key=lambda rows: len(rows) * max(self.lengths[row] for row in rows))
        spread = [rising[int((step + 0.5) / steps * len(rising))] for step in range(steps)]
        random.Random(seed).shuffle(spread)
        return [self._batch(rows) for rows in (rising[-1], *spread)]

    def _batch(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return {name: values.to(self.network.device) for name, values in self.collate(rows).items()}


def load(
    model: str | os.PathLike | PreTrainedModel,
    examples: data.Examples | None,
    batch_size: int,
    max_length: int,
    seed: int,
) -> Job:
    """A job from :func:`fastft.compare`'s arguments; ``examples`` None makes up rows of random tokens.

    Raises: ValueError, TypeError, OSError: one sentence that names the argument and the value.
    """
    names = None if examples is None else data.label_names(examples.labels)
    network, tokenizer, facts = _classifier(model, names)
    network.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if examples is None:
        lengths, collate = _made_up(network, batch_size * MEGABATCH, max_length)
        rows = ROWS
        facts["data"] = (
            f"none given: random tokens, of lengths as uneven as real texts' (log-normal, {np.mean(lengths):.1f} on "
            f"average, at most {max(lengths)})"
        )
    else:
        lengths, collate, facts["data"] = _tokenised(network, tokenizer, examples, names, max_length, seed)
        rows = len(examples)
    order = list(tokens.LengthGroupedSampler(lengths, batch_size, seed))
    mixed = random.Random(seed).sample(order, len(order))
    grouped, ungrouped = (tokens.batches(rows, batch_size) for rows in (order, mixed))
    padding = {"grouped": padding_share(grouped, lengths), "ungrouped": padding_share(ungrouped, lengths)}
    facts["batches"] = (
        f"{len(grouped[0])} rows, grouped by length: {padding['grouped']:.1%} padding "
        f"({padding['ungrouped']:.1%} ungrouped)"
    )
    return Job(network, rows, lengths, collate, grouped, padding, facts)


# ---- the model


def _classifier(
    model: str | os.PathLike | PreTrainedModel, labels: Sequence[str] | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, dict[str, str]]:
    """(a stock classifier of our own, its tokenizer if there are ``labels``, what there is to tell)."""
    if isinstance(model, torch.nn.Module):
        network, tokenizer, fresh, name = *_copied(model, labels), [], "the object given"
    else:
        name = str(model)
        head, known = _head(model)
        tokenizer, network, fresh = checkpoint.load_classifier(model, head, labels or known, None)
    size = sum(parameter.numel() for parameter in network.parameters())
    facts = {"model": f"{type(network).__name__} from {name}: {size:,} parameters"}
    return network, tokenizer, facts | ({"new": ", ".join(fresh)} if fresh else {})


def _head(name: str | os.PathLike) -> tuple[str, list[str]]:
    """(the head that a checkpoint has, else the usual one; the names of its classes, else of two)."""
    with checkpoint.loading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    labels = list(config.id2label.values())
    return "cls" if isinstance(config, TextClassifierConfig) else "pooler", labels if len(labels) > 1 else ["0", "1"]


def _copied(
    model: torch.nn.Module, labels: Sequence[str] | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """(a stock copy of ``model``; the tokenizer of the checkpoint that it came from, if there are ``labels``)."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel) or "labels" not in inspect.signature(model.forward).parameters:
        raise TypeError(f"compare: model is a {kind}, a transformers classifier or the name of one is needed")
    if model.config.problem_type not in (None, "single_label_classification") or model.config.num_labels < 2:
        problem = f"problem_type={model.config.problem_type!r}, num_labels={model.config.num_labels}"
        raise ValueError(f"compare: the model has {problem}; a classifier with one of several classes a row is needed")
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(f"compare: the model's parameters must be torch.float32, {name} is {parameter.dtype}")
    if labels is not None:
        if len(labels) > model.config.num_labels:
            raise ValueError(f"compare: data has {len(labels)} classes, the model {model.config.num_labels}")
        if not model.name_or_path:
            raise ValueError("compare: the model names no checkpoint to take a tokenizer from: pass a folder")
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path) if labels is not None else None
    return fastft.restore(copy.deepcopy(model)), tokenizer


# ---- the rows


def _tokenised(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: data.Examples,
    names: Sequence[str],
    max_length: int,
    seed: int,
) -> tuple[list[int], Collate, str]:
    """(lengths, collate, what there is to tell) of ``examples``, or of a sample of them."""
    sample = sorted(random.Random(seed).sample(range(len(examples)), min(TEXTS, len(examples))))
    taken, indices = examples.take(sample), {name: index for index, name in enumerate(names)}
    length = tokens.longest_row(tokenizer, network.config, max_length)
    encoded = tokens.encode(tokenizer, taken.texts, [indices[name] for name in taken.labels], length)
    pad = tokens.collator(tokenizer)
    of = f", of which {len(taken):,} were measured" if len(taken) < len(examples) else ""
    where = f" ({examples.columns})" if examples.columns else ""
    fact = (
        f"{len(examples):,} rows to train on of {examples.source}{where}, {len(names)} classes{of}; "
        f"{np.mean(encoded.lengths()):.1f} tokens a text, {encoded.cut:,} texts cut to {length}"
    )
    return encoded.lengths(), lambda rows: dict(pad([encoded[row] for row in rows])), fact


def _made_up(network: PreTrainedModel, count: int, max_length: int) -> tuple[list[int], Collate]:
    """(lengths, collate) of ``count`` rows of random tokens."""
    embedding, longest = network.get_input_embeddings(), tokens.longest_input(network.config, max_length)
    pad = embedding.padding_idx or 0
    lengths = np.random.lognormal(math.log(MEDIAN_LENGTH), SIGMA, count).round().clip(3, longest).astype(int).tolist()
    ids = [torch.randint(pad + 1, embedding.num_embeddings, (length,)) for length in lengths]  # no padding inside
    targets = torch.randint(network.config.num_labels, (count,))

    def collate(rows: Sequence[int]) -> dict[str, torch.Tensor]:
        padded = torch.nn.utils.rnn.pad_sequence([ids[row] for row in rows], batch_first=True, padding_value=pad)
        mask = torch.arange(padded.shape[1]) < torch.tensor([[lengths[row]] for row in rows])
        return {"input_ids": padded, "attention_mask": mask.long(), "labels": targets[list(rows)]}

    return lengths, collate
