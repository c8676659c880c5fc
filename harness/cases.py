"""Cases: a configuration, calibrated weights, inputs of real text, and the seed of all three.

Weights are drawn so that the model behaves like a trained one where it matters to a check: attention far
from uniform, index scores of both signs and well spread, norms with non-trivial gains and biases, a spread
router with a bias that decides. The default initialisation is nearly uniform, and blind.

Letters: B batch, L rows.
"""

import math
import zlib
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from reference import DeepseekV32Config, DeepseekV32ForCausalLM

from .text import PAD, text_batch

# Standard deviation of a linear layer's output for unit input. Attention logits get (nope + rope)^(1/2) · scale
# times the query's, which is about 2.8 with YaRN; the residual stream grows slowly.
_LINEAR_GAINS = {
    "q_b_proj.weight": 1.5, "o_proj.weight": 0.7, "down_proj.weight": 0.7, "down_proj": 0.7, "weights_proj.weight": 2.0,
    ".gate.weight": 2.0, "lm_head.weight": 1.0,
}  # fmt: skip


def calibrated_state(
    config: DeepseekV32Config, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """A `state_dict` for `config`; each tensor depends on its name and `seed` only."""
    with torch.device("meta"):
        skeleton = DeepseekV32ForCausalLM(config).state_dict()
    return {name: _draw(name, tensor.shape, seed).to(dtype) for name, tensor in skeleton.items()}


def _draw(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator)
    if name.endswith("e_score_correction_bias"):
        # Negative on the whole, so that masking dropped groups with 0 instead of −inf would show.
        return noise * 0.2 - 0.5
    if "norm" in name.rsplit(".", 2)[-2]:
        return noise * 0.3 if name.endswith("bias") else 1 + 0.2 * noise
    if "embed_tokens" in name:
        return noise
    gain = next((g for suffix, g in _LINEAR_GAINS.items() if name.endswith(suffix)), 1.0)
    return noise * (gain / math.sqrt(shape[-1]))


@dataclass(frozen=True)
class Case:
    """Inputs of one forward, and the mode it runs in."""

    name: str
    config: DeepseekV32Config
    seed: int
    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    needs: frozenset[str] = field(default_factory=frozenset)

    @property
    def fp8(self) -> bool:
        """Whether any tensor goes through FP8."""
        return "fp8" in (self.config.indexer_precision, self.config.kv_latent_precision)

    @property
    def real_BL(self) -> torch.Tensor:
        """Which tokens are real."""
        mask = self.attention_mask
        return torch.ones_like(self.input_ids, dtype=torch.bool) if mask is None else mask.bool()

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Keyword arguments of a forward; upstream needs use_cache=False to see packed documents."""
        tensors = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }
        return {**{k: None if v is None else v.to(device) for k, v in tensors.items()}, "use_cache": False}


CASE_NAMES = ("text", "left-padded", "right-padded", "packed", "offset-5000", "offset-100000", "fp8")


def build_case(name: str, config: DeepseekV32Config, *, seed: int, length: int, batch: int = 2) -> Case:
    """The case called `name` on text drawn from `seed`.

    Padding takes a fifth of every second row; packed rows hold documents of 1, 2 and 9 twelfths; an offset moves all
    positions; "fp8" switches the official FP8 path on. Labels leave out what no model agrees on: padding and its neighbour, first tokens of documents.

    Raises:
        ValueError: an unknown name, or a length below 8.
    """
    if name not in CASE_NAMES:
        raise ValueError(f"Unknown case {name!r}; available: {', '.join(CASE_NAMES)}.")
    if length < 8:
        raise ValueError(f"seq_len is {length}; cases need 8 tokens or more.")
    ids = text_batch(batch, length, seed)
    labels, mask, positions = ids.clone(), None, None
    needs: set[str] = set()
    if name in ("left-padded", "right-padded"):
        mask = torch.ones_like(ids)
        pad = slice(0, length // 5) if name == "left-padded" else slice(length - length // 5, length)
        mask[::2, pad] = 0
        ids = ids.masked_fill(mask == 0, PAD)
        labels = labels.masked_fill(mask == 0, -100)
        if name == "left-padded":
            labels[::2, length // 5] = -100
        needs.add("padding")
    elif name == "packed":
        cuts = (0, length // 12, length // 4, length)
        positions = torch.cat([torch.arange(b - a) for a, b in pairwise(cuts)]).expand(batch, -1).clone()
        labels[:, cuts[1:-1]] = -100
        needs.add("packing")
    elif name.startswith("offset-"):
        positions = torch.arange(length).expand(batch, -1) + int(name.removeprefix("offset-"))
    elif name == "fp8":
        config = DeepseekV32Config(**{**config.to_dict(), "indexer_precision": "fp8", "kv_latent_precision": "fp8"})
        needs.add("fp8")
    return Case(name, config, seed, ids, labels, mask, positions, frozenset(needs))
