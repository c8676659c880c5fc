"""The indexer's selection on Triton kernels: scores of a chunk of query rows, then the exact top-k of each of them.

Shape legend: B batch, L query rows, S key slots, J indexer heads, E indexer head dim, K selected keys, C queries in a
chunk, n key slots that a chunk visits.

Only one chunk's scores exist at a time, C x n in fp32. Chunks begin at multiples of the tile, and so does the range of
keys that a chunk visits, so that each score comes from the same place of the same tile however the rows are cut.
"""

import torch
from torch import Tensor

from optimized.kernels.common import architecture, check_runnable
from optimized.kernels.index_logits import index_logits, logits_tile, operand, row_length, rows_per_chunk
from optimized.kernels.radix_topk import radix_topk
from optimized.ops.backend import carve, register, row_chunks


@register("indexer_topk", "triton")
def indexer_topk_triton(
    q_BLJE: Tensor, k_BSE: Tensor, w_BLJ: Tensor, bounds_BL2: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """`optimized.ops.indexer_topk` by kernels; fp32 scores are exact to fp32, as IEEE products without tensor cores.

    q and k of one 16-bit dtype are multiplied in it, with fp32 sums; otherwise both are taken to fp32. Raises ValueError
    for tensors that no kernel can take here (`check_runnable`).
    """
    check_runnable("indexer_topk", q_BLJE, k_BSE, w_BLJ)
    B, L = q_BLJE.shape[:2]
    S, device = k_BSE.shape[1], q_BLJE.device
    dtype = torch.promote_types(q_BLJE.dtype, k_BSE.dtype)
    tile = logits_tile(architecture(device), dtype, k_BSE.shape[2])
    rows = rows_per_chunk(L, 4 * S, tile.rows)
    indices_BLK = torch.full((B, L, min(k, S)), -1, dtype=torch.int32, device=device)
    lse_BL = torch.full((B, L), -torch.inf, dtype=torch.float32, device=device)
    buffer = torch.empty(min(rows, L) * (S + tile.keys), dtype=torch.float32, device=device)
    with torch.cuda.device_of(q_BLJE):
        for b, first, last, low, high in row_chunks(bounds_BL2, rows):
            base = low // tile.keys * tile.keys
            bounds_C2 = (bounds_BL2[b, first:last] - base).int().contiguous()
            logits_Cn = carve(buffer, last - first, row_length(high - base))
            lse_BL[b, first:last] = index_logits(
                operand(q_BLJE[b, first:last], dtype),
                operand(k_BSE[b, base:high], dtype),
                w_BLJ[b, first:last].float().contiguous(),
                bounds_C2,
                logits_Cn,
                tile,
            )
            radix_topk(logits_Cn, bounds_C2, min(k, S), base, indices_BLK[b, first:last])
    return indices_BLK, lse_BL
