"""BERT."""

import torch
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert import modeling_bert

from fastft import functional
from fastft.functional._choice import runs
from fastft.models import encoder, head
from fastft.models.linear import fused, why_not_fused
from fastft.models.norm import normalized, why_not_normalized
from fastft.models.swap import Swapped, collected, is_sharded, replaces, watched

# What computes something besides calling what is inside, and is left to PyTorch.
NOT_REPLACED = (modeling_bert.BertCrossAttention,)

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


class BertSelfAttention(Swapped, modeling_bert.BertSelfAttention):
    _fastft_parts = ("dropout",)

    def _fastft_why_not(self):
        implementation = self.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            return f"its attention is {implementation!r}, not 'sdpa' or 'eager'"
        if self.is_decoder or self.is_causal:
            return "it is a decoder's"
        if type(self.dropout) is not torch.nn.Dropout:
            return f"its dropout is {type(self.dropout).__qualname__}, not torch.nn.Dropout"
        if why := watched(self.dropout):
            return f"its dropout {why}"
        if implementation == "eager" and collected(self):
            return "its weights are asked for"
        return None

    @replaces(modeling_bert.BertSelfAttention.forward)
    def forward(self, hidden_states, attention_mask=None, cache=None, **kwargs):
        if cache is not None or not runs("BertSelfAttention", self._fastft_why_not()):
            return super().forward(hidden_states, attention_mask, cache=cache, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        heads = (module(hidden_states).view(shape).transpose(1, 2) for module in (self.query, self.key, self.value))
        dropout = self.dropout.p if self.dropout.training else 0.0
        output = functional.attention(*heads, attention_mask, dropout, scale=self.scaling)
        return output.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1), None


class BertAttention(Swapped, modeling_bert.BertAttention):
    """The attention half of a layer."""

    def _fastft_why_not(self):
        if self.is_cross_attention or not isinstance(self.self, BertSelfAttention):
            return f"its attention is {type(self.self).__name__}"
        return self.self._fastft_why_not() or ATTENTION.why_not(self)

    def _fastft_arguments(self):
        return ATTENTION.arguments(self, self.self.num_attention_heads, self.self.scaling)

    @replaces(modeling_bert.BertAttention.forward)
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        cache=None,
        **kwargs,
    ):
        why_not = self._fastft_why_not()
        if why_not is None and cache is None:
            attention = self._fastft_arguments()
            if encoder.runs_here(hidden_states, attention_mask, attention[0]):
                return encoder.run(hidden_states, attention_mask, attention), None
        return super().forward(
            *(hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask), cache=cache, **kwargs
        )


class BertLayer(encoder.Layer, modeling_bert.BertLayer):
    def _fastft_why_not(self):
        if self.add_cross_attention or self.is_decoder:
            return "it is a decoder's"
        if self.chunk_size_feed_forward:
            return f"chunk_size_feed_forward is {self.chunk_size_feed_forward}"
        if not isinstance(self.attention, BertAttention):
            return f"its attention is {type(self.attention).__name__}"
        if why := self.attention._fastft_why_not():
            return f"its attention half runs by itself: {why}"
        if why := watched(self.attention):
            return f"attention {why}"
        if why := FEED_FORWARD.why_not(self):
            return f"its feed-forward half runs by itself: {why}"
        return None

    @replaces(modeling_bert.BertLayer.forward)
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        cache=None,
        **kwargs,
    ):
        if self._fastft_why_not() is None and cache is None:
            attention, feed_forward = self.attention._fastft_arguments(), FEED_FORWARD.arguments(self)
            if encoder.runs_here(hidden_states, attention_mask, (*attention[0], *feed_forward[0])):
                return encoder.run(hidden_states, attention_mask, attention, feed_forward, self._fastft_memory())
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


class BertIntermediate(Swapped, modeling_bert.BertIntermediate):
    _fastft_parts = ("dense", "intermediate_act_fn")

    def _fastft_why_not(self):
        return why_not_fused(self.dense, self.intermediate_act_fn)

    @replaces(modeling_bert.BertIntermediate.forward)
    def forward(self, hidden_states):
        if not runs("BertIntermediate", self._fastft_why_not()):
            return super().forward(hidden_states)
        return fused(hidden_states, self.dense, self.intermediate_act_fn)


class BertSelfOutput(Swapped, modeling_bert.BertSelfOutput):
    _fastft_parts = ("dropout", "LayerNorm")

    def _fastft_why_not(self):
        return why_not_normalized(self.dropout, self.LayerNorm)

    @replaces(modeling_bert.BertSelfOutput.forward)
    def forward(self, hidden_states, input_tensor):
        if not runs("BertSelfOutput", self._fastft_why_not()):
            return super().forward(hidden_states, input_tensor)
        return normalized(self.dense(hidden_states), input_tensor, self.dropout, self.LayerNorm)


class BertOutput(Swapped, modeling_bert.BertOutput):
    _fastft_parts = ("dropout", "LayerNorm")

    def _fastft_why_not(self):
        return why_not_normalized(self.dropout, self.LayerNorm)

    @replaces(modeling_bert.BertOutput.forward)
    def forward(self, hidden_states, input_tensor):
        if not runs("BertOutput", self._fastft_why_not()):
            return super().forward(hidden_states, input_tensor)
        return normalized(self.dense(hidden_states), input_tensor, self.dropout, self.LayerNorm)


class BertPooler(Swapped, modeling_bert.BertPooler):
    _fastft_parts = ("dense", "activation")

    def _fastft_why_not(self):
        return why_not_fused(self.dense, self.activation)

    @replaces(modeling_bert.BertPooler.forward)
    def forward(self, hidden_states):
        if not runs("BertPooler", self._fastft_why_not()):
            return super().forward(hidden_states)
        return fused(hidden_states[:, 0], self.dense, self.activation)


class BertEncoder(Swapped, modeling_bert.BertEncoder):
    _fastft_works = False

    @replaces(modeling_bert.BertEncoder.forward)
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        cache=None,
        use_cache=None,
        **kwargs,
    ):
        if isinstance(attention_mask, encoder.Plan):
            output = encoder.run_layers(self.layer, hidden_states, attention_mask)
            return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=output)
        return super().forward(
            *(hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, cache, use_cache), **kwargs
        )


class BertModel(Swapped, modeling_bert.BertModel):
    _fastft_works = False
    _fastft_padding_free = True
    _fastft_first_only = False

    @replaces(modeling_bert.BertModel.forward)
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)

    def _create_attention_masks(self, attention_mask, encoder_attention_mask, embedding_output, **others):
        def stock():
            return modeling_bert.BertModel._create_attention_masks(
                self, attention_mask, encoder_attention_mask, embedding_output, **others
            )

        if isinstance(self.encoder, BertEncoder) and all(value is None for value in others.values()):
            plan = encoder.plan(
                *(self.encoder.layer, attention_mask, embedding_output, self._fastft_reads_first_only()),
                *(self._fastft_padding_free, self.config.num_attention_heads, lambda: stock()[0]),
            )
            if plan is not None:
                return plan, None
        return stock()

    def _fastft_reads_first_only(self):
        pooler = self.pooler
        known = pooler is None or type(pooler) in (BertPooler, modeling_bert.BertPooler)
        parts = [self, self.encoder, *([] if pooler is None else [pooler])]
        return self._fastft_first_only and known and all(is_sharded(part) or not watched(part) for part in parts)


class BertForSequenceClassification(Swapped, modeling_bert.BertForSequenceClassification):
    _fastft_cls_only = True
    forward = head.with_cross_entropy(modeling_bert.BertForSequenceClassification, "bert")
    _fastft_why_not = head.why_not
