"""The native `indexer_kl`; see `optimized.ops.indexer_kl` for its contract and indexer_kl_*.cpp for the two plans.

Selected keys that the heads share are read by their slots. Keys of a range, and keys per head, are walked over,
which needs finite inputs; others, which no healthy run has, go through the torch implementation.
"""

import torch
from torch import Tensor

from optimized.native.build import call
from optimized.native.inputs import all_finite, needs_fp64, packed32, padded, padded32, slots32, through_torch
from optimized.ops.backend import register
from optimized.ops.indexer_kl import streamed


@register("indexer_kl", "native")
def _indexer_kl_native(
    iq_BLJE: Tensor,
    ik_BSE: Tensor,
    w_BLJ: Tensor,
    q_BLHD: Tensor,
    k: Tensor,
    lse_BLH: Tensor,
    bounds_BL2: Tensor,
    scale: float,
    indices_BLK: Tensor | None,
) -> tuple[Tensor, Tensor]:
    floats = (iq_BLJE, ik_BSE, w_BLJ, q_BLHD, k)
    gathered = indices_BLK is not None and k.ndim == 3
    if needs_fp64(*floats, lse_BLH) or not (gathered or all_finite(*floats)):
        kl_sum, kl_BL = through_torch("indexer_kl", *floats, lse_BLH, bounds_BL2, scale, indices_BLK)
    else:
        kl_sum, kl_BL = streamed(_stream, *floats, lse_BLH, bounds_BL2, scale, indices_BLK)
    return kl_sum, kl_BL


def _stream(
    iq_BLJE: Tensor,
    ik_BSE: Tensor,
    w_BLJ: Tensor,
    q_BLHD: Tensor,
    k: Tensor,
    lse_BLH: Tensor,
    bounds_BL2: Tensor,
    scale: float,
    indices_BLK: Tensor | None,
    wanted: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """The rows' divergences, and the gradients of their sum."""
    (B, L, J, E), S, (H, D) = iq_BLJE.shape, ik_BSE.shape[1], q_BLHD.shape[2:]
    kl_BL = torch.empty(B, L)
    grads: list[Tensor | None] = [None, None, None]
    if wanted:
        grads = [torch.empty(B, L, J, E), torch.zeros(B, S, padded(E)), torch.empty(B, L, J)]
    if indices_BLK is not None and k.ndim == 3:
        keys, index_keys = padded32(k), padded32(ik_BSE)
        call(
            "indexer_kl_selected", packed32(iq_BLJE), index_keys, packed32(w_BLJ), packed32(q_BLHD), keys,
            packed32(lse_BLH), slots32(bounds_BL2), slots32(indices_BLK), float(scale),
            B, L, S, indices_BLK.shape[-1], J, E, index_keys.shape[-1], H, D, keys.shape[-1], kl_BL, *grads,
        )  # fmt: skip
    else:
        K = 0 if indices_BLK is None else indices_BLK.shape[-1]
        call(
            "indexer_kl_dense", packed32(iq_BLJE), packed32(ik_BSE), packed32(w_BLJ), packed32(q_BLHD),
            packed32(k), packed32(lse_BLH), slots32(bounds_BL2),
            None if indices_BLK is None else slots32(indices_BLK), float(scale),
            B, L, S, K, J, E, H, D, H if k.ndim == 4 else 1, kl_BL, *grads,
        )  # fmt: skip
    diq_BLJE, dik, dw_BLJ = grads
    if diq_BLJE is None or dik is None or dw_BLJ is None:
        return kl_BL, None
    return kl_BL, (diq_BLJE, dik[..., :E], dw_BLJ)
