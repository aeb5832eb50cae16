"""TextClassifier on our kernels; what replaces what is in fastft/models."""

from fastft.models import head
from fastft.training import classifier


class TextClassifier(head.SequenceClassifier, classifier.TextClassifier):
    _fastft_encoder = "encoder"
