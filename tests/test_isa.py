"""Instruction sets: chosen at load, capped by FASTFT_ISA, and never leaking into one another's code."""

import os
import re
import subprocess
import sys

import pytest

import setup
from fastft import _library

# The linker keeps one of several equal weak functions, whichever instruction set it was compiled for.
WEAK = "VWuvw"


@pytest.fixture(scope="module")
def objects():
    """Objects of each instruction set, up to date."""
    if reason := setup.why_no_native():
        pytest.skip(reason)
    setup.build_library()
    found = {isa: sorted((setup.BUILD / isa).glob("*.o")) for isa in setup.Config.discover().isas}
    return {
        isa: [file for file in files if (setup.CSRC / "cpu" / f"{file.stem}.cpp").is_file()]
        for isa, files in found.items()
    }


def leaks(file, isa):
    """Symbols that the linker might merge with another instruction set's, and code that would run at load."""
    listing = subprocess.run(["nm", "--demangle", "--defined-only", file], capture_output=True, text=True, check=True)
    for line in listing.stdout.splitlines():
        _, kind, name = line.split(maxsplit=2)
        own = f"fastft::cpu::{isa}::" in name or f"N6fastft3cpu{len(isa)}{isa}" in name  # some nm cannot demangle
        merged = kind in WEAK and not own and not name.startswith("DW.ref.")
        if merged or name.startswith("_GLOBAL__sub_I_"):
            yield name


@pytest.mark.parametrize("isa", setup.ISA_FLAGS)
def test_no_function_can_be_merged_into_another_instruction_sets_path(objects, isa):
    assert objects[isa], f"nothing was compiled for {isa}"
    assert {file.name: found for file in objects[isa] if (found := sorted(set(leaks(file, isa))))} == {}


@pytest.mark.parametrize(
    "code", ["#include <algorithm>\nint f(const int& a) { return std::max(a, 1); }", "int g(); int h = g();"]
)
def test_a_leak_would_be_seen(tmp_path, code):
    if reason := setup.why_no_native():
        pytest.skip(reason)
    source, output = tmp_path / "leak.cpp", tmp_path / "leak.o"
    source.write_text(code)
    subprocess.run([*setup.find_compiler(), "-O0", "-c", source, "-o", output], check=True)
    assert list(leaks(output, "avx2"))


@pytest.mark.parametrize(("isa", "registers"), [("baseline", "[yz]mm"), ("avx2", "zmm")])
def test_code_uses_no_wider_registers_than_its_instruction_set(objects, isa, registers):
    shared = [setup.BUILD / "isa.o", *(setup.BUILD / "binding").glob("*.o")] if isa == "baseline" else []
    for file in [*objects[isa], *shared]:
        code = subprocess.run(["objdump", "--disassemble", file], capture_output=True, text=True, check=True).stdout
        assert re.search(rf"%{registers}\d", code) is None, file


@pytest.fixture
def native():
    if reason := _library.why_not():
        pytest.skip(reason)
    before = _library.isa()
    yield
    _library.set_isa(before)


def test_the_highest_usable_instruction_set_runs_by_default(native):
    if not os.environ.get("FASTFT_ISA"):
        assert _library.isa() == _library.isas()[-1]


def test_instruction_sets_can_be_switched(native):
    for name in _library.isas():
        _library.set_isa(name)
        assert _library.isa() == name
    with pytest.raises(ValueError, match="set_isa: 'sse9' is not one of baseline"):
        _library.set_isa("sse9")


def run_with_isa(name):
    code = "from fastft import _library; print(_library.isa(), *_library.isas())"
    environment = {**os.environ, "FASTFT_ISA": name, "PYTHONPATH": str(setup.ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("limit", _library.ISAS[:-1])
def test_fastft_isa_caps_the_instruction_set(native, limit):
    if os.environ.get("FASTFT_ISA"):
        pytest.skip("FASTFT_ISA is set, so what this CPU has is not known")
    allowed = [name for name in _library.isas() if _library.ISAS.index(name) <= _library.ISAS.index(limit)]
    assert run_with_isa(limit).stdout.split() == [allowed[-1], *allowed]


def test_an_unknown_fastft_isa_is_an_error(native):
    done = run_with_isa("sse9")
    assert done.returncode == 1
    assert done.stderr.endswith("FASTFT_ISA is 'sse9', must be one of baseline, avx2, avx512, avx512_bf16\n")
