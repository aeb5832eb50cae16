"""Checkpoints in and out: a classifier from a pre-trained encoder, and the files that every library can load."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from fastft.training import files
from fastft.training.classifier import TextClassifier, TextClassifierConfig
from fastft.training.readers import first_line

# What the architectures call their dropout probabilities.
DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    *("dropout", "attention_dropout", "seq_classif_dropout"),
)
_ON_THE_HUB = re.compile(r"\w[\w.-]*(?:/[\w.-]+)?")  # what names there look like


@contextlib.contextmanager
def transformers_quiet() -> Iterator[None]:
    """Keeps transformers' progress bars, and its and the hub's log lines below errors, away."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels, bars = [logger.level for logger in loggers], transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def load_classifier(
    name: str | os.PathLike, head: str, labels: Sequence[str], dropout: float | None
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, list[str]]:
    """Loads tokenizer and encoder, in float32, of a checkpoint under a new classification head for the given labels.

    Args:
        name: a folder or a name on the Hugging Face hub.
        head: "pooler", the model's own sequence classifier, or "cls", :class:`fastft.TextClassifier`.
        dropout: every dropout probability of the model, or None for the checkpoint's.
    Returns: (tokenizer, model, names of the parameters that start at random).
    Raises: ValueError: nothing to load there, weights of the encoder itself are missing in it, or the tokenizer is.
    """
    place = {"trust_remote_code": False}  # never on by default, and never asked for on the terminal
    with loading(name):
        config = AutoConfig.from_pretrained(name, **place)
        tokenizer = AutoTokenizer.from_pretrained(name, **place)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    if dropout is not None:
        set_dropout(config, dropout)
    if head == "pooler" and isinstance(config, TextClassifierConfig):
        raise ValueError(f"model={str(name)!r} is a TextClassifier, which has no pooler: pass head='cls'")
    model_class = TextClassifier if head == "cls" else AutoModelForSequenceClassification
    how = {"dtype": torch.float32, "weights_only": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with loading(name):
        model, loaded = model_class.from_pretrained(name, config=config, **how, **place)
    fresh = sorted(loaded["missing_keys"] | {key for key, *_ in loaded["mismatched_keys"]})
    lost = [key for key in fresh if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key]
    if lost:
        raise ValueError(
            f"model={str(name)!r} lacks {len(lost)} weights of the encoder that its configuration asks for, "
            f"the first is {lost[0]}"
        )
    check_tokenizer(f"model={str(name)!r}", tokenizer, model)
    return tokenizer, model, fresh


def check_tokenizer(place: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raises: ValueError: it is none that ``model`` was trained with, though transformers takes it."""
    special = set(tokenizer.all_special_tokens)
    if len(tokenizer) <= len(special):  # what transformers makes up where there is no file
        raise ValueError(f"{place} holds no tokenizer: there are no tokens but {', '.join(sorted(special))}")
    known, rows = max(tokenizer.get_vocab().values()) + 1, model.get_input_embeddings().num_embeddings
    if known > rows:
        raise ValueError(f"{place} has a tokenizer of another model: it knows {known:,} tokens, the model {rows:,}")


@contextlib.contextmanager
def loading(name: str | os.PathLike) -> Iterator[None]:
    """Whatever transformers, tokenizers and safetensors raise about the checkpoint ``name``, in one sentence."""
    name, nowhere = str(name), ""
    if not os.path.isdir(name):
        is_file = os.path.isfile(name)
        nowhere = "it is a file, not a folder" if is_file else "there is no such folder"
        if is_file or not _ON_THE_HUB.fullmatch(name):
            raise ValueError(f"model={name!r} cannot be loaded: {nowhere}")
        nowhere += ", and the Hugging Face hub: "
    try:
        with transformers_quiet():
            yield
    except Exception as error:  # tokenizers raises nothing more specific
        reason = first_line(error) or type(error).__name__
        raise ValueError(f"model={name!r} cannot be loaded: {nowhere}{reason}") from error


def set_dropout(config: PreTrainedConfig, dropout: float) -> None:
    """Sets every dropout probability that ``config`` has, whatever its architecture calls them."""
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        for key in DROPOUTS:
            if hasattr(part, key):
                setattr(part, key, dropout)


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over configuration and weights: two runs with the same fingerprint started from the same model."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("_name_or_path", "dtype")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in weights(model).items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by name, a shared one once."""
    saved = model.state_dict(keep_vars=True)
    once = {id(tensor): name for name, tensor in reversed(saved.items())}
    return {name: saved[name] for name in sorted(once.values())}


def save_classifier(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes weights, configuration and tokenizer as transformers does; files of other names stay."""
    new = folder / ".unfinished-model"
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed here
    new.mkdir()
    try:
        with transformers_quiet():
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
        mode = (new / "config.json").stat().st_mode  # as umask has it; safetensors lets nobody else read the weights
        for path in sorted(new.iterdir()):
            path.chmod(mode)
            files.sync(path)
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    files.sync(folder)
