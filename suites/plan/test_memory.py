"""The memory that is planned is the memory that a step takes: every preset, stage and mode within 15 %.

Measured is every byte that torch's CPU allocator gives out during a forward, backward and update of the optimized model.
Planted omissions show that the comparison would notice a plan that forgets something.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from harness.plan import blocks
from harness.plan import memory as planner
from harness.plan.command import TOLERANCE
from harness.plan.measure import here, measure
from harness.plan.memory import memory
from harness.plan.step import Step
from harness.training.stages import STAGES, stage_for
from reference import DeepseekV32Config

ROOT = Path(__file__).resolve().parents[2]
# transformers warns of the name that its older versions know.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")


def step_of(preset, length, batch, stage, checkpointing, *, dtype="float32", backend="native", **overrides):
    """The step, and its stage."""
    config = DeepseekV32Config.preset(preset, **overrides)
    found = stage_for(stage, config)
    step = Step(
        config, length, batch, found.sparse, found.trains, dtype, checkpointing, backend, here(dtype),
        muon=found.lr_matrices is not None,
    )  # fmt: skip
    return step, found


@cache
def measured(preset, length, batch, stage, checkpointing, dtype="float32", backend="native", overrides=()):
    torch.set_num_threads(1)
    step, found = step_of(preset, length, batch, stage, checkpointing, dtype=dtype, backend=backend, **dict(overrides))
    return step, measure(step, found)


def off(step, true):
    """How far the plan is from what was measured: growth, update, weights, state, and all of it."""
    planned = memory(step)
    peak = true.weights + true.optimizer + max(true.growth, true.update)
    return {
        "growth": planned.growth / true.growth - 1, "update": planned.update / true.update - 1,
        "weights": planned.weights / true.weights - 1, "optimizer": planned.optimizer / true.optimizer - 1,
        "peak": planned.total / peak - 1,
    }  # fmt: skip


def agrees(step, true):
    return all(abs(error) <= TOLERANCE for error in off(step, true).values())


modes = pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
stages = pytest.mark.parametrize("stage", STAGES)


@modes
@stages
@pytest.mark.parametrize(("length", "batch", "dtype"), [(1024, 1, "float32"), (512, 2, "bfloat16")])
def test_a_step_takes_what_is_planned(length, batch, dtype, stage, checkpointing):
    step, true = measured("tiny", length, batch, stage, checkpointing, dtype)
    assert agrees(step, true), off(step, true)


@modes
@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_a_step_of_a_larger_model_takes_what_is_planned(stage, checkpointing):
    step, true = measured("bench", 512, 1, stage, checkpointing)
    assert agrees(step, true), off(step, true)


@pytest.mark.parametrize(
    ("stage", "parts"), [("sft", ("attention",)), ("sft", ("attention", "experts")), ("warmup", ("indexer",))]
)
def test_a_step_of_adapters_takes_what_is_planned(stage, parts):
    step, found = step_of("tiny", 1024, 1, stage, False)
    adapted = replace(step, lora=parts)
    true = measure(adapted, replace(found, bias_rate=0.0))
    assert agrees(adapted, true), off(adapted, true)
    assert memory(adapted).optimizer != memory(step).optimizer


@pytest.mark.slow
@modes
@stages
@pytest.mark.parametrize(
    ("preset", "length", "batch", "dtype", "backend", "overrides"),
    [
        ("tiny", 4096, 2, "float32", "native", ()),
        ("bench", 512, 1, "float32", "native", ()),
        ("bench", 1024, 1, "bfloat16", "native", ()),
        ("bench", 2048, 2, "float32", "native", ()),
        ("bench", 8192, 1, "float32", "native", ()),
        ("bench", 1024, 1, "float32", "torch", ()),
        ("bench", 300, 2, "float32", "native", (("index_topk", 512),)),
        ("bench", 2048, 1, "bfloat16", "native", (("vocab_size", 4096), ("num_experts_per_tok", 4))),
        ("bench", 2048, 1, "float32", "native", (("index_n_heads", 16), ("index_head_dim", 64), ("kv_lora_rank", 128))),
    ],
)
def test_longer_wider_and_other_steps_take_what_is_planned(
    preset, length, batch, dtype, backend, overrides, stage, checkpointing
):
    step, true = measured(preset, length, batch, stage, checkpointing, dtype, backend, overrides)
    assert agrees(step, true), off(step, true)


def without(block, *names):
    """A block's maker that forgets tensors, and a backward that needs them."""

    def forgetful(step):
        made = block(step)
        assert all(name in made.kept for name in names)
        kept = {name: size for name, size in made.kept.items() if name not in names}
        return replace(made, kept=kept, backward=min(made.backward, 0))

    return forgetful


def state_of_frozen(step):
    every = sum(2 * step.shard(p) for p in step.parameters) * step.itemsize
    return replace(memory(step), optimizer=every)


WIDE_VOCABULARY, MANY_EXPERTS = (("vocab_size", 2048),), (("num_experts_per_tok", 6), ("topk_group", 4))
PLANTED = {
    "logits in fp32": ("sft", WIDE_VOCABULARY, "head", ("log-probabilities",)),
    "outputs of the experts": ("dense", MANY_EXPERTS, "experts", ("experts' outputs", "gate", "up")),
    "what attention keeps": ("sparse", (), "attention", ("q", "absorbed q", "latents", "attended latents")),
    "gradients of the indexer's loss": ("warmup", (), "attention", ("gradient of index queries",)),
}  # fmt: skip


@pytest.mark.parametrize("omission", PLANTED)
def test_a_plan_that_forgets_something_is_caught(omission, monkeypatch):
    stage, overrides, name, forgotten = PLANTED[omission]
    step, true = measured("tiny", 1024, 1, stage, False, overrides=overrides)
    assert agrees(step, true)
    monkeypatch.setattr(planner, name, without(getattr(blocks, name), *forgotten))
    assert not agrees(step, true)


def test_a_plan_without_checkpointing_is_caught_under_checkpointing():
    step, true = measured("tiny", 1024, 1, "sparse", True)
    assert not agrees(replace(step, checkpointing=False), true)


def test_state_of_frozen_parameters_is_caught(monkeypatch):
    step, true = measured("tiny", 1024, 1, "warmup", False)
    assert agrees(step, true)
    wrong = state_of_frozen(step)
    monkeypatch.setattr(sys.modules[__name__], "memory", lambda _: wrong)
    assert not agrees(step, true)


def test_gradients_that_never_come_are_caught(monkeypatch):
    step, true = measured("bench", 512, 1, "sparse", True)
    assert agrees(step, true)
    monkeypatch.setattr(planner._Walk, "_backward", lambda *_: None)
    assert not agrees(step, true)


RESIDENT = """
import json, sys
import torch
from harness.bench.worker import Resident
from harness.text import text_batch
from optimized import DeepseekV32ForCausalLM
from reference.training import set_trainable, training_loss
from suites.plan.test_memory import step_of

torch.set_num_threads(1)
*size, stage, checkpointing = json.loads(sys.argv[1])
step, found = step_of(*size, stage, checkpointing)
step.config.use_sparse_attention = step.sparse
model = DeepseekV32ForCausalLM(step.config).train()
set_trainable(model, step.trains)
if checkpointing:
    model.gradient_checkpointing_enable()

def once(length):
    ids = text_batch(step.batch, length, 0)
    out = model(input_ids=ids, labels=ids, output_indexer_kl_loss=step.kl, use_cache=False)
    training_loss(out, step.trains, 1.0).backward()

once(64)
model.zero_grad(set_to_none=True)
resident = Resident()
resident.start()
once(step.length)
print(json.dumps(resident.growth() * 2**20))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="The peak of one process is read from /proc.")
# Where tensors are some hundred MB. What is no tensor (code, the libraries' buffers) was 30 MB in warmup and 84 MB in a
# checkpointed sparse step, as much as a third of what those take.
@pytest.mark.parametrize(("stage", "checkpointing"), [("dense", False), ("sparse", False)])
def test_the_resident_memory_of_a_process_grows_as_planned(stage, checkpointing):
    """What the operating system sees agrees too: the allocator's count is not blind to something large."""
    size = ("bench", 4096, 1)
    # Blocks go back to the system as soon as they are freed: what a heap keeps for later is not the model's.
    glibc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, json.dumps([*size, stage, checkpointing])],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **glibc}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    planned, grown = memory(step_of(*size, stage, checkpointing)[0]).growth, json.loads(done.stdout.splitlines()[-1])
    assert abs(planned / grown - 1) <= TOLERANCE, (planned, grown)
