"""Says what runs in a model, module by module: our kernels or PyTorch's, and why."""

import re
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from fastft import _library
from fastft.environment import PRODUCTS
from fastft.functional import _choice
from fastft.functional.linear_act import shipped_rule as linear_act_rule
from fastft.models.optimize import check_module, obstacles, sharded_modules, shown
from fastft.models.swap import Swapped, adapter, known_base, replacement

NOT_REPLACED = "fastft has no replacement for it"
TYPICAL_ROWS = 2048  # 16 sequences of 128 tokens


def report(model):
    """What runs in each module of ``model``, as it is now, that computes something itself.

    A call that is too small to gain from our kernel takes PyTorch's all the same (``FASTFT_BACKEND=auto``). A module is
    said to be PyTorch's where that was measured on this machine to be faster for a batch of usual size, too.

    Returns: a :class:`Report`; it prints as a table.
    Raises: TypeError: ``report: model must be a torch.nn.Module, got str``
    """
    check_module("report", model)
    kept, sharded, fused, lines = obstacles(model), sharded_modules(model), {}, []
    for name, module in model.named_modules():  # parents first
        if isinstance(module, Swapped):
            reason = _why_not(module, name in sharded)
            of_parts = reason or module._fastft_why_not_parts()
            fused.update((f"{name}.{part}".lstrip("."), of_parts) for part in module._fastft_parts)
            runs_something = module._fastft_works
        elif name in fused:
            reason, runs_something = fused[name], True
        else:
            reason = _why_left(name, module, model, kept)
            runs_something = reason is not None
        if runs_something:
            lines.append(Line(name, type(module).__name__, reason))
    _choice.facts_in_force()  # which say how bfloat16 is multiplied
    bf16 = _library.bf16() if _library.available() else None
    return Report(type(model).__name__, tuple(lines), tuple(_notes(model)), bf16)


@dataclass(frozen=True)
class Line:
    """One module: its name in ``named_modules``, the name of its class, and why PyTorch runs it (None: we do)."""

    name: str
    kind: str
    reason: str | None

    @property
    def runs(self):
        return "torch" if self.reason else "fastft"


@dataclass(frozen=True)
class Report:
    """What :func:`report` found: ``model``, the name of its class, ``lines``, one for each module that computes, and
    ``notes``, sentences on what is not computed.

    ``bf16``: how our kernels on the CPU multiply bfloat16, "dot" (VDPBF16PS) or "widen" (in float32); None: there are
    none.
    """

    model: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()
    bf16: str | None = None

    def as_dict(self):
        """``{"modules": {name: {"runs": "fastft" or "torch", "reason": None or a sentence}}, "bf16": …}``.

        The name "" is the model's own.
        """
        modules = {line.name: {"runs": line.runs, "reason": line.reason} for line in self.lines}
        return {"modules": modules, "bf16": self.bf16}

    def __str__(self):
        ours = sum(line.runs == "fastft" for line in self.lines)
        groups = {None: {}}  # of a reason: {(pattern, class): layer numbers}; ours first
        for line in self.lines:
            pattern, number = _split_number(line.name)
            groups.setdefault(line.reason, {}).setdefault((pattern, line.kind), []).append(number)
        rows = {
            reason: [(pattern.replace("*", _ranges(numbers), 1), kind) for (pattern, kind), numbers in found.items()]
            for reason, found in groups.items()
        }
        width = max((len(name) for found in rows.values() for name, _ in found), default=0)
        table = [f"{self.model}: fastft runs {ours} of the {len(self.lines)} modules that compute something"]
        for reason, found in rows.items():
            table += [f"torch ({reason})" if reason else "fastft"] if found else []
            table += [f"  {name.ljust(width)}  {kind}" for name, kind in found]
        products = [f"bfloat16 on the CPU: products {PRODUCTS[self.bf16]}"] if self.bf16 else []
        return "\n".join([*table, *self.notes, *products])

    __repr__ = __str__


def _notes(model):
    """What is left out of the computation where a batch allows it."""
    for name, module in model.named_modules():
        if not isinstance(module, Swapped):
            continue
        if getattr(module, "_fastft_padding_free", False):
            yield (
                f"padding: {shown(name)} leaves it out if no first token is masked, on a GPU if the mask has lengths, "
                "as of fastft's collator; hidden states there are zeros"
            )
        if getattr(module, "_fastft_cls_only", False):
            yield f"first tokens only: {shown(name)} reads no others of the last layer, which computes no others"


def _split_number(name):
    """Layers that differ in their number only share a row: ``("encoder.layer.*.output", 3)``."""
    match = re.match(r"(.*?\.|)(\d+)(\..*|)$", name)
    return (f"{match[1]}*{match[3]}", int(match[2])) if match else (name or "(the model)", None)


def _ranges(numbers):
    """``[0, 1, 2, 5]`` as ``{0-2,5}``."""
    if len(numbers) == 1:
        return str(numbers[0])
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)) + "}"


def _why_not(module, is_sharded):
    """Why a swapped module runs on PyTorch's kernels all the same, None if it runs on ours."""
    if _choice.backend() == "torch":
        return "FASTFT_BACKEND is torch"
    if "forward" in vars(module) and not _calls_ours(module):
        return "its forward was replaced after optimize"
    parts = [part for name in module._fastft_parts if isinstance(part := getattr(module, name), torch.nn.Module)]
    tensors = [tensor for owner in (module, *parts) for tensor in owner.parameters(recurse=False)]
    tensors = [] if is_sharded else tensors  # between calls they are DTensors, in the forward plain ones
    return module._fastft_why_not() or _choice.unsupported(*tensors) or _why_slower(module, parts)


def _why_slower(module, parts):
    """A sentence if the module's linear layer runs on PyTorch's kernel because of what was measured, else None."""
    layers = [layer for layer in (module, *parts) if isinstance(layer, torch.nn.Linear)]
    for layer in layers if _choice.backend() == "auto" else ():
        dtype = layer.weight.dtype if module._fastft_dtype is None else module._fastft_dtype
        sizes = (TYPICAL_ROWS, layer.in_features, layer.out_features)
        cell = _choice.measured("linear_act", layer.weight.device.type, dtype, layer.weight.requires_grad, sizes)
        if cell is not None and cell.runs == "torch" and not linear_act_rule(layer.weight.device.type, *sizes):
            return f"PyTorch's was measured to be faster here: {cell.torch_us:.0f} us, ours {cell.fastft_us:.0f}"
    return None


def _calls_ours(module):
    """Whether the wrapped forward of a swapped module leads to ours, as far as ``__wrapped__`` tells."""
    forward = module.forward
    while forward is not None and getattr(forward, "__func__", forward) is not type(module).forward:
        forward = getattr(forward, "__wrapped__", None)
    return forward is not None


def _why_left(name, module, model, kept):
    """Why a module that is not swapped is PyTorch's, None if it computes nothing itself."""
    kind = type(module)
    if name in kept:
        return kept[name]
    if (known := known_base(kind)) is not None:
        if known is kind:
            return "not swapped: call fastft.optimize" if replacement(kind)._fastft_works else None
        return f"fastft knows {known.__name__}, not {kind.__name__}, which is made from it"
    if isinstance(module, PreTrainedModel):
        return f"fastft does not know {kind.__name__}, only what is inside it"
    if not name and not any(_is_known(inner) for inner in model.modules()):
        return f"fastft does not know {kind.__name__}: only the linear layers in it are swapped"
    is_leaf = next(module.children(), None) is None and kind.forward is not torch.nn.Module.forward
    if (is_leaf and kind is not torch.nn.Identity) or kind in getattr(adapter(kind), "NOT_REPLACED", ()):
        return NOT_REPLACED
    return None


def _is_known(module):
    """Whether fastft knows more of the module's architecture than that there are linear layers in it."""
    is_known = isinstance(module, Swapped) or replacement(type(module)) is not None
    return is_known and not isinstance(module, torch.nn.Linear)
