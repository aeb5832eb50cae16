"""Encoder layers: which halves of one can run as our kernels, and how its modules become their arguments.

An architecture's file says where its modules are; nothing here knows their names.
"""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastft.functional import _autograd, _choice
from fastft.functional import encoder_layer as node
from fastft.functional.packing import pack, unpack
from fastft.models.linear import activation_name, why_not_fused, why_not_linear
from fastft.models.mask import lengths_of, plain
from fastft.models.norm import why_not_normalized
from fastft.models.swap import Swapped, heard, is_sharded, told, watched

FEW_ROWS = 64  # below, packing a weight costs more than it saves: the modules inside decide one by one


class Layer(Swapped):
    """What the replacing classes of all architectures' layers have in common: how much they keep for the backward."""

    _fastft_activation_memory = "fast"

    @property
    def gradient_checkpointing(self):
        """False, so that nothing is checkpointed from outside; what was set is kept for restore, and for us."""
        return False

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value):
        vars(self)["gradient_checkpointing"] = value

    def _fastft_whole(self, hidden_states, attention_mask):
        """The output by one node; None where the modules inside have to run one by one."""
        planned = isinstance(attention_mask, node.Batch)  # then plan has asked all this
        if not planned and self._fastft_why_not() is not None:
            return None
        attention, feed_forward = self._fastft_arguments()
        if not planned and not runs_here(hidden_states, attention_mask, (*attention[0], *feed_forward[0])):
            return None
        memory = "lowest" if self._fastft_checkpoints() else self._fastft_activation_memory
        return run(hidden_states, attention_mask, attention, feed_forward, memory)

    def _fastft_checkpoints(self):
        return vars(self).get("gradient_checkpointing", False)

    def _fastft_by_modules(self, forward, *args, **kwargs):
        """``forward``, in which the modules inside run one by one, checkpointed if that was asked for."""
        forward = functools.partial(forward, **kwargs)
        if self._fastft_checkpoints() and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(forward, *args)
        return forward(*args)


class AttentionHalf(NamedTuple):
    """Where the modules of a layer's attention half are, as attributes of the module that is it."""

    query: str
    key: str
    value: str
    weights_dropout: str
    dense: str
    dropout: str | None
    norm: str
    called: tuple[str, ...]  # modules whose forward calls the others

    def why_not(self, module):
        """A sentence if the half has to be done by its modules, one by one, else None; the module that attends has been
        asked for its own reasons."""
        return (
            _why_not_linears(module, self.query, self.key, self.value, self.dense)
            or self._why_not_square(module)
            or _why_not_skipped(module, self.called)
            or why_not_normalized(self.dropout and _get(module, self.dropout), _get(module, self.norm))
        )

    def _why_not_square(self, module):
        """A sentence if a head is missing, or elements of all, else None."""
        for path in (self.query, self.key, self.value, self.dense):
            linear = _get(module, path)
            if linear.in_features != linear.out_features:
                return f"{path} has {linear.in_features} inputs and {linear.out_features} outputs"
        return None

    def arguments(self, module, heads, scale):
        """What :func:`encoder_layer` takes."""
        linears = [_get(module, name) for name in (self.query, self.key, self.value)]
        dense, norm = _get(module, self.dense), _get(module, self.norm)
        parameters = node.AttentionParameters(
            *(linear.weight for linear in linears),
            *(linear.bias for linear in linears),
            *(dense.weight, dense.bias, norm.weight, norm.bias),
        )
        rates = [_rate(_get(module, name)) if name else 0.0 for name in (self.weights_dropout, self.dropout)]
        return parameters, node.AttentionOptions(heads, scale, *rates, norm.eps)


class FeedForwardHalf(NamedTuple):
    """Where the modules of a layer's feed-forward half are, as attributes of the module that is it."""

    inner: str
    activation: str
    dense: str
    dropout: str
    norm: str
    called: tuple[str, ...]

    def why_not(self, module):
        """A sentence if the half has to be done by its modules, one by one, else None."""
        activation = _get(module, self.activation)
        if why := why_not_fused(_get(module, self.inner), activation):
            return why
        if activation_name(activation) == "identity":
            return f"{self.activation} does nothing"
        return (
            _why_not_linears(module, self.inner, self.dense)
            or _why_not_skipped(module, self.called)
            or why_not_normalized(_get(module, self.dropout), _get(module, self.norm))
        )

    def arguments(self, module):
        """What :func:`encoder_layer` takes."""
        inner, dense, norm = (_get(module, name) for name in (self.inner, self.dense, self.norm))
        parameters = node.FeedForwardParameters(
            inner.weight, inner.bias, dense.weight, dense.bias, norm.weight, norm.bias
        )
        activation = activation_name(_get(module, self.activation))
        return parameters, node.FeedForwardOptions(activation, _rate(_get(module, self.dropout)), norm.eps)


def run(hidden_states, attention_mask, attention=None, feed_forward=None, memory="fast"):
    """A layer or a half of it.

    Args:
        hidden_states: ``(B, S, H)``, or ``(M, H)`` with a :class:`Batch` in place of a mask.
        attention_mask: a :class:`Batch`, or as transformers gives it to a layer: None, or broadcastable to
            ``(B, N, S, S)``.
        attention: what :meth:`AttentionHalf.arguments` gave, or None.
        feed_forward: what :meth:`FeedForwardHalf.arguments` gave, or None.
        memory: of ``node.MEMORY``.
    Returns: the same shape; ``(B, H)`` where the batch wants first rows only.
    """
    shape, batch = hidden_states.shape, attention_mask
    if attention and not isinstance(batch, node.Batch):
        batch = padded(attention_mask, *shape[:2], attention[1].heads, hidden_states.dtype)
    # Autocast's dtype, where a product made the first hidden states: what stock rounds to it is rounded at the end.
    rows = hidden_states.reshape(-1, shape[-1]).to((attention or feed_forward)[0][-1].dtype)
    output = node.encoder_layer(rows, batch, attention, feed_forward, memory).to(hidden_states.dtype)
    return output if isinstance(attention_mask, node.Batch) else output.view(shape)


def padded(attention_mask, B, S, heads, dtype):
    """The :class:`Batch` of padded sequences with transformers' mask."""
    if attention_mask is None:
        return node.Batch(B, S)
    mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask.to(dtype)
    return node.Batch(B, S, mask.detach().expand(B, heads, S, S))


def runs_here(hidden_states, attention_mask, parameters):
    """Whether a layer, or a half of it, runs as one node on these arguments of a call; else its modules decide."""
    is_slower = hidden_states.is_cpu and hidden_states.shape[:-1].numel() < FEW_ROWS
    if _choice.backend() == "torch" or (_choice.backend() == "auto" and is_slower):
        return False
    if hidden_states.dim() != 3 or {(p.dtype, p.device) for p in parameters} != {
        (parameters[0].dtype, hidden_states.device)
    }:
        return False
    compute = _autograd.autocast_dtype(hidden_states) or hidden_states.dtype
    if parameters[0].dtype != hidden_states.dtype and (parameters[0].dtype, hidden_states.dtype) != (
        torch.float32,
        compute,
    ):
        return False
    if attention_mask is not None and (attention_mask.dim() != 4 or attention_mask.requires_grad):
        return False
    return _choice.unsupported(hidden_states, hidden_states.new_empty(0, dtype=compute), *parameters) is None


# ---- the whole encoder: without padding, and the last layer for first rows only


class Plan(NamedTuple):
    """What an encoder leaves out of a batch."""

    batch: node.Batch
    kept: torch.Tensor | None  # rows of all B * S that are computed; None: all, or those that are present
    first_only: bool  # of the last layer
    tokens: int | None = None  # that the batch has, as its mask's lengths say; where those are known
    present: torch.Tensor | None = None  # (B, S), where they are not padding


@dataclass
class Handed:
    """What the model hands to its embeddings and its encoder past transformers' code between them."""

    attention_mask: torch.Tensor | None  # the caller's; with lengths, if a collator knew them
    first_only: bool  # the caller reads nothing but the first row of each sequence
    padding_free: bool
    layers: Sequence[torch.nn.Module]
    plan: Plan | None = None  # of embeddings that made packed rows,
    rows: torch.Tensor | None = None  # these, and
    stand_in: torch.Tensor | None = None  # what stands for them on the way: all hidden states' shape, and NaN


def stand_in(shape, dtype, device):
    """Hidden states of which only shape, dtype and device are true."""
    return torch.full((1,), torch.nan, dtype=dtype, device=device).expand(shape)


class Encoder(Swapped):
    """What the replacing classes of all architectures' encoders have in common."""

    _fastft_works = False

    def _fastft_forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        handed = heard(self)
        if handed is not None and handed.plan is not None:
            if hidden_states is not handed.stand_in:
                raise RuntimeError(f"{type(self).__name__}: something came between the embeddings and the encoder")
            output = run_layers(self.layer, hidden_states.shape, handed.rows, handed.plan)
            return self._fastft_output(last_hidden_state=output)
        if handed is not None and not args and _only_encodes(kwargs):
            found = plan(handed, hidden_states, attention_mask)
            if found is not None:
                shape = hidden_states.shape
                rows = hidden_states.reshape(-1, shape[-1])
                if found.kept is not None:
                    rows = rows.index_select(0, found.kept)
                elif found.tokens is not None:
                    rows = pack(hidden_states, found.present, found.batch.cu_seqlens, found.tokens)
                return self._fastft_output(last_hidden_state=run_layers(self.layer, shape, rows, found))
        return super().forward(hidden_states, attention_mask, *args, **kwargs)


class Model(Swapped):
    """What the replacing classes of all architectures' models have in common; ``attention_mask`` is argument 1."""

    _fastft_works = False
    _fastft_padding_free = True

    def _fastft_forward(self, *args, **kwargs):
        inner = getattr(self, self._fastft_encoder)
        # Neither torch.compile nor torch.jit.trace may take one mask's lengths for those of all.
        if not isinstance(inner, Encoder) or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return super().forward(*args, **kwargs)
        unseen = all(is_sharded(module) or not watched(module) for module in (self, inner))
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if lengths_of(mask) is not None:
            given = _for_stock(mask)
            args, kwargs = (*args[:1], given, *args[2:]) if len(args) > 1 else args, dict(kwargs)
            if "attention_mask" in kwargs:
                kwargs["attention_mask"] = given
        handed = Handed(
            mask,
            heard(self) is FIRST_ONLY and unseen and self._fastft_reads_first_only(),
            self._fastft_padding_free,
            inner.layer,
        )
        hears = [inner]
        # ELECTRA has a layer between the two; encoder_hidden_states are the sixth argument.
        direct = not hasattr(self, "embeddings_project") and len(args) <= 5 and _only_encodes(kwargs)
        if direct and isinstance(self.embeddings, Swapped) and not watched(inner) and not watched(self.embeddings):
            hears.append(self.embeddings)
        with told(dict.fromkeys(hears, handed)):
            return super().forward(*args, **kwargs)


def _for_stock(mask):
    """The mask as transformers gets it: on the CPU without its lengths, which are nobody else's business. On a GPU with
    them, as it would wait for a plain one; or None where nothing is padding, for attention without a mask."""
    if not _is_on_gpu(mask):
        return plain(mask)
    return None if mask.all() else mask


def _only_encodes(kwargs):
    return all(kwargs.get(name) is None for name in ("encoder_hidden_states", "encoder_attention_mask", "cache"))


def packing(handed, hidden_states):
    """The :class:`Plan` of a batch whose padding is left out; None where there is none, or it has to be computed.

    Packing applies where each sequence's first token is there: who reads hidden states finds zeros at padding.

    Args:
        handed: a :class:`Handed`; its mask must be ``(B, S)``, and its layers must all run as one node.
        hidden_states: ``(B, S, H)``, what the first layer gets.
    """
    # On a GPU waiting for the mask would stop what runs there.
    if not handed.padding_free or handed.attention_mask is None or _is_on_gpu(hidden_states):
        return None
    present = plain(handed.attention_mask) != 0
    if present.shape != hidden_states.shape[:2] or present.all() or not present[:, 0].all():
        return None
    if not _all_whole(handed.layers, hidden_states):
        return None
    lengths = present.sum(1)
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, out=cu_seqlens[1:])
    batch = node.Batch(len(lengths), int(lengths.max()), None, cu_seqlens)
    return Plan(batch, present.flatten().nonzero()[:, 0], handed.first_only)


def packing_by_lengths(handed, hidden_states):
    """The same on a GPU, where the mask came with its lengths."""
    mask, lengths = handed.attention_mask, lengths_of(handed.attention_mask) if handed.padding_free else None
    if lengths is None or not _is_on_gpu(hidden_states) or mask.shape != hidden_states.shape[:2]:
        return None
    if min(lengths, default=0) in (0, mask.shape[1]) or not _all_whole(handed.layers, hidden_states):
        return None
    present = plain(mask) != 0
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=present.device)
    torch.cumsum(present.sum(1), 0, out=cu_seqlens[1:])
    batch = node.Batch(len(lengths), max(lengths), None, cu_seqlens)
    return Plan(batch, None, handed.first_only, sum(lengths), present)


def plan(handed, hidden_states, attention_mask):
    """The :class:`Plan` of one call, or None where there is nothing to leave out.

    Args:
        handed: as for :func:`packing`.
        hidden_states: the same.
        attention_mask: the mask that layers get otherwise.
    """
    found = packing(handed, hidden_states)
    found = packing_by_lengths(handed, hidden_states) if found is None else found
    if found is not None or not handed.first_only or not _all_whole(handed.layers, hidden_states):
        return found
    (_, options), _ = handed.layers[0]._fastft_arguments()
    return Plan(padded(attention_mask, *hidden_states.shape[:2], options.heads, hidden_states.dtype), None, True)


def _is_on_gpu(tensor):
    return not tensor.is_cpu


def _all_whole(layers, hidden_states):
    """Whether every layer runs as one node, and nobody looks at what goes in and out of it."""
    for layer in layers:
        sharded = is_sharded(layer)
        if not isinstance(layer, Swapped) or layer._fastft_why_not() or (not sharded and watched(layer)):
            return False
        # Parameters of a sharded layer are there only while it runs; DataParallel's replicas have none by that name.
        if not sharded:
            attention, feed_forward = layer._fastft_arguments()
            if not runs_here(hidden_states, None, (*attention[0], *feed_forward[0])):
                return False
    return len(layers) > 0


def run_layers(layers, shape, rows, plan):
    """The last hidden states ``(B, S, H)``, or ``(B, 1, H)`` where only first rows are read, from the planned rows."""
    B, S, H = shape
    *layers, last = layers
    for layer in layers:
        rows = layer(rows, plan.batch)
    rows = last(rows, plan.batch._replace(first_only=plan.first_only))
    if plan.first_only:
        return rows.view(B, 1, H)
    if plan.kept is not None:
        rows = rows.new_zeros(B * S, H).index_copy(0, plan.kept, rows)
    elif plan.tokens is not None:
        rows = unpack(rows, plan.batch.cu_seqlens, (B, S, H))
    return rows.view(B, S, H)


FIRST_ONLY = "first rows"  # what a model is told by a caller that reads no others


@contextlib.contextmanager
def reading_first(model, readers):
    """Within it, the caller reads nothing of the model's last hidden states but first rows; ``readers`` are the modules
    that it hands them to."""
    if not isinstance(model, Model) or torch.compiler.is_compiling() or any(map(watched, readers)):
        yield
        return
    with told({model: FIRST_ONLY}):
        yield


def _why_not_linears(module, *paths):
    for path in paths:
        linear = _get(module, path)
        if why := why_not_linear(linear):
            return f"{path} {why}"
        if linear.bias is None:
            return f"{path} has no bias"
    return None


def _why_not_skipped(module, paths):
    return next((f"{path} {why}" for path in paths if (why := watched(_get(module, path)))), None)


def _get(module, path):
    """What is there; Module.__getattr__ takes three times as long, and layers are looked over in every call."""
    for name in path.split("."):
        found = module._modules.get(name)
        module = getattr(module, name) if found is None else found
    return module


def _rate(dropout):
    return dropout.p if dropout.training else 0.0
