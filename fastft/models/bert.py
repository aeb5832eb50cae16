"""BERT."""

from transformers.models.bert import modeling_bert

from fastft.models import bert_like, embedding, head

# What computes something besides calling what is inside, and is left to PyTorch.
NOT_REPLACED = (modeling_bert.BertCrossAttention,)


class BertEmbeddings(embedding.Embeddings, modeling_bert.BertEmbeddings):
    pass


class BertSelfAttention(bert_like.SelfAttention, modeling_bert.BertSelfAttention):
    pass


class BertSelfOutput(bert_like.Output, modeling_bert.BertSelfOutput):
    pass


class BertAttention(bert_like.Attention, modeling_bert.BertAttention):
    pass


class BertIntermediate(bert_like.Intermediate, modeling_bert.BertIntermediate):
    pass


class BertOutput(bert_like.Output, modeling_bert.BertOutput):
    pass


class BertLayer(bert_like.Layer, modeling_bert.BertLayer):
    pass


class BertEncoder(bert_like.Encoder, modeling_bert.BertEncoder):
    pass


class BertPooler(bert_like.Pooler, modeling_bert.BertPooler):
    pass


class BertModel(bert_like.Model, modeling_bert.BertModel):
    pass


class BertForSequenceClassification(head.SequenceClassifier, modeling_bert.BertForSequenceClassification):
    _fastft_encoder = "bert"
