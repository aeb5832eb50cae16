"""The head of a sequence classifier: its loss."""

import contextlib
import inspect

import torch

from fastft import functional
from fastft.models.encoder import reading_first
from fastft.models.swap import Swapped, replaced


class SequenceClassifier(Swapped):
    """What the replacing classes of sequence classifiers have in common: our cross-entropy; other losses are stock's.

    Stock's ``forward`` is transformers': ``labels`` among its arguments, ``loss`` and ``logits`` in its output.
    """

    _fastft_cls_only = True
    _fastft_encoder = None  # the attribute of the encoder, of whose hidden states only first rows are read
    _fastft_readers = ()  # attributes of the modules that get them, beside the encoder's own pooler

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if (stock := replaced(cls)) is not None:
            cls._fastft_labels = list(inspect.signature(stock.forward).parameters).index("labels") - 1  # without self

    def _fastft_why_not(self):
        """A sentence if the classifier's loss is not cross-entropy over class indices, else None."""
        kind = self.config.problem_type or ("regression" if self.num_labels == 1 else "single_label_classification")
        return None if kind == "single_label_classification" else f"the loss of {kind} is PyTorch's"

    def _fastft_forward(self, *args, **kwargs):
        position = self._fastft_labels
        labels = args[position] if len(args) > position else kwargs.get("labels")
        readers = [getattr(self, name) for name in self._fastft_readers]
        context = contextlib.nullcontext()
        if self._fastft_cls_only:
            context = reading_first(getattr(self, self._fastft_encoder), readers)
        if labels is None or not _is_single_label(self, labels):
            with context:
                return super().forward(*args, **kwargs)
        if len(args) > position:
            args = (*args[:position], None, *args[position + 1 :])
        else:
            kwargs["labels"] = None
        return_dict = kwargs.pop("return_dict", None)
        with context:
            output = super().forward(*args, **kwargs, return_dict=True)
        logits = output.logits.view(-1, self.num_labels)
        loss = functional.cross_entropy(logits, labels.view(-1).to(logits.device))
        output = type(output)(loss=loss, **output)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def _is_single_label(self, labels):
    if self.config.problem_type is None and self.num_labels > 1 and labels.dtype in (torch.int64, torch.int32):
        self.config.problem_type = "single_label_classification"  # as transformers does with the first labels it sees
    return self.config.problem_type == "single_label_classification"
