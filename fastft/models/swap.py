"""What every replacing class has in common: what it replaces, what it computes in, and what keeps it from running."""

import contextlib
import functools
import importlib
import importlib.util
import re
import threading
import types

import torch
from torch.nn.modules import module as torch_module
from transformers.modeling_utils import _CAN_RECORD_REGISTRY
from transformers.utils import ModelOutput


class Swapped:
    """First base, or that one's base, of every class that replaces another one; the second base is what it replaces.

    Its ``forward`` is ``_fastft_forward``, if there is one. Both classes have the same name, and ours can be imported
    from its module under it, so that pickle, deepcopy and DataParallel's replicas find it. ``optimize`` changes the
    ``__class__`` of existing instances.
    """

    _fastft_dtype = None  # what optimize(dtype=…) asked for, where it is not what the parameters and autocast say
    _fastft_parts = ()  # attributes that hold inner modules whose work is done here, without calling them
    _fastft_works = True  # False: it only calls what is inside

    def __init_subclass__(cls, **kwargs):
        stock = replaced(cls)
        if stock is not None and "forward" not in vars(cls) and hasattr(cls, "_fastft_forward"):
            cls.forward = replaces(stock.forward)(cls._fastft_forward)
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "_can_record_outputs"):  # else transformers gives None for the hidden states of our class
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), cls._can_record_outputs)

    def _fastft_why_not(self):
        """A sentence if this module, as it is now, has to do its work as the class it replaces does, else None."""
        return None

    def _fastft_why_not_parts(self):
        """The same if only the work of its parts is theirs."""
        return None


def replaces(original):
    """Decorates the ``forward`` that stands for ``original``: its signature, in the dtype that was asked for."""

    def decorate(forward):
        def in_dtype(self, *args, **kwargs):
            if not isinstance(self, Swapped):  # restored, while a wrapper (accelerate's, say) still leads here
                return original(self, *args, **kwargs)
            if self._fastft_dtype is None:
                return forward(self, *args, **kwargs)
            device = next((v.device.type for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), "cpu")
            autocast = self._fastft_dtype != torch.float32
            if torch.is_autocast_enabled(device) == autocast:  # by the caller, or by a swapped module around this one
                return forward(self, *args, **kwargs)
            args, kwargs = _float32(args), _float32(kwargs)
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                return _float32(forward(self, *args, **kwargs))

        # A code object of its own: torch.compile counts how often it has compiled one, and all classes would share it.
        code = in_dtype.__code__.replace(co_name=original.__qualname__)
        own = types.FunctionType(code, globals(), closure=in_dtype.__closure__)
        return functools.wraps(original)(own)

    return decorate


_calls = threading.local()  # of each thread: several may run one model at once


@contextlib.contextmanager
def told(values):
    """Within it, :func:`heard` gives to these modules, in this thread, the values that belong to them."""
    before = getattr(_calls, "values", {})
    _calls.values = {**before, **values}
    try:
        yield
    finally:
        _calls.values = before


def heard(module):
    """What the module around this one hands to it in the call that runs now, past the code between them; or None."""
    return None if torch.compiler.is_compiling() else getattr(_calls, "values", {}).get(module)


def _float32(value):
    """``value`` with the half-precision tensors in it in float32, the dtype of the parameters."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    if isinstance(value, ModelOutput):
        return type(value)(**{key: _float32(item) for key, item in value.items()})
    if type(value) is dict:
        return {key: _float32(item) for key, item in value.items()}
    return type(value)(_float32(item) for item in value) if type(value) in (tuple, list) else value


@functools.cache
def adapter(stock):
    """The Python module that holds the replacement of the class ``stock``, or None.

    For torch.nn.Linear it is linear.py, for torch.nn.Embedding embedding.py, for transformers.models.<architecture> it
    is <architecture>.py; any other class names its own in ``_fastft_adapter``.
    """
    home = vars(stock).get("_fastft_adapter")
    if stock in (torch.nn.Linear, torch.nn.Embedding):
        home = f"fastft.models.{stock.__name__.lower()}"
    elif match := re.fullmatch(r"transformers\.models\.(\w+)\.modeling_\1", stock.__module__):
        home = f"fastft.models.{match[1]}"
    return importlib.import_module(home) if home and importlib.util.find_spec(home) else None


def replacement(stock):
    """The class that replaces the class ``stock``, or None."""
    ours = getattr(adapter(stock), stock.__name__, None)
    return ours if isinstance(ours, type) and replaced(ours) is stock else None


def known_base(kind):
    """The class that has a replacement and that ``kind`` is or is made from, or None."""
    return next((base for base in kind.__mro__ if replacement(base) is not None), None)


def replaced(ours):
    """The class that ``ours`` replaces; None if it was made from a replacing class (fully_shard does that)."""
    ours, *stock = ours.__bases__
    return stock[0] if stock and issubclass(ours, Swapped) else None


def watched(module, but=()):
    """Why ``module`` has to be called, its work cannot be done elsewhere; None if nobody would notice.

    ``but``: names of hooks whose work the caller does.
    """
    if "forward" in module.__dict__:
        return "has a wrapped forward"
    if torch_module._has_any_global_hook():
        return "is watched by a global hook"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks) and any(_counts(hook) and _name(hook) not in but for of_kind in hooks for hook in of_kind.values()):
        return "has a hook"
    return None


def is_hooked(module, names):
    """Whether ``module`` has a forward hook of one of these names."""
    return any(_name(hook) in names for hook in module._forward_hooks.values())


def collected(module):
    """Whether transformers collects this module's outputs in the call that runs now."""
    return any(_collects(hook) for hook in module._forward_hooks.values())


def _counts(hook):
    """Whether a hook sees something: transformers' capturing hooks, which one call with output_attentions leaves behind
    for good, do so only while a call collects what they are for."""
    return _name(hook) != _CAPTURING or _collects(hook)


_CAPTURING = "output_capturing_hook"


def _name(hook):
    return getattr(hook, "__name__", "")


def _collects(hook):
    if _name(hook) != _CAPTURING:
        return False
    kind = hook.__closure__[hook.__code__.co_freevars.index("key")].cell_contents
    return kind in (hook.__globals__["_active_collector"].get() or ())


def is_sharded(module):
    """Whether ``fully_shard`` was applied to ``module`` itself."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)
