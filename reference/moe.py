"""Feed-forward blocks: RMSNorm, SwiGLU, the gate and the experts (spec 1.3, 1.7).

Letters: B batch, L rows, N = B·L tokens, M hidden_size, F FFN width, X routed experts, G groups,
T chosen experts a token.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .config import DeepseekV32Config
from .precision import at_least_fp32, without_autocast


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, wholly in at least fp32, cast back after the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype as `x`."""
        wide = at_least_fp32(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.to(wide.dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        """Width and eps."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up in at least fp32, cast back."""
    return (F.silu(at_least_fp32(gate)) * at_least_fp32(up)).to(gate.dtype)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) · w3 x): a dense layer's FFN, and the shared experts."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype as `x`."""
        out: torch.Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return out


class Gate(nn.Module):
    """Chooses experts by sigmoid score + bias within the best groups; weighs them by the scores alone."""

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: DeepseekV32Config) -> None:
        super().__init__()
        self.top_k, self.n_group, self.topk_group = (
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
        )
        self.normalise, self.scale = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> "Gate":
        # `model.to(bfloat16)` must not round the bias: it decides near ties, and is kept in fp32 everywhere.
        kept = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype.itemsize < 4:
            self.e_score_correction_bias = kept.to(self.e_score_correction_bias.device)
        return self

    @without_autocast
    def forward(self, x_NM: torch.Tensor) -> torch.Tensor:
        """`s_NX` = sigmoid(x·Wᵀ) in at least fp32, both operands cast."""
        x = at_least_fp32(x_NM)
        return F.linear(x, self.weight.to(x.dtype)).sigmoid()

    @torch.no_grad()
    def choose(self, scores_NX: torch.Tensor) -> torch.Tensor:
        """int32 `[N, T]`, ascending: best experts of the best groups, lowest index first among equals.

        A group counts for the sum of its two best biased scores; experts of dropped groups are −inf, not 0: with a
        negative bias a 0 would win.
        """
        biased = scores_NX + self.e_score_correction_bias.to(scores_NX.dtype)
        groups_NGX = biased.unflatten(-1, (self.n_group, -1))
        if self.n_group > 1:
            group_score = groups_NGX.sort(-1, descending=True).values[..., :2].sum(-1)
            order = group_score.sort(dim=-1, descending=True, stable=True).indices
            kept = torch.zeros_like(group_score, dtype=torch.bool).scatter_(-1, order[..., : self.topk_group], True)
            biased = groups_NGX.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
        best = biased.sort(dim=-1, descending=True, stable=True).indices[..., : self.top_k]
        return best.sort(-1).values.to(torch.int32)

    def weights(self, scores_NX: torch.Tensor, experts_NT: torch.Tensor) -> torch.Tensor:
        """`w_NT`: the unbiased scores of the chosen experts, divided by their sum, times routed_scaling_factor."""
        weights = scores_NX.gather(-1, experts_NT.long())
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scale


class Experts(nn.Module):
    """The routed experts, stacked: gate_up_proj `[X, 2F, M]` (gate rows first), down_proj `[X, M, F]`."""

    def __init__(self, config: DeepseekV32Config) -> None:
        super().__init__()
        experts, inner, width = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))

    def forward(self, x_NM: torch.Tensor, experts_NT: torch.Tensor, weights_NT: torch.Tensor) -> torch.Tensor:
        """Σ over a token's experts of weight · expert(x), accumulated in at least fp32: `[N, M]` in that dtype."""
        out = at_least_fp32(torch.zeros_like(x_NM))
        # unbind, because the gradient of each index into a stack would be a buffer of the whole stack.
        gate_up, down = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
        for expert in experts_NT.unique().tolist():
            token, place = torch.where(experts_NT == expert)
            gate, up = F.linear(x_NM[token], gate_up[expert]).chunk(2, dim=-1)
            y = F.linear(swiglu(gate, up), down[expert])
            out = out.index_add(0, token, at_least_fp32(y) * weights_NT[token, place, None])
        return out


class MoE(nn.Module):
    """Routed experts + the shared expert."""

    experts_class: type[Experts] = Experts

    def __init__(self, config: DeepseekV32Config) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = self.experts_class(config)
        self.shared_experts = SwiGLU(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    @property
    def router(self) -> Gate:
        """The gate itself: an adapter on its weight stands around it, and has nothing of it but `forward`."""
        return next(module for module in self.gate.modules() if isinstance(module, Gate))

    def forward(
        self, x_BLM: torch.Tensor, real_BL: torch.Tensor, replayed_BLT: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The block's output `[B, L, M]`, and its own choice int32 `[B, L, T]` (−1 in pad rows).

        `replayed_BLT` replaces the choice in real rows; the weights always come from the model's own scores.
        """
        x_NM = x_BLM.flatten(0, 1)
        scores_NX = self.gate(x_NM)
        own_NT = self.router.choose(scores_NX)
        real_N1 = real_BL.flatten()[:, None]
        used_NT = own_NT if replayed_BLT is None else torch.where(real_N1, replayed_BLT.flatten(0, 1), own_NT)
        routed = self.experts(x_NM, used_NT, self.router.weights(scores_NX, used_NT))
        out = (routed + at_least_fp32(self.shared_experts(x_NM))).to(x_BLM.dtype)
        return out.view_as(x_BLM), torch.where(real_N1, own_NT, -1).unflatten(0, x_BLM.shape[:2])
