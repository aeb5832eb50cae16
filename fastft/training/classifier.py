"""A text classifier on the hidden state of the first token, over any encoder that transformers has."""

from __future__ import annotations

import copy
import inspect
import os
from typing import Any

import torch
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_tuple

# Arguments of from_pretrained that say where a checkpoint is.
_PLACE = (
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"),
    *("trust_remote_code", "code_revision"),
)
# Those that say how it is loaded, though configurations have fields of these names.
_HOW = ("dtype", "torch_dtype", "quantization_config")


class TextClassifierConfig(PreTrainedConfig):
    """Configuration of :class:`TextClassifier`.

    Args:
        encoder: the encoder's configuration, or the dict of one; BERT's default when None.
        classifier_dropout: dropout before the head; None takes the encoder's, as its own classifiers would.
        kwargs: ``num_labels``, ``id2label``, ``label2id``, ``problem_type``, by default those of the encoder's
            configuration, and whatever else every configuration has.
    """

    model_type = "fastft_text_classifier"
    sub_configs = {"encoder": AutoConfig}  # noqa: RUF012 — a class attribute of every configuration

    def __init__(
        self,
        encoder: PreTrainedConfig | dict[str, Any] | None = None,
        classifier_dropout: float | None = None,
        **kwargs: Any,
    ):
        encoder = {} if encoder is None else encoder
        if isinstance(encoder, dict):
            options = {key: value for key, value in encoder.items() if key != "model_type"}
            encoder = AutoConfig.for_model(encoder.get("model_type", "bert"), **options)
        self.encoder = encoder
        self.classifier_dropout = classifier_dropout
        if "num_labels" not in kwargs and "id2label" not in kwargs:
            kwargs.update(id2label=encoder.id2label, label2id=encoder.label2id)
        kwargs.setdefault("problem_type", encoder.problem_type)
        super().__init__(**kwargs)


class TextClassifier(PreTrainedModel):
    """An encoder, dropout, and a linear layer on the first row of its last hidden state.

    Unlike transformers' own sequence classifiers it has no pooler between encoder and head. Trains under any Trainer or
    loop; ``fastft.optimize`` puts our kernels in as with transformers' models.

    Args:
        config: a :class:`TextClassifierConfig`, or the configuration of an encoder.
        encoder: a model to take as encoder; by default one is made from ``config``, with random weights.
    """

    config_class = TextClassifierConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    accepts_loss_kwargs = False  # the loss is a mean over the batch: Trainer divides it by its accumulation steps
    supports_gradient_checkpointing = True
    # The encoder says for itself which of these it can take.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _fastft_adapter = "fastft.training.classifier_swap"

    def __init__(self, config: TextClassifierConfig | PreTrainedConfig, encoder: PreTrainedModel | None = None):
        if not isinstance(config, TextClassifierConfig):
            config = TextClassifierConfig(encoder=config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.loss_type = "ForSequenceClassification"
        if encoder is None:
            encoder = AutoModel.from_config(config.encoder, **_without_pooler(config.encoder))
        self.encoder = encoder
        self.dropout = torch.nn.Dropout(_head_dropout(config))
        self.classifier = torch.nn.Linear(config.encoder.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Arguments as those of transformers' sequence classifiers; an encoder gets only those that are given.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: ``(B, S)``; inputs_embeds: ``(B, S, H)``.
            labels: ``(B,)`` class indices, or what a regression or several labels need: see ``config.problem_type``.
            kwargs: the encoder's own, ``output_hidden_states`` and ``output_attentions`` among them.
        Returns: logits ``(B, C)``, with labels the loss, and what was asked for of the encoder.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        given.update(position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs)
        for key in ("output_hidden_states", "output_attentions"):
            given.setdefault(key, getattr(self.config, key) or None)
        given = {key: value for key, value in given.items() if value is not None}
        encoded = self.encoder(**given, return_dict=True)
        logits = self.classifier(self.dropout(encoded.last_hidden_state[:, 0]))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=encoded.get("hidden_states"),
            attentions=encoded.get("attentions"),
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Loads a saved TextClassifier, or the encoder of any other checkpoint under a new head.

        Args: those of transformers' ``from_pretrained``; ``num_labels``, ``classifier_dropout`` and other fields of the
            configurations may be among them.
        Raises: ValueError: weights of the encoder are missing in the checkpoint, or have another shape.
        """
        place = {key: kwargs[key] for key in _PLACE if key in kwargs}
        name, with_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        if config is not None and not isinstance(config, PreTrainedConfig):
            config = AutoConfig.from_pretrained(config, **place)
        found = config if name is None else AutoConfig.from_pretrained(name, **place)
        if isinstance(found, TextClassifierConfig):
            model, info = super().from_pretrained(name, *args, config=config, output_loading_info=True, **kwargs)
            _require_encoder(name, _not_loaded(info), "encoder.")
        else:
            model, info = cls._from_encoder(name, copy.deepcopy(config or found), kwargs)
        return (model, info) if with_info else model

    @classmethod
    def _from_encoder(
        cls, name: str | os.PathLike, config: PreTrainedConfig, options: dict[str, Any]
    ) -> tuple[TextClassifier, dict[str, Any]]:
        if not isinstance(config, TextClassifierConfig):
            config = TextClassifierConfig(encoder=config, classifier_dropout=options.pop("classifier_dropout", None))
            for key in [key for key in options if hasattr(config.encoder, key) and key not in _HOW]:
                value = options.pop(key)
                setattr(config, key, value)
                setattr(config.encoder, key, value)
        encoder, info = AutoModel.from_pretrained(
            name, config=config.encoder, output_loading_info=True, **_without_pooler(config.encoder), **options
        )
        _require_encoder(name, _not_loaded(info))
        config.encoder, config.dtype = encoder.config, encoder.config.dtype
        model = cls(config, encoder=encoder)
        model.name_or_path = config.name_or_path = str(name)
        model.classifier.to(encoder.device, encoder.dtype)
        head = {f"classifier.{key}" for key in model.classifier.state_dict()}
        return model.eval(), {**info, "missing_keys": head}


def _without_pooler(config: PreTrainedConfig) -> dict[str, bool]:
    """Options that leave out the encoder's pooler, which would get no gradient; not every architecture has one."""
    encoder = MODEL_MAPPING.get(type(config), None)
    has_choice = inspect.isclass(encoder) and "add_pooling_layer" in inspect.signature(encoder.__init__).parameters
    return {"add_pooling_layer": False} if has_choice else {}


def _head_dropout(config: TextClassifierConfig) -> float:
    names = ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob", "dropout")
    found = [config.classifier_dropout, *(getattr(config.encoder, name, None) for name in names)]
    return next((dropout for dropout in found if dropout is not None), 0.0)


def _not_loaded(info: dict[str, Any]) -> list[str]:
    return sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})


def _require_encoder(name: str | os.PathLike | None, not_loaded: list[str], prefix: str = "") -> None:
    lost = [key for key in not_loaded if key.startswith(prefix)]
    if lost:
        shown = ", ".join(lost[:3]) + (", …" if len(lost) > 3 else "")
        raise ValueError(f"TextClassifier: {str(name)!r} lacks weights of the encoder, {len(lost)} in number: {shown}")


AutoConfig.register(TextClassifierConfig.model_type, TextClassifierConfig)
AutoModelForSequenceClassification.register(TextClassifierConfig, TextClassifier)
