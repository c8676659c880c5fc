"""Gradients of the dense divergence in the indexer's inputs, from dI = softmax(I) - p (report eq. 3).

Shape legend: C query rows of a chunk, n key slots that the chunk visits, S key slots, J indexer heads, E indexer head
dim, G groups of heads.

    a_j = q_j . k     dw_j = sum_s dI relu(a_j)     dq_j = w_j sum_s dI 1[a_j > 0] k     dk = sum_tj dI w_j 1[a_j > 0] q_j

The a_j are recomputed, twice. One kernel stays at its queries: a program owns a head of a tile of rows and walks over
the keys, so dq and dw come out whole. The other stays at its keys: a program owns a tile of keys and walks over heads
and rows, and adds to what earlier chunks left; the groups that share a tile's heads have a sum each. Every sum so has
one owner and one order, and no float is added atomically.

What a row may not see has dI = 0, but 0 * NaN would leak. So both kernels want operands without NaN or infinities
(zeros there do); where a row sees such a value its score is NaN, then its logsumexp and its dI, which mark every
gradient it has. For the same reason dI is multiplied by 0 or 1, not chosen.

Scores, p and dI of a chunk lie in buffers whose rows are a multiple of 16 long. Loads and stores are masked by that
length, which the compiler can tell to be even, and not by the visible range, which would make them one element wide.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.common import KernelSpec, interpreted
from optimized.kernels.index_logits import PLAIN_TILE, Tile, is_plain, load_rows, padded, relu, visible_span

# Programs of the key-stationary kernel that a GPU should have to be busy: heads are divided until there are so many.
BUSY_PROGRAMS = 256


def dense_dq_tile(arch: int, dtype: torch.dtype, width: int) -> Tile:
    """The tile of `dense_dq_kernel`."""
    if interpreted():
        return Tile(64, 128, 4, 1)
    if is_plain(dtype, width):
        return PLAIN_TILE
    return Tile(128, 64, 8, 3 if arch >= 90 else 2)


def dense_dk_tile(dtype: torch.dtype, width: int) -> Tile:
    """The tile of `dense_dk_kernel`."""
    if interpreted():
        return Tile(64, 128, 4, 1)
    return PLAIN_TILE if is_plain(dtype, width) else Tile(64, 128, 8, 2)


def head_groups(keys: int, heads: int, tile: Tile) -> int:
    """Into how many groups `dense_dk` divides the heads; by sizes alone, so that sums are the same everywhere."""
    return max(1, min(heads, BUSY_PROGRAMS // max(1, triton.cdiv(keys, tile.keys))))


@triton.jit
def dense_dq_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    w_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    di_ptr: tl.tensor,
    dq_ptr: tl.tensor,
    dw_ptr: tl.tensor,
    rows: tl.tensor,
    keys: tl.tensor,
    heads: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    di_row: tl.tensor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_E)
    live = row < rows
    start = tl.load(bounds_ptr + 2 * row, mask=live, other=0)
    end = tl.load(bounds_ptr + 2 * row + 1, mask=live, other=0)
    low, high = visible_span(start, end)
    inside = tl.minimum(row, rows - 1)
    q = load_rows(q_ptr + head * q_head, inside, q_row, lane, E, BLOCK_E)
    dq = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    dw = tl.zeros([BLOCK_M], tl.float32)
    for first_key in range(tl.minimum(low, high) // BLOCK_N * BLOCK_N, high, BLOCK_N):
        key = first_key + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, tl.minimum(key, keys - 1), k_row, lane, E, BLOCK_E)
        a = tl.dot(q, tl.trans(k), input_precision="ieee")
        visible = (key[None, :] >= start[:, None]) & (key[None, :] < end[:, None])
        stored = live[:, None] & (key < di_row)[None, :]
        di = tl.load(di_ptr + row.to(tl.int64)[:, None] * di_row + key[None, :], mask=stored, other=0.0)
        di = tl.where(visible, di, 0.0)
        dw += tl.sum(tl.where(visible, di * relu(a), 0.0), 1)
        dq += tl.dot((di * (a > 0.0).to(tl.float32)).to(k.dtype), k, input_precision="ieee")
    dw_offset = row.to(tl.int64) * heads + head
    w = tl.load(w_ptr + head * rows + inside)
    tl.store(dw_ptr + dw_offset, dw, mask=live)
    dq_ptrs = dq_ptr + dw_offset[:, None] * E + lane[None, :]
    tl.store(dq_ptrs, dq * w[:, None], mask=live[:, None] & (lane < E)[None, :])


@triton.jit
def dense_dk_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    w_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    di_ptr: tl.tensor,
    dk_ptr: tl.tensor,
    rows: tl.tensor,
    keys: tl.tensor,
    heads: tl.tensor,
    group_heads: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    di_row: tl.tensor,
    dk_group: tl.tensor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    first_key = tl.program_id(0) * BLOCK_N
    key = first_key + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_E)
    # The rows between the first and the last tile of rows that see one of these keys.
    low = rows
    high = 0
    for first in range(0, rows, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        start = tl.load(bounds_ptr + 2 * row, mask=row < rows, other=0)
        end = tl.load(bounds_ptr + 2 * row + 1, mask=row < rows, other=0)
        seen_low, seen_high = visible_span(start, end)
        seen = (first_key < seen_high) & (first_key + BLOCK_N > seen_low)
        low = tl.where(seen, tl.minimum(low, first), low)
        high = tl.where(seen, first + BLOCK_M, high)
    tiles = tl.maximum(tl.cdiv(high - low, BLOCK_M), 0)

    first_head = tl.program_id(1) * group_heads
    own_heads = tl.minimum(group_heads, heads - first_head)
    k = load_rows(k_ptr, tl.minimum(key, keys - 1), k_row, lane, E, BLOCK_E)
    dk = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    # One loop over heads and rows: two would drain the pipeline of loads at every head.
    for step in range(own_heads * tiles):
        head = first_head + step // tiles
        row = low + step % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        live = row < rows
        inside = tl.minimum(row, rows - 1)
        q = load_rows(q_ptr + head.to(tl.int64) * q_head, inside, q_row, lane, E, BLOCK_E)
        w = tl.load(w_ptr + head.to(tl.int64) * rows + inside)
        start = tl.load(bounds_ptr + 2 * row, mask=live, other=0)
        end = tl.load(bounds_ptr + 2 * row + 1, mask=live, other=0)
        visible = (key[:, None] >= start[None, :]) & (key[:, None] < end[None, :])
        stored = live[None, :] & (key < di_row)[:, None]
        di = tl.load(di_ptr + row.to(tl.int64)[None, :] * di_row + key[:, None], mask=stored, other=0.0)
        di = tl.where(visible, di, 0.0)
        a = tl.dot(k, tl.trans(q), input_precision="ieee")
        dk += tl.dot((di * w[None, :] * (a > 0.0).to(tl.float32)).to(q.dtype), q, input_precision="ieee")
    dk_ptrs = dk_ptr + tl.program_id(1).to(tl.int64) * dk_group + key.to(tl.int64)[:, None] * E + lane[None, :]
    mask = (key < keys)[:, None] & (lane < E)[None, :]
    tl.store(dk_ptrs, tl.load(dk_ptrs, mask=mask, other=0.0) + dk, mask=mask)


def dense_dq(
    q_CJE: Tensor,
    k_nE: Tensor,
    w_CJ: Tensor,
    bounds_C2: Tensor,
    di_Cn: Tensor,
    dq_CJE: Tensor,
    dw_CJ: Tensor,
    tile: Tile,
) -> None:
    """Fills `dq_CJE` and `dw_CJ`, contiguous fp32. q and k are of one dtype, w fp32; none has NaN or infinities.

    bounds are int32 and counted from the first of the n keys; only dI within them is read.
    """
    C, J, E = q_CJE.shape
    dense_dq_kernel[J, triton.cdiv(C, tile.rows)](
        q_CJE,
        k_nE,
        # The rows of a tile read one head's weights together.
        w_CJ.T.contiguous(),
        bounds_C2,
        di_Cn,
        dq_CJE,
        dw_CJ,
        C,
        len(k_nE),
        J,
        q_CJE.stride(0),
        q_CJE.stride(1),
        k_nE.stride(0),
        di_Cn.stride(0),
        E=E,
        BLOCK_E=padded(E),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def dense_dk(
    q_CJE: Tensor, k_nE: Tensor, w_CJ: Tensor, bounds_C2: Tensor, di_Cn: Tensor, dk_GnE: Tensor, tile: Tile
) -> None:
    """Adds the chunk's share to `dk_GnE`, fp32 with contiguous rows: G sums, each over a part of the heads.

    The other arguments are as for `dense_dq`.
    """
    (C, J, E), n = q_CJE.shape, len(k_nE)
    dense_dk_kernel[triton.cdiv(n, tile.keys), len(dk_GnE)](
        q_CJE,
        k_nE,
        # The rows of a tile read one head's weights together.
        w_CJ.T.contiguous(),
        bounds_C2,
        di_Cn,
        dk_GnE,
        C,
        n,
        J,
        triton.cdiv(J, len(dk_GnE)),
        q_CJE.stride(0),
        q_CJE.stride(1),
        k_nE.stride(0),
        di_Cn.stride(0),
        dk_GnE.stride(0),
        E=E,
        BLOCK_E=padded(E),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def specs(arch: int) -> list[KernelSpec]:
    """Both kernels at V3.2's dims: 64 heads of 128 lanes, bf16."""
    inputs = {"q_ptr": "*bf16", "k_ptr": "*bf16", "w_ptr": "*fp32", "bounds_ptr": "*i32", "di_ptr": "*fp32"}
    sizes = dict.fromkeys(("rows", "keys", "heads"), "i32")
    strides = dict.fromkeys(("q_row", "q_head", "k_row", "di_row"), "i32")
    dq_signature = {**inputs, "dq_ptr": "*fp32", "dw_ptr": "*fp32", **sizes, **strides}
    dk_signature = {**inputs, "dk_ptr": "*fp32", **sizes, "group_heads": "i32", **strides, "dk_group": "i32"}
    found = []
    for name, kernel, signature, tile in (
        ("indexer_kl.dense_dq", dense_dq_kernel, dq_signature, dense_dq_tile(arch, torch.bfloat16, 128)),
        ("indexer_kl.dense_dk", dense_dk_kernel, dk_signature, dense_dk_tile(torch.bfloat16, 128)),
    ):
        blocks = {"E": 128, "BLOCK_E": 128, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
        signature = {**signature, **dict.fromkeys(blocks, "constexpr")}
        unaligned = frozenset({"keys", "group_heads"}) & frozenset(signature)
        found.append(KernelSpec(name, kernel, signature, blocks, tile.num_warps, tile.num_stages, unaligned))
    return found
