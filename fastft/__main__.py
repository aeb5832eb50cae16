"""``python -m fastft``: the command line."""

from fastft.cli.main import app

app(prog_name="fastft")
