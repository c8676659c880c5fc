"""docs/subjects.md as its reader uses it: both examples are pasted and run, then one fault goes in, and is named."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from reports.records import Status, read_run

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(
    r"```python\n# (\w+\.py)\n(.*?)```", (ROOT / "docs/subjects.md").read_text(encoding="utf-8"), re.DOTALL
)
SOURCES = dict(BLOCKS)


def verify(folder, file, source, name, *words):
    (folder / file).write_text(source, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "harness.cli", "verify", "--subject", f"{file}:{name}", "--out", "out", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, read_run(folder / "out").verdicts


def test_both_examples_are_there_and_short():
    assert list(SOURCES) == ["my_model.py", "my_kernels.py"]
    assert all(len(source.splitlines()) <= 30 for source in SOURCES.values())


def test_the_model_is_verified(tmp_path):
    code, verdicts = verify(
        tmp_path, "my_model.py", SOURCES["my_model.py"], "factory", "--checks", "parity,kl", "--cases", "text"
    )
    assert code == 0
    assert {v.status for v in verdicts} == {Status.VERIFIED}


def test_the_kernel_is_verified(tmp_path):
    code, verdicts = verify(
        tmp_path, "my_kernels.py", SOURCES["my_kernels.py"], "operators", "--checks", "operators,probes"
    )
    assert [
        (v.check, v.case, v.reason) for v in verdicts if v.status in (Status.FAILED, Status.ERROR, Status.VACUOUS)
    ] == []
    assert code == 0
    assert {v.check for v in verdicts if v.status is Status.VERIFIED} >= {
        "operators.sparse_mla", "operators.sparse_mla_lse", "operators.sparse_mla_gradients",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        (" * scale\n", " * q_BLHD.shape[-1] ** -0.5\n", "scale"),
        (".masked_fill(missing_BLK[:, :, None], -torch.inf)", "", "−1 is not masked"),
        ("z_BLHK.logsumexp(-1)", "(z_BLHK.logsumexp(-1) / 0.6931471805599453)", "base 2"),
    ],
)
def test_a_fault_in_the_kernel_is_named(tmp_path, right, wrong, says):
    source = SOURCES["my_kernels.py"]
    assert source.count(right) == 1
    code, verdicts = verify(
        tmp_path,
        "my_kernels.py",
        source.replace(right, wrong),
        "operators",
        "--checks",
        "operators",
        "--dtype",
        "float32",
    )
    assert code == 1
    failed = [v for v in verdicts if v.status is Status.FAILED]
    assert any(re.search(says, v.reason) for v in failed), {v.reason for v in failed}
