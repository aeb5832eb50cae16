"""Lists the benchmarks."""

import ast
from pathlib import Path


def main() -> None:
    """One line per module of this folder: how to start it, and the first line of its docstring."""
    modules = [path for path in sorted(Path(__file__).parent.glob("*.py")) if not path.name.startswith("_")]
    width = max(len(path.stem) for path in modules)
    for path in modules:
        summary = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        print(f"python -m benchmarks.{path.stem:<{width}}  {summary}")
    print("\nEach has --help; --save keeps its results under benchmarks/results/.")


if __name__ == "__main__":
    main()
