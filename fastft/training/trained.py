"""The folder of a trained classifier: what is wrong with it, told before torch is imported; then its logits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.training import preprocess, run_folder
from fastft.training.readers import first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = tuple(
    f"{name}{index}" for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")
)
WINDOW = 64  # so many batches of texts are tokens at a time, and sorted by length among themselves
UNLIMITED = 512  # tokens of a text where neither tokenizer nor model knows a limit


@dataclass(frozen=True)
class Description:
    """What a folder says of itself: the classes' names in the order of their indices, and how its texts were cleaned.

    ``preprocessing`` is None where fastft did not train it: that model saw texts as they are.
    """

    folder: Path
    names: list[str]
    preprocessing: dict[str, Any] | None

    def clean(self, texts: Sequence[str]) -> tuple[Sequence[str], dict[str, int]]:
        """(the texts as the model saw them in training, how many of them each step changed)."""
        if self.preprocessing is None:
            # half a character, which JSON can hold, is nothing that a tokenizer takes
            return [text if text.isascii() else text.encode(errors="replace").decode() for text in texts], {}
        return preprocess.clean_all(texts, self.preprocessing["lower_case"])


def describe(folder: str | os.PathLike) -> Description:
    """Reads what is to be known of ``folder`` without loading it.

    Raises: OSError, ValueError: one sentence about what is missing or damaged in it, or that it holds no classifier.
    """
    path = Path(folder)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: the folder of a trained model is needed")
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: the folder of a trained model is needed")
    if not (path / "config.json").is_file():
        if (path / run_folder.KEPT).is_dir():
            raise ValueError(
                f"{path} holds an interrupted run and no model yet: finish it with fastft finetune --resume"
            )
        raise ValueError(f"{path} holds no config.json: it is not the folder of a trained model")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        kinds = config.get("architectures") or []
        names = _names(config)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path / 'config.json'} is damaged: {reason}") from error
    if kinds and not any(str(kind).endswith(("ForSequenceClassification", "TextClassifier")) for kind in kinds):
        raise ValueError(f"{path} holds a {kinds[0]}, which is no text classifier: fine-tune it first")
    if config.get("problem_type") in ("regression", "multi_label_classification") or len(names) < 2:
        kind = config.get("problem_type") or f"{len(names)} class"
        raise ValueError(f"{path} does not choose one of several classes: its config.json says {kind!r}")
    if not any((path / name).is_file() for name in WEIGHTS):
        raise ValueError(f"{path} holds no weights: {' or '.join(WEIGHTS[::2])} is missing")
    return Description(path, names, preprocess.read_options(path))


def _names(config: dict[str, Any]) -> list[str]:
    for part in (config, config.get("encoder") or {}):  # a TextClassifier's may stand with its encoder's
        if part.get("id2label"):
            return [str(part["id2label"][str(index)]) for index in range(len(part["id2label"]))]
    return ["LABEL_0", "LABEL_1"]  # what transformers leaves out of the file


@dataclass
class Trained:
    """A classifier ready for inference, on its device, with our kernels unless they were not wanted.

    Attributes:
        stock: whether they were not.
        length: tokens at which a text is cut; cut: how many texts were, so far.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stock: bool
    length: int
    cut: int = 0

    def logits(
        self, texts: Sequence[str], batch_size: int, advance: Callable[[int], None]
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yields (rows, logits) batch by batch: B indices into ``texts``, and (B, C) float32 on the CPU.

        Batches hold texts of similar length. ``advance`` is called with the number of texts of each.
        """
        import torch

        from fastft.training import tokens

        collate = tokens.collator(self.tokenizer)
        for start in range(0, len(texts), WINDOW * batch_size):
            part = texts[start : start + WINDOW * batch_size]
            encoded = tokens.encode(self.tokenizer, part, [0] * len(part), self.length)
            self.cut += encoded.cut
            lengths = encoded.lengths()
            order = sorted(range(len(part)), key=lambda row: -lengths[row])
            for first in range(0, len(order), batch_size):
                rows = order[first : first + batch_size]
                batch = collate([encoded[row] for row in rows]).to(self.model.device)
                batch.pop("labels")
                with torch.no_grad():
                    logits = self.model(**batch).logits
                yield [start + row for row in rows], logits.float().cpu()
                advance(len(rows))

    def kernels(self) -> str:
        """Whose kernels run where, and why."""
        import fastft
        from fastft.training.lines import kernels_fact

        return kernels_fact(None if self.stock else fastft.report(self.model))


def load(known: Description, max_length: int | None, stock: bool) -> Trained:
    """Loads what :func:`describe` found: float32, on an accelerator if there is one. Nothing is unpickled, no code run.

    Args:
        max_length: tokens of a text, at most what the model can take; None takes those it was trained with.
    Raises: ValueError: the folder is damaged.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import fastft
    from fastft.training import classifier, tokens  # noqa: F401 — makes TextClassifier known to transformers
    from fastft.training.checkpoint import check_tokenizer, transformers_quiet

    place = {"local_files_only": True, "trust_remote_code": False}
    try:
        with transformers_quiet():
            tokenizer = AutoTokenizer.from_pretrained(known.folder, **place)
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                known.folder, dtype=torch.float32, weights_only=True, output_loading_info=True, **place
            )
    except Exception as error:  # transformers, tokenizers, safetensors and pickle each raise their own
        reason = first_line(error) or "no reason given"
        raise ValueError(f"{known.folder} cannot be loaded: {type(error).__name__}: {reason}") from error
    lost = sorted(loaded["missing_keys"])
    if lost:
        raise ValueError(f"{known.folder} lacks {len(lost)} weights of the model, the first is {lost[0]}")
    if model.config.num_labels != len(known.names):
        raise ValueError(f"{known.folder} names {len(known.names)} classes, its model has {model.config.num_labels}")
    check_tokenizer(str(known.folder), tokenizer, model)
    wanted = max_length or (known.preprocessing or {}).get("max_length")
    length = tokens.longest_row(tokenizer, model.config, wanted or 2**31)
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu").eval()
    if not stock:
        fastft.optimize(model)
    return Trained(model, tokenizer, stock, UNLIMITED if length == 2**31 else length)
