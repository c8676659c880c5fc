"""Loading FP8 shards takes the model and less than one shard: measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

import torch

import reference
from reference import DeepseekV32Config, DeepseekV32ForCausalLM

ROOT = Path(__file__).parents[2]
SHARD = 8_000_000
# What an allocator may keep for itself: 1.2 to 2.9 MB beyond the model were measured in all.
SLACK = 4_000_000
# 158 MB in bf16, nine tenths of it experts.
LARGE = {
    "hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 28, "intermediate_size": 1024,
    "vocab_size": 8192, "num_hidden_layers": 4,
}  # fmt: skip


def test_the_peak_is_the_model_and_one_shard_and_a_loader_that_reads_ahead_is_seen(tmp_path):
    for name, sizes in (("small", {}), ("large", LARGE)):
        torch.manual_seed(0)
        model = DeepseekV32ForCausalLM(DeepseekV32Config.preset("tiny", **sizes)).bfloat16()
        saved = reference.save_official(model, tmp_path / name, "fp8", shard_size=SHARD)
    assert len(saved.files) > 10
    done = subprocess.run(
        [sys.executable, "-m", "suites.checkpoints.peak_memory", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    size, streamed, gathered = (int(n) for n in done.stdout.split()[-3:])
    assert size > 150_000_000
    assert size <= streamed < size + SHARD + SLACK
    assert gathered > size + saved.total_bytes - SLACK > size + SHARD + SLACK
