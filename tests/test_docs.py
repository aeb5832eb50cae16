"""What the documentation shows is what happens: the docstrings' examples."""

import doctest
import importlib
import pkgutil

import pytest

import fastft

NO_MODULES = ("__main__", "libfastft")  # runs the command line; the native library, which is not Python's to import
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(fastft.__path__, "fastft.")
    if module.name.rpartition(".")[2] not in NO_MODULES
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    public = {n: getattr(module, n) for n in getattr(module, "__all__", [])}
    failed, _ = doctest.testmod(module, extraglobs={"torch": importlib.import_module("torch"), **public})
    assert failed == 0


def test_the_documented_functions_have_examples():
    from fastft.functional import cross_entropy, linear_act
    from fastft.nn import LinearAct

    for public in (linear_act, cross_entropy, LinearAct):
        assert any(test.examples for test in doctest.DocTestFinder().find(public))
