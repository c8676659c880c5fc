"""docs/findings-transformers.md cannot rot: every reproduction in it runs, and shows what the document says.

A future transformers that mends a finding makes its assertion fail, and the message says which section to update.
"""

import contextlib
import functools
import gc
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "findings-transformers.md"
# `make test-all` builds this second environment, and names its Python here.
OTHER = os.environ.get("V32_OTHER_PYTHON")
KINDS = ("defect", "trap", "limitation")
PARTS = ("**What happens.**", "**Why.**", "**Numbers.**", "**Who is affected.**", "**Workaround.**", "\ncheck: ")


@dataclass(frozen=True, slots=True)
class Finding:
    """One section of the document, with its row of the table."""

    number: int
    name: str
    kind: str
    versions: tuple[str, ...]
    text: str
    block: str


def read_findings(document: str) -> list[Finding]:
    """The sections `## N. name` in order, each with its one Python block and its row of the table."""
    row = re.compile(r"^\| (\d+) \| \[(.+)\]\(#.+\) \| (\w+) \| .+ \| ([\d., ]+) \|$", re.MULTILINE)
    rows = {int(number): (name, kind, versions) for number, name, kind, versions in row.findall(document)}
    found = []
    for section in re.split(r"^## ", document, flags=re.MULTILINE)[1:]:
        title = re.match(r"(\d+)\. (.+)\n", section)
        if title is None:
            continue
        number, name = int(title[1]), title[2]
        (block,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        in_table, kind, versions = rows.pop(number)
        assert in_table == name, f"the table calls finding {number} {in_table!r}, its section {name!r}"
        found.append(Finding(number, name, kind, tuple(versions.split(", ")), section, block))
    assert rows == {}, f"rows of the table without a section: {sorted(rows)}"
    return found


FINDINGS = read_findings(DOCUMENT.read_text(encoding="utf-8"))
each_finding = pytest.mark.parametrize("finding", FINDINGS, ids=[str(finding.number) for finding in FINDINGS])


def stale(number: int, version: str, evidence: str) -> str:
    return f"finding {number} no longer holds on transformers {version}: update the document\n{evidence}"


def show(finding: Finding) -> str:
    """Run a block in this process; what it printed."""
    printed = io.StringIO()
    threads = torch.get_num_threads()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(finding.block, f"finding {finding.number}", "exec"), {"__name__": "__main__"})
    except Exception as error:
        evidence = f"{printed.getvalue()}{type(error).__name__}: {error}"
        pytest.fail(stale(finding.number, transformers.__version__, evidence), pytrace=False)
    finally:
        torch.set_num_threads(threads)
        # In torch 2.11 the next backward goes on with what is left of one that raised, for as long as that lives.
        gc.collect()
    return printed.getvalue()


@functools.cache
def version_of(python: str) -> str:
    command = [python, "-c", "import transformers; print(transformers.__version__)"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run_alone(python: str, finding: Finding, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a block as a file of its own, from the root of the repository."""
    file = directory / "block.py"
    file.write_text(finding.block, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [python, str(file)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def mended(finding: Finding) -> bool:
    """Whether the installed transformers is one that the document was written on, and does not have the finding."""
    here = transformers.__version__.rpartition(".")[0]
    return here in {version for f in FINDINGS for version in f.versions} - set(finding.versions)


@each_finding
def test_a_finding_holds(finding):
    if mended(finding):
        with pytest.raises(pytest.fail.Exception, match="no longer holds"):
            show(finding)
        return
    assert show(finding).strip()


@pytest.mark.slow
@each_finding
def test_a_block_runs_by_itself(finding, tmp_path):
    done = run_alone(sys.executable, finding, tmp_path)
    holds = done.returncode == 0
    assert holds is not mended(finding), stale(finding.number, transformers.__version__, done.stdout + done.stderr)


@pytest.mark.slow
@pytest.mark.skipif(OTHER is None, reason="V32_OTHER_PYTHON is not set; `make test-all` sets it.")
@each_finding
def test_the_versions_named_are_those_that_show_it(finding, tmp_path):
    assert OTHER is not None
    version = version_of(OTHER)
    done = run_alone(OTHER, finding, tmp_path)
    if version.rpartition(".")[0] in finding.versions:
        assert done.returncode == 0, stale(finding.number, version, done.stdout + done.stderr)
    else:
        assert "AssertionError" in done.stderr, f"finding {finding.number} shows on transformers {version} too: name it"


def test_the_document_is_complete():
    assert [finding.number for finding in FINDINGS] == list(range(1, len(FINDINGS) + 1))
    for finding in FINDINGS:
        assert finding.kind in KINDS
        assert [part for part in PARTS if part not in finding.text] == []
        assert finding.block.rstrip().splitlines()[-1].startswith("assert ") or "    assert " in finding.block
        assert "print(" in finding.block


def test_findings_refer_to_sections_that_exist():
    document = DOCUMENT.read_text(encoding="utf-8")
    numbers = {finding.number for finding in FINDINGS}
    assert {int(number) for number in re.findall(r"[Ff]inding (\d+)", document)} <= numbers


@pytest.mark.parametrize("block", ["print(1)\nassert False\n", "raise ValueError('mended otherwise')\n"])
def test_a_finding_that_no_longer_holds_is_reported(block, tmp_path):
    planted = Finding(7, "planted", "defect", ("5.23",), "", block)
    with pytest.raises(
        pytest.fail.Exception, match="finding 7 no longer holds on transformers .*: update the document"
    ):
        show(planted)
    assert run_alone(sys.executable, planted, tmp_path).returncode != 0


def test_a_table_that_contradicts_its_sections_is_caught():
    text = "| 1 | [One](#1-one) | trap | x | 5.17, 5.23 |\n\n## 1. {}\n\n```python\nassert 1\n```\n"
    assert read_findings(text.format("One"))[0].versions == ("5.17", "5.23")
    with pytest.raises(AssertionError, match="calls finding 1 'One', its section 'Two'"):
        read_findings(text.format("Two"))
