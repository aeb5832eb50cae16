"""``fastft env``: what runs here, and why not what does not."""

from typing import Annotated

import typer

from fastft.cli._errors import reporting
from fastft.cli._options import flag


def env(as_json: Annotated[bool, flag("--json", "One JSON object instead of a table")] = False):
    """Print what runs here: versions, CPU, CUDA, kernels, or why not.

    Example: fastft env --json
    """
    with reporting():
        from fastft.environment import describe
        from fastft.functional import _tuning

        facts = {**describe(), "tuning_file": str(_tuning.path())}
    if as_json:
        import json

        typer.echo(json.dumps(facts, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows(facts):
        table.add_row(name, value)
    Console().print(table)


def rows(facts):
    """The table's rows: what is known in one line each, what is missing with its reason."""
    from fastft.environment import PRODUCTS

    yield "fastft", f"{facts['fastft']}, backend {facts['backend']}"
    yield "Python", facts["python"]
    for name in ("torch", "transformers", "accelerate", "numpy"):
        yield name, facts[name]
    yield "CPU", f"{facts['cpu']}, {facts['system']}"
    yield "threads", f"{facts['threads']} of {facts['cpus']} CPUs"
    if facts["native"]:
        yield "native kernels", f"loaded, built by {facts['compiler']}"
        yield "instruction set", facts["isa"]
        yield "bfloat16 products", PRODUCTS[facts["bf16"]]
        yield "can run", ", ".join(facts["isas"])
        yield "holds", ", ".join(facts["isas_held"])
        yield "kernels chosen by", facts["choice"]
        yield "measured facts", facts["tuning_file"]
    else:
        yield "native kernels", f"none, PyTorch's run instead: {facts['native_why_not']}"
    if facts["cuda"]:
        driver = f", need driver {facts['oldest_gpu_driver']} or later" if facts["oldest_gpu_driver"] else ""
        yield "CUDA kernels", f"{', '.join(facts['cuda_archs'])}, built by {facts['nvcc']}{driver}"
    elif facts["native"]:
        yield "CUDA kernels", f"none: {facts['cuda_why_not']}"
    else:
        yield "CUDA kernels", "none, without native kernels"
    yield "GPUs", ", ".join(facts["gpus"]) or "none that this torch can use"
