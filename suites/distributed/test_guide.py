"""The program of the guide to several devices runs as it stands, on as many ranks as it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.ranks.world import ROOT
from harness.text import text_batch
from optimized import DeepseekV32Config, DeepseekV32ForCausalLM

PAGE = ROOT / "docs" / "distributed.md"


def test_the_program_of_the_guide_computes_what_one_process_does(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    started = re.match(r"# (\S+), started by: torchrun (.*)\n", program)
    assert started is not None
    (tmp_path / started[1]).write_text(program, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", *started[2].split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [float(number) for number in re.findall(r"\d+\.\d+", done.stdout)]

    torch.manual_seed(0)
    model = DeepseekV32ForCausalLM(DeepseekV32Config.preset("tiny"))
    ids = text_batch(4, 64, seed=0)
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids, output_indexer_kl_loss=True, use_cache=False)
    assert found == pytest.approx([float(out.lm_loss), float(out.indexer_kl_loss)], abs=1e-3)
