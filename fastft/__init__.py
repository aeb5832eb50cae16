"""fastft makes fine-tuning BERT-family encoders as fast as the hardware allows, with the same numbers.

Names are imported when they are first used, so that ``import fastft`` and ``fastft --help`` load no torch.
"""

import importlib

__version__ = "0.1.0"

_SUBMODULES = ("activations", "functional", "models", "nn", "optim", "testing", "training")

_HOMES = {
    "optimize": "models.optimize",
    "restore": "models.optimize",
    "report": "models.report",
    "Report": "models.report",
    "TextClassifier": "training.classifier",
    "GraphedStep": "training.graphed_step",
    "finetune": "training.finetune",
    "evaluate": "training.evaluate",
    "predict": "training.predict",
    "compare": "training.compare",
}

__all__ = ["__version__", *_SUBMODULES, *_HOMES]


def __getattr__(name):
    if name in _SUBMODULES:
        return importlib.import_module(f"fastft.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"fastft.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastft' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
