"""Checkpoints in and out: a classifier from a pre-trained encoder, and the folder that a run leaves behind.

A file is written under another name and renamed, so no reader ever sees half of one.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from fastft.training.classifier import TextClassifier, TextClassifierConfig

HEADS = ("pooler", "cls")
# What the architectures call their dropout probabilities.
DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    *("dropout", "attention_dropout", "seq_classif_dropout"),
)


@contextlib.contextmanager
def transformers_quiet() -> Iterator[None]:
    """Keeps transformers' log lines below errors and its progress bars away."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_classifier(
    name: str | os.PathLike, head: str, labels: Sequence[str], dropout: float | None
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, list[str]]:
    """Loads tokenizer and encoder, in float32, of a checkpoint under a new classification head for the given labels.

    Args:
        name: a folder or a name on the Hugging Face hub.
        head: "pooler", the model's own sequence classifier, or "cls", :class:`fastft.TextClassifier`.
        dropout: every dropout probability of the model, or None for the checkpoint's.
    Returns: (tokenizer, model, names of the parameters that start at random).
    Raises: ValueError: nothing to load there, or weights of the encoder itself are missing in it.
    """
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"model={str(name)!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    if dropout is not None:
        set_dropout(config, dropout)
    if head == "pooler" and isinstance(config, TextClassifierConfig):
        raise ValueError(f"model={str(name)!r} is a TextClassifier, which has no pooler: pass head='cls'")
    model_class = TextClassifier if head == "cls" else AutoModelForSequenceClassification
    model, loaded = model_class.from_pretrained(
        name, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    fresh = sorted(loaded["missing_keys"] | {key for key, *_ in loaded["mismatched_keys"]})
    lost = [key for key in fresh if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key]
    if lost:
        raise ValueError(
            f"model={str(name)!r} lacks {len(lost)} weights of the encoder that its configuration asks for, "
            f"the first is {lost[0]}"
        )
    return tokenizer, model, fresh


def set_dropout(config: PreTrainedConfig, dropout: float) -> None:
    """Sets every dropout probability that ``config`` has, whatever its architecture calls them."""
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        for key in DROPOUTS:
            if hasattr(part, key):
                setattr(part, key, dropout)


def prepare_folder(output: str | os.PathLike, overwrite: bool) -> Path:
    """Creates the folder ``output``.

    Raises: FileExistsError: it is a file, or a folder that is not empty and ``overwrite`` is false.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output={str(output)!r} is a file, not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"output={str(output)!r} is not empty: name another folder or pass overwrite=True")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_classifier(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes weights, configuration and tokenizer as transformers does; files of other names stay."""
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        for path in sorted(Path(new).iterdir()):
            path.replace(folder / path.name)


def write_json(path: Path, content: Any) -> None:
    _write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, records: Sequence[Any]) -> None:
    _write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _write(path: Path, content: str) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(content, encoding="utf-8")
    unfinished.replace(path)
