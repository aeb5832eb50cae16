"""torch.nn.Embedding, alone and as an encoder begins: rows of several of them, LayerNorm, dropout."""

import functools

import torch

from fastft.functional._choice import runs
from fastft.functional.embedding import embedding, embeddings
from fastft.models import encoder
from fastft.models.norm import why_not_normalized
from fastft.models.swap import Swapped, heard, is_hooked, replaces, watched

# transformers' and peft's hooks on a table that let checkpointed layers behind it have gradients.
REQUIRE_GRADS = ("make_inputs_require_grads", "make_inputs_require_grad")


class Embedding(Swapped, torch.nn.Embedding):
    def _fastft_why_not(self):
        return _unusual(self)

    @replaces(torch.nn.Embedding.forward)
    def forward(self, input):
        if self._fastft_why_not() is not None:
            return torch.nn.Embedding.forward(self, input)
        return embedding(input, self.weight, self.padding_idx)


class Embeddings(Swapped):
    """What the replacing classes of all architectures' embeddings have in common; the second base as for encoders."""

    _fastft_parts = ("LayerNorm", "dropout")

    def _fastft_why_not(self):
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
            if (table := getattr(self, name, None)) is None:
                continue
            if type(table) not in (Embedding, torch.nn.Embedding):
                return f"its {name} is {type(table).__module__}.{type(table).__qualname__}, not torch.nn.Embedding"
            if why := _unusual(table):
                return f"{name}: {why}"
            if why := watched(table, but=REQUIRE_GRADS):
                return f"its {name} {why}"
        return why_not_normalized(self.dropout, self.LayerNorm)

    def _fastft_forward(
        self, input_ids=None, token_type_ids=None, position_ids=None, inputs_embeds=None, cache_length=0, **kwargs
    ):
        cache_length = kwargs.pop("past_key_values_length", cache_length)  # its name in earlier transformers
        if self._fastft_runs(input_ids, inputs_embeds):
            return self._fastft_embedded(input_ids, token_type_ids, position_ids, cache_length)
        return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, cache_length, **kwargs)

    def _fastft_runs(self, input_ids, inputs_embeds):
        given = input_ids is not None and inputs_embeds is None and input_ids.dim() == 2
        return given and runs(type(self).__name__, self._fastft_why_not())

    def _fastft_embedded(self, input_ids, token_type_ids, position_ids, cache_length=0):
        if position_ids is None:
            position_ids = self._fastft_positions(input_ids, cache_length)
        types = getattr(self, "token_type_embeddings", None)
        if types is not None and token_type_ids is None:  # zeros, unless somebody changed the buffer
            token_type_ids = self.token_type_ids.expand(position_ids.shape[0], -1).gather(1, position_ids)
        tables = self.word_embeddings, self.position_embeddings, types
        ids, handed = (input_ids, position_ids, token_type_ids), heard(self)
        packed, standing = (None, None) if handed is None else _packing(handed, tables, input_ids.shape)
        if packed is not None:
            ids = [None if of is None else of.expand(input_ids.shape).reshape(-1)[packed.kept] for of in ids]
        output = embeddings(
            *ids,
            *(None if table is None else table.weight for table in tables),
            *(self.LayerNorm.weight, self.LayerNorm.bias, self.dropout.p, self.dropout.training, self.LayerNorm.eps),
            tuple(None if table is None else table.padding_idx for table in tables),
        )
        if torch.is_grad_enabled() and is_hooked(self.word_embeddings, REQUIRE_GRADS):
            output.requires_grad_()
        if packed is None:
            return output
        handed.plan, handed.rows, handed.stand_in = packed, output, standing
        return standing

    def _fastft_positions(self, input_ids, cache_length):
        return self.position_ids[:, cache_length : cache_length + input_ids.shape[1]]


def _packing(handed, tables, shape):
    """How the encoder packs the tokens, ``(B, S)``, and what stands for their hidden states until there; (None, None):
    it does not."""
    weights = [table.weight for table in tables if table is not None]
    dtype = functools.reduce(torch.promote_types, (weight.dtype for weight in weights))
    standing = encoder.stand_in((*shape, weights[0].shape[1]), dtype, weights[0].device)
    packed = encoder.packing(handed, standing)
    return packed, None if packed is None else standing


def _unusual(table):
    """A sentence if a table does something besides giving rows, else None."""
    unusual = {"max_norm": None, "scale_grad_by_freq": False, "sparse": False}
    return next((f"its {name} is set" for name, usual in unusual.items() if getattr(table, name) != usual), None)
