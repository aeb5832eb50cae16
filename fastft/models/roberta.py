"""RoBERTa."""

from transformers.models.roberta import modeling_roberta

from fastft.models import bert_like, embedding, head

# What computes something besides calling what is inside, and is left to PyTorch.
NOT_REPLACED = (modeling_roberta.RobertaCrossAttention,)


class RobertaEmbeddings(embedding.Embeddings, modeling_roberta.RobertaEmbeddings):
    def _fastft_positions(self, input_ids, cache_length):
        return self.create_position_ids_from_input_ids(input_ids, self.padding_idx, cache_length)


class RobertaSelfAttention(bert_like.SelfAttention, modeling_roberta.RobertaSelfAttention):
    pass


class RobertaSelfOutput(bert_like.Output, modeling_roberta.RobertaSelfOutput):
    pass


class RobertaAttention(bert_like.Attention, modeling_roberta.RobertaAttention):
    pass


class RobertaIntermediate(bert_like.Intermediate, modeling_roberta.RobertaIntermediate):
    pass


class RobertaOutput(bert_like.Output, modeling_roberta.RobertaOutput):
    pass


class RobertaLayer(bert_like.Layer, modeling_roberta.RobertaLayer):
    pass


class RobertaEncoder(bert_like.Encoder, modeling_roberta.RobertaEncoder):
    pass


class RobertaPooler(bert_like.Pooler, modeling_roberta.RobertaPooler):
    pass


class RobertaModel(bert_like.Model, modeling_roberta.RobertaModel):
    pass


class RobertaForSequenceClassification(head.SequenceClassifier, modeling_roberta.RobertaForSequenceClassification):
    _fastft_encoder = "roberta"
    _fastft_readers = ("classifier",)
    _fastft_parts, _fastft_classifier = (), "classifier.out_proj"  # whose dropout comes twice
