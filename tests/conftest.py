"""Tests run with the shipped rule: nothing is measured, and no file of the user's is read."""

import os
import signal

os.environ["FASTFT_TUNE"] = "0"

import pytest
import simt

from fastft import _library

# A shell that starts the suite in the background has it ignore Ctrl-C, and so would the runs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=_library.isas())
def each_isa(request):
    """The CPU's kernels with one instruction set after the other; its name."""
    with _library.use_isa(request.param):
        yield request.param


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash.get(simt.SUMMARY, []):
        terminalreporter.write_line(line)
