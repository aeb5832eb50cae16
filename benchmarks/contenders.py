"""Other packages that train BERT on a CPU, their steps beside :class:`benchmarks.cells.Training`'s, where installed.

    pip install keras-hub jax
    pip install onnxruntime-training-cpu==1.19.2 onnx==1.17.0 "protobuf<6" "numpy<2"

each in an environment of its own beside fastft. The model has the same sizes, random weights, dropout 0.1, clipping to
norm 1 and AdamW. They use as many threads as the process has cores (ONNX Runtime as many as torch).
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import cells
from benchmarks.cells import Cell

KERAS, ONNX = "keras-hub on JAX", "ONNX Runtime"
NEEDS = {KERAS: ("keras_hub", "jax"), ONNX: ("onnxruntime.training.api", "onnx")}
DTYPES = {KERAS: ("float32", "bfloat16"), ONNX: ("float32",)}


def installed(cell: Cell) -> list[str]:
    """Names of those that can train the cell."""
    return [name for name, needs in NEEDS.items() if cell.dtype in DTYPES[name] and cells.installed(*needs)]


def step(name: str, cell: Cell) -> Callable[[], object]:
    """A training step of the cell by one of :func:`installed`."""
    return {KERAS: _keras, ONNX: _onnx}[name](cell)


def _keras(cell: Cell) -> Callable[[], object]:
    os.environ["KERAS_BACKEND"] = "jax"  # read once, at the first import
    import keras
    import keras_hub

    c, batch = cell.config(), {name: tensor.numpy() for name, tensor in cell.tensors().items()}
    keras.mixed_precision.set_dtype_policy("mixed_bfloat16" if cell.dtype == "bfloat16" else "float32")
    encoder = keras_hub.models.BertBackbone(
        vocabulary_size=c.vocab_size,
        num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        hidden_dim=c.hidden_size,
        intermediate_dim=c.intermediate_size,
        dropout=c.hidden_dropout_prob,
        max_sequence_length=c.max_position_embeddings,
    )
    model = keras_hub.models.BertTextClassifier(
        encoder, num_classes=2, dropout=c.hidden_dropout_prob, preprocessor=None
    )
    model.compile(
        optimizer=keras.optimizers.AdamW(2e-5, weight_decay=0.01, global_clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True,
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    given = {"token_ids": ids, "segment_ids": ids * 0, "padding_mask": mask.astype(bool)}
    return lambda: model.train_on_batch(given, batch["labels"])


def _onnx(cell: Cell) -> Callable[[], object]:
    import onnx
    import onnxruntime
    from onnxruntime.training import artifacts, onnxblock
    from onnxruntime.training.api import CheckpointState, Module, Optimizer

    batch = {name: tensor.as_subclass(torch.Tensor) for name, tensor in cell.tensors().items()}
    inputs, model = (batch["input_ids"], batch["attention_mask"]), cell.classifier().train()
    model.config._attn_implementation = "eager"  # what this exporter knows
    model.config.return_dict = False
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        torch.onnx.export(
            *(model, inputs, str(file)),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            training=torch.onnx.TrainingMode.TRAINING,
            do_constant_folding=False,
            opset_version=15,
            dynamo=False,
        )
        exported = onnx.load(str(file))
        learned = [name for name, _ in model.named_parameters()]
        if missing := set(learned) - {tensor.name for tensor in exported.graph.initializer}:
            raise RuntimeError(f"the exported model lacks {min(missing)}, and {len(missing) - 1} more")
        artifacts.generate_artifacts(
            exported,
            requires_grad=learned,
            loss=artifacts.LossType.CrossEntropyLoss,
            optimizer=onnxblock.optim.AdamW(clip_grad=onnxblock.optim.ClipGradNorm(1.0)),
            artifact_directory=folder,
        )
        state = CheckpointState.load_checkpoint(f"{folder}/checkpoint")
        trained = Module(f"{folder}/training_model.onnx", state, session_options=options)
        optimizer = Optimizer(f"{folder}/optimizer_model.onnx", trained)
    optimizer.set_learning_rate(2e-5)
    trained.train()
    given = [tensor.numpy() for tensor in (*inputs, batch["labels"])]

    def run() -> object:
        loss = trained(*given)
        optimizer.step()
        trained.lazy_reset_grad()
        return loss

    return run
