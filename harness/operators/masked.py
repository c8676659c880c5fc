"""Both attentions in one form, with their gradients written out: what the plain definitions leave to autograd.

    z = scale · q · k      P = softmax of z over the visible keys      out = P v
    dP = dout · v      Δ = Σ P dP      dS = scale · P (dP − Δ)      dq = dS k      dk = dSᵀ q      dv = Pᵀ dout

Letters: B batch, L query rows, S key slots, H attention heads, D width of a query or key, V width of a value.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from reference.indexer import selected_mask

from .bench import Call
from .plain import visible_keys


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
