"""What docstrings say of files is so: each file named exists, each module stands in its package's list."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("setformer", "setformer_dist", "dataloaders", "checkpoints", "launch")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Files of others, which docstrings speak of.
FOREIGN = {"zero_to_fp32.py", "data/listops.py"}


def docstrings(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node))]


def test_every_file_that_a_docstring_names_exists() -> None:
    missing = []
    for path in FILES:
        places = (ROOT, path.parent, ROOT / "setformer_dist", ROOT / path.relative_to(ROOT).parts[0])
        for text in docstrings(path):
            for name in re.findall(r"(?<![\w.*/-])((?:[a-z_]+/)*[a-z_0-9]+\.py)\b", text):
                if name not in FOREIGN and not any((place / name).exists() for place in places):
                    missing.append(f"{path.relative_to(ROOT)} names {name}")
    assert not missing


@pytest.mark.parametrize("package", [p for p in FILES if p.name == "__init__.py"], ids=lambda p: str(p.parent.name))
def test_every_module_is_listed_in_its_package(package: Path) -> None:
    text = ast.get_docstring(ast.parse(package.read_text())) or ""
    modules = [p.stem for p in package.parent.glob("*.py") if not p.name.startswith("__")]
    assert not [name for name in modules if not re.search(rf"\b{name}\.py\b", text)]
