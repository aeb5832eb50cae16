"""Tests run with the shipped rule: nothing is measured, and no file of the user's is read."""

import os
import signal

os.environ["FASTFT_TUNE"] = "0"
if "PYTEST_XDIST_WORKER" in os.environ:  # the others have the other cores; what a test starts inherits it
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

import native
import pytest
import simt
import torch

import setup
from fastft import _library
from fastft.testing.timing import Peaks

# A shell that starts the suite in the background has it ignore Ctrl-C, and so would the runs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Whatever ran before: in some models a rounded number ends on the other side of a ReLU, and its gradient too."""
    torch.manual_seed(0)


@pytest.fixture(params=_library.isas())
def each_isa(request):
    """The CPU's kernels with one instruction set after the other; its name."""
    with _library.use_isa(request.param):
        yield request.param


@pytest.fixture(params=setup.ISA_FLAGS)
def kernels(request):
    """The CPU kernels without PyTorch, with one instruction set after the other."""
    module = native.kernels()
    if request.param not in module.isas().split(","):
        pytest.skip(f"not built or not on this machine: {request.param}")
    module.set_isa(request.param)
    yield module
    module.set_threads(1)
    module.set_scattered(False)
    module.set_isa(module.isas().split(",")[-1])


@pytest.fixture
def fast_machine(monkeypatch):
    """Peaks that nothing beats, at once: measured while other tests run beside, they would be too low."""

    def window(self):
        self.float32 = self.bfloat16 = self.tile_float32 = self.tile_bfloat16 = 1e15
        self.copy = self.update = 1e13
        self.windows += 1

    monkeypatch.setattr(Peaks, "window", window)


# Whose tests count what the others ran, or share what is dear: one process of several runs all of them.
TOGETHER = {
    **dict.fromkeys(("test_simt.py", "test_optim.py"), "simt"),
    **{f"test_{name}.py": name for name in ("build", "cuda_gates", "distributed", "native", "simt_executor")},
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return TOGETHER.get(nodeid.partition("::")[0].rpartition("/")[2], nodeid)

    return Scheduling(config, log)


def pytest_sessionfinish(session):
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["simt"] = session.config.stash.get(simt.SUMMARY, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash.setdefault(simt.SUMMARY, []).extend(getattr(node, "workeroutput", {}).get("simt", []))


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash.get(simt.SUMMARY, []):
        terminalreporter.write_line(line)
