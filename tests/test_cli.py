"""The command line as a new user meets it."""

import json
import os
import re
import subprocess
import sys

import processes
import pytest
from typer.testing import CliRunner

import fastft
from fastft import _library
from fastft.cli.main import app


def run(*arguments, python=("-m", "fastft")):
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "80"}
    return subprocess.run([sys.executable, *python, *arguments], env=environment, capture_output=True, text=True)


def test_help_lists_the_commands_and_imports_no_torch():
    code = "import sys; from fastft.cli.main import app; app(standalone_mode=False); sys.exit('torch' in sys.modules)"
    done = run("--help", python=("-c", code))
    assert done.returncode == 0
    assert " env " in done.stdout and "Example: fastft finetune " in done.stdout
    assert run().stdout == run("--help").stdout, "no command at all is a question too"
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("finetune", "DATA --model NAME_OR_DIR --output DIR [OPTIONS]"),
        ("evaluate", "DIR DATA [OPTIONS]"),
        ("predict", "DIR [TEXT]... [OPTIONS]"),
        ("compare", "--model NAME_OR_DIR [OPTIONS]"),
        ("env", "[OPTIONS]"),
        ("bench", "[OPTIONS]"),
    ],
)
def test_help_of_a_command_has_an_example_and_a_line_for_each_option(command, usage):
    shown = processes.at_once(command, "--help").out
    assert f"Usage: fastft {command} {usage}" in shown and f"Example: fastft {command}" in shown
    assert max(map(len, shown.splitlines())) <= 80
    inside = [line for line in shown.splitlines() if line.startswith("│")]
    assert inside and all(re.match(r"│ (\* |  )? *(--[a-z]|[A-Z])", line) for line in inside), "one takes two lines"


def test_version():
    assert run("--version").stdout == f"fastft {fastft.__version__}\n"


def test_an_unknown_command_is_one_sentence_and_status_2():
    done = run("finetun")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "fastft: No such command 'finetun'. Did you mean 'finetune'?; fastft --help tells more\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune"], "Missing argument 'DATA'; fastft finetune --help tells more"),
        (["finetune", "a.csv", "--model", "m"], "Missing option '--output'; fastft finetune --help tells more"),
        (["predict", "m", "--tpo", "3"], "No such option: --tpo "),
        (["predict", "m", "--top", "many"], "--top 'many': "),
        (["evaluate", "m", "a.csv", "--batch-size=1.5"], "--batch-size '1.5': "),
        (["evaluate", "m", "a.csv", "b.csv"], "Got unexpected extra argument"),
        (["finetune", "a.csv", "--head", "mean", "--model", "m", "--output", "o"], "--head: 'mean' is not one of "),
        (["bench", "--op", "linear"], "--op 'linear' is not one of attention, cross_entropy, "),
        (["bench", "--rounds", "0"], "bench: --rounds 0; a whole number from 1 is needed"),
        (["bench", "--shape", "7x7"], "--shape '7x7' is in the name of no shape that is measured"),
        (["bench", "--device", "tpu"], "--device 'tpu' is not one of cpu"),
    ],
    ids=" ".join,
)
def test_what_is_typed_wrongly_is_one_sentence_with_the_value(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"fastft: {message}") and done.stderr.count("\n") == 1


def test_env_says_what_runs_or_why_not():
    facts = json.loads(run("env", "--json").stdout)
    assert facts["fastft"] == fastft.__version__
    assert facts["native"] == _library.available()
    assert facts["native_why_not"] == _library.why_not()
    assert facts["isas"] == _library.isas()
    assert facts["cuda"] == (facts["cuda_why_not"] is None)
    assert facts["cpu"]
    table = run("env").stdout
    assert facts["isa"] is None or facts["isa"] in table
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize("command", ["env", "bench"])
def test_a_wrong_variable_of_the_environment_is_one_sentence(monkeypatch, command):
    monkeypatch.setenv("FASTFT_ISA", "sse9")
    done = run(command)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "fastft: FASTFT_ISA is 'sse9', must be one of baseline, avx2, avx512, avx512_bf16\n"


def test_names_are_imported_when_first_used():
    code = "import sys, fastft; assert 'torch' not in sys.modules; [getattr(fastft, name) for name in fastft.__all__]"
    assert run(python=("-c", code)).stderr == ""


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(fastft, "no_such_name")


def test_bench_shows_each_shape_beside_pytorchs(fast_machine):
    options = ["bench", "--op", "linear_act", "--shape", "32x768", "--dtype", "float32", "--rounds", "1"]
    done = CliRunner().invoke(app, options, env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert "linear_act" in lines[1] and "32x768->768 tanh" in lines[2] and "Peak: " in done.stdout
    assert max(map(len, lines[:3])) <= 80
    (row,) = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)["rows"]
    assert row["sample"] == "32x768->768 tanh" and row["path"] == "train" and row["fastft"]["median"] > 0
