"""DeepSeek V3.2 with blockwise operators: same classes, same config, same `state_dict` keys as `reference`.

`attend` is what is replaced, and how experts, linear layers, norms and the Hadamard rotation compute. Attention works in compact index
space (pads left out, see reference/layout.py), where a row's visible keys are one [start, end) range, and holds no
tensor of L×S elements, forward or backward, unless scores or targets of that size are asked for.

Letters: B batch, L rows, S key slots, H heads, N nope dim, R rope dim, V v_head_dim, C kv_lora_rank,
D = C + R, K selected keys, J indexer heads, E indexer head dim.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from reference import model as reference_model
from reference.attention import Ask, Found, Projected
from reference.attention import DeepseekV32Attention as ReferenceAttention
from reference.config import DeepseekV32Config
from reference.indexer import LightningIndexer as ReferenceIndexer
from reference.indexer import index_scores, selected_mask
from reference.layout import Layout
from reference.moe import MoE as ReferenceMoE
from reference.moe import RMSNorm as ReferenceRMSNorm
from reference.precision import at_least_fp32, without_autocast

from .experts import Experts, experts_implementation
from .linear import Linear, is_linear, linear_implementation
from .norm import RMSNorm
from .ops import dense_mla, hadamard, hadamard_implementation, indexer_kl, indexer_topk, sparse_mla
from .ops.backend import resolve_backend
from .paths import PATHS, AttentionPath, choose_path

# Rows of an asked-for [B, L, S] tensor that are computed at a time.
CHUNK = 64


def check_backend(name: str, device: torch.device | str = "cpu") -> None:
    """Refuse an implementation that any operator of the model lacks.

    Raises:
        ValueError: no such implementation; the sentence names those there are.
    """
    for operator in ("indexer_topk", "sparse_mla", "dense_mla", "indexer_kl"):
        resolve_backend(operator, name, torch.device(device))


def use_fast_parts(module: torch.nn.Module) -> None:
    """Makes plain linear layers and norms in `module` the faster ones, in place: the same parameters and names."""
    faster: dict[type, type] = {torch.nn.Linear: Linear, ReferenceRMSNorm: RMSNorm}
    for part in module.modules():
        part.__class__ = faster.get(type(part), type(part))


@dataclass(slots=True)
class Selection:
    """The keys that one call of one layer chose, kept for the recomputation of that call and for nothing else."""

    topk_BLK: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class CheckpointedAsk(Ask):
    """What a layer under gradient checkpointing is asked for: with a place for its selection."""

    selection: Selection = field(default_factory=Selection)


class LightningIndexer(ReferenceIndexer):
    """The reference's indexer with the operator's Hadamard rotation, and RoPE in place where no gradient is wanted."""

    def _turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return super()._turn(x, cos, sin)
        # `x` was made for this. Its queries are the largest tensor of a forward, 32 KB a token at V3.2's dims.
        pe = x[..., : self.rope_dim]
        pe.copy_(self.rotate(pe, cos, sin))
        return x

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        """By `optimized.ops.hadamard`."""
        return hadamard(x)


class DeepseekV32Attention(ReferenceAttention):
    """MLA and indexer through the operators of `optimized.ops`."""

    indexer_class = LightningIndexer
    backend: str | None = None
    # None lets the dimensions decide.
    forced_path: AttentionPath | None = None

    def attend(
        self, t: Projected, layout: Layout, ask: Ask, replayed_BLK: torch.Tensor | None
    ) -> tuple[torch.Tensor, Found]:
        """As the reference's, by the cheapest of the paths of `optimized.paths`."""
        bounds_BL2 = layout.bounds_BL2
        index_k_BSE = None if t.index_k_BSE is None else layout.compact(t.index_k_BSE)
        own_BLK = used_BLK = None
        path: AttentionPath = "dense"
        if self.config.use_sparse_attention:
            most_visible = int((bounds_BL2[..., 1] - bounds_BL2[..., 0]).max())
            all_selected = replayed_BLK is None and most_visible <= self.config.index_topk
            rows, slots = bounds_BL2.shape[1], layout.num_slots
            backend = resolve_backend("sparse_mla", self.backend, bounds_BL2.device)
            path = self.forced_path or choose_path(self.config, rows, slots, backend, all_selected=all_selected)
            if path == "dense" and not all_selected:
                path = "masked"
            # Nobody asks the indexer which keys to take where all are taken.
            if all_selected:
                own_BLK = all_visible(bounds_BL2, min(self.config.index_topk, slots))
            else:
                own_BLK = self._select(t, index_k_BSE, layout, ask)
            used_BLK = own_BLK if replayed_BLK is None else replayed_BLK.to(torch.int32)
        if path == "gathered":
            assert used_BLK is not None
            out_BLHV, q_BLHD, k, lse_BLH = self._gathered(t, layout, used_BLK)
        else:
            mask_BLK = used_BLK if path == "masked" else None
            out_BLHV, q_BLHD, k, lse_BLH = self._dense(t, layout, mask_BLK)

        found = Found(topk_BLK=own_BLK)
        if ask.kl_loss:
            assert t.index_q_BLJE is not None and index_k_BSE is not None and t.index_w_BLJ is not None
            found.kl_sum = self._kl_sum(
                t.index_q_BLJE, index_k_BSE, t.index_w_BLJ, q_BLHD.detach(), k.detach(), lse_BLH, bounds_BL2, self.scale,
                None if path == "dense" else used_BLK, backend=self.backend,
            )  # fmt: skip
        if ask.scores or ask.kl_target:
            self._materialise(found, t, layout, ask, used_BLK, q_BLHD.detach(), k.detach(), lse_BLH)
        return out_BLHV, found

    def _select(self, t: Projected, index_k_BSE: torch.Tensor | None, layout: Layout, ask: Ask) -> torch.Tensor:
        """The model's own choice, int32 `[B, L, min(k, S)]`; a recomputed layer takes that of its forward again."""
        kept = ask.selection if isinstance(ask, CheckpointedAsk) else Selection()
        if kept.topk_BLK is None:
            assert t.index_q_BLJE is not None and index_k_BSE is not None and t.index_w_BLJ is not None
            kept.topk_BLK, _ = indexer_topk(
                t.index_q_BLJE,
                index_k_BSE,
                t.index_w_BLJ,
                layout.bounds_BL2,
                self.config.index_topk,
                backend=self.backend,
            )
        return kept.topk_BLK

    def _kl_sum(self, *inputs: Any, backend: str | None) -> torch.Tensor:
        """Σ over rows of the KL: what `indexer_kl` makes of the same arguments."""
        kl_sum, _ = indexer_kl(*inputs, backend=backend)
        return kl_sum

    def _gathered(
        self, t: Projected, layout: Layout, indices_BLK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """`out_BLHV`, absorbed `q_BLHD`, latent `kv_BSD`, `lse_BLH`: q_nope·W_uk reads the latents themselves."""
        w_uk_HNC, w_uv_HVC = self.up_projections(t.c_kv_BSC)
        dtype = t.q_nope_BLHN.dtype
        q_BLHD = torch.cat((torch.einsum("blhn,hnc->blhc", t.q_nope_BLHN, w_uk_HNC.to(dtype)), t.q_pe_BLHR), -1)
        kv_BSD = layout.compact(torch.cat((t.c_kv_BSC, t.k_pe_BSR), -1))
        out_BLHC, lse_BLH = sparse_mla(q_BLHD, kv_BSD, indices_BLK, self.scale, self.latent_dim, backend=self.backend)
        out_BLHV = torch.einsum("blhc,hvc->blhv", out_BLHC, w_uv_HVC.to(dtype))
        return out_BLHV, q_BLHD, kv_BSD, lse_BLH

    def up_projections(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """W_uk `[H, N, C]` and W_uv `[H, V, C]`, for latents `like`.

        A kv_b_proj that is more than a linear layer (an adapter, an offloading hook) is asked for its matrix by
        applying it to the identity; dropout of an adapter then drops latent channels for all tokens at once.
        """
        proj = self.kv_b_proj
        if is_linear(proj):
            weight = proj.weight
        else:
            weight = proj(torch.eye(self.latent_dim, dtype=like.dtype, device=like.device)).T
        w_uk, w_uv = weight.unflatten(0, (self.n_heads, -1)).split([self.nope_dim, self.v_dim], dim=1)
        return w_uk, w_uv

    def _dense(
        self, t: Projected, layout: Layout, indices_BLK: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """`out_BLHV`, `q_BLHD`, `k_BSHD`, `lse_BLH`, D = N + R: keys and values expanded a head, `indices_BLK` a mask."""
        c_kv, k_pe = layout.compact(t.c_kv_BSC), layout.compact(t.k_pe_BSR)
        k_nope, v_BSHV = self.keys_and_values(c_kv)
        k_BSHD = torch.cat((k_nope, k_pe[:, :, None].expand(-1, -1, self.n_heads, -1)), -1)
        q_BLHD = torch.cat((t.q_nope_BLHN, t.q_pe_BLHR), -1)
        out_BLHV, lse_BLH = dense_mla(
            q_BLHD, k_BSHD, v_BSHV, layout.bounds_BL2, self.scale, indices_BLK, backend=self.backend
        )
        return out_BLHV, q_BLHD, k_BSHD, lse_BLH

    def _target_rows(self, q_BCHD: torch.Tensor, k: torch.Tensor, lse_BCH: torch.Tensor) -> torch.Tensor:
        """As the function of that name, at the model's scale."""
        return _target_rows(q_BCHD, k, lse_BCH, self.scale)

    def _materialise(
        self,
        found: Found,
        t: Projected,
        layout: Layout,
        ask: Ask,
        used_BLK: torch.Tensor | None,
        q_BLHD: torch.Tensor,
        k: torch.Tensor,
        lse_BLH: torch.Tensor,
    ) -> None:
        """The `[B, L, S]` answers, by row chunks: only they themselves have that size."""
        length = q_BLHD.shape[1]
        scores, targets = [], []
        visible_BLS = layout.visible_BLS()
        candidates_BLS = visible_BLS
        if used_BLK is not None:
            candidates_BLS = selected_mask(layout.to_slots(used_BLK), layout.num_slots)
        shown_BLS = visible_BLS if ask.scores == "visible" else candidates_BLS
        for start in range(0, length, CHUNK):
            rows = slice(start, min(start + CHUNK, length))
            if ask.scores:
                assert t.index_q_BLJE is not None and t.index_k_BSE is not None and t.index_w_BLJ is not None
                part = checkpoint(
                    index_scores,
                    t.index_q_BLJE[:, rows],
                    t.index_k_BSE,
                    t.index_w_BLJ[:, rows],
                    use_reentrant=False,
                )
                scores.append(part.masked_fill(~shown_BLS[:, rows], -torch.inf))
            if ask.kl_target:
                p = self._target_rows(q_BLHD[:, rows], k, lse_BLH[:, rows])
                p = p.gather(-1, layout.compact_BS[:, None, :].expand_as(p)) if layout.padded else p
                targets.append(p.masked_fill(~candidates_BLS[:, rows], 0.0))
        if scores:
            found.scores_BLS = torch.cat(scores, 1)
        if targets:
            found.kl_target_BLS = torch.cat(targets, 1)


def all_visible(bounds_BL2: torch.Tensor, width: int) -> torch.Tensor:
    """int32 `[B, L, width]`: every key in a row's bounds, ascending, −1 at the tail."""
    start_BL1, end_BL1 = bounds_BL2.split(1, dim=-1)
    slots_BLK = start_BL1 + torch.arange(width, device=bounds_BL2.device)
    return torch.where(slots_BLK < end_BL1, slots_BLK, -1).to(torch.int32)


@torch.no_grad()
@without_autocast
def _target_rows(q_BCHD: torch.Tensor, k: torch.Tensor, lse_BCH: torch.Tensor, scale: float) -> torch.Tensor:
    """p of C rows on every compact key, before the mask: the heads' mean of exp(z − lse); `k` shared or a head's."""
    pattern = "bchd,bsd->bchs" if k.dim() == 3 else "bchd,bshd->bchs"
    logits = torch.einsum(pattern, at_least_fp32(q_BCHD), at_least_fp32(k)) * scale
    # Rows without keys have lse −inf; the mask zeroes them, and 0 keeps the exponential finite.
    lse = lse_BCH.masked_fill(lse_BCH == -torch.inf, torch.inf)
    return (logits - lse[..., None]).exp().mean(2)


class MoE(ReferenceMoE):
    """The reference's block with grouped experts."""

    experts_class = Experts


class DeepseekV32DecoderLayer(reference_model.DeepseekV32DecoderLayer):
    """The reference's block around the blockwise attention and the grouped experts."""

    attention_class = DeepseekV32Attention
    moe_class = MoE

    def __call__(self, x_BLM: torch.Tensor, layout: Layout, rotary: Any, ask: Ask, *args: Any, **kwargs: Any) -> Any:
        """Gives each call that will be recomputed a place of its own for its selection, however calls interleave."""
        if self.gradient_checkpointing and self.training:
            ask = CheckpointedAsk(ask.scores, ask.kl_target, ask.kl_loss, ask.decisions)
        return super().__call__(x_BLM, layout, rotary, ask, *args, **kwargs)


class DeepseekV32Model(reference_model.DeepseekV32Model):
    """The reference's backbone with these layers."""

    layer_class = DeepseekV32DecoderLayer

    def __init__(self, config: DeepseekV32Config) -> None:
        super().__init__(config)
        use_fast_parts(self)


class DeepseekV32ForCausalLM(reference_model.DeepseekV32ForCausalLM):
    """The reference's causal LM on this backbone."""

    backbone_class = DeepseekV32Model

    def __init__(self, config: DeepseekV32Config) -> None:
        super().__init__(config)
        use_fast_parts(self)

    @property
    def backend(self) -> str:
        """The implementation of the operators in use: the one set, or the device's default."""
        return resolve_backend("sparse_mla", self.model.layers[0].self_attn.backend, self.device)

    @backend.setter
    def backend(self, name: str | None) -> None:
        if name is not None:
            check_backend(name, self.device)
        for layer in self.model.layers:
            layer.self_attn.backend = name

    @property
    def attention_path(self) -> AttentionPath | None:
        """The path of sparse attention that every layer takes: the one set, or None, where dimensions decide."""
        path: AttentionPath | None = self.model.layers[0].self_attn.forced_path
        return path

    @attention_path.setter
    def attention_path(self, path: AttentionPath | None) -> None:
        if path is not None and path not in PATHS:
            raise ValueError(f"attention_path is {path!r}; it must be None or one of {', '.join(PATHS)}.")
        for layer in self.model.layers:
            layer.self_attn.forced_path = path


def implementations(
    config: DeepseekV32Config, rows: int, *, backend: str | None = None, device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, str]:  # fmt: skip
    """What computes a forward of `rows` tokens without a cache, by part of the model: for records and reports.

    Raises:
        ValueError: a backend that does not exist, or cannot be used here.
    """
    device = torch.device(device)
    operators = resolve_backend("sparse_mla", backend, device)
    path: AttentionPath = "dense"
    if config.use_sparse_attention:
        path = choose_path(config, rows, rows, operators, all_selected=rows <= config.index_topk)
    return {
        "operators": operators,
        "attention": path,
        "experts": experts_implementation(config.hidden_size, config.moe_intermediate_size, dtype),
        "hadamard": hadamard_implementation(device),
        "linear": linear_implementation(device, dtype),
    }
