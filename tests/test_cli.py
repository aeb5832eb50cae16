"""The command line as a new user meets it."""

import json
import os
import subprocess
import sys

import fastft
from fastft import _library


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
