"""TextClassifier on our kernels; what replaces what is in fastft/models."""

from fastft.models import head
from fastft.models.swap import Swapped
from fastft.training import classifier


class TextClassifier(Swapped, classifier.TextClassifier):
    _fastft_cls_only = True
    forward = head.with_cross_entropy(classifier.TextClassifier, "encoder")
    _fastft_why_not = head.why_not
