"""What a real training step takes on this machine's CPU: every byte that torch's allocator gives out and gets back.

torch's profiler sees each allocation with its size, those inside of operators, of the backward and of recomputed layers
among them. Not seen is what is no tensor: code, threads, small buffers of the native operators.
"""

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from optimized import DeepseekV32ForCausalLM
from optimized.linear import linear_implementation
from reference.training import add_lora, set_trainable, training_loss

from ..subjects import recompute_activations
from ..text import text_batch
from ..training.optimizers import build_optimizers
from ..training.stages import Stage
from .step import Step


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes: of weights, of optimizer state, and the peaks of forward and backward, and of the update, beyond both."""

    weights: int
    optimizer: int
    growth: int
    update: int


class Peak(NamedTuple):
    """Bytes beyond those before a run: the most that were allocated at once during it, and what is left of them."""

    most: int
    left: int


def peak_of(run: Callable[[], Any]) -> Peak:
    """What `run` allocates. Both are too high by what a thread sets free that torch does not profile (gloo's are)."""
    # Some builds of torch tell the terminal of each profile, at a level above that of errors.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # What is collected during the run would count as set free by it.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return Peak(most, live)


def measure(step: Step, stage: Stage) -> Measured:
    """One step of `step`'s model on a CPU, after one that is not measured; gradients are made anew, as the loop does."""
    config = step.config
    config.use_sparse_attention = step.sparse
    torch.manual_seed(0)
    model: Any = DeepseekV32ForCausalLM(config).to(getattr(torch, step.dtype)).train()
    model.backend = step.backend
    if step.lora:
        model = add_lora(model, step.lora, rank=step.rank)
    else:
        set_trainable(model, step.trains)
    if step.checkpointing:
        recompute_activations(model)
    ids = text_batch(step.batch, step.length, 0)
    optimizers = build_optimizers(model, stage)

    def forward_and_backward() -> None:
        out = model(input_ids=ids, labels=ids, output_indexer_kl_loss=step.kl, use_cache=False)
        training_loss(out, step.trains, stage.kl_coef).backward()

    def update() -> None:
        for optimizer in optimizers:
            optimizer.step()

    forward_and_backward()
    update()
    model.zero_grad(set_to_none=True)
    growth = peak_of(forward_and_backward).most
    held = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    # Gradients are there before the update and after it.
    beside = peak_of(update).most
    state = [t for o in optimizers for kept in o.state.values() for t in kept.values() if isinstance(t, torch.Tensor)]
    return Measured(
        sum(p.nbytes for p in model.parameters()), sum(t.nbytes for t in state), growth, held + beside
    )  # fmt: skip


def here(dtype: str) -> str:
    """What multiplies matrices of `dtype` on this machine's CPU."""
    return linear_implementation(torch.device("cpu"), getattr(torch, dtype))
