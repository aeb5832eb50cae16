"""BERT."""

from transformers.models.bert import modeling_bert

from fastft.functional._choice import runs
from fastft.models import head
from fastft.models.linear import fused, why_not_fused
from fastft.models.norm import normalized, why_not_normalized
from fastft.models.swap import Swapped, replaces

# What computes something besides calling what is inside, and is left to PyTorch.
NOT_REPLACED = (modeling_bert.BertSelfAttention, modeling_bert.BertCrossAttention)


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


class BertModel(Swapped, modeling_bert.BertModel):
    _fastft_works = False

    @replaces(modeling_bert.BertModel.forward)
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class BertForSequenceClassification(Swapped, modeling_bert.BertForSequenceClassification):
    forward = head.with_cross_entropy(modeling_bert.BertForSequenceClassification)
    _fastft_why_not = head.why_not
