"""The allocation law: training the optimized model holds no tensor of L×L elements, forward or backward.

Every tensor that any operation makes is seen by a dispatch mode, autograd's own and those of recomputed layers among
them. The widths are small and the lengths large, so that L×L is more than anything that may grow with L alone: at
two heads a chunk of 128 rows makes 256 elements a key, the logits make 320 a token.

Letters: B batch, L rows.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import optimized
import reference
from harness.cases import build_case, calibrated_state
from harness.subjects import load_weights
from optimized.ops.backend import MAX_CHUNK_ROWS
from reference import DeepseekV32Config

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
MODELS = {"optimized": optimized.DeepseekV32ForCausalLM, "reference": reference.DeepseekV32ForCausalLM}
# Its successor in transformers' next major version has another name.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
SHORT, LONG = 512, 1024
assert SHORT >= 4 * MAX_CHUNK_ROWS


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned, and which operation it was."""

    def __init__(self):
        super().__init__()
        self.numel, self.operation, self.count = 0, "", 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count += 1
                if leaf.numel() > self.numel:
                    self.numel, self.operation = leaf.numel(), str(function)
        return result


def few_heads(sparse):
    return DeepseekV32Config.preset(
        "tiny", use_sparse_attention=sparse, num_attention_heads=2, index_n_heads=2, num_hidden_layers=2
    )


def train_once(name, case_name, length, *, sparse, checkpointing=False):
    """Forward and backward of both losses; returns the batch size."""
    config = few_heads(sparse)
    model = load_weights(MODELS[name], config, calibrated_state(config, 0), CPU, torch.float32).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    case = build_case(case_name, config, seed=0, length=length, batch=1 if case_name == "text" else 2)
    out = model(**case.inputs(), labels=case.labels, output_indexer_kl_loss=True)
    (out.lm_loss + out.indexer_kl_loss).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "experts" not in n)
    return case.input_ids.shape[0]


@cache
def largest(name, case_name, length, sparse, checkpointing=False):
    """Elements of the largest tensor a batch row, and the operation that made it."""
    with Largest() as seen:
        batch = train_once(name, case_name, length, sparse=sparse, checkpointing=checkpointing)
    assert seen.count > 1000
    return seen.numel / batch, seen.operation


both_modes = pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
# A padded batch, whose keys are compacted, and a packed one, whose rows see ranges.
every_layout = pytest.mark.parametrize("case_name", ["text", "left-padded", "packed"])
checkpointed = pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])


@both_modes
@every_layout
@checkpointed
def test_no_tensor_of_a_training_step_has_a_square_of_the_length(case_name, sparse, checkpointing):
    numel, operation = largest("optimized", case_name, LONG, sparse, checkpointing)
    assert numel < LONG * LONG / 2, operation


@both_modes
@every_layout
@checkpointed
def test_the_largest_tensor_of_a_training_step_grows_as_the_length(case_name, sparse, checkpointing):
    short, _ = largest("optimized", case_name, SHORT, sparse, checkpointing)
    long, operation = largest("optimized", case_name, LONG, sparse, checkpointing)
    assert long <= 2.2 * short, operation


@both_modes
def test_the_same_monitor_catches_the_reference(sparse):
    short, long = (largest("reference", "text", length, sparse)[0] for length in (512, 1024))
    assert long >= 1024 * 1024
    assert long >= 3.9 * short


@both_modes
def test_asking_for_scores_makes_them_and_the_monitor_sees_it(sparse):
    config = few_heads(sparse)
    model = load_weights(MODELS["optimized"], config, calibrated_state(config, 0), CPU, torch.float32)
    case = build_case("text", config, seed=0, length=SHORT, batch=1)
    with Largest() as seen, torch.no_grad():
        model(**case.inputs(), output_indexer_scores="visible")
    assert seen.numel >= SHORT * SHORT


def test_the_monitor_sees_a_square_that_exists_in_the_backward_alone():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            return x.clone()

        @staticmethod
        def backward(_, gradient):
            return (gradient @ gradient.mT) @ gradient

    x = torch.ones(64, 2, requires_grad=True)
    with Largest() as seen:
        Square.apply(x).sum().backward()
    assert seen.numel == 64 * 64


def test_the_monitor_sees_what_a_recomputed_layer_makes():
    def square(x):
        return (x @ x.mT) @ x

    x = torch.ones(64, 2, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(square, x, use_reentrant=False)
    with Largest() as seen:
        out.sum().backward()
    assert seen.numel == 64 * 64


# Not ru_maxrss: Linux hands that of the parent on to the process that it starts.
STATUS = Path("/proc/self/status")
MEASURE = """
import json, re, sys
from suites.kernels.test_allocation import STATUS, train_once

name, sparse, *lengths = json.loads(sys.argv[1])

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", STATUS.read_text())[1]) / 1024

train_once(name, "text", 64, sparse=sparse)
before = peak()
found = []
for length in lengths:
    train_once(name, "text", length, sparse=sparse)
    found.append(peak() - before)
print(json.dumps(found))
"""
needs_proc = pytest.mark.skipif(not STATUS.exists(), reason="The peak of one process is read from /proc.")


def peaks(name, lengths, sparse):
    """Peak memory of a process in MiB, beyond what it held before, after a training step at each length in turn."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps([name, sparse, *lengths])],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@needs_proc
@pytest.mark.slow
@both_modes
def test_peak_memory_of_a_training_step_grows_as_the_length(sparse):
    short, long = peaks("optimized", (4096, 8192), sparse)
    assert long <= 2.5 * short
    # One tensor of L×L elements for one head would be 256 MiB.
    assert long < 256


@needs_proc
@pytest.mark.slow
def test_peak_memory_of_the_reference_grows_as_its_square():
    short, long = peaks("reference", (512, 1024), True)
    assert long >= 3.2 * short
