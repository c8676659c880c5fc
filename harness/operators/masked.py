"""Attention and divergence with their gradients written out: what the plain definitions leave to autograd.

Both attentions have one form:

    z = scale · q · k      P = softmax of z over the visible keys      out = P v
    dP = dout · v      Δ = Σ P dP      dS = scale · P (dP − Δ)      dq = dS k      dk = dSᵀ q      dv = Pᵀ dout

And the indexer's divergence (spec 3.3), with a_j = q_j · k and I = Σ_j w_j ReLU(a_j):

    dI = softmax(I) − p      dw_j = Σ dI ReLU(a_j)      dq_j = Σ dI w_j 1[a_j > 0] k      dk = Σ dI w_j 1[a_j > 0] q_j

Letters: B batch, L query rows, S key slots, H attention heads, D width of a query or key, V width of a value,
J indexer heads, E width of an indexer head.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from reference.indexer import index_scores, selected_mask

from .bench import Call
from .plain import kl_target, visible_keys


@dataclass(frozen=True)
class MaskedAttention:
    """One call of an attention in fp64, every key that a row may not see hidden by `visible_BLS`.

    `d_v` is the width of the values in a latent that is key and value at once; None where values are their own tensor.
    """

    q_BLHD: torch.Tensor
    k_BSHD: torch.Tensor
    v_BSHV: torch.Tensor
    visible_BLS: torch.Tensor
    scale: float
    dout_BLHV: torch.Tensor | None
    d_v: int | None

    @classmethod
    def of(cls, call: Call) -> "MaskedAttention":
        """The masked form of a call of sparse_mla (distinct indices) or dense_mla."""
        a = call.to(torch.float64).arguments
        dout = None if call.cotangent is None else call.cotangent.double()
        if call.operator == "dense_mla":
            visible = visible_keys(a["bounds_BL2"], a["k_BSHD"].shape[1], a.get("indices_BLK"))
            return cls(a["q_BLHD"], a["k_BSHD"], a["v_BSHV"], visible, a["scale"], dout, None)
        k = a["kv_BSD"][:, :, None].expand(-1, -1, a["q_BLHD"].shape[2], -1)
        visible = selected_mask(a["indices_BLK"], k.shape[1])
        return cls(a["q_BLHD"], k, k[..., : a["d_v"]], visible, a["scale"], dout, a["d_v"])

    @cached_property
    def logits_BLHS(self) -> torch.Tensor:
        """z, −inf where hidden."""
        z = torch.einsum("blhd,bshd->blhs", self.q_BLHD, self.k_BSHD) * self.scale
        return z.masked_fill(~self.visible_BLS[:, :, None], -torch.inf)

    @cached_property
    def empty_BL(self) -> torch.Tensor:
        """Which rows have no keys."""
        return ~self.visible_BLS.any(-1)

    @cached_property
    def weights_BLHS(self) -> torch.Tensor:
        """P, 0 in rows without keys."""
        empty = self.empty_BL[..., None, None]
        return self.logits_BLHS.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)

    @cached_property
    def dP_BLHS(self) -> torch.Tensor:
        """dout · v of every key, hidden ones too."""
        assert self.dout_BLHV is not None
        return torch.einsum("blhv,bshv->blhs", self.dout_BLHV, self.v_BSHV)

    @cached_property
    def dS_BLHS(self) -> torch.Tensor:
        """The gradient of q · k."""
        delta = (self.weights_BLHS * self.dP_BLHS).sum(-1, keepdim=True)
        return self.weights_BLHS * (self.dP_BLHS - delta) * self.scale

    def gradients(self, dS_BLHS: torch.Tensor, weights_BLHS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gradients by the name of the argument, from `dS` and from the weights that meet `dout`."""
        assert self.dout_BLHV is not None
        dq = torch.einsum("blhs,bshd->blhd", dS_BLHS, self.k_BSHD)
        dk = torch.einsum("blhs,blhd->bshd", dS_BLHS, self.q_BLHD)
        dv = torch.einsum("blhs,blhv->bshv", weights_BLHS, self.dout_BLHV)
        if self.d_v is None:
            return {"q_BLHD": dq, "k_BSHD": dk, "v_BSHV": dv}
        dkv = dk.sum(2)
        dkv[..., : self.d_v] += dv.sum(2)
        return {"q_BLHD": dq, "kv_BSD": dkv}


@dataclass(frozen=True)
class IndexerDivergence:
    """One call of indexer_kl in fp64: both distributions over each row's keys, and the gradient that follows."""

    q_BLJE: torch.Tensor
    k_BSE: torch.Tensor
    w_BLJ: torch.Tensor
    softmax_BLS: torch.Tensor
    p_BLS: torch.Tensor
    upstream: float

    @classmethod
    def of(cls, call: Call) -> "IndexerDivergence":
        """The two distributions of a call; 0 in rows without keys."""
        a = call.to(torch.float64).arguments
        indexer = a["iq_BLJE"], a["ik_BSE"], a["w_BLJ"]
        visible = visible_keys(a["bounds_BL2"], a["ik_BSE"].shape[1], a.get("indices_BLK"))
        empty = ~visible.any(-1, keepdim=True)
        softmax = (
            index_scores(*indexer).masked_fill(~visible & ~empty, -torch.inf).softmax(-1).masked_fill(~visible, 0.0)
        )
        p = kl_target(a["q_BLHD"], a["k"], a["lse_BLH"], visible, a["scale"])
        assert call.cotangent is not None
        return cls(*indexer, softmax, p, float(call.cotangent))

    def gradients(self, dI_BLS: torch.Tensor, *, gated: bool = True, weighted: bool = True) -> dict[str, torch.Tensor]:
        """Gradients by the name of the argument; without the ReLU's gate, or the head weights, as a fault would have it."""
        dots_BLJS = torch.einsum("blje,bse->bljs", self.q_BLJE, self.k_BSE)
        dI_BLS = dI_BLS * self.upstream
        flow_BLJS = dI_BLS[:, :, None] * (self.w_BLJ[..., None] if weighted else 1.0)
        flow_BLJS = flow_BLJS * ((dots_BLJS > 0) if gated else torch.ones_like(dots_BLJS))
        return {
            "iq_BLJE": torch.einsum("bljs,bse->blje", flow_BLJS, self.k_BSE),
            "ik_BSE": torch.einsum("bljs,blje->bse", flow_BLJS, self.q_BLJE),
            "w_BLJ": torch.einsum("bls,bljs->blj", dI_BLS, dots_BLJS.relu() if gated else dots_BLJS),
        }
