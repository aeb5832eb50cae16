"""BERT and the architectures whose modules transformers copied from it: what their replacing classes do.

Each class here is a mixin: an architecture's file names its second base, whose ``forward`` it replaces.
"""

import torch
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from fastft import functional
from fastft.functional._choice import runs
from fastft.models import encoder
from fastft.models.linear import fused, why_not_fused
from fastft.models.norm import normalized, why_not_normalized
from fastft.models.swap import Swapped, collected, is_sharded, watched

ATTENTION = encoder.AttentionHalf(
    *("self.query", "self.key", "self.value", "self.dropout"),
    *("output.dense", "output.dropout", "output.LayerNorm"),
    called=("self", "output"),
)
FEED_FORWARD = encoder.FeedForwardHalf(
    *("intermediate.dense", "intermediate.intermediate_act_fn"),
    *("output.dense", "output.dropout", "output.LayerNorm"),
    called=("intermediate", "output"),
)


class SelfAttention(Swapped):
    _fastft_parts = ("dropout",)
    _fastft_projections = ("query", "key", "value")

    def _fastft_why_not(self):
        implementation = self.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            return f"its attention is {implementation!r}, not 'sdpa' or 'eager'"
        if getattr(self, "is_decoder", False) or self.is_causal:
            return "it is a decoder's"
        if type(self.dropout) is not torch.nn.Dropout:
            return f"its dropout is {type(self.dropout).__qualname__}, not torch.nn.Dropout"
        if why := watched(self.dropout):
            return f"its dropout {why}"
        if implementation == "eager" and collected(self):
            return "its weights are asked for"
        return None

    def _fastft_forward(self, hidden_states, attention_mask=None, cache=None, **kwargs):
        if cache is not None:
            return super().forward(hidden_states, attention_mask, cache=cache, **kwargs)
        if not runs(type(self).__name__, self._fastft_why_not()):
            return super().forward(hidden_states, attention_mask, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        heads = (getattr(self, name)(hidden_states).view(shape).transpose(1, 2) for name in self._fastft_projections)
        dropout = self.dropout.p if self.dropout.training else 0.0
        output = functional.attention(*heads, attention_mask, dropout, scale=self.scaling)
        return self._fastft_joined(output.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None

    def _fastft_joined(self, context):
        return context


class Attention(Swapped):
    """The attention half of a layer."""

    def _fastft_why_not(self):
        if self.is_cross_attention or not isinstance(self.self, SelfAttention):
            return f"its attention is {type(self.self).__name__}"
        return self.self._fastft_why_not() or ATTENTION.why_not(self)

    def _fastft_arguments(self):
        return ATTENTION.arguments(self, self.self.num_attention_heads, self.self.scaling)

    def _fastft_forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        cache=None,
        **kwargs,
    ):
        if self._fastft_why_not() is None and cache is None:
            attention = self._fastft_arguments()
            if encoder.runs_here(hidden_states, attention_mask, attention[0]):
                return encoder.run(hidden_states, attention_mask, attention), None
        return super().forward(
            *(hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask), cache=cache, **kwargs
        )


class Intermediate(Swapped):
    _fastft_parts = ("dense", "intermediate_act_fn")

    def _fastft_why_not(self):
        return why_not_fused(self.dense, self.intermediate_act_fn)

    def _fastft_forward(self, hidden_states):
        if not runs(type(self).__name__, self._fastft_why_not()):
            return super().forward(hidden_states)
        return fused(hidden_states, self.dense, self.intermediate_act_fn)


class Output(Swapped):
    """What ends each half of a layer."""

    _fastft_parts = ("dropout", "LayerNorm")

    def _fastft_why_not(self):
        return why_not_normalized(self.dropout, self.LayerNorm)

    def _fastft_forward(self, hidden_states, input_tensor):
        if not runs(type(self).__name__, self._fastft_why_not()):
            return super().forward(hidden_states, input_tensor)
        return normalized(self.dense(hidden_states), input_tensor, self.dropout, self.LayerNorm)


class Layer(encoder.Layer):
    def _fastft_why_not(self):
        if self.add_cross_attention or self.is_decoder:
            return "it is a decoder's"
        if self.chunk_size_feed_forward:
            return f"chunk_size_feed_forward is {self.chunk_size_feed_forward}"
        if not isinstance(self.attention, Attention):
            return f"its attention is {type(self.attention).__name__}"
        if why := self.attention._fastft_why_not():
            return f"its attention half runs by itself: {why}"
        if why := watched(self.attention):
            return f"attention {why}"
        if why := FEED_FORWARD.why_not(self):
            return f"its feed-forward half runs by itself: {why}"
        return None

    def _fastft_arguments(self):
        return self.attention._fastft_arguments(), FEED_FORWARD.arguments(self)

    def _fastft_forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        cache=None,
        **kwargs,
    ):
        if cache is None and (output := self._fastft_whole(hidden_states, attention_mask)) is not None:
            return output
        return self._fastft_by_modules(
            *(super().forward, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask),
            **(kwargs | {"cache": cache}),
        )

    def feed_forward_chunk(self, attention_output):
        if FEED_FORWARD.why_not(self) is None:
            feed_forward = FEED_FORWARD.arguments(self)
            if encoder.runs_here(attention_output, None, feed_forward[0]):
                return encoder.run(attention_output, None, None, feed_forward)
        return super().feed_forward_chunk(attention_output)


class Encoder(encoder.Encoder):
    _fastft_output = BaseModelOutputWithPastAndCrossAttentions


class Pooler(Swapped):
    _fastft_parts = ("dense", "activation")

    def _fastft_why_not(self):
        return why_not_fused(self.dense, self.activation)

    def _fastft_forward(self, hidden_states):
        if not runs(type(self).__name__, self._fastft_why_not()):
            return super().forward(hidden_states)
        return fused(hidden_states[:, 0], self.dense, self.activation)


class Model(encoder.Model):
    _fastft_encoder = "encoder"

    def _fastft_reads_first_only(self):
        pooler = getattr(self, "pooler", None)
        return pooler is None or (isinstance(pooler, Pooler) and (is_sharded(pooler) or not watched(pooler)))
