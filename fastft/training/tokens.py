"""Texts to batches: tokens by the model's own tokenizer, batches of similar length, padding to the longest row."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchEncoding, DataCollatorWithPadding, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices

from fastft.models.mask import with_lengths

CHUNK = 1000  # texts that the tokenizer is given at a time: its own objects take 100 bytes a token


@dataclass(frozen=True)
class Tokens:
    """Texts as tokens, four bytes each: Python's own lists take ten times that, and large data would not fit.

    A row, ``tokens[i]``, is what the collator takes: ``input_ids``, …, ``labels``.

    Attributes:
        columns: of each text ``input_ids``, and what else the model wants but the mask, which the collator makes.
        labels: of each text.
        cut: how many texts were.
    """

    columns: dict[str, list[array]]
    labels: list[int]
    cut: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: rows[row].tolist() for name, rows in self.columns.items()} | {"labels": self.labels[row]}

    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.columns["input_ids"]]


# model_type of those that number positions from the padding token's index on: of 514 positions 512 are left.
_POSITIONS_AFTER_PADDING = (
    *("camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "mpnet", "roberta"),
    *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)


def longest_row(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, max_length: int) -> int:
    """``max_length``, or what tokenizer and model can take where that is less."""
    return min(tokenizer.model_max_length, longest_input(config, max_length))


def longest_input(config: PreTrainedConfig, max_length: int) -> int:
    """``max_length``, or what the model can take where that is less."""
    parts = [config, *(getattr(config, name) for name in config.sub_configs)]
    return min(max_length, *(_positions(part, max_length) for part in parts))


def _positions(config: PreTrainedConfig, unknown: int) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return unknown
    return positions - (config.pad_token_id + 1 if config.model_type in _POSITIONS_AFTER_PADDING else 0)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], targets: Sequence[int], max_length: int) -> Tokens:
    """Tokenises ``texts``, cutting each at ``max_length`` tokens, and adds ``targets`` as ``labels``."""
    columns: dict[str, list[array]] = {}
    cut = 0
    for start in range(0, len(texts), CHUNK):
        part = list(texts[start : start + CHUNK])
        encoded = tokenizer(part, truncation=True, max_length=max_length, return_attention_mask=False)
        for name, rows in encoded.items():
            columns.setdefault(name, []).extend(array("i", row) for row in rows)
        cut += _cut(tokenizer, encoded, part, max_length)
    return Tokens(columns, list(targets), cut)


def _cut(tokenizer: PreTrainedTokenizerBase, encoded: BatchEncoding, texts: Sequence[str], max_length: int) -> int:
    """How many of ``texts`` were longer than ``encoded``, what the tokenizer made of them, holds."""
    if encoded.encodings is not None:
        return sum(bool(of.overflowing) for of in encoded.encodings)
    # a tokenizer written in Python does not tell
    full = [text for text, ids in zip(texts, encoded["input_ids"], strict=True) if len(ids) == max_length]
    return sum(len(ids) > max_length for ids in tokenizer(full, verbose=False)["input_ids"]) if full else 0


class Collator(DataCollatorWithPadding):
    """Pads the rows of a batch to its longest; the mask knows their lengths, without which a GPU would pack nothing."""

    def __call__(self, features: list[dict[str, Any]]) -> BatchEncoding:
        batch = super().__call__(features)
        if "attention_mask" in batch and self.tokenizer.padding_side == "right":
            lengths = [len(row["input_ids"]) for row in features]
            batch["attention_mask"] = with_lengths(batch["attention_mask"], lengths)
        return batch


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
    """The one place where batches are formed."""
    return Collator(tokenizer)


def batches(rows: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """``rows`` in their order, cut into batches."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def padding_share(batches: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    """How much of ``batches``, row numbers that are padded to the longest of each, is padding."""
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in batches)
    return 1 - sum(lengths[row] for rows in batches for row in rows) / padded


class LengthGroupedSampler(torch.utils.data.Sampler):
    """transformers' grouping by length, in an order that depends on seed and epoch only.

    transformers' own sampler draws from the global generator, so the order of the second epoch depends on what dropout
    drew in the first: two runs with different kernels, or a resumed one, would see other batches.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:  # called by the Trainer
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
