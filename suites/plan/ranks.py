"""What a step takes on each of several ranks, for `test_ranks`: module of `harness.ranks.world`."""

import json
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
    model.zero_grad(set_to_none=True)
    growth = peak_of(forward_and_backward)
    weights = sum(p.to_local().nbytes for p in model.parameters())
    found: list[Any] = [None] * step.layout.world
    dist.all_gather_object(found, (weights, growth))
    largest_weights, largest_growth = (max(column) for column in zip(*found, strict=True))
    return {"weights": largest_weights, "growth": largest_growth}
