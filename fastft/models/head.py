"""The head of a sequence classifier: its loss."""

import inspect

import torch

from fastft import functional
from fastft.models.encoder import reading_first
from fastft.models.swap import replaces


def with_cross_entropy(stock, encoder):
    """The forward of the sequence classifier ``stock`` with our cross-entropy; any other loss is its own.

    The attribute ``encoder`` is its encoder, of whose hidden states it reads first rows only. ``stock.forward`` is
    transformers': ``labels`` among its arguments, ``loss`` and ``logits`` in its output.
    """
    position = list(inspect.signature(stock.forward).parameters).index("labels") - 1  # without self

    def encode(self, *args, **kwargs):
        if not self._fastft_cls_only:
            return stock.forward(self, *args, **kwargs)
        with reading_first(getattr(self, encoder)):
            return stock.forward(self, *args, **kwargs)

    @replaces(stock.forward)
    def forward(self, *args, **kwargs):
        labels = args[position] if len(args) > position else kwargs.get("labels")
        if labels is None or not _is_single_label(self, labels):
            return encode(self, *args, **kwargs)
        if len(args) > position:
            args = (*args[:position], None, *args[position + 1 :])
        else:
            kwargs["labels"] = None
        return_dict = kwargs.pop("return_dict", None)
        output = encode(self, *args, **kwargs, return_dict=True)
        logits = output.logits.view(-1, self.num_labels)
        loss = functional.cross_entropy(logits, labels.view(-1).to(logits.device))
        output = type(output)(loss=loss, **output)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    return forward


def why_not(self):
    """A sentence if the classifier's loss is not cross-entropy over class indices, else None."""
    kind = self.config.problem_type or ("regression" if self.num_labels == 1 else "single_label_classification")
    return None if kind == "single_label_classification" else f"the loss of {kind} is PyTorch's"


def _is_single_label(self, labels):
    if self.config.problem_type is None and self.num_labels > 1 and labels.dtype in (torch.int64, torch.int32):
        self.config.problem_type = "single_label_classification"  # as transformers does with the first labels it sees
    return self.config.problem_type == "single_label_classification"
