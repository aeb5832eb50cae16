"""The command line in processes of their own that have imported everything already: a second each instead of five."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["fastft.cli.main", "fastft.training.finetune_run", "sklearn.metrics", "matplotlib.figure"]
)
SECONDS = 120  # for a run of a tiny model on a busy machine


# The command, and whether torch had to be imported before it could answer.
AT_ONCE = (
    "import sys\nfrom fastft.cli.main import app\n"
    "try: app(prog_name='fastft')\n"
    "finally: assert 'torch' not in sys.modules"
)


@dataclass
class Done:
    status: int  # as a shell has it, minus the signal's number if one ended it
    out: str
    err: str


def at_once(*arguments, **how):
    """``fastft`` with these arguments in a new Python, which must answer before it imports torch."""
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "80"}
    command = [sys.executable, "-c", AT_ONCE, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, **how)
    return Done(done.returncode, done.stdout, done.stderr)


def fastft(*arguments, before=None, kill_after=None, terminal=False):
    """``fastft`` with these arguments; its stdout is a file, or a terminal.

    Args:
        before: called in the process first; a function of a module, or a functools.partial of one.
        kill_after: seconds after which the process gets SIGKILL if it still runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = CONTEXT.Process(target=_child, args=([str(a) for a in arguments], before, out, err, terminal))
        process.start()
        process.join(SECONDS if kill_after is None else kill_after)
        if process.is_alive():
            process.kill()
            process.join()
        return Done(process.exitcode, out.read_text(), err.read_text())


def _child(arguments, before, out, err, terminal):
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), descriptor)
    if terminal:
        _become_terminal(1)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 — as Python's own
    from fastft.cli.main import app

    if before is not None:
        before()
    try:
        app(arguments, prog_name="fastft")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if terminal:
            time.sleep(0.2)  # what was written last is copied by then


def _become_terminal(descriptor):
    """Puts a pseudo-terminal in front of the descriptor, and copies what it shows."""
    file = os.dup(descriptor)
    outer, inner = os.openpty()
    os.dup2(inner, descriptor)

    def copy():
        while True:
            os.write(file, os.read(outer, 65536))

    threading.Thread(target=copy, daemon=True).start()
