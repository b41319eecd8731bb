"""The columns of the house: how large, how documented, how typed and how entangled the packages are.

    python -m benchmarks.house                      this checkout, as a table
    python -m benchmarks.house --commit e09d4ff     another commit next to it
    python -m benchmarks.house --graph              which room imports which, as a Mermaid diagram
    python -m benchmarks.house --json out.json      the figures as JSON

Counted are the Python files of the four packages, against those of tests/. A room `testing` of a package serves
tests and benchmarks alone, and counts as lines of tests. A line of code is one that is neither blank,
nor a comment alone, nor part of a docstring; a line is any line. A function's length includes its
docstring.
"""

from __future__ import annotations

import argparse
import ast
import io
import itertools
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("setformer_dist", "dataloaders", "checkpoints", "launch")
# Who may import whom at the top: only what stands before, or in the same place.
LEVELS = (("setformer_dist",), ("dataloaders", "checkpoints"), ("launch",))
COMMANDS = "launch.cli"  # whose functions import what a command needs when it runs
LONG = 60

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Module:
    """One file, parsed."""

    name: str
    package: bool
    text: str
    tree: ast.Module = field(init=False)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.text)

    @property
    def functions(self) -> Iterator[Function]:
        """Every function and method."""
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))

    def imports(self, node: ast.AST) -> Iterator[str]:
        """Yield the modules that a statement imports, and the names that may be modules."""
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = self.name.split(".")
                kept = parts[: len(parts) - node.level + self.package]
                base = ".".join([*kept, *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def read(root: Path, folders: Iterable[str]) -> list[Module]:
    """Return the modules below some folders of a checkout."""
    found = []
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        package = parts[-1] == "__init__"
        found.append(Module(".".join(parts[:-1] if package else parts), package, path.read_text()))
    return found


def lines_of_code(modules: Iterable[Module]) -> tuple[int, int]:
    """Return how many lines hold code, and how many a comment alone."""
    code = comments = 0
    for module in modules:
        lines = [line.strip() for line in module.text.splitlines()]
        for first, last in docstrings(module):
            lines[first - 1 : last] = [""] * (last - first + 1)
        comments += sum(line.startswith("#") for line in lines)
        code += sum(bool(line) and not line.startswith("#") for line in lines)
    return code, comments


def docstrings(module: Module) -> Iterator[tuple[int, int]]:
    """Yield the first and last lines of a module's docstrings."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node) is not None:
            yield node.body[0].lineno, node.body[0].end_lineno or 0


def parameters(function: Function) -> list[ast.arg]:
    """Return a function's parameters without self and cls."""
    a = function.args
    listed = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
    return [p for p in listed if p.arg not in ("self", "cls")]


def annotations(module: Module) -> Iterator[ast.expr]:
    """Yield every annotation of a parameter, a result or a name."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.AnnAssign):
            yield node.annotation
        elif isinstance(node, Function):
            yield from (p.annotation for p in parameters(node) if p.annotation is not None)
            if node.returns is not None:
                yield node.returns


def mentions_any(annotation: ast.expr) -> bool:
    """Return whether an annotation holds `Any`."""
    return any(
        (isinstance(node, ast.Name) and node.id == "Any") or (isinstance(node, ast.Attribute) and node.attr == "Any")
        for node in ast.walk(annotation)
    )


def public(module: Module) -> Iterator[ast.AST]:
    """Yield the classes, functions and methods without an underscore, outside of functions and private classes."""

    def below(body: Iterable[ast.stmt]) -> Iterator[ast.AST]:
        for node in body:
            if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
                yield node
                if isinstance(node, ast.ClassDef):
                    yield from below(node.body)

    return below(module.tree.body)


def inside_functions(module: Module) -> int:
    """Return how many import statements stand in functions."""
    found = {
        id(node)
        for function in module.functions
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    return len(found)


def graph(modules: list[Module]) -> dict[str, set[str]]:
    """Return which of the modules imports which, at the top of its file or anywhere in it."""
    names = {module.name for module in modules}
    edges: dict[str, set[str]] = {module.name: set() for module in modules}
    for module in modules:
        for node in ast.walk(module.tree):
            found = [name for name in module.imports(node) if name in names]
            longest = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
            edges[module.name].update(set(longest) - {module.name})
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the sets of modules that import each other, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in edges[name]:
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            members = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(members) > 1:
                found.append(sorted(members))

    sys.setrecursionlimit(10_000)
    for name in edges:
        if name not in order:
            visit(name)
    return found


def level(name: str) -> int:
    """Return how high a module's package stands."""
    return next(i for i, packages in enumerate(LEVELS) if name.split(".")[0] in packages)


def room(name: str) -> str:
    """Return a module's folder below its package, the package itself for what lies at its top."""
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 else parts[0]


def columns(root: Path) -> dict[str, float]:
    """Measure one checkout."""
    modules = read(root, PACKAGES)
    helps = [module for module in modules if ".testing" in module.name]
    tests = [*read(root, ["tests"]), *helps]
    code, comments = lines_of_code(modules)
    functions = [(module, function) for module in modules for function in module.functions]
    lengths = [(function.end_lineno or 0) - function.lineno + 1 for _, function in functions]
    sizes = sorted(len(module.text.splitlines()) for module in modules)
    written = [annotation for module in modules for annotation in annotations(module)]
    documented = [ast.get_docstring(node) is not None for module in modules for node in public(module)]
    edges = graph(modules)
    commands = [module for module in modules if module.name.startswith(COMMANDS)]
    share = 100.0 / len(modules)
    return {
        "files": len(modules),
        "lines": sum(sizes),
        "functions": len(functions),
        "functions over 60 lines, %": 100 * sum(length > LONG for length in lengths) / len(lengths),
        "longest function": max(lengths),
        "largest file": sizes[-1],
        "second largest file": sizes[-2],
        "third largest file": sizes[-3],
        "median file": statistics.median(sizes),
        "public docstrings, %": 100 * sum(documented) / len(documented),
        "module docstrings, %": share * sum(ast.get_docstring(m.tree) is not None for m in modules if m.text.strip()),
        "annotated results, %": 100 * sum(f.returns is not None for _, f in functions) / len(functions),
        "annotations with Any, %": 100 * sum(map(mentions_any, written)) / len(written),
        "widest parameter list": max(len(parameters(function)) for _, function in functions),
        "imports in functions": sum(map(inside_functions, modules)) - sum(map(inside_functions, commands)),
        "imports in functions of launch/cli": sum(map(inside_functions, commands)),
        "comment lines per line of code, %": 100 * comments / code,
        "test lines per line of code": lines_of_code(tests)[0] / (code - lines_of_code(helps)[0]),
        "upward imports": sum(level(other) > level(name) for name, others in edges.items() for other in others),
        "import circles": len(circles(edges)),
        "arrows between rooms": len(arrows(edges)),
    }


def arrows(edges: dict[str, set[str]]) -> dict[tuple[str, str], int]:
    """Return how many imports run from one room to another."""
    found: dict[tuple[str, str], int] = {}
    for name, others in edges.items():
        for other in others:
            if (pair := (room(name), room(other))) and pair[0] != pair[1]:
                found[pair] = found.get(pair, 0) + 1
    return found


def mermaid(root: Path) -> str:
    """Return the rooms and who imports whom."""
    pairs = sorted(arrows(graph(read(root, PACKAGES))).items())
    rooms = sorted(set(itertools.chain.from_iterable(pair for pair, _ in pairs)))
    listed = [f'  {name.replace(".", "_")}["{name}"]' for name in rooms]
    drawn = [f"  {a.replace('.', '_')} -->|{count}| {b.replace('.', '_')}" for (a, b), count in pairs]
    return "\n".join(["flowchart LR", *listed, *drawn])


def checkout(commit: str, folder: Path) -> Path:
    """Write a commit's files into a folder and return it."""
    packed = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def shown(value: float) -> str:
    """Return a figure as the table has it."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="measure this commit as well")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--graph", action="store_true", help="print the rooms' imports instead")
    arguments = parser.parse_args()
    if arguments.graph:
        print(mermaid(ROOT))
        return
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.commit:
            measured[arguments.commit] = columns(checkout(arguments.commit, Path(folder)))
    measured["here"] = columns(ROOT)
    print(f"| {' | '.join(['', *measured])} |\n|{' --- |' * (len(measured) + 1)}")
    for name in measured["here"]:
        print(f"| {' | '.join([name, *(shown(found[name]) for found in measured.values())])} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
