"""The divergence's target: attention weights averaged over the main heads, recomputed from their logsumexps.

Shape legend: C query rows of a chunk, n key slots that the chunk visits, K selected keys, H attention heads, D q/k
width.

    p[t, s] = 1/H sum_h exp(scale * q[t, h] . k[s] - lse[t, h])

With lse known there is no softmax pass: a program owns a tile of p and adds up the heads in registers, so that no
score of a single head is ever written. Dense tiles are rows x keys, one product a head. Selected keys differ from row
to row, so there a program owns one row and a tile of its keys, and the rows of a product are heads.

D is held as two powers of two (576 as 512 + 64, 192 as 128 + 64), for that is what blocks are sized in.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.common import SHARED_MEMORY, KernelSpec, interpreted
from optimized.kernels.index_logits import PLAIN_TILE, Tile, load_rows, padded, visible_span

LOG2E = tl.constexpr(math.log2(math.e))


def split_width(width: int) -> tuple[int, int]:
    """Two powers of two, 16 at least, that hold `width` lanes together; the second is 0 where one is enough."""
    whole = padded(width)
    if whole in (width, 16):
        return whole, 0
    tail = padded(width - whole // 2)
    return (whole, 0) if tail == whole // 2 else (whole // 2, tail)


def dense_target_tile(arch: int, dtype: torch.dtype, width: int, shared: bool) -> Tile:
    """The largest tile of `dense_target_kernel` whose operands fit."""
    if interpreted():
        return Tile(64, 128, 4, 1)
    # What fits into shared memory behind the first two was found by compiling: the other limit is registers.
    small = [Tile(64, 32, 8, 2) if arch >= 100 else Tile(64, 64, 8, 1)]
    return _largest([Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), *small], arch, dtype, width, shared)


def selected_target_tile(arch: int, dtype: torch.dtype, width: int) -> Tile:
    """The largest tile of `selected_target_kernel`, whose rows are heads."""
    if interpreted():
        return Tile(64, 256, 4, 1)
    tiles = [Tile(64, 32, 8, 2)] if arch >= 100 else [Tile(64, 64, 8, 2), Tile(64, 64, 8, 1)]
    return _largest(tiles, arch, dtype, width, shared=True)


def _largest(tiles: list[Tile], arch: int, dtype: torch.dtype, width: int, shared: bool) -> Tile:
    """The first that fits shared memory: queries are fetched ahead, and keys too, unless the heads share them."""
    if dtype == torch.float32:
        # Without tensor cores operands live in registers.
        return PLAIN_TILE if width <= 256 else Tile(16, 16, 4, 1)
    for tile in tiles:
        fetched, held = (tile.rows, tile.keys) if shared else (tile.rows + tile.keys, 0)
        if (fetched * tile.num_stages + held) * sum(split_width(width)) * dtype.itemsize <= SHARED_MEMORY[arch]:
            return tile
    return PLAIN_TILE


@triton.jit
def dense_target_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    p_ptr: tl.tensor,
    rows: tl.tensor,
    keys: tl.tensor,
    heads: tl.tensor,
    scale: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    p_row: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL_D: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_key = tl.program_id(0) * BLOCK_N
    key = first_key + tl.arange(0, BLOCK_N)
    live = row < rows
    start = tl.load(bounds_ptr + 2 * row, mask=live, other=0)
    end = tl.load(bounds_ptr + 2 * row + 1, mask=live, other=0)
    low, high = visible_span(start, end)
    if (first_key >= high) | (first_key + BLOCK_N <= low):
        return

    WIDTH: tl.constexpr = D if TAIL_D == 0 else BLOCK_D
    lane = tl.arange(0, BLOCK_D)
    # Rows and keys past the last repeat it: that is cheaper than a mask, and nobody reads their weights.
    inside_row = tl.minimum(row, rows - 1)
    inside_key = tl.minimum(key, keys - 1)
    if SHARED:
        k = load_rows(k_ptr, inside_key, k_row, lane, WIDTH, BLOCK_D)
        if TAIL_D > 0:
            k_tail = load_rows(k_ptr + BLOCK_D, inside_key, k_row, tl.arange(0, TAIL_D), D - BLOCK_D, TAIL_D)
    p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(heads):
        if not SHARED:
            k = load_rows(k_ptr, inside_key, k_row, lane, WIDTH, BLOCK_D)
        q = load_rows(q_ptr, inside_row, q_row, lane, WIDTH, BLOCK_D)
        z = tl.dot(q, tl.trans(k), input_precision="ieee")
        if TAIL_D > 0:
            if not SHARED:
                k_tail = load_rows(k_ptr + BLOCK_D, inside_key, k_row, tl.arange(0, TAIL_D), D - BLOCK_D, TAIL_D)
            q_tail = load_rows(q_ptr + BLOCK_D, inside_row, q_row, tl.arange(0, TAIL_D), D - BLOCK_D, TAIL_D)
            z = tl.dot(q_tail, tl.trans(k_tail), z, input_precision="ieee")
        lse = tl.load(lse_ptr + inside_row)
        p += tl.exp2(z * (scale * LOG2E) - (lse * LOG2E)[:, None])
        lse_ptr += rows
        q_ptr += q_head
        k_ptr += k_head
    offsets = row.to(tl.int64)[:, None] * p_row + key[None, :]
    tl.store(p_ptr + offsets, p / heads, mask=live[:, None] & (key < p_row)[None, :])


@triton.jit
def selected_target_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    p_ptr: tl.tensor,
    heads: tl.tensor,
    selected: tl.tensor,
    scale: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    listed = place < selected
    slot = tl.load(slots_ptr + row * selected + place, mask=listed, other=-1)
    if tl.max(slot, 0) < 0:
        return

    # A hidden key is read as key 0, whose weights nobody reads.
    slot = tl.maximum(slot, 0)
    WIDTH: tl.constexpr = D if TAIL_D == 0 else BLOCK_D
    lane = tl.arange(0, BLOCK_D)
    k = load_rows(k_ptr, slot, k_row, lane, WIDTH, BLOCK_D)
    if TAIL_D > 0:
        k_tail = load_rows(k_ptr + BLOCK_D, slot, k_row, tl.arange(0, TAIL_D), D - BLOCK_D, TAIL_D)
    q_ptr += row * q_row
    lse_ptr += row * heads
    p = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, heads, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        inside = tl.minimum(head, heads - 1)
        q = load_rows(q_ptr, inside, q_head, lane, WIDTH, BLOCK_D)
        z = tl.dot(q, tl.trans(k), input_precision="ieee")
        if TAIL_D > 0:
            q_tail = load_rows(q_ptr + BLOCK_D, inside, q_head, tl.arange(0, TAIL_D), D - BLOCK_D, TAIL_D)
            z = tl.dot(q_tail, tl.trans(k_tail), z, input_precision="ieee")
        lse = tl.load(lse_ptr + inside)
        weight = tl.exp2(z * (scale * LOG2E) - (lse * LOG2E)[:, None])
        p += tl.sum(tl.where((head < heads)[:, None], weight, 0.0), 0)
    tl.store(p_ptr + row * selected + place, p / heads, mask=listed)


def dense_target(
    q_CHD: Tensor, k: Tensor, lse_CH: Tensor, bounds_C2: Tensor, scale: float, p_Cn: Tensor, tile: Tile
) -> None:
    """Fills the visible tiles of `p_Cn`; k is [n, D], shared by the heads, or [n, H, D].

    q and k are of one dtype that kernels can read, lse fp32, bounds int32 and counted from the first of the n keys.
    """
    (C, H, D), n, shared = q_CHD.shape, len(k), k.ndim == 2
    block, tail = split_width(D)
    dense_target_kernel[triton.cdiv(n, tile.keys), triton.cdiv(C, tile.rows)](
        q_CHD,
        k,
        # The rows of a tile read one head's logsumexps together.
        lse_CH.T.contiguous(),
        bounds_C2,
        p_Cn,
        C,
        n,
        H,
        scale,
        q_CHD.stride(0),
        q_CHD.stride(1),
        k.stride(0),
        0 if shared else k.stride(1),
        p_Cn.stride(0),
        D=D,
        BLOCK_D=block,
        TAIL_D=tail,
        SHARED=shared,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def selected_target(
    q_CHD: Tensor, k_nD: Tensor, lse_CH: Tensor, slots_CK: Tensor, scale: float, p_CK: Tensor, tile: Tile
) -> None:
    """Fills `p_CK`, with nonsense where `slots_CK` (int32, counted from the first of the n keys) is -1."""
    (C, H, D), K = q_CHD.shape, slots_CK.shape[1]
    block, tail = split_width(D)
    selected_target_kernel[triton.cdiv(K, tile.keys), C](
        q_CHD,
        k_nD,
        lse_CH,
        slots_CK,
        p_CK,
        H,
        K,
        scale,
        q_CHD.stride(0),
        q_CHD.stride(1),
        k_nD.stride(0),
        D=D,
        BLOCK_D=block,
        TAIL_D=tail,
        BLOCK_H=min(tile.rows, padded(H)),
        BLOCK_K=tile.keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def specs(arch: int) -> list[KernelSpec]:
    """Both kernels at V3.2's dims: 128 heads, keys of 192 lanes a head or of 576 lanes that they share; k = 2048."""
    operands = {"q_ptr": "*bf16", "k_ptr": "*bf16", "lse_ptr": "*fp32"}
    strides = dict.fromkeys(("q_row", "q_head", "k_row"), "i32")
    found = []
    for width, shared in ((192, False), (576, True)):
        tile = dense_target_tile(arch, torch.bfloat16, width, shared)
        block, tail = split_width(width)
        blocks = {"D": width, "BLOCK_D": block, "TAIL_D": tail, "SHARED": shared}
        blocks |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
        signature = {**operands, "bounds_ptr": "*i32", "p_ptr": "*fp32", "rows": "i32", "keys": "i32", "heads": "i32"}
        signature |= {"scale": "fp32", **strides, "k_head": "i32", "p_row": "i32", **dict.fromkeys(blocks, "constexpr")}
        name = f"indexer_kl.dense_target_{width}"
        compiled = (tile.num_warps, tile.num_stages)
        found.append(KernelSpec(name, dense_target_kernel, signature, blocks, *compiled, frozenset({"keys"})))
    tile = selected_target_tile(arch, torch.bfloat16, 576)
    block, tail = split_width(576)
    blocks = {"D": 576, "BLOCK_D": block, "TAIL_D": tail, "BLOCK_H": tile.rows, "BLOCK_K": tile.keys}
    signature = {**operands, "slots_ptr": "*i32", "p_ptr": "*fp32", "heads": "i32", "selected": "i32", "scale": "fp32"}
    signature |= {**strides, **dict.fromkeys(blocks, "constexpr")}
    name = "indexer_kl.selected_target_576"
    found.append(KernelSpec(name, selected_target_kernel, signature, blocks, tile.num_warps, tile.num_stages))
    return found
