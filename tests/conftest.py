"""Tests run with the shipped rule: nothing is measured, and no file of the user's is read."""

import os

os.environ["FASTFT_TUNE"] = "0"

import pytest

from fastft import _library


@pytest.fixture(params=_library.isas())
def each_isa(request):
    """The CPU's kernels with one instruction set after the other; its name."""
    with _library.use_isa(request.param):
        yield request.param
