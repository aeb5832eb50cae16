"""Lists the benchmarks."""

import ast
from pathlib import Path


def main() -> None:
    """One line per module of this folder that can be started: how, and the first line of its docstring."""
    found = sorted(Path(__file__).parent.glob("[!_]*.py"))
    modules = [path for path in found if '__name__ == "__main__"' in path.read_text()]
    width = max(len(path.stem) for path in modules)
    for path in modules:
        summary = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        print(f"python -m benchmarks.{path.stem:<{width}}  {summary}")
    print("\nEach has --help; --save keeps its results under benchmarks/results/.")


if __name__ == "__main__":
    main()
