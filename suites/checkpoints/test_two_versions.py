"""A checkpoint travels between both ends of the tested range of transformers, and back, with equal logits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# `make test-all` builds this second environment, and names its Python here.
OTHER = os.environ.get("V32_OTHER_PYTHON")


def leg(python: str, what: str, directory: Path) -> str:
    """Run one leg under `python`; the version of transformers that it ran under."""
    done = subprocess.run(
        [python, "-m", "suites.checkpoints.roundtrip", what, str(directory)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()[-1]


@pytest.mark.slow
@pytest.mark.skipif(OTHER is None, reason="V32_OTHER_PYTHON is not set; `make test-all` sets it.")
@pytest.mark.parametrize("here_first", [True, False])
def test_a_checkpoint_goes_to_the_other_version_and_back(tmp_path, here_first):
    assert OTHER is not None
    first, second = (sys.executable, OTHER) if here_first else (OTHER, sys.executable)
    saved = leg(first, "save", tmp_path)
    assert leg(second, "load", tmp_path) != saved
    assert leg(first, "load", tmp_path) == saved


def test_a_changed_weight_is_noticed(tmp_path):
    """The journey can fail: the same legs over a checkpoint with one weight moved."""
    from safetensors.torch import load_file, save_file

    leg(sys.executable, "save", tmp_path)
    file = str(tmp_path / "model" / "model.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.indexer.wk.weight"] *= -1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(AssertionError, match="reference: logits differ"):
        leg(sys.executable, "load", tmp_path)
