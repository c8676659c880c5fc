"""The key properties of the plug-in under this version of transformers, and under the other end of the tested range."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# `make test-all` builds this second environment, and names its Python here.
OTHER = os.environ.get("V32_OTHER_PYTHON")


def run_under(python: str) -> str:
    """Run the program under `python`; the version of transformers that it ran under."""
    done = subprocess.run(
        [python, "-m", "suites.plug_in.both_versions"],
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()[-1]


@pytest.mark.slow
def test_the_plug_in_holds_under_this_version():
    import transformers

    assert run_under(sys.executable) == transformers.__version__


@pytest.mark.slow
@pytest.mark.skipif(OTHER is None, reason="V32_OTHER_PYTHON is not set; `make test-all` sets it.")
def test_the_plug_in_holds_under_the_other_version():
    import transformers

    assert OTHER is not None
    assert run_under(OTHER) != transformers.__version__
