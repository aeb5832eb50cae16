"""The command line as a new user meets it."""

import json
import os
import subprocess
import sys

from typer.testing import CliRunner

import fastft
from fastft import _library
from fastft.cli.main import app
from fastft.testing.timing import Peaks


def run(*arguments, python=("-m", "fastft")):
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "80"}
    return subprocess.run([sys.executable, *python, *arguments], env=environment, capture_output=True, text=True)


def test_help_lists_the_commands_and_imports_no_torch():
    code = "import sys; from fastft.cli.main import app; app(standalone_mode=False); sys.exit('torch' in sys.modules)"
    done = run("--help", python=("-c", code))
    assert done.returncode == 0
    assert " env " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_version():
    assert run("--version").stdout == f"fastft {fastft.__version__}\n"


def test_an_unknown_command_is_one_sentence_and_status_2():
    done = run("finetun")
    assert done.returncode == 2
    assert "No such command 'finetun'" in done.stderr


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


def test_names_are_imported_when_first_used():
    code = "import sys, fastft; assert 'torch' not in sys.modules; [getattr(fastft, name) for name in fastft.__all__]"
    assert run(python=("-c", code)).stderr == ""


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(fastft, "no_such_name")


def test_bench_shows_each_shape_beside_pytorchs(monkeypatch):
    monkeypatch.setattr(Peaks, "COPIED", 1 << 20)
    options = ["bench", "--op", "linear_act", "--shape", "32x768", "--dtype", "float32", "--rounds", "1"]
    done = CliRunner().invoke(app, options, env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert "linear_act" in lines[1] and "32x768->768 tanh" in lines[2] and "Peak: " in done.stdout
    assert max(map(len, lines[:3])) <= 80
    (row,) = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)["rows"]
    assert row["sample"] == "32x768->768 tanh" and row["path"] == "train" and row["fastft"]["median"] > 0


def test_bench_explains_itself_and_names_a_wrong_value():
    shown = run("bench", "--help").stdout
    assert "fastft bench --tune" in shown and "fastft bench --op linear_act --shape 2048x768" in shown
    done = run("bench", "--op", "linear")
    assert done.returncode == 2 and "'linear' is not one of attention, cross_entropy" in done.stderr
    assert run("bench", "--rounds", "0").returncode == 2
