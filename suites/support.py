"""What several suites share: the two models on small calibrated weights, and prompts fed in chunks.

Letters: B batch, L tokens, S key slots.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import optimized
import reference
from harness.cases import calibrated_state
from harness.subjects import load_weights
from harness.text import text_batch
from reference import Decisions, DeepseekV32Config, LatentCache

MODELS = {"reference": reference.DeepseekV32ForCausalLM, "optimized": optimized.DeepseekV32ForCausalLM}
CPU = torch.device("cpu")
SEED = 3
# fp64 sums in another order: what two ways to the same number may differ by.
EXACT = 1e-10

both_models = pytest.mark.parametrize("model_class", list(MODELS.values()), ids=list(MODELS))
both_modes = pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])


def tiny(**overrides: Any) -> DeepseekV32Config:
    """The preset `tiny`: 3 layers, 16 keys a row."""
    return DeepseekV32Config.preset("tiny", **overrides)


def build(model_class: type[Any], dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A model on calibrated weights, in eval mode: the same weights for both classes."""
    config = tiny(**overrides)
    return load_weights(model_class, config, calibrated_state(config, SEED), CPU, dtype).eval()


def text(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    """Token ids `[B, L]` of real text."""
    return text_batch(batch, length, seed)


def assert_same(actual: torch.Tensor, expected: torch.Tensor, atol: float = EXACT) -> None:
    """Equal up to `atol`; NaN equals nothing."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def in_chunks(
    model: Any, ids: torch.Tensor, sizes: Sequence[int], *, attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None, cache: LatentCache | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, LatentCache, Decisions]:  # fmt: skip
    """Logits, cache and tape of `ids` fed in chunks of `sizes` tokens through one cache.

    `attention_mask` covers what the cache holds already, too.
    """
    assert sum(sizes) == ids.shape[1]
    cache = LatentCache(model.config) if cache is None else cache
    before, start = cache.get_seq_length(), 0
    logits, tapes = [], []
    for size in sizes:
        rows = slice(start, start + size)
        out = model(
            ids[:, rows],
            attention_mask=None if attention_mask is None else attention_mask[:, : before + start + size],
            position_ids=None if position_ids is None else position_ids[:, rows],
            past_key_values=cache,
            output_decisions=True,
            **kwargs,
        )
        logits.append(out.logits)
        tapes.append(out.decisions)
        start += size
    return torch.cat(logits, 1), cache, Decisions.cat(tapes)
