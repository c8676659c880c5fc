"""The house keeps its order: what lies where, what a module says of itself, which versions agree."""

import ast
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = ("reference", "optimized", "reports", "harness", "suites")
TOP_LEVEL = frozenset(
    {
        *PACKAGES,
        "conftest.py",
        "pyproject.toml",
        "README.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "constraints.txt",
        "docs",
        ".ci",
        ".gitignore",
    }
)
LONGEST_FILE = 600

# Build products, for a tree without git; with git, .gitignore says the same.
BUILT = re.compile(
    r"(^|/)(\.git|\.venv|__pycache__|[^/]*\.egg-info|build|dist|runs|\.[a-z]+_cache|\.hypothesis|\.benchmarks)(/|$)"
)
# In pieces, so that this file does not hold what it forbids.
MACHINE_PATH = re.compile("/(" + "|".join(("wo" + "rk", "fa" + "rm", "ro" + "ot")) + ")/")
BANNER = re.compile(r"^\s*#\s*([-=*~#_+])\1{3,}")
BUILT_IN_MARKERS = {"parametrize", "skip", "skipif", "xfail", "usefixtures", "filterwarnings", "benchmark"}


def house_files(root: Path) -> list[str]:
    """Return the files under `root`: those git knows or would add; without git, all but build products."""
    if shutil.which("git") and (root / ".git").exists():
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=root,
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        names = [name for name in listing.split("\0") if name and (root / name).is_file()]
    else:
        names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
        names = [name for name in names if not BUILT.search(name)]
    return sorted(names)


def text_of(path: Path) -> str:
    """Return the text of a file, or nothing for a binary one."""
    content = path.read_bytes()
    return "" if b"\0" in content else content.decode("utf-8", errors="replace")


def strangers(names: list[str]) -> list[str]:
    return sorted({name.partition("/")[0] for name in names} - TOP_LEVEL)


def without_docstring(root: Path, names: list[str]) -> list[str]:
    modules = [name for name in names if name.endswith(".py") and name.startswith(tuple(f"{p}/" for p in PACKAGES))]
    return [name for name in modules if not ast.get_docstring(ast.parse(text_of(root / name), name))]


def too_long(root: Path, names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".py") and len(text_of(root / name).splitlines()) > LONGEST_FILE]


def lines_matching(pattern: re.Pattern[str], root: Path, names: list[str]) -> list[str]:
    return [
        f"{name}:{number}"
        for name in names
        for number, line in enumerate(text_of(root / name).splitlines(), 1)
        if pattern.search(line)
    ]


def markers_used(source: str) -> set[str]:
    """Return X of every `pytest.mark.X` in a source."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "mark"
        and isinstance(node.value.value, ast.Name)
        and node.value.value.id == "pytest"
    }


def constraint_faults(pyproject: dict, constraints: str) -> list[str]:
    """Return a sentence for every range that the pins miss, and for every line that is no pin."""
    pins: dict[str, str] = {}
    faults = []
    for line in constraints.splitlines():
        if line.strip() and not line.startswith("#"):
            name, equals, version = line.partition("==")
            if not equals or not re.fullmatch(r"[A-Za-z0-9._-]+", name) or not re.fullmatch(r"[0-9a-z.]+", version):
                faults.append(f"constraints.txt: {line!r} is not name==version.")
            pins[canonicalize_name(name)] = version
    project = pyproject["project"]
    extras = project.get("optional-dependencies", {})
    for line in [*project["dependencies"], *(line for extra in extras.values() for line in extra)]:
        asked = Requirement(line)
        pin = pins.get(canonicalize_name(asked.name))
        if pin is None:
            faults.append(f"constraints.txt pins no version of {asked.name}.")
        elif not asked.specifier.contains(pin):
            faults.append(f"constraints.txt pins {asked.name} {pin}, but pyproject.toml asks for {asked.specifier}.")
    return faults


@pytest.fixture(scope="module")
def names() -> list[str]:
    return house_files(ROOT)


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_top_level_holds_only_agreed_names(names: list[str]) -> None:
    assert strangers(names) == []
    assert strangers(["setup.py", "tools/x.py", "reference/config.py"]) == ["setup.py", "tools"]


def test_the_walk_without_git_finds_the_same_files(names: list[str], tmp_path: Path) -> None:
    for name in [*names, ".venv/lib/x.py", "harness/__pycache__/x.pyc", "runs/1/records.jsonl"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert house_files(tmp_path) == names


def test_every_module_has_a_docstring(names: list[str]) -> None:
    assert without_docstring(ROOT, names) == []


def test_files_stay_short(names: list[str]) -> None:
    assert too_long(ROOT, names) == []


def test_no_file_names_a_path_of_some_machine(names: list[str]) -> None:
    assert lines_matching(MACHINE_PATH, ROOT, names) == []


def test_no_banners(names: list[str]) -> None:
    assert lines_matching(BANNER, ROOT, [name for name in names if not name.endswith(".md")]) == []


def test_commented_out_code_is_refused_everywhere(pyproject: dict) -> None:
    # ruff finds the code itself; here, that nobody has switched that rule off.
    lint = pyproject["tool"]["ruff"]["lint"]
    lifted = [*lint["ignore"], *(rule for rules in lint["per-file-ignores"].values() for rule in rules)]
    assert "ERA" in lint["select"]
    assert [rule for rule in lifted if rule.startswith("ERA")] == []


def test_the_checks_of_files_catch_what_is_planted(tmp_path: Path) -> None:
    planted = {
        "reference/bare.py": "x = 1\n",
        "harness/long.py": '"""Long."""\n' + "x = 1\n" * LONGEST_FILE,
        "reports/banner.py": '"""Banner."""\n# ' + "-" * 20 + "\n",
        "docs/path.md": "See /" + "wo" + "rk/main.\n",
        "suites/fine.py": '"""Fine: a/b, a - b, framework."""\n',
        "suites/binary.safetensors": "\0/" + "wo" + "rk/\n",
    }
    for name, text in planted.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    names = house_files(tmp_path)
    assert names == sorted(planted)
    assert without_docstring(tmp_path, names) == ["reference/bare.py"]
    assert too_long(tmp_path, names) == ["harness/long.py"]
    assert lines_matching(BANNER, tmp_path, names) == ["reports/banner.py:2"]
    assert lines_matching(MACHINE_PATH, tmp_path, names) == ["docs/path.md:1"]


def test_constraints_satisfy_every_range(pyproject: dict) -> None:
    assert constraint_faults(pyproject, (ROOT / "constraints.txt").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "constraints",
    [
        "torch==2.10.0\nmodal==1.6.4",
        "modal==1.6.4",
        "torch==2.13.0\nmodal==1.7.0",
        "torch==2.13.0+cpu\nmodal==1.6.4",
        "torch @ file:///tmp/torch.whl\nmodal==1.6.4",
    ],
    ids=["too old", "missing", "too new in an extra", "local build", "local path"],
)
def test_a_planted_constraint_is_caught(constraints: str) -> None:
    ranges = {"project": {"dependencies": ["torch>=2.11"], "optional-dependencies": {"modal": ["modal>=1.6,<1.7"]}}}
    assert constraint_faults(ranges, "# pins\ntorch==2.13.0\nmodal==1.6.4\n") == []
    assert constraint_faults(ranges, constraints) != []


def test_every_marker_in_use_is_declared(names: list[str], pyproject: dict) -> None:
    declared = {line.partition(":")[0] for line in pyproject["tool"]["pytest"]["ini_options"]["markers"]}
    used = {name: markers_used(text_of(ROOT / name)) for name in names if name.endswith(".py")}
    assert {name: extra for name, marks in used.items() if (extra := marks - declared - BUILT_IN_MARKERS)} == {}
    assert markers_used("@pytest.mark.fast\ndef f(): ...\npytestmark = [pytest.mark.gpu(1)]") == {
        "fast",
        "gpu",
    }
