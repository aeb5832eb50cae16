"""Swaps our kernels into a model, and out again."""

import types

import torch

from fastft.models.swap import Swapped, is_sharded, known_base, replaced, replacement

DTYPES = ("auto", torch.bfloat16, torch.float32)


def optimize(model, *, dtype="auto"):
    """Lets every part of ``model`` that fastft knows run on fastft's kernels; in place.

    Only the classes of modules change, each to a subclass of the same name: parameters, ``state_dict``, saving and loading
    stay as they are. :func:`report` tells what runs where, :func:`restore` undoes it. Call it before anything wraps the
    model (``fully_shard``, ``Trainer(bf16=True)``, accelerate); calling it again takes in what was added since and the new
    ``dtype``.

    Args:
        model: any torch.nn.Module. BertModel, BertForSequenceClassification and TextClassifier are known as a whole; of
            others every torch.nn.Linear, and those inside them.
        dtype: ``"auto"`` computes in the dtype of the parameters, or autocast's where the caller trains under it;
            ``torch.bfloat16`` in bfloat16 with float32 parameters and accumulation, outputs in float32;
            ``torch.float32`` in float32 even under autocast.
    Returns: ``model``.
    Raises:
        TypeError: ``optimize: model must be a torch.nn.Module, got str``
        ValueError: ``optimize: dtype is 'half', must be one of 'auto', torch.bfloat16, torch.float32``; or the parameters
            have another dtype than float32 and the one asked for.
    """
    check_module("optimize", model)
    if not isinstance(dtype, str | torch.dtype) or dtype not in DTYPES:
        raise ValueError(f"optimize: dtype is {dtype!r}, must be one of {', '.join(map(repr, DTYPES))}")
    why_not = obstacles(model)
    plan = {  # of modules that are ours already too: their dtype may be another one now
        name: (module, replacement(type(module)))
        for name, module in model.named_modules()
        if isinstance(module, Swapped) or (replacement(type(module)) and name not in why_not)
    }
    compute = _compute_dtype(plan, dtype)
    for module, ours in plan.values():
        module.__class__ = ours or type(module)
        vars(module).pop("_fastft_dtype", None)
        if compute is not None:
            module._fastft_dtype = compute
    return model


def restore(model):
    """Undoes :func:`optimize`: every module has the class again that it had before; in place, parameters untouched.

    A wrapper that accelerate or Trainer(bf16=True) put around a ``forward`` since then stays, around the original one.

    Returns: ``model``.
    Raises:
        TypeError: ``restore: model must be a torch.nn.Module, got str``
        RuntimeError: a module's class or ``forward`` was changed again after ``optimize`` (``fully_shard`` and
            ``torch.nn.utils.parametrize`` do that), in a way that restoring would destroy.
    """
    check_module("restore", model)
    swapped = {name: module for name, module in model.named_modules() if isinstance(module, Swapped)}
    if swapped and (sharded := sharded_modules(model)):
        raise RuntimeError(f"restore: fully_shard was applied to {_shown(min(sharded))} after optimize and cannot be undone")
    forwards = {}
    for name, module in swapped.items():
        if replaced(type(module)) is None:
            made = type(module).__name__
            raise RuntimeError(f"restore: {_shown(name)} was made a {made} after optimize; undo that first")
        if calls_ours(module):
            forwards[name] = _rebound(vars(module)["forward"], module)
            if forwards[name] is None:
                raise RuntimeError(f"restore: the forward of {_shown(name)} was wrapped after optimize; undo that first")
    for name, module in swapped.items():
        ours, stock = type(module), replaced(type(module))
        if name in forwards:
            vars(module)["forward"] = forwards[name]
        kept = vars(module).get("_original_forward")  # where accelerate finds it again when it unwraps
        if getattr(kept, "__func__", None) is ours.forward:
            vars(module)["_original_forward"] = types.MethodType(stock.forward, module)
        vars(module).pop("_fastft_dtype", None)
        module.__class__ = stock
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


def calls_ours(module):
    """Whether something has wrapped the forward of a swapped module, in a way that leads to ours in the end."""
    return "forward" in vars(module) and any(_function(step) is type(module).forward for step in _chain(module.forward))


def _chain(forward):
    while forward is not None:
        yield forward
        forward = getattr(forward, "__wrapped__", None)


def _function(forward):
    return getattr(forward, "__func__", forward)


def _rebound(wrapper, module):
    """``wrapper`` made anew around the original forward instead of ours; None if it hides where it keeps ours.

    A new one, because copies of a model share their wrappers.
    """
    wrapper, ours = _function(wrapper), type(module).forward
    if wrapper is ours:
        return types.MethodType(replaced(type(module)).forward, module)
    chain = [_function(step) for step in _chain(wrapper)]
    inner = replaced(type(module)).forward
    for step, before in zip(reversed(chain[: chain.index(ours)]), reversed(chain[1 : chain.index(ours) + 1]), strict=True):
        inner = _around(step, before, inner)
        if inner is None:
            return None
    return types.MethodType(inner, module)


def _around(wrapper, before, inner):
    """A copy of ``wrapper`` that holds ``inner`` where that holds ``before``; None if it does not hold it in plain sight."""
    attributes = {key: inner if value is before else value for key, value in vars(wrapper).items()}
    if isinstance(wrapper, types.FunctionType):
        cells = [cell.cell_contents for cell in wrapper.__closure__ or ()]
        if not any(content is before for content in cells):
            return None
        closure = tuple(types.CellType(inner if content is before else content) for content in cells)
        copy = types.FunctionType(
            wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, closure
        )
        copy.__kwdefaults__ = wrapper.__kwdefaults__
    else:
        copy = object.__new__(type(wrapper))
    vars(copy).update(attributes)
    return copy


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


def _shown(name):
    return repr(name) if name else "the model"
