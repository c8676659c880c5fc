"""The native `indexer_topk`; see `optimized.ops.indexer_topk` for its contract and indexer_topk.cpp for its plan."""

import torch
from torch import Tensor

from optimized.native.build import call
from optimized.native.inputs import needs_fp64, packed32, slots32, through_torch
from optimized.ops.backend import register


@register("indexer_topk", "native")
def _indexer_topk_native(
    q_BLJE: Tensor, k_BSE: Tensor, w_BLJ: Tensor, bounds_BL2: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    if needs_fp64(q_BLJE, k_BSE, w_BLJ):
        indices_BLK, lse_BL = through_torch("indexer_topk", q_BLJE, k_BSE, w_BLJ, bounds_BL2, k)
        return indices_BLK, lse_BL
    (B, L, J, E), S = q_BLJE.shape, k_BSE.shape[1]
    K = min(k, S)
    indices_BLK = torch.empty(B, L, K, dtype=torch.int32)
    lse_BL = torch.empty(B, L, dtype=torch.float32)
    call(
        "indexer_topk", packed32(q_BLJE), packed32(k_BSE), packed32(w_BLJ), slots32(bounds_BL2),
        B, L, S, J, E, K, indices_BLK, lse_BL,
    )  # fmt: skip
    return indices_BLK, lse_BL
