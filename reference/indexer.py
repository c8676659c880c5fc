"""The Lightning Indexer: one score a (query, key) pair, and the top-k of them (report eq. 1-2; spec 2).

    I[t, s] = Σ_j w[t, j] · ReLU(q[t, j] · k[s])          w scaled by J^(-1/2) · E^(-1/2)
    S_t     = the index_topk visible keys with the largest I[t, s], lowest index first among equals

Letters: B batch, L rows, S key slots, M hidden_size, Q q_lora_rank, J indexer heads, E indexer head
dim, R rope lanes (they come first in E), K selected keys.
"""

import torch
from torch import nn

from .config import DeepseekV32Config
from .fp8 import fp8_round_trip, hadamard_rotate
from .precision import WideLayerNorm, WideLinear, at_least_fp32, without_autocast
from .rope import rotate_half_split, rotate_interleaved

K_NORM_EPS = 1e-6


class LightningIndexer(nn.Module):
    """Projects queries, keys and head weights; scores are `index_scores`, the choice is `select_topk`."""

    def __init__(self, config: DeepseekV32Config) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.rope_dim = (
            config.index_n_heads,
            config.index_head_dim,
            config.qk_rope_head_dim,
        )
        self.fp8 = config.indexer_precision == "fp8"
        self.rotate = rotate_interleaved if config.indexer_rope_interleaved else rotate_half_split
        self.wq_b = nn.Linear(config.q_lora_rank, self.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.k_norm = WideLayerNorm(self.head_dim, eps=K_NORM_EPS)
        self.weights_proj = WideLinear(config.hidden_size, self.n_heads, bias=False)

    def _turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        pe, rest = x.split([self.rope_dim, self.head_dim - self.rope_dim], dim=-1)
        return torch.cat((self.rotate(pe, cos, sin), rest), dim=-1)

    def keys(self, x_BLM: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`k_BLE`: LayerNorm(wk x) in at least fp32, then RoPE. This is what the cache holds (before Hadamard)."""
        k = self.wk(x_BLM)
        return self._turn(self.k_norm(k).to(k.dtype), cos, sin)

    def queries(self, q_latent_BLQ: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`q_BLJE` from the normalised q latent, rope lanes first."""
        q = self.wq_b(q_latent_BLQ).unflatten(-1, (self.n_heads, self.head_dim))
        return self._turn(q, cos[..., None, :], sin[..., None, :])

    def head_weights(self, x_BLM: torch.Tensor) -> torch.Tensor:
        """`w_BLJ` in at least fp32 (input and weight upcast), times J^(-1/2) · E^(-1/2). It may be negative."""
        return self.weights_proj(x_BLM) * (self.n_heads**-0.5 * self.head_dim**-0.5)

    def quantized(self, x: torch.Tensor) -> torch.Tensor:
        """q or k as the scoring reads it: unchanged, or Hadamard-rotated bf16 through FP8 (`indexer_precision`).

        Scales are powers of two, so applying them before the dot product or after the ReLU is the same number.
        """
        if not self.fp8:
            return x
        return fp8_round_trip(self.hadamard(x.to(torch.bfloat16))).to(x.dtype)

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        """x rotated before FP8; `optimized` computes the same by a faster transform."""
        return hadamard_rotate(x)


@without_autocast
def index_scores(q_BLJE: torch.Tensor, k_BSE: torch.Tensor, w_BLJ: torch.Tensor) -> torch.Tensor:
    """`I_BLS`, raw: no mask. Report eq. 1, in at least fp32; J×L×S elements are alive."""
    dots_BLJS = torch.einsum("blje,bse->bljs", at_least_fp32(q_BLJE), at_least_fp32(k_BSE))
    return torch.einsum("bljs,blj->bls", dots_BLJS.relu(), at_least_fp32(w_BLJ))


@torch.no_grad()
def select_topk(scores_BLS: torch.Tensor, visible_BLS: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the min(k, visible) best visible keys, int32 `[B, L, min(k, S)]`, ascending, −1 at the tail.

    Ties: lowest index first; −0.0 equals 0.0; NaN ranks highest, so that it is selected and seen. Report eq. 2.
    """
    width = scores_BLS.shape[-1]
    # Adding 0.0 turns −0.0 into 0.0. A stable sort keeps equal scores in index order, and puts NaN first.
    descending = torch.sort(scores_BLS + 0.0, dim=-1, descending=True, stable=True).indices
    # A second stable sort brings the visible ones to the front without changing their order.
    hidden = ~visible_BLS.gather(-1, descending)
    order = descending.gather(-1, torch.argsort(hidden.byte(), dim=-1, stable=True))[..., : min(k, width)]
    chosen = visible_BLS.gather(-1, order)
    ascending = torch.where(chosen, order, width).sort(-1).values
    return torch.where(ascending == width, -1, ascending).to(torch.int32)


def selected_mask(indices_BLK: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Boolean `[B, L, S]`, True at the indices; −1 marks nothing."""
    # One column more than there are slots takes what −1 points at.
    mask = torch.zeros(*indices_BLK.shape[:2], num_slots + 1, dtype=torch.bool, device=indices_BLK.device)
    target = torch.where(indices_BLK < 0, num_slots, indices_BLK).long()
    return mask.scatter_(-1, target, True)[..., :num_slots]
