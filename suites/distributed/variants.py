"""Gradients on two ranks of models and batches out of the ordinary, against one process, in fp64."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from harness.cases import calibrated_state
from harness.ranks.parity import KL_COEF, ROWS, apart, batch_for, largest
from optimized import DeepseekV32Config, DeepseekV32ForCausalLM
from optimized.distributed import ParallelLayout, parallelize

# Fields of the config, by what is out of the ordinary.
VARIANTS: dict[str, dict[str, Any]] = {
    "tied head": {"tie_word_embeddings": True},
    "fp8": {"indexer_precision": "fp8", "kv_latent_precision": "fp8"},
    "indexer input attached": {"detach_indexer_input": False},
    "two micro-batches": {},
}
LAYOUTS = ("fsdp=2", "cp=2", "tp=2", "ep=2")


def model_of(variant: str) -> Any:
    """The plain model of a variant."""
    tiny = DeepseekV32Config.preset("tiny")
    config = DeepseekV32Config(**{**tiny.to_dict(), **VARIANTS[variant]})
    config.indexer_kl_coef = KL_COEF
    model = DeepseekV32ForCausalLM(config)
    weights = calibrated_state(tiny, 0)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    model = model.double().train()
    model.backend = "torch"
    return model


def gradients(model: Any, variant: str, mine: slice) -> dict[str, Tensor]:
    """Of every parameter that has one, whole."""
    batch = {name: x[mine] for name, x in batch_for("left-padded").items()}
    if variant == "two micro-batches":
        for part in (slice(0, 1), slice(1, None)):
            # As Trainer says how many targets the whole batch has.
            model(
                **{name: x[part] for name, x in batch.items()}, use_cache=False, num_items_in_batch=100
            ).loss.backward()
    else:
        model(**batch, use_cache=False).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g.clone() for name, g in found.items()}


def prepare(arguments: list[str]) -> dict[str, dict[str, Tensor]]:
    """One process's gradients."""
    torch.set_num_threads(1)
    return {variant: gradients(model_of(variant), variant, slice(None)) for variant in VARIANTS}


def on_rank(rank: int, prepared: dict[str, dict[str, Tensor]], arguments: list[str]) -> dict[str, dict[str, float]]:
    """The largest distance of any gradient, by variant and layout."""
    answers: dict[str, dict[str, float]] = {}
    for variant, expected in prepared.items():
        answers[variant] = {}
        for layout in LAYOUTS:
            model = parallelize(model_of(variant), ParallelLayout.parse(layout))
            found = gradients(model, variant, model.ranks.batch_rows(ROWS))
            same = found.keys() == expected.keys()
            distance = max(apart(found[name], x) for name, x in expected.items()) if same else float("inf")
            answers[variant][layout] = largest(distance)
    return answers
