"""The allocation law inside transformers: no tensor of L×L elements, and memory that grows as the length.

The monitor and the process that is measured are those of suites/kernels/test_allocation.py.

Letters: L rows.
"""

import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from harness.cases import build_case
from suites.kernels.test_allocation import Largest, needs_proc
from suites.plug_in.pairs import built, reference_config

ROOT = Path(__file__).resolve().parents[2]
SHORT, LONG = 512, 1024
FEW = {"num_attention_heads": 2, "index_n_heads": 2}
# log2 of how a quantity grows when the length doubles.
LINEAR, SQUARE = 1.1, 1.9
families = pytest.mark.parametrize("family", ["deepseek", "glm"])
both_passes = pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])


def run_once(family, length, *, plugged, training):
    """A forward, or a forward and backward of both losses as far as the model has them."""
    config = reference_config(family, **FEW)
    model = built(family, plugged=plugged, **FEW)
    case = build_case("text", config, seed=0, length=length, batch=1)
    # The logits of every row would be larger than all else.
    if not training:
        with torch.no_grad():
            model(case.input_ids, use_cache=False, logits_to_keep=1)
        return
    asked = {"output_indexer_kl_loss": True} if plugged else {}
    out = model.train()(**case.inputs(), labels=case.labels, **asked)
    (out.loss + out.indexer_kl_loss if plugged else out.loss).backward()


@cache
def largest(family, length, plugged, training):
    """Elements of the largest tensor, and the operation that made it."""
    with Largest() as seen:
        run_once(family, length, plugged=plugged, training=training)
    assert seen.count > 500
    return seen.numel, seen.operation


@families
@both_passes
def test_the_largest_tensor_grows_as_the_length(family, training):
    short, _ = largest(family, SHORT, True, training)
    long, operation = largest(family, LONG, True, training)
    assert long < LONG * LONG / 2, operation
    assert math.log2(long / short) <= LINEAR, operation


def test_the_same_monitor_catches_transformers_own():
    short, _ = largest("deepseek", SHORT, False, False)
    long, _ = largest("deepseek", LONG, False, False)
    assert long >= LONG * LONG
    assert math.log2(long / short) >= SQUARE


def test_generate_with_a_static_cache_makes_no_square():
    model = built("deepseek", plugged=True, **FEW)
    ids = build_case("text", reference_config("deepseek", **FEW), seed=0, length=LONG, batch=1).input_ids
    with Largest() as seen:
        model.generate(ids, max_new_tokens=2, cache_implementation="static", do_sample=False)
    assert seen.numel < LONG * LONG / 2, seen.operation


MEASURE = """
import json, re, sys
from suites.kernels.test_allocation import STATUS
from suites.plug_in.test_memory import run_once

family, plugged, training, *lengths = json.loads(sys.argv[1])

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", STATUS.read_text())[1]) / 1024

run_once(family, 64, plugged=plugged, training=training)
before = peak()
found = []
for length in lengths:
    run_once(family, length, plugged=plugged, training=training)
    found.append(peak() - before)
print(json.dumps(found))
"""


def growth(family, lengths, *, plugged, training):
    """How many times the peak memory of a process grows from one length to the next, beyond what it held before."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    asked = json.dumps([family, plugged, training, *lengths])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, asked], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    short, long = json.loads(done.stdout.splitlines()[-1])
    return long / short


# What an allocator keeps, and what a process held before and reuses, moves a peak by some per cent: 1.9 to 2.2 times
# were measured here where the largest tensor grows 2.0 times.
@needs_proc
@pytest.mark.slow
@families
@both_passes
def test_peak_memory_grows_as_the_length(family, training):
    assert growth(family, (8192, 16384), plugged=True, training=training) <= 2.5


@needs_proc
@pytest.mark.slow
def test_the_same_measure_catches_transformers_own():
    # 3.2 times were measured: what is not a square is part of it.
    assert growth("deepseek", (2048, 4096), plugged=False, training=False) >= 2.8
