"""Two processes under torchrun, whatever wraps the model: training ends where that of one process ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import two_processes
from safetensors.torch import load_file
from small_models import build, distance

import fastft
from fastft.functional._choice import use_backend


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The weights that each wrapper's training ended with."""
    folder = tmp_path_factory.mktemp("weights")
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={two_processes.PROCESSES}")
    command = [sys.executable, *torchrun, str(Path(two_processes.__file__)), str(folder)]
    environment = {**os.environ, "FASTFT_BACKEND": "fastft"}  # a kernel that quietly falls back cannot pass
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def alone(model, batches):
    """The weights after the same steps in one process."""
    two_processes.train(model, two_processes.optimizer_of(model), batches)
    return two_processes.weights(model)


@pytest.fixture(scope="module")
def single():
    """Those of stock and of ours, and in float64."""

    def batches():
        return map(two_processes.global_batch, range(two_processes.STEPS))

    with use_backend("fastft"):
        ours = alone(fastft.optimize(build()), batches())
    return {"stock": alone(build(), batches()), "fastft": ours, "exact": alone(build().double(), batches())}


@pytest.mark.parametrize("wrapper", two_processes.WRAPPERS)
def test_two_processes_end_as_near_to_one_as_stock_s_do(wrapper, folder, single):
    stock, ours = (load_file(folder / f"{wrapper}, {kind}") for kind in ("stock", "fastft"))
    moved = distance(ours, dict(build().state_dict()))
    for of_stock, of_ours in (("stock", "fastft"), ("exact", "exact")):
        assert distance(ours, single[of_ours]) <= 2 * distance(stock, single[of_stock]) < moved / 1e3


def test_a_process_that_trained_on_its_rows_only_would_be_seen(folder, single):
    rows = [two_processes.part(two_processes.global_batch(step), 0) for step in range(two_processes.STEPS)]
    stock = load_file(folder / f"{next(iter(two_processes.WRAPPERS))}, stock")
    assert distance(alone(build(), rows), single["stock"]) > 1e3 * distance(stock, single["stock"])
