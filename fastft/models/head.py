"""The head of a sequence classifier: its loss, and what comes right before it."""

import contextlib
import functools
import inspect
import operator

import torch

from fastft import functional
from fastft.functional.head import head
from fastft.models.encoder import reading_first
from fastft.models.linear import Linear, why_not_linear
from fastft.models.swap import Swapped, replaced, told, watched


class SequenceClassifier(Swapped):
    """What the replacing classes of sequence classifiers have in common: our cross-entropy; other losses are stock's.

    Stock's ``forward`` is transformers': ``labels`` among its arguments, ``loss`` and ``logits`` in its output.
    """

    _fastft_cls_only = True
    _fastft_parts = ("dropout",)  # which nothing but the classifier gets; or ()
    _fastft_classifier = "classifier"  # where the linear layer is that makes the logits
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

    def _fastft_why_not_parts(self):
        """A sentence if dropout, classifier and loss run one after the other, else None."""
        classifier = operator.attrgetter(self._fastft_classifier)(self)
        if type(classifier) is not Linear or watched(classifier):
            return f"its {self._fastft_classifier} {why_not_linear(classifier) or 'is not swapped'}"
        if classifier.out_features != self.num_labels:
            return (
                f"its {self._fastft_classifier} has {classifier.out_features} outputs, num_labels is {self.num_labels}"
            )
        for name in self._fastft_parts:
            if type(dropout := getattr(self, name)) is not torch.nn.Dropout:
                return f"its {name} is {type(dropout).__module__}.{type(dropout).__qualname__}, not torch.nn.Dropout"
            if why := watched(dropout):
                return f"its {name} {why}"
        return None

    def _fastft_together(self, labels):
        """What makes the classifier drop, multiply and take the loss by one op, or None."""
        if torch.compiler.is_compiling() or self._fastft_why_not_parts() is not None:
            return None
        dropouts = [getattr(self, name) for name in self._fastft_parts]
        return Together(operator.attrgetter(self._fastft_classifier)(self), dropouts, labels.view(-1))

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
        forward = functools.partial(super().forward, *args, **kwargs, return_dict=True)
        together = self._fastft_together(labels)
        with context:
            output = forward() if together is None else together.run(forward)
        if together is not None:
            loss = together.loss
        else:
            logits = output.logits.view(-1, self.num_labels)
            loss = functional.cross_entropy(logits, labels.view(-1).to(logits.device))
        output = type(output)(loss=loss, **output)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class Together:
    """In :meth:`run`, ``classifier``, a :class:`Linear`, makes ``loss`` along with the logits, and drops in place of
    the ``dropouts``, of which stock's forward calls at most one before it."""

    def __init__(self, classifier, dropouts, labels):
        self.classifier, self.labels, self.loss = classifier, labels, None
        self.dropouts = [dropout for dropout in dropouts if dropout.training]

    def run(self, forward):
        for dropout in self.dropouts:
            dropout.training = False
        try:
            with told({self.classifier: self}):
                return forward()
        finally:
            for dropout in self.dropouts:
                dropout.training = True

    def logits(self, input):
        p = sum(dropout.p for dropout in self.dropouts)
        labels, linear = self.labels.to(input.device), self.classifier
        self.loss, logits = head(input, linear.weight, linear.bias, labels, p)
        return logits


def _is_single_label(self, labels):
    if self.config.problem_type is None and self.num_labels > 1 and labels.dtype in (torch.int64, torch.int32):
        self.config.problem_type = "single_label_classification"  # as transformers does with the first labels it sees
    return self.config.problem_type == "single_label_classification"
