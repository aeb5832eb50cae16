"""A post-norm encoder layer (BERT's) as one autograd node, strung together from the kernels of the single functions.

    attention half       y = LayerNorm(x + dropout(attention(x Wq + bq, x Wk + bk, x Wv + bv) Wo + bo))
    feed-forward half    y = LayerNorm(x + dropout(act(x W1 + b1) W2 + b2))

Either half can be a node of its own, where the other one is left to PyTorch. Kept for the backward, in units of one
activation (rows x H): the input 1, query, key and value 3, their attention 1, the pre-activation 4 (at an inner size of
4 H), the two sums before LayerNorm 2. What LayerNorm and the activation made of these is made again, which costs a pass
over memory each. That is memory "fast"; "low" makes the pre-activation and the first of the two sums again, too, by two
more products; "lowest" keeps the input alone and runs the layer twice. One seed serves the three dropouts.
"""

from typing import NamedTuple

import torch

from fastft import activations
from fastft.functional import _arena, _autograd, _dropout
from fastft.functional.attention import Call
from fastft.functional.attention import backward as attention_backward
from fastft.functional.attention import composition as attention_composition
from fastft.functional.attention import forward as attention_forward
from fastft.functional.layer_norm import backward as norm_backward
from fastft.functional.layer_norm import composition as norm_composition
from fastft.functional.layer_norm import forward as norm_forward
from fastft.functional.linear_act import backward as linear_backward
from fastft.functional.linear_act import forward as linear_forward
from fastft.functional.linear_act import goes_through_activation, joined_low, rounds_input
from fastft.functional.linear_act import reference as linear_reference

ATTENTION, ATTENTION_OUTPUT, OUTPUT = 0, 1, 2  # `use` of the three dropouts
MEMORY = ("fast", "low", "lowest")


class AttentionParameters(NamedTuple):
    """Tensors of the attention half: weights ``(H, H)``, the rest ``(H,)``."""

    query_weight: torch.Tensor
    key_weight: torch.Tensor
    value_weight: torch.Tensor
    query_bias: torch.Tensor
    key_bias: torch.Tensor
    value_bias: torch.Tensor
    output_weight: torch.Tensor
    output_bias: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor


class FeedForwardParameters(NamedTuple):
    """Tensors of the feed-forward half: ``(F, H)``, ``(F,)``, ``(H, F)``, and the rest ``(H,)``."""

    inner_weight: torch.Tensor
    inner_bias: torch.Tensor
    output_weight: torch.Tensor
    output_bias: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor


class AttentionOptions(NamedTuple):
    """What the attention half computes; probabilities of dropout are 0 outside training."""

    heads: int
    scale: float
    weights_dropout: float
    output_dropout: float
    eps: float


class FeedForwardOptions(NamedTuple):
    """What the feed-forward half computes."""

    activation: str
    output_dropout: float
    eps: float


class Batch(NamedTuple):
    """How the rows make sequences: ``(B, S)`` of them, padded, with a mask as attention's, or packed."""

    B: int
    S: int  # of the longest sequence where they are packed
    mask: torch.Tensor | None = None  # expanded to (B, N, S, S)
    cu_seqlens: torch.Tensor | None = None
    first_only: bool = False  # of the output only the first row of each sequence is wanted


def encoder_layer(input, batch, attention=None, feed_forward=None, memory="fast"):
    """An encoder layer, or one half of it, by our kernels; the caller has made sure that they can run.

    Args:
        input: ``(M, H)``, the rows of all sequences, in the dtype of the parameters.
        batch: a :class:`Batch`; None without the attention half.
        attention: None, or (:class:`AttentionParameters`, :class:`AttentionOptions`).
        feed_forward: None, or (:class:`FeedForwardParameters`, :class:`FeedForwardOptions`).
        memory: one of :data:`MEMORY`.
    Returns: ``(M, H)``, dtype of ``input``; ``(B, H)`` with ``batch.first_only``.
    """
    parameters = (*(attention[0] if attention else ()), *(feed_forward[0] if feed_forward else ()))
    run = _Run(
        attention[1] if attention else None,
        feed_forward[1] if feed_forward else None,
        _Layout(batch.B, batch.S, batch.cu_seqlens is not None, batch.first_only) if batch else None,
        _autograd.autocast_dtype(input) or input.dtype,
        memory,
    )
    mask, cu_seqlens = (batch.mask, batch.cu_seqlens) if batch else (None, None)
    seed = _dropout.draw_seed(input.device) if run.drops() else None
    if _autograd.needs_grad(input, *parameters):
        return _autograd.apply(_Layer, run, mask, cu_seqlens, seed, input, *parameters)
    return run.forward(mask, cu_seqlens, seed, input, parameters, keep=False)[0]


class _Layout(NamedTuple):
    """What a node knows of its :class:`Batch` apart from tensors."""

    B: int
    S: int
    packed: bool
    first_only: bool


class _Run(NamedTuple):
    """What a node computes, apart from its tensors."""

    attention: AttentionOptions | None
    feed_forward: FeedForwardOptions | None
    layout: _Layout | None
    dtype: torch.dtype  # of the products
    memory: str = "fast"

    def drops(self):
        ps = [self.attention.weights_dropout, self.attention.output_dropout] if self.attention else []
        ps += [self.feed_forward.output_dropout] if self.feed_forward else []
        return any(map(_dropout.threshold, ps))

    def split(self, values):
        """Parameters, or what belongs to them, of both halves; None for the one that is left out."""
        count = len(AttentionParameters._fields) if self.attention else 0
        return (
            AttentionParameters(*values[:count]) if self.attention else None,
            FeedForwardParameters(*values[count:]) if self.feed_forward else None,
        )

    def forward(self, mask, cu_seqlens, seed, input, parameters, keep):
        """The output, and what the backward needs: seven tensors of the attention half, four of the other; nothing
        where memory is lowest."""
        keep = keep and self.memory != "lowest"
        first, second = self.split(parameters)
        output, kept = input, ()
        if first:
            output, kept = self._attend(mask, cu_seqlens, seed, output, first, keep)
        if second:
            output, more = self._feed_forward(seed, output, second, keep)
            kept += more
        return output, kept if keep else ()

    def backward(self, mask, cu_seqlens, seed, kept, wanted, grad, input, *parameters, spent=False):
        """Gradients of the input and of the parameters, None where not wanted; ``kept`` may be ``spent``: overwritten,
        nobody else has it."""
        if self.memory == "lowest":
            again = self._replace(memory="fast")
            kept = again.forward(mask, cu_seqlens, seed, input, parameters, keep=True)[1]  # and not the output
            return again.backward(mask, cu_seqlens, seed, kept, wanted, grad, input, *parameters, spent=True)
        (first, second), (of_first, of_second) = self.split(parameters), self.split(wanted[1:])
        grads_first, grads_second, x = (), (), input
        if first and kept[4] is None:
            x, *norm = self._attended(seed, kept[2], self._queried(cu_seqlens, input), first, keep=True)
            kept = *kept[:4], *norm, *kept[7:]
        elif first and second:  # what the attention half returned
            x, *_ = norm_forward(
                kept[4], None, first.norm_weight, first.norm_bias, self.attention.eps, _dropout.NONE, keep=False
            )
        if second:
            wants_x = wanted[0] or (first is not None and any(of_first))
            grad, grads_second = self._feed_forward_backward(
                seed, kept[-4:], wants_x, of_second, grad, x, second, spent
            )
        if first and not (wanted[0] or any(of_first)):
            grads_first = [None] * len(first)
        elif first:
            grad, grads_first = self._attend_backward(
                mask, cu_seqlens, seed, kept[:7], wanted[0], of_first, grad, input, first
            )
        return grad, *grads_first, *grads_second

    # ---- attention half

    def _attend(self, mask, cu_seqlens, seed, x, p, keep):
        o, rows = self.attention, self._queried(cu_seqlens, x)
        if keep:
            query, joined = self._project(rows, x, p)
            heads = self._heads(query, joined)
        else:  # without a copy of the weights, which takes longer than it saves where rows are few
            query = joined = None
            queries, keys, values = (self._linear(*linear) for linear in zip((rows, x, x), p[:3], p[3:6], strict=True))
            heads = self._queries(queries), *(_heads(part, 1, o.heads, self.layout)[0] for part in (keys, values))
        context = _arena.empty(rows.shape, self.dtype, x)
        _, stats = attention_forward(
            *(self._call(), *heads, *self._masks(mask, cu_seqlens)),
            *(seed if self._call().threshold else None, keep, self._queries(context)),
        )
        keep_norm = keep and self.memory == "fast"
        y, *norm = self._attended(seed, context, rows, p, keep_norm)
        return y, (query, joined, context, stats, *(norm if keep_norm else [None] * len(norm)))

    def _attended(self, seed, context, rows, p, keep):
        """The half's output, and what the backward of its LayerNorm needs."""
        mixed = self._linear(context, p.output_weight, p.output_bias)
        dropout = _drop(seed, self.attention.output_dropout, ATTENTION_OUTPUT)
        return norm_forward(mixed, rows, p.norm_weight, p.norm_bias, self.attention.eps, dropout, keep)

    def _attend_backward(self, mask, cu_seqlens, seed, kept, wants_x, wanted, grad, x, p):
        o, (query, joined, context, stats, *norm) = self.attention, kept
        grad_mixed, grad_rows, grad_norm_weight, grad_norm_bias = norm_backward(
            *(norm, _drop(seed, o.output_dropout, ATTENTION_OUTPUT)),
            *((True, wants_x, wanted.norm_weight, wanted.norm_bias), grad),
            *(context, None, p.norm_weight, p.norm_bias),  # context: of the shape and dtype of what was normalised
        )
        grad_context, grad_output_weight, grad_output_bias = linear_backward(
            *(0, None, (True, wanted.output_weight, wanted.output_bias)),
            *(grad_mixed, context, p.output_weight, p.output_bias),
        )
        grad_query, grad_joined = (None if part is None else _arena.empty_like(part) for part in (query, joined))
        attention_backward(
            *(self._call(), self._heads(grad_query, grad_joined), self._queries(grad_context), stats),
            *(*self._heads(query, joined), *self._masks(mask, cu_seqlens)),
            seed if self._call().threshold else None,
        )
        apart = 0 if query is None else 1  # the query has a product of its own
        grad_x, grad_weight, grad_bias = self._linear_backward(
            *(wants_x, any(wanted[apart:3]), any(wanted[3 + apart : 6]), grad_joined, x),
            *self._joined(p, apart, x, train=True),
            add=None if apart else grad_rows,
        )
        grad_weights, grad_biases = (
            _parts(grad, 3 - apart, of.dtype) for grad, of in ((grad_weight, p.key_weight), (grad_bias, p.key_bias))
        )
        if apart:
            starts = self._starts(cu_seqlens, x)
            grad_rows, grad_weight, grad_bias = self._linear_backward(
                *(wants_x, wanted.query_weight, wanted.query_bias),
                *(grad_query, x[starts], p.query_weight, p.query_bias, grad_rows),
            )
            if wants_x:
                grad_x[starts] += grad_rows
            grad_weights, grad_biases = [grad_weight, *grad_weights], [grad_bias, *grad_biases]
        return grad_x, AttentionParameters(
            *(*grad_weights, *grad_biases),
            *(grad_output_weight, grad_output_bias, grad_norm_weight, grad_norm_bias),
        )

    def _call(self):
        o, S = self.attention, self.layout.S
        threshold = _dropout.threshold(o.weights_dropout)
        return Call(o.scale, False, 1 if self.layout.first_only else S, S, threshold, ATTENTION)

    def _starts(self, cu_seqlens, x):
        """Where each sequence begins, if only that is wanted."""
        if not self.layout.first_only:
            return None
        B, S, packed, _ = self.layout
        return cu_seqlens[:-1].long() if packed else torch.arange(0, B * S, S, device=x.device)

    def _queried(self, cu_seqlens, x):
        """The rows of ``x`` whose output is wanted."""
        starts = self._starts(cu_seqlens, x)
        return x if starts is None else x[starts]

    def _project(self, rows, x, p):
        """None and query, key and value side by side, or a query for some ``rows`` and the others for all."""
        if rows is x:
            return None, self._linear(x, *self._joined(p, 0, x, train=False))
        query = self._linear(rows, p.query_weight, p.query_bias)
        return query, self._linear(x, *self._joined(p, 1, x, train=False))

    def _joined(self, p, first, x, train):
        """:func:`_joined`, the weight in the dtype of the products where they can be had so."""
        low = joined_low(p[first:3], x, self.dtype, train)
        return _joined(p, first) if low is None else (low, torch.cat(p[3 + first : 6]))

    def _heads(self, query, joined):
        """Query, key and value as attention takes them."""
        parts = _heads(joined, 2 if self.layout.first_only else 3, self.attention.heads, self.layout)
        return parts if query is None else (self._queries(query), *parts)

    def _queries(self, rows):
        """Rows of the queries, or of what belongs to them, as attention takes them."""
        layout = self.layout._replace(S=1) if self.layout.first_only else self.layout
        return _heads(rows, 1, self.attention.heads, layout)[0]

    def _masks(self, mask, cu_seqlens):
        """The mask, and where sequences begin among queries and among keys."""
        if not self.layout.first_only:
            return mask, cu_seqlens, cu_seqlens
        if mask is not None:
            mask = mask[:, :, :1]
        if cu_seqlens is None:
            return mask, None, None
        return mask, torch.arange(len(cu_seqlens), dtype=torch.int32, device=cu_seqlens.device), cu_seqlens

    # ---- feed-forward half

    def _feed_forward(self, seed, x, p, keep):
        o = self.feed_forward
        index = activations.index(o.activation)
        keep_preact = keep and self.memory == "fast"
        inner, preact = linear_forward(
            *(self._rounded(x), p.inner_weight, p.inner_bias, index, self.dtype, keep_preact), apart=True
        )
        mixed = self._linear(inner, p.output_weight, p.output_bias)
        dropout = _drop(seed, o.output_dropout, OUTPUT)
        y, *norm = norm_forward(mixed, x, p.norm_weight, p.norm_bias, o.eps, dropout, keep)
        return y, (preact, *norm)

    def _feed_forward_backward(self, seed, kept, wants_x, wanted, grad, x, p, spent):
        o, (preact, *norm) = self.feed_forward, kept
        spent = spent or preact is None
        if preact is None:
            preact = self._linear(x, p.inner_weight, p.inner_bias, apart=True)
        grad_mixed, grad_x, grad_norm_weight, grad_norm_bias = norm_backward(
            *(norm, _drop(seed, o.output_dropout, OUTPUT)),
            *((True, wants_x, wanted.norm_weight, wanted.norm_bias), grad),
            *(preact, None, p.norm_weight, p.norm_bias),  # preact: of the dtype of what was normalised
        )
        inner, index = preact if spent else _arena.rows_like(preact), activations.index(o.activation)
        # The pre-activation stands in for the activation, of which this product needs the shape only.
        to_inner = 0, None, (True, False, False), grad_mixed, preact, p.output_weight, None
        if goes_through_activation(grad_mixed, p.output_weight):
            grad_inner, _, _ = linear_backward(*to_inner, through=(index, preact, inner))
            index, preact = 0, None
        else:
            grad_inner, _, _ = linear_backward(*to_inner)
        grad_x, grad_inner_weight, grad_inner_bias = self._linear_backward(
            *(wants_x, wanted.inner_weight, wanted.inner_bias),
            *(grad_inner, x, p.inner_weight, p.inner_bias),
            *(grad_x, index, preact, inner if preact is not None else None),
        )
        _, grad_output_weight, grad_output_bias = linear_backward(
            *(0, None, (False, wanted.output_weight, wanted.output_bias)),
            *(grad_mixed, inner, p.output_weight, p.output_bias),
        )
        return grad_x, FeedForwardParameters(
            *(grad_inner_weight, grad_inner_bias, grad_output_weight, grad_output_bias),
            *(grad_norm_weight, grad_norm_bias),
        )

    # ---- products

    def _linear(self, x, weight, bias, apart=False):
        return linear_forward(self._rounded(x), weight, bias, 0, self.dtype, False, apart)[0]

    def _linear_backward(
        self, wants_x, wants_weight, wants_bias, grad, x, weight, bias, add, activation=0, preact=None, output=None
    ):
        """``add``, if any, is a gradient that comes to ``x`` another way, in its dtype."""
        wanted, taken = (wants_x, wants_weight, wants_bias), self._rounded(x)
        if taken.dtype == x.dtype:
            return linear_backward(activation, preact, wanted, grad, x, weight, bias, add, output)
        grad_x, *others = linear_backward(activation, preact, wanted, grad, taken, weight, bias, None, output)
        if grad_x is not None:
            grad_x = grad_x.to(x.dtype) if add is None else grad_x + add
        return grad_x, *others

    def _rounded(self, x):
        """``x`` in the dtype of the products, or as it is where the kernel rounds it."""
        return x if x.dtype == self.dtype or rounds_input(x, self.dtype) else x.to(self.dtype)

    # ---- the same in PyTorch's functions, with the elements dropped that the kernels drop

    def composition(self, mask, cu_seqlens, seed, input, *parameters):
        first, second = self.split(parameters)
        output = input
        if first:
            o, rows, linear = self.attention, self._queried(cu_seqlens, input), torch.nn.functional.linear
            query = None if rows is input else linear(rows, first.query_weight, first.query_bias)
            joined = linear(input, *_joined(first, 0 if rows is input else 1))
            others = *self._masks(mask, cu_seqlens), seed if self._call().threshold else None
            context = attention_composition(self._call(), others, *self._heads(query, joined))
            context = context if context.dim() == 3 else context.transpose(1, 2)
            mixed = linear(context.reshape(rows.shape), first.output_weight, first.output_bias)
            dropout = _drop(seed, o.output_dropout, ATTENTION_OUTPUT)
            output = norm_composition(mixed, rows, first.norm_weight, first.norm_bias, o.eps, dropout)
        if second:
            o = self.feed_forward
            inner = linear_reference(output, second.inner_weight, second.inner_bias, o.activation)
            mixed = torch.nn.functional.linear(inner, second.output_weight, second.output_bias)
            dropout = _drop(seed, o.output_dropout, OUTPUT)
            output = norm_composition(mixed, output, second.norm_weight, second.norm_bias, o.eps, dropout)
        return output


def _drop(seed, p, use):
    """Dropout of probability p as layer_norm.py takes it."""
    threshold = _dropout.threshold(p)
    return (seed, threshold, use) if threshold else _dropout.NONE


def _heads(rows, parts, heads, layout):
    """The parts that lie side by side in ``rows``, as attention takes them."""
    shape = (parts, heads, rows.shape[1] // parts // heads)
    if layout.packed:
        return rows.view(len(rows), *shape).unbind(1)
    return tuple(part.transpose(1, 2) for part in rows.view(layout.B, layout.S, *shape).unbind(2))


def _joined(p, first):
    """Weight and bias of one linear layer that gives query (if 0 is ``first``), key and value side by side."""
    weights, biases = p[first:3], p[3 + first : 6]
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.cat(weights), torch.cat(biases)
    width = weights[0].shape[1]
    joined = _arena.empty((sum(map(len, weights)), width), weights[0].dtype, weights[0])
    return torch.cat(weights, out=joined), torch.cat(biases)


def _parts(joined, count, dtype):
    """The parts, each with a storage of its own: autograd keeps a gradient as it gets it, and what resizes or saves one
    must not meet the others. Large ones stay where they are, and their memory is given back with the last of them."""
    if joined is None:
        return [None] * count
    parts = joined.chunk(count)
    if joined.dtype == dtype and _arena.is_plain(joined) and parts[0].numel() * dtype.itemsize >= _arena.LEAST:
        return [torch.from_dlpack(part) for part in parts]
    return [_arena.empty_like(part, dtype, _arena.GRADIENT).copy_(part) for part in parts]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, mask, cu_seqlens, seed, input, *parameters):
        _arena.keep_together(run.memory == "lowest")
        output, kept = run.forward(mask, cu_seqlens, seed, input, parameters, keep=True)
        ctx.run, ctx.count = run, len(kept)
        ctx.save_for_backward(*kept, mask, cu_seqlens, seed, input, *parameters)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        tensors = ctx.saved_tensors
        kept, given, sources = tensors[: ctx.count], tensors[ctx.count : ctx.count + 3], tensors[ctx.count + 3 :]
        wanted = _autograd.wanted(ctx, slice(4, None))

        def kernel(grad_output, *sources):
            grads = ctx.run.backward(*given, kept, wanted, grad_output, *sources)
            return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))

        def composition(*sources):
            return ctx.run.composition(*given, *sources)

        return None, None, None, None, *_autograd.gradients(kernel, composition, grad_output, *sources)
