"""DistilBERT, whose layers have no modules for their halves, and no dropout after attention."""

from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert import modeling_distilbert

from fastft.functional._choice import runs
from fastft.models import bert_like, embedding, encoder, head
from fastft.models.linear import fused, why_not_fused
from fastft.models.swap import Swapped

ATTENTION = encoder.AttentionHalf(
    *("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.dropout"),
    *("attention.out_lin", None, "sa_layer_norm"),
    called=("attention",),
)
FEED_FORWARD = encoder.FeedForwardHalf(
    *("ffn.lin1", "ffn.activation", "ffn.lin2", "ffn.dropout", "output_layer_norm"), called=("ffn",)
)


class Embeddings(embedding.Embeddings, modeling_distilbert.Embeddings):
    def _fastft_forward(self, input_ids, inputs_embeds=None, position_ids=None):
        if self._fastft_runs(input_ids, inputs_embeds):
            return self._fastft_embedded(input_ids, None, position_ids)
        return super().forward(input_ids, inputs_embeds, position_ids)


class DistilBertSelfAttention(bert_like.SelfAttention, modeling_distilbert.DistilBertSelfAttention):
    _fastft_projections = ("q_lin", "k_lin", "v_lin")

    def _fastft_joined(self, context):
        return self.out_lin(context)


class FFN(Swapped, modeling_distilbert.FFN):
    _fastft_parts = ("lin1", "activation")

    def _fastft_why_not(self):
        return why_not_fused(self.lin1, self.activation)

    def _fastft_forward(self, input):
        return super().forward(input)

    def ff_chunk(self, input):
        if not runs("FFN", self._fastft_why_not()):
            return super().ff_chunk(input)
        return self.dropout(self.lin2(fused(input, self.lin1, self.activation)))


class TransformerBlock(encoder.Layer, modeling_distilbert.TransformerBlock):
    def _fastft_why_not(self):
        if self.ffn.chunk_size_feed_forward:
            return f"chunk_size_feed_forward is {self.ffn.chunk_size_feed_forward}"
        if not isinstance(self.attention, DistilBertSelfAttention):
            return f"its attention is {type(self.attention).__name__}"
        if why := self.attention._fastft_why_not():
            return f"attention: {why}"
        return ATTENTION.why_not(self) or FEED_FORWARD.why_not(self)

    def _fastft_arguments(self):
        attention = ATTENTION.arguments(self, self.attention.n_heads, self.attention.scaling)
        return attention, FEED_FORWARD.arguments(self)

    def _fastft_forward(self, hidden_states, attention_mask=None, **kwargs):
        if (output := self._fastft_whole(hidden_states, attention_mask)) is not None:
            return output
        return self._fastft_by_modules(super().forward, hidden_states, attention_mask, **kwargs)


class Transformer(encoder.Encoder, modeling_distilbert.Transformer):
    _fastft_output = BaseModelOutput


class DistilBertModel(encoder.Model, modeling_distilbert.DistilBertModel):
    _fastft_encoder = "transformer"

    def _fastft_reads_first_only(self):
        return True


class DistilBertForSequenceClassification(
    head.SequenceClassifier, modeling_distilbert.DistilBertForSequenceClassification
):
    _fastft_encoder = "distilbert"
