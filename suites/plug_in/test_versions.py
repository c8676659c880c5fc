"""The key properties of the plug-in in processes of their own: under both ends of the tested range, and on two ranks."""

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "plan"),
    [("deepseek", "tensor"), ("glm-shared", "tensor"), ("glm-shared", "tensor-expert"), ("deepseek", "expert")],
)
def test_ranks_under_a_plan_of_transformers_give_what_one_process_gives(family, plan, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
         "suites.plug_in.parallel_plans", str(tmp_path), family, plan],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    refused = done.stdout.count("The indexer's KL loss needs all 4 heads, and this process has 2 of them")
    assert refused == (0 if plan == "expert" else 2)
