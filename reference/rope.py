"""Rotary positions: one table, two pairings, and the softmax scale (spec 1.5).

MLA turns interleaved pairs (2i, 2i+1); the Lightning Indexer turns half-split pairs (i, i + R/2).
Both read the same angles. Confusing the two is the most frequent public bug of this model.

Letters: B batch, L rows (tokens), R rope lanes; * any number of axes.
"""

import math
from typing import Any

import torch

from .config import DeepseekV32Config
from .precision import at_least_fp32


def yarn_inv_freq(rope_parameters: dict[str, Any], dim: int) -> torch.Tensor:
    """Angular frequencies `[dim / 2]` in fp32, radians per token.

    f_i = theta^(-2i/dim). YaRN keeps the fast ones, divides the slow ones by `factor` and blends between:
    with r(i) = clamp((i - low) / (high - low), 0, 1), f'_i = f_i/factor * r + f_i * (1 - r), where low and high
    are the indices that turn beta_fast and beta_slow times over the original context. The table is data: it is
    rounded to fp32 in every dtype of the model, fp64 included, and made on the CPU, so that all devices have the same.
    """
    theta = float(rope_parameters["rope_theta"])
    index = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu")
    inv_freq = 1.0 / theta ** (index / dim)
    if rope_parameters["rope_type"] == "default":
        return inv_freq

    def index_of(rotations: float) -> float:
        context = rope_parameters["original_max_position_embeddings"]
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(index_of(rope_parameters.get("beta_fast") or 32)), 0)
    high = min(math.ceil(index_of(rope_parameters.get("beta_slow") or 1)), dim - 1)
    width = max(high - low, 0.001)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    return inv_freq / rope_parameters["factor"] * ramp + inv_freq * (1 - ramp)


def yarn_mscale(factor: float, mscale: float) -> float:
    """m = 0.1 * mscale * ln(factor) + 1, and 1 for a factor of at most 1 (YaRN's attention temperature)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: DeepseekV32Config) -> float:
    """(nope + rope)^(-1/2), times m² under YaRN: 0.1352337789 for V3.2. It multiplies the whole logit."""
    scale = float((config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5)
    rope = config.rope
    if rope["rope_type"] == "yarn" and rope.get("mscale_all_dim"):
        scale *= yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
    return scale


def rotary_factor(rope_parameters: dict[str, Any]) -> float:
    """What cos and sin are multiplied by: the ratio m(mscale) / m(mscale_all_dim), 1.0 for V3.2."""
    if rope_parameters["rope_type"] == "default":
        return 1.0
    if (given := rope_parameters.get("attention_factor")) is not None:
        return float(given)
    factor = rope_parameters["factor"]
    mscale, mscale_all_dim = rope_parameters.get("mscale"), rope_parameters.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    return yarn_mscale(factor, 1.0)


class RotaryTable(torch.nn.Module):
    """cos and sin of the angles of given positions, shared by MLA and indexer in every layer."""

    inv_freq: torch.Tensor

    def __init__(self, config: DeepseekV32Config) -> None:
        super().__init__()
        self.rope_parameters = dict(config.rope)
        self.dim = config.qk_rope_head_dim
        self.factor = rotary_factor(self.rope_parameters)
        table = yarn_inv_freq(self.rope_parameters, self.dim).to(torch.get_default_device())
        self.inv_freq = torch.nn.Buffer(table, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "RotaryTable":
        # The table is fp32 data: `model.to(bfloat16)` must not round it, nor `model.double()` make it look finer.
        super()._apply(fn, recurse)
        self.inv_freq = yarn_inv_freq(self.rope_parameters, self.dim).to(self.inv_freq.device)
        return self

    @torch.no_grad()
    def forward(self, positions_BL: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """`cos_BLR/2`, `sin_BLR/2` in at least fp32 for a model of `dtype`; angles are rounded to fp32 always."""
        angles = positions_BL[..., None].float() * self.inv_freq
        angles = angles.double() if dtype == torch.float64 else angles
        return angles.cos() * self.factor, angles.sin() * self.factor


def rotate_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs (2i, 2i+1) of the last axis, output interleaved again. MLA's q_pe and k_pe.

    `x` `[*, R]`, `cos` and `sin` `[*, R/2]` broadcastable; computed in at least fp32, returned in x's dtype.
    """
    even, odd = at_least_fp32(x[..., 0::2]), at_least_fp32(x[..., 1::2])
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def rotate_half_split(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs (i, i + R/2) of the last axis. The indexer's q and k. Shapes as `rotate_interleaved`."""
    first, second = at_least_fp32(x).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
