"""Swaps our kernels into a model, and out again."""

import torch

from fastft import _library
from fastft.functional.encoder_layer import MEMORY
from fastft.models.swap import Swapped, is_sharded, known_base, replaced, replacement
from fastft.testing import tune

DTYPES = ("auto", torch.bfloat16, torch.float32)
_LEAST = 1 << 20  # bytes of a weight that is worth pages of its own
READ_PADDING = "ForQuestionAnswering"  # ends the names of transformers' classes whose loss is over all tokens of a row


def optimize(model, *, dtype="auto", padding_free=True, cls_only="auto", activation_memory="fast"):
    """Lets every part of ``model`` that fastft knows run on fastft's kernels; in place.

    Only the classes of modules change, each to a subclass of the same name: parameters, ``state_dict``, saving and
    loading stay as they are. :func:`fastft.report` tells what runs where, :func:`restore` undoes it. Call it before
    anything wraps the model (``fully_shard``, ``Trainer(bf16=True)``, accelerate), but after what chooses modules by
    their exact class (``quantize_dynamic`` would leave ours alone); calling it again takes in what was added since, and
    the new ``dtype``. The first call on a machine takes a few seconds more to find out which kernels are faster there
    (FASTFT_TUNE=0 leaves it to the shipped rule). On a CPU large weights get memory in pages of 2 MB, where the system
    gives such, by their addresses as before.

    Args:
        model: any torch.nn.Module. BertModel, BertForSequenceClassification and TextClassifier are known as a whole; of
            others every torch.nn.Linear, and those inside them.
        dtype: ``"auto"`` computes in the dtype of the parameters, or autocast's where the caller trains under it;
            ``torch.bfloat16`` in bfloat16 with float32 parameters and accumulation, outputs in float32;
            ``torch.float32`` in float32 even under autocast.
        padding_free: False computes padding as stock does. Otherwise sequences run without theirs where each one's
            first token is unmasked, and hidden states of padding, which an encoder by itself returns, are zeros;
            inside of question answering, whose loss reads them, padding is computed.
        cls_only: ``"auto"`` computes the last layer for first tokens only where the model has a head that reads nothing
            else; False for all of them; True as "auto", and an error where there is no such head.
        activation_memory: what an encoder layer keeps for the backward, in units of one hidden state: ``"fast"`` about
            11; ``"low"`` 6, for two more products; ``"lowest"`` 1, for a second forward. Where
            ``gradient_checkpointing_enable()`` was called, "lowest".
    Returns: ``model``.
    Raises:
        TypeError: ``optimize: model must be a torch.nn.Module, got str``
        ValueError: ``optimize: dtype is 'half', must be one of 'auto', torch.bfloat16, torch.float32``; or the
            parameters have another dtype than float32 and the one asked for; or ``optimize: cls_only is True, but
            BertModel has no head that reads first tokens only``.
    Example:
        >>> model = optimize(torch.nn.Linear(3, 2))
        >>> type(restore(model)) is torch.nn.Linear
        True
    """
    check_module("optimize", model)
    if not isinstance(dtype, str | torch.dtype) or dtype not in DTYPES:
        raise ValueError(f"optimize: dtype is {dtype!r}, must be one of {', '.join(map(repr, DTYPES))}")
    if cls_only not in ("auto", True, False):
        raise ValueError(f"optimize: cls_only is {cls_only!r}, must be one of 'auto', True, False")
    if not isinstance(padding_free, bool):
        raise ValueError(f"optimize: padding_free is {padding_free!r}, must be True or False")
    if activation_memory not in MEMORY:
        raise ValueError(
            f"optimize: activation_memory is {activation_memory!r}, must be one of {', '.join(map(repr, MEMORY))}"
        )
    why_not = obstacles(model)
    plan = {  # of modules that are ours already too: their dtype may be another one now
        name: (module, replacement(type(module)))
        for name, module in model.named_modules()
        if isinstance(module, Swapped) or (replacement(type(module)) and name not in why_not)
    }
    compute = _compute_dtype(plan, dtype)
    heads = [ours or type(module) for module, ours in plan.values() if hasattr(ours or module, "_fastft_cls_only")]
    if cls_only is True and not heads:
        raise ValueError(
            f"optimize: cls_only is True, but {type(model).__name__} has no head that reads first tokens only"
        )
    readers = (module for module in model.modules() if type(module).__name__.endswith(READ_PADDING))
    read = {inner for reader in readers for inner in reader.modules()}
    for module, ours in plan.values():
        module.__class__ = ours or type(module)
        _forget_options(module)
        if compute is not None:
            module._fastft_dtype = compute
        if activation_memory != "fast" and hasattr(module, "_fastft_activation_memory"):
            module._fastft_activation_memory = activation_memory
        if (not padding_free or module in read) and hasattr(module, "_fastft_padding_free"):
            module._fastft_padding_free = False
        if not cls_only and hasattr(module, "_fastft_cls_only"):
            module._fastft_cls_only = False
    _library.huge_pages([weight for weight in map(_in_memory, model.modules()) if weight is not None], written=True)
    tune.first_time(model)
    return model


def restore(model):
    """Undoes :func:`optimize`: every module has the class again that it had before; in place, parameters untouched.

    A wrapper that accelerate or Trainer(bf16=True) put around a ``forward`` since then stays, and leads to the original
    one.

    Returns: ``model``.
    Raises:
        TypeError: ``restore: model must be a torch.nn.Module, got str``
        RuntimeError: a module's class was changed again after ``optimize`` (``fully_shard`` and
            ``torch.nn.utils.parametrize`` do that), which restoring would destroy.
    """
    check_module("restore", model)
    swapped = {name: module for name, module in model.named_modules() if isinstance(module, Swapped)}
    if swapped and (sharded := sharded_modules(model)):
        first = shown(min(sharded))
        raise RuntimeError(f"restore: fully_shard was applied to {first} after optimize and cannot be undone")
    for name, module in swapped.items():
        if replaced(type(module)) is None:
            made = type(module).__name__
            raise RuntimeError(f"restore: {shown(name)} was made a {made} after optimize; undo that first")
    for module in swapped.values():
        _forget_options(module)
        module.__class__ = replaced(type(module))
    return model


def obstacles(model):
    """``{name: sentence}`` of the modules that fastft knows but must leave as they are."""
    found, sharded = {}, sharded_modules(model)
    for name, module in model.named_modules():
        if isinstance(module, Swapped) or known_base(type(module)) is None:
            continue
        if name in sharded:
            found[name] = "fully_shard came first: call optimize before it"
        elif "forward" in vars(module) and replacement(type(module)) is not None:
            found[name] = "wrapped: optimize first"
    return found


def sharded_modules(model):
    """The names of the modules to which ``fully_shard`` was applied, and of those inside them."""
    names = set()
    for name, module in model.named_modules():  # parents first
        if is_sharded(module) or name.rpartition(".")[0] in names:
            names.add(name)
    return names


def _in_memory(module):
    """A linear layer's weight, if products read it row by row from the CPU's memory; large ones, as only these gain."""
    weight = module.weight if isinstance(module, torch.nn.Linear) else None
    plain = type(weight) is torch.nn.Parameter and weight.is_cpu and weight.layout is torch.strided
    return weight if plain and weight.is_contiguous() and weight.numel() * weight.itemsize >= _LEAST else None


def _forget_options(module):
    for option in ("_fastft_dtype", "_fastft_padding_free", "_fastft_cls_only", "_fastft_activation_memory"):
        vars(module).pop(option, None)


def _compute_dtype(plan, dtype):
    """What the swapped modules must be told to compute in; None if the parameters and autocast say it."""
    if dtype == "auto":
        return None
    found = set()
    for name, (module, _) in plan.items():
        for key, parameter in module.named_parameters(name, recurse=False):
            if parameter.dtype not in (torch.float32, dtype):
                wants = " or ".join(dict.fromkeys(("torch.float32", str(dtype))))
                raise ValueError(f"optimize: dtype {dtype} needs parameters of {wants}, {key} is {parameter.dtype}")
            found.add(parameter.dtype)
    return dtype if torch.float32 in found else None


def check_module(function, model):
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def shown(name):
    return repr(name) if name else "the model"
