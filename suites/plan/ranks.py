"""What a step takes on each of several ranks, for `test_ranks`: module of `harness.ranks.world`."""

import json
import sys
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from harness.plan.measure import peak_of
from harness.plan.step import Step
from harness.subjects import recompute_activations
from harness.text import text_batch
from optimized import DeepseekV32ForCausalLM
from optimized.distributed import parallelize
from optimized.distributed.layout import ParallelLayout
from reference.training import set_trainable, training_loss

from .test_memory import step_of

# gloo's own threads set tensors free without the profiler's seeing it, now and then: such a peak is too high by no more
# than what seems to be left. Steps are repeated until the bounds that they leave are this close.
EXACT, TRIES = 1.02, 40


def steps(questions: list[list[Any]]) -> list[Step]:
    """A step for each [layout, stage, checkpointing, dtype] of the preset `bench`."""
    found = []
    for layout, stage, checkpointing, dtype in questions:
        step, _ = step_of("bench", 512, 1, stage, checkpointing, dtype=dtype)
        found.append(replace(step, layout=ParallelLayout.parse(layout)))
    return found


def prepare(arguments: list[str]) -> list[Step]:
    """Before the fork."""
    return steps(json.loads(arguments[0]))


def on_rank(_rank: int, prepared: list[Step], _arguments: list[str]) -> list[dict[str, float]]:
    """Bytes of weights, and of the peak beyond them, of the fullest rank for each step."""
    return [_largest(step) for step in prepared]


def _largest(step: Step) -> dict[str, float]:
    step.config.use_sparse_attention = step.sparse
    torch.manual_seed(0)
    model: Any = DeepseekV32ForCausalLM(step.config).to(getattr(torch, step.dtype)).train()
    set_trainable(model, step.trains)
    if step.checkpointing:
        recompute_activations(model)
    model = parallelize(model, step.layout)
    every = step.batch * step.layout.batches
    ids = text_batch(every, step.length, 0)[model.ranks.batch_rows(every)]

    def forward_and_backward() -> None:
        out = model(input_ids=ids, labels=ids, output_indexer_kl_loss=step.kl, use_cache=False)
        training_loss(out, step.trains, 1.0).backward()

    forward_and_backward()
    weights = sum(p.to_local().nbytes for p in model.parameters())
    found: list[Any] = [None] * step.layout.world
    low, high = 0, sys.maxsize
    for _ in range(TRIES):
        model.zero_grad(set_to_none=True)
        most, left = peak_of(forward_and_backward)
        unseen = left - sum(p.grad.to_local().nbytes for p in model.parameters() if p.grad is not None)
        assert unseen >= 0, f"{-unseen} bytes of the gradients of {step} were allocated unseen."
        low, high = max(low, most - unseen), min(high, most)
        dist.all_gather_object(found, (weights, low, high))
        if all(high <= EXACT * low for _, low, high in found):
            return {"weights": max(weights for weights, *_ in found), "growth": max(high for *_, high in found)}
    raise AssertionError(f"After {TRIES} steps the peaks of {step} still lie anywhere in {found} (weights, low, high).")
