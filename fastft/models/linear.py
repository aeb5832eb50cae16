"""torch.nn.Linear, alone and together with the activation that follows it."""

import functools

import torch
from transformers.activations import ACT2FN

from fastft import activations
from fastft.functional import linear_act
from fastft.models.swap import Swapped, heard, replaces, watched


class Linear(Swapped, torch.nn.Linear):
    @replaces(torch.nn.Linear.forward)
    def forward(self, input):
        if (together := heard(self)) is not None:  # in a classifier: head.py
            return together.logits(input)
        return linear_act(input, self.weight, self.bias, "identity")


def fused(input, linear, activation):
    """``activation(linear(input))`` by one kernel, without calling either module; ``why_not_fused`` must be None."""
    return linear_act(input, linear.weight, linear.bias, activation_name(activation))


def why_not_fused(linear, activation):
    """A sentence if these two modules, as they are now, have to be called one after the other, else None."""
    if why := why_not_linear(linear):
        return f"its linear layer {why}"
    if activation_name(activation) is None:
        return f"its activation {activation} is none of fastft's"
    if isinstance(activation, torch.nn.Module) and (why := watched(activation)):
        return f"its activation {why}"
    return None


def why_not_linear(linear):
    """The end of a sentence if this module has to be called, its work cannot be done elsewhere, else None."""
    if type(linear) not in (Linear, torch.nn.Linear):
        return f"is {_path(linear)}, not torch.nn.Linear"
    return watched(linear)


def activation_name(activation):
    """The name in :data:`fastft.activations.NAMES` of a module or function, None if it is not exactly one of them."""
    for options, name in _KNOWN_ACTIVATIONS.get(_kind(activation), ()):
        if options == _options(activation):
            return name
    return None


def _known_activations():
    """``{function or module class: [(options, name), …]}``."""
    known = {}
    for name in activations.NAMES:
        function = activations.torch_function(name)
        known.setdefault(function, []).append((_options(function), name))
    for alias in ACT2FN:
        if name := _resolve(alias):
            module = ACT2FN[alias]
            known.setdefault(type(module), []).append((_options(module), name))
    return known


def _resolve(alias):
    try:
        return activations.resolve(alias)
    except ValueError:  # one of transformers' that we have no kernel for
        return None


def _kind(activation):
    return type(activation) if isinstance(activation, torch.nn.Module) else activation


def _options(activation):
    """What distinguishes two activation modules of one class: slopes, approximations, the function inside."""
    if not isinstance(activation, torch.nn.Module):
        return None
    return {
        key: _comparable(value)
        for key, value in vars(activation).items()
        if not key.startswith("_") and key not in ("training", "inplace")
    }


def _comparable(value):
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    return getattr(value, "__func__", value)  # of a bound method: its object is another one in each module


def _path(module):
    return f"{type(module).__module__}.{type(module).__qualname__}"


_KNOWN_ACTIVATIONS = _known_activations()
