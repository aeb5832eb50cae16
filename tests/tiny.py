"""A BERT small enough for a test, and reviews whose label is decided by single words."""

import random

import torch
from transformers import BertConfig, BertModel, BertTokenizer

GOOD = ["good", "great", "fine", "nice"]
BAD = ["bad", "poor", "dull", "awful"]
OTHER = ["the", "a", "film", "plot", "actor", "scene", "is", "was", "and", "with"]


def make_checkpoint(folder, seed=0):
    """Writes a randomly initialised BertModel (2 layers of 32) with its tokenizer; returns the folder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *OTHER]
    vocabulary = {word: index for index, word in enumerate(words)}
    BertTokenizer(vocab=vocabulary, model_max_length=64).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,  # 0.02 suits hundreds of features, not 32
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    return folder


def make_reviews(rows, seed):
    """(texts, labels): as many "negative" as "positive", 2 to 24 words."""
    draw = random.Random(seed)
    texts, labels = [], []
    for row in range(rows):
        count = draw.randint(1, 12)
        words = draw.choices(OTHER, k=count) + draw.choices((BAD, GOOD)[row % 2], k=count)
        draw.shuffle(words)
        texts.append(" ".join(words))
        labels.append(("negative", "positive")[row % 2])
    return texts, labels
