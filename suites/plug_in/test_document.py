"""docs/plug-in.md as its reader uses it: each block runs by itself, and the versions and fields are those of the code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from optimized.plug_in import TESTED_VERSIONS
from optimized.plug_in.attention import OWN_FIELDS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs/plug-in.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_runs_by_itself(block, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", block], cwd=tmp_path, env=environment, check=True)


def test_versions_and_fields_are_those_of_the_code():
    lowest, highest = (".".join(map(str, edge)) for edge in TESTED_VERSIONS)
    assert f"Releases {lowest} to {highest} of transformers" in DOCUMENT
    fields = set(re.findall(r"^\| `(\w+)` \|", DOCUMENT, re.MULTILINE))
    assert fields == {*OWN_FIELDS, "indexer_rope_interleaved"}
