"""ELECTRA."""

from transformers.models.electra import modeling_electra

from fastft.models import bert_like, embedding, head

# What computes something besides calling what is inside, and is left to PyTorch.
NOT_REPLACED = (modeling_electra.ElectraCrossAttention,)


class ElectraEmbeddings(embedding.Embeddings, modeling_electra.ElectraEmbeddings):
    pass


class ElectraSelfAttention(bert_like.SelfAttention, modeling_electra.ElectraSelfAttention):
    pass


class ElectraSelfOutput(bert_like.Output, modeling_electra.ElectraSelfOutput):
    pass


class ElectraAttention(bert_like.Attention, modeling_electra.ElectraAttention):
    pass


class ElectraIntermediate(bert_like.Intermediate, modeling_electra.ElectraIntermediate):
    pass


class ElectraOutput(bert_like.Output, modeling_electra.ElectraOutput):
    pass


class ElectraLayer(bert_like.Layer, modeling_electra.ElectraLayer):
    pass


class ElectraEncoder(bert_like.Encoder, modeling_electra.ElectraEncoder):
    pass


class ElectraModel(bert_like.Model, modeling_electra.ElectraModel):
    pass


class ElectraForSequenceClassification(head.SequenceClassifier, modeling_electra.ElectraForSequenceClassification):
    _fastft_encoder = "electra"
    _fastft_readers = ("classifier",)
    _fastft_parts, _fastft_classifier = (), "classifier.out_proj"  # whose dropout comes twice
