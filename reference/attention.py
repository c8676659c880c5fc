"""Multi-head Latent Attention over the keys that the indexer selects (report eq. 2; spec 1.4-1.6).

    c_q = norm(W x)      q_h = [nope ‖ rope] = W c_q        [c_kv ‖ k_pe] = W x, c_kv normed, k_pe rotated
    k_h = [W_uk c_kv ‖ k_pe]      v_h = W_uv c_kv      out = W_o Σ_s softmax_s(q_h·k_h · scale) v_h
    s runs over S_t (sparse) or over every visible key (dense).

`DeepseekV32Attention.attend` is the only method that `optimized` replaces.

Letters: B batch, L rows, S key slots, M hidden_size, H heads, N nope dim, R rope dim, V v_head_dim,
C kv_lora_rank, Q q_lora_rank, J indexer heads, E indexer head dim, K selected keys.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from .cache import LatentCache
from .config import DeepseekV32Config
from .decisions import check_topk_replay
from .fp8 import fp8_round_trip
from .indexer import LightningIndexer, index_scores, select_topk, selected_mask
from .layout import Layout
from .losses import kl_rows
from .moe import RMSNorm
from .precision import at_least_fp32, without_autocast
from .rope import rotate_interleaved, softmax_scale

LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Ask:
    """What one forward is asked for besides hidden states."""

    scores: Literal[False, "candidates", "visible"] = False
    kl_target: bool = False
    kl_loss: bool = False
    decisions: bool = False

    @property
    def reads_indexer(self) -> bool:
        """Whether the indexer's scores are wanted for more than choosing keys."""
        return bool(self.scores) or self.kl_loss


@dataclass(slots=True)
class Found:
    """What one layer's attention answers to an `Ask`; None where nothing was asked."""

    scores_BLS: torch.Tensor | None = None
    kl_target_BLS: torch.Tensor | None = None
    kl_sum: torch.Tensor | None = None
    topk_BLK: torch.Tensor | None = None


@dataclass(slots=True)
class Projected:
    """The tensors of one layer from which attention and indexer compute; keys are in slot order, cache included."""

    q_nope_BLHN: torch.Tensor
    q_pe_BLHR: torch.Tensor
    c_kv_BSC: torch.Tensor
    k_pe_BSR: torch.Tensor
    index_q_BLJE: torch.Tensor | None = None
    index_k_BSE: torch.Tensor | None = None
    index_w_BLJ: torch.Tensor | None = None


class DeepseekV32Attention(nn.Module):
    """One layer's MLA with its indexer."""

    indexer_class: type[LightningIndexer] = LightningIndexer

    def __init__(self, config: DeepseekV32Config, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.n_heads, self.nope_dim, self.rope_dim = (
            config.num_attention_heads,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
        )
        self.v_dim, self.latent_dim = config.v_head_dim, config.kv_lora_rank
        self.scale = softmax_scale(config)
        self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
        self.q_b_proj = nn.Linear(config.q_lora_rank, self.n_heads * (self.nope_dim + self.rope_dim), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.latent_dim + self.rope_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(self.latent_dim, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.latent_dim, self.n_heads * (self.nope_dim + self.v_dim), bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.v_dim, config.hidden_size, bias=False)
        self.indexer = self.indexer_class(config)

    def forward(
        self,
        x_BLM: torch.Tensor,
        layout: Layout,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: LatentCache | None = None,
        ask: Ask | None = None,
        replayed_BLK: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Found]:
        """Attention's output `[B, L, M]` (0 in pad rows) and what was asked for.

        `replayed_BLK` replaces the selection: indices counted from each row's document start, −1 at the tail.

        Raises:
            ValueError: a replayed selection that does not fit, or one given in dense mode.
        """
        ask = ask or Ask()
        if replayed_BLK is not None:
            if not self.config.use_sparse_attention:
                raise ValueError(
                    f"decisions, layer {self.layer_idx}: topk_indices given, but use_sparse_attention is False."
                )
            bounds = layout.bounds_BL2
            check_topk_replay(replayed_BLK, bounds[..., 1] - bounds[..., 0], self.layer_idx)
            replayed_BLK = layout.from_relative(replayed_BLK)
        projected = self.project(x_BLM, rotary, cache, ask)
        out_BLHV, found = self.attend(projected, layout, ask, replayed_BLK)
        out_BLHV = out_BLHV.masked_fill(~layout.real_BL[..., None, None], 0)
        if found.topk_BLK is not None:
            found.topk_BLK = layout.to_relative(found.topk_BLK) if ask.decisions else None
        return self.o_proj(out_BLHV.flatten(2)), found

    def project(
        self,
        x_BLM: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: LatentCache | None,
        ask: Ask,
    ) -> Projected:
        """Everything linear: latents, queries, rope, the indexer's inputs, and the cache's turn."""
        cos, sin = rotary
        q_latent = self.q_a_layernorm(self.q_a_proj(x_BLM))
        q = self.q_b_proj(q_latent).unflatten(-1, (self.n_heads, -1))
        q_nope, q_pe = q.split([self.nope_dim, self.rope_dim], dim=-1)
        q_pe = rotate_interleaved(q_pe, cos[..., None, :], sin[..., None, :])
        latent, k_pe = self.kv_a_proj_with_mqa(x_BLM).split([self.latent_dim, self.rope_dim], dim=-1)
        c_kv = self.kv_a_layernorm(latent)
        if self.config.kv_latent_precision == "fp8":
            c_kv = fp8_round_trip(c_kv)
        k_pe = rotate_interleaved(k_pe, cos, sin)

        index_q = index_k = index_w = None
        scored = self.config.use_sparse_attention or ask.reads_indexer
        # Dense mode without a reader computes no indexer at all, but a cache may be read in sparse mode later.
        with torch.set_grad_enabled(torch.is_grad_enabled() and ask.reads_indexer):
            x, latent_in = (
                (x_BLM.detach(), q_latent.detach()) if self.config.detach_indexer_input else (x_BLM, q_latent)
            )
            if scored or cache is not None:
                index_k = self.indexer.keys(x, cos, sin)
            if scored:
                index_q = self.indexer.quantized(self.indexer.queries(latent_in, cos, sin))
                index_w = self.indexer.head_weights(x)
        if cache is not None:
            assert index_k is not None
            c_kv, k_pe, index_k = cache.layers[self.layer_idx].update(c_kv, k_pe, index_k)
        if scored:
            assert index_k is not None
            index_k = self.indexer.quantized(index_k)
        return Projected(q_nope, q_pe, c_kv, k_pe, index_q, index_k, index_w)

    def keys_and_values(self, c_kv_BSC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`k_nope_BSHN` = W_uk c_kv and `v_BSHV` = W_uv c_kv: kv_b_proj holds a head's N key rows, then its V value rows."""
        expanded = self.kv_b_proj(c_kv_BSC).unflatten(-1, (self.n_heads, -1))
        k_nope, v = expanded.split([self.nope_dim, self.v_dim], dim=-1)
        return k_nope, v

    def attend(
        self, t: Projected, layout: Layout, ask: Ask, replayed_BLK: torch.Tensor | None
    ) -> tuple[torch.Tensor, Found]:
        """`out_BLHV` and the answers, by the formulas as they stand: L×S elements a head.

        Selections, here and in `Found.topk_BLK`, are compact indices (see layout.py).
        """
        visible_BLS = layout.visible_BLS()
        candidates_BLS, scores_BLS, own_BLK = visible_BLS, None, None
        if t.index_q_BLJE is not None:
            assert t.index_k_BSE is not None and t.index_w_BLJ is not None
            with torch.set_grad_enabled(torch.is_grad_enabled() and ask.reads_indexer):
                scores_BLS = index_scores(t.index_q_BLJE, t.index_k_BSE, t.index_w_BLJ)
        if self.config.use_sparse_attention:
            assert scores_BLS is not None
            own_BLK = self.choose(scores_BLS.detach(), visible_BLS, layout)
            used_BLK = own_BLK if replayed_BLK is None else replayed_BLK
            candidates_BLS = selected_mask(layout.to_slots(used_BLK), layout.num_slots)
        k_nope_BSHN, v_BSHV = self.keys_and_values(t.c_kv_BSC)
        out_BLHV, probs_BHLS = masked_attention(
            t.q_nope_BLHN, t.q_pe_BLHR, k_nope_BSHN, v_BSHV, t.k_pe_BSR, self.scale, candidates_BLS
        )
        found = Found(topk_BLK=own_BLK)
        if ask.kl_target or ask.kl_loss:
            found.kl_target_BLS = attention_target(probs_BHLS)
        if scores_BLS is not None:
            candidate_scores = scores_BLS.masked_fill(~candidates_BLS, -torch.inf)
            if ask.kl_loss:
                assert found.kl_target_BLS is not None
                found.kl_sum = kl_rows(candidate_scores, found.kl_target_BLS).sum()
            if ask.scores == "candidates":
                found.scores_BLS = candidate_scores
            elif ask.scores == "visible":
                found.scores_BLS = scores_BLS.masked_fill(~visible_BLS, -torch.inf)
        return out_BLHV, found

    def choose(self, scores_BLS: torch.Tensor, visible_BLS: torch.Tensor, layout: Layout) -> torch.Tensor:
        """The top-k of each row as compact indices `[B, L, min(k, S)]`."""
        slots_BLK = select_topk(scores_BLS, visible_BLS, self.config.index_topk)
        if not layout.padded:
            return slots_BLK
        compact = layout.compact_BS.gather(1, slots_BLK.clamp_min(0).flatten(1).long()).view_as(slots_BLK)
        return torch.where(slots_BLK < 0, -1, compact.to(torch.int32))


@without_autocast
def masked_attention(
    q_nope_BLHN: torch.Tensor,
    q_pe_BLHR: torch.Tensor,
    k_nope_BSHN: torch.Tensor,
    v_BSHV: torch.Tensor,
    k_pe_BSR: torch.Tensor,
    scale: float,
    candidates_BLS: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Non-absorbed MLA: `out_BLHV` in q's dtype and the probabilities `[B, H, L, S]` in at least fp32.

    Products and softmax are in at least fp32, whatever the dtype of queries, keys and values. A row without candidates gives
    probabilities 0 and output 0.
    """
    logits = torch.einsum("blhn,bshn->bhls", at_least_fp32(q_nope_BLHN), at_least_fp32(k_nope_BSHN))
    logits = logits + torch.einsum("blhr,bsr->bhls", at_least_fp32(q_pe_BLHR), at_least_fp32(k_pe_BSR))
    allowed = candidates_BLS[:, None]
    # A row of −inf alone would give NaN: such rows get uniform logits, and 0 afterwards.
    empty = ~allowed.any(-1, keepdim=True)
    probs = (logits * scale).masked_fill(~allowed & ~empty, -torch.inf).softmax(-1).masked_fill(~allowed, 0.0)
    out = torch.einsum("bhls,bshv->blhv", probs, at_least_fp32(v_BSHV))
    return out.to(q_nope_BLHN.dtype), probs


def attention_target(probs_BHLS: torch.Tensor) -> torch.Tensor:
    """p `[B, L, S]`, detached: probabilities summed over heads, then L1-normalised along the keys (report eq. 3)."""
    summed = probs_BHLS.detach().sum(1)
    mass = summed.sum(-1, keepdim=True)
    return torch.where(mass > 0, summed / mass.clamp_min(torch.finfo(summed.dtype).tiny), 0.0)
