"""Imports between the packages run one way: the arrows of the house, read from the syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

ALLOWED: dict[str, frozenset[str]] = {
    "reference": frozenset(),
    "optimized": frozenset({"reference"}),
    "reports": frozenset(),
    "harness": frozenset({"reference", "optimized", "reports"}),
    "suites": frozenset({"reference", "optimized", "reports", "harness"}),
}
OURS = frozenset(ALLOWED)
PYTEST = frozenset({"pytest", "_pytest"})
# The core of the harness runs without pytest; this one file connects the two.
PYTEST_PLUGIN = "harness/pytest_plugin.py"


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, top-level name) of every import, wherever it stands, also by importlib and a literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            target = node.args[0]
            if (
                called in ("import_module", "__import__")
                and isinstance(target, ast.Constant)
                and isinstance(target.value, str)
                and not target.value.startswith(".")
            ):
                yield node.lineno, target.value.partition(".")[0]


def violations(root: Path) -> list[str]:
    """Return a sentence for every import under `root` that runs against the arrows."""
    found = []
    for package, allowed in ALLOWED.items():
        for path in sorted((root / package).rglob("*.py")):
            where = path.relative_to(root).as_posix()
            for line, name in imported_names(ast.parse(path.read_text(encoding="utf-8"), where)):
                if name in OURS - allowed - {package}:
                    found.append(f"{where}:{line} imports {name}, which {package} may not.")
                if name in PYTEST and package != "suites" and where != PYTEST_PLUGIN:
                    found.append(f"{where}:{line} imports pytest; only {PYTEST_PLUGIN} and suites may.")
    return found


def test_imports_run_one_way() -> None:
    assert violations(ROOT) == []


def test_every_package_is_walked() -> None:
    # A package that moved away would make the test above pass on nothing.
    assert [package for package in ALLOWED if not list((ROOT / package).rglob("*.py"))] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("reference/planted.py", "import optimized"),
        ("reference/planted.py", "from harness.metrics import worst_row"),
        ("reference/deep/planted.py", "def f():\n    import reports.records"),
        ("optimized/planted.py", "from harness import cases"),
        ("optimized/planted.py", "import importlib\nimportlib.import_module('suites.meta')"),
        ("optimized/planted.py", "__import__('reports')"),
        ("reports/planted.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import reference"),
        ("harness/planted.py", "from suites import meta"),
        ("harness/planted.py", "import pytest"),
        ("harness/checks/pytest_plugin.py", "from _pytest.config import Config"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path: Path, path: str, source: str) -> None:
    planted = tmp_path / path
    planted.parent.mkdir(parents=True)
    planted.write_text(source, encoding="utf-8")
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("reference/allowed.py", "import torch\nfrom . import rope\nfrom reference.config import Config"),
        ("optimized/allowed.py", "from reference import losses"),
        ("harness/allowed.py", "import reports\nimport optimized\nimport reference"),
        (PYTEST_PLUGIN, "import pytest\nfrom harness import runner"),
        ("suites/meta/test_allowed.py", "import pytest\nimport harness"),
        ("reference/allowed.py", "import harnessing, reports_of_others"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, source: str) -> None:
    written = tmp_path / path
    written.parent.mkdir(parents=True)
    written.write_text(source, encoding="utf-8")
    assert violations(tmp_path) == []
