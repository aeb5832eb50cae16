"""What torchrun starts for test_distributed.py: trains small classifiers under every wrapper, saves their weights."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from small_models import batch, build
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastft

STEPS, PROCESSES, ROWS = 3, 2, 8  # of a global batch


def global_batch(step):
    return batch(seed=step, rows=ROWS)


def part(inputs, rank):
    """The rows of one of the processes."""
    return {name: tensor.chunk(PROCESSES)[rank] for name, tensor in inputs.items()}


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def train(model, optimizer, batches, backward=torch.Tensor.backward):
    for inputs in batches:
        backward(model(**inputs).loss)
        optimizer.step()
        optimizer.zero_grad()


# ---- a model's training on this process's rows, under each wrapper; each returns the wrapped model


def distributed(model):
    return by_rows(DistributedDataParallel(model))


def sharded(model):
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    return by_rows(fully_shard(model))


def by_rows(model):
    rank = torch.distributed.get_rank()
    train(model, optimizer_of(model), (part(global_batch(step), rank) for step in range(STEPS)))
    return model


def accelerated(model):
    accelerator, batches = Accelerator(cpu=True), [global_batch(step) for step in range(STEPS)]
    rows = [{name: tensor[row] for name, tensor in inputs.items()} for inputs in batches for row in range(ROWS)]
    loader = torch.utils.data.DataLoader(rows, batch_size=ROWS // PROCESSES)  # each process takes every second batch
    model, optimizer, loader = accelerator.prepare(model, optimizer_of(model), loader)
    train(model, optimizer, loader, accelerator.backward)
    return model


WRAPPERS = {"DistributedDataParallel": distributed, "fully_shard": sharded, "accelerate": accelerated}


def weights(model):
    """Whole, by the names of the model that was wrapped."""
    found = {}
    for name, value in model.state_dict().items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        found[name.removeprefix("module.")] = value.detach().clone()
    return found


def main(folder):
    torch.distributed.init_process_group("gloo")
    for name, train_under in WRAPPERS.items():
        for kind, model in (("stock", build()), ("fastft", fastft.optimize(build()))):
            found = weights(train_under(model))  # by all processes: each holds a shard
            if torch.distributed.get_rank() == 0:
                save_file(found, Path(folder, f"{name}, {kind}"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
