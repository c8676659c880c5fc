"""Attention over gathered keys: one pass over the selected keys of a row, with an online softmax.

Shape legend: B batch, L query rows, S key slots, H attention heads, D q/k width, V value width (= first d_v columns of
the latent), K selected keys.

A program owns one query row and a block of its heads. All heads share the row's keys, so a step gathers a block of
latents once, as keys and as values, and makes two matrix products of it: the heads are their rows. Programs of one row
follow one another, so that the second finds its keys in the L2 cache. They are counted along one axis of the grid, as
the others end at 65,535.

The latent is cut into parts of a power of two: its V columns into one or two of at most 256 (a block of heads times
512 columns of output, in fp32, does not fit in registers at once), and the remaining D - V, which are key only, into
one. At V3.2's dims that is 256 + 256 + 64.

A slot of -1 is never followed: loads are masked, and zeros stand in for its key. Its logit is -inf. While all logits of
a row are -inf the running maximum is too, and 0 takes its place in differences, since -inf - -inf is NaN. What comes
after the last slot that is not -1 costs nothing.

Logits carry log2(e), so that exponents are of base 2; the logsumexp that is stored is natural.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.common import KernelSpec, architecture, like, widened

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
INF = tl.constexpr(math.inf)
# Slots that a program looks over at once for the last that is not -1.
BLOCK_SLOTS = tl.constexpr(1024)


class Tile(NamedTuple):
    """Heads and keys of a step, and how the kernel is compiled for it."""

    heads: int
    keys: int
    num_warps: int
    num_stages: int


class Parts(NamedTuple):
    """How the latent's columns are cut: V into one or two of width `part`, D - V padded to `rest` (0: there are none)."""

    part: int
    two: bool
    rest: int


def padded(width: int) -> int:
    """The next power of two, at least 16: what matrix products can take."""
    return max(16, triton.next_power_of_2(width))


def parts(D: int, V: int) -> Parts:
    """The parts of a latent of D columns, the first V of which are values."""
    two = V > 256
    return Parts(padded(triton.cdiv(V, 2) if two else V), two, padded(D - V) if D > V else 0)


def block_heads(H: int, most: int) -> int:
    """Heads of a block: all, padded to a power of two, but at most `most`."""
    return min(most, padded(H))


def forward_tile(H: int, K: int, dtype: torch.dtype, arch: int) -> Tile:
    """Tile of the forward kernel.

    On sm_90 64 heads are the fewest that get its warp-group matrix products, and more keys than 32 spill registers. On
    sm_100, accumulators live in tensor memory, whose 512 columns two outputs of 256 for 64 heads would fill, with none
    left for logits: 32 heads take the older matrix products and accumulate in registers. fp32 has no tensor cores.
    """
    if dtype == torch.float32:
        return Tile(block_heads(H, 16), 16, 8, 1)
    return Tile(block_heads(H, 32 if arch >= 100 else 64), min(32, padded(K)), 8, 3 if arch >= 90 else 2)


@triton.jit
def used_slots(index_ptr: tl.tensor, K: tl.tensor) -> tl.tensor:
    """One more than the last position of a row of indices that is not -1."""
    used = 0
    for start in range(0, K, BLOCK_SLOTS):
        position = start + tl.arange(0, BLOCK_SLOTS)
        slot = tl.load(index_ptr + position, mask=position < K, other=-1)
        used = tl.maximum(used, tl.max(tl.where(slot >= 0, position + 1, 0), 0))
    return used


@triton.jit
def load_part(
    base_ptr: tl.tensor,
    offset: tl.tensor,
    inside: tl.tensor,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Columns FIRST to LAST - 1 of the rows that begin at `offset`, zeros up to WIDTH and in rows not `inside`."""
    column = FIRST + tl.arange(0, WIDTH)
    mask = inside[:, None]
    if LAST - FIRST < WIDTH:
        mask &= (column < LAST)[None, :]
    return tl.load(base_ptr + offset[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_part(
    base_ptr: tl.tensor,
    offset: tl.tensor,
    inside: tl.tensor,
    value: tl.tensor,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """The inverse of `load_part`, rounding to the pointer's dtype."""
    column = FIRST + tl.arange(0, WIDTH)
    mask = inside[:, None]
    if LAST - FIRST < WIDTH:
        mask &= (column < LAST)[None, :]
    tl.store(base_ptr + offset[:, None] + column[None, :], value.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_row"])
def sparse_mla_forward_kernel(
    q_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    first_row: tl.tensor,
    K: tl.tensor,
    scale: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    PART: tl.constexpr,
    TWO: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    head_blocks = tl.cdiv(H, BLOCK_H)
    # 64 bits: q passes 2^31 elements at 29,128 rows of V3.2.
    row = (first_row + tl.program_id(0) // head_blocks).to(tl.int64)
    head = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = head < H
    index_ptr = indices_ptr + row * K

    q_offset = (row * H + head) * D
    q0 = load_part(q_ptr, q_offset, is_head, 0, V, PART)
    total0 = tl.zeros((BLOCK_H, PART), tl.float32)
    if TWO:
        q1 = load_part(q_ptr, q_offset, is_head, PART, V, PART)
        total1 = tl.zeros((BLOCK_H, PART), tl.float32)
    if REST > 0:
        q2 = load_part(q_ptr, q_offset, is_head, V, D, REST)
    top = tl.full((BLOCK_H,), -INF, tl.float32)
    weight_sum = tl.zeros((BLOCK_H,), tl.float32)

    for start in range(0, used_slots(index_ptr, K), BLOCK_K):
        position = start + tl.arange(0, BLOCK_K)
        slot = tl.load(index_ptr + position, mask=position < K, other=-1)
        is_key = slot >= 0
        kv_offset = slot.to(tl.int64) * D
        kv0 = load_part(kv_ptr, kv_offset, is_key, 0, V, PART)
        logit = tl.dot(q0, tl.trans(kv0), input_precision="ieee")
        if TWO:
            kv1 = load_part(kv_ptr, kv_offset, is_key, PART, V, PART)
            logit = tl.dot(q1, tl.trans(kv1), logit, input_precision="ieee")
        if REST > 0:
            kv2 = load_part(kv_ptr, kv_offset, is_key, V, D, REST)
            logit = tl.dot(q2, tl.trans(kv2), logit, input_precision="ieee")
        logit = tl.where(is_key[None, :], logit * (scale * LOG2E), -INF)

        new_top = tl.maximum(top, tl.max(logit, 1))
        subtracted = tl.where(new_top == -INF, 0.0, new_top)
        weight = tl.exp2(logit - subtracted[:, None])
        shrink = tl.exp2(top - subtracted)
        weight_sum = weight_sum * shrink + tl.sum(weight, 1)
        weight = weight.to(kv0.dtype)
        total0 = tl.dot(weight, kv0, total0 * shrink[:, None], input_precision="ieee")
        if TWO:
            total1 = tl.dot(weight, kv1, total1 * shrink[:, None], input_precision="ieee")
        top = new_top

    # Only a row without keys has weights that sum to 0: its output is 0 / 1, its logsumexp -inf + 0.
    has_keys = weight_sum != 0
    divisor = tl.where(has_keys, weight_sum, 1.0)
    out_offset = (row * H + head) * V
    store_part(out_ptr, out_offset, is_head, total0 / divisor[:, None], 0, V, PART)
    if TWO:
        store_part(out_ptr, out_offset, is_head, total1 / divisor[:, None], PART, V, PART)
    tl.store(lse_ptr + row * H + head, (top + tl.log2(divisor)) * LN2, mask=is_head)


def forward_constants(D: int, V: int, H: int, tile: Tile) -> Mapping[str, int | bool]:
    """The kernel's compile-time arguments."""
    part, two, rest = parts(D, V)
    return {
        "H": H, "D": D, "V": V, "PART": part, "TWO": two, "REST": rest, "BLOCK_H": tile.heads, "BLOCK_K": tile.keys,
    }  # fmt: skip


def forward(q_BLHD: Tensor, kv_BSD: Tensor, indices_BLK: Tensor, scale: float, d_v: int) -> tuple[Tensor, Tensor]:
    """out_BLHV in q's dtype and lse_BLH in fp32.

    Takes contiguous tensors, q and kv of one dtype, int32 indices.
    """
    B, L, H, D = q_BLHD.shape
    K = indices_BLK.shape[-1]
    dtype, device = q_BLHD.dtype, q_BLHD.device
    tile = forward_tile(H, K, dtype, architecture(device))
    constants = forward_constants(D, d_v, H, tile)
    out_BLHV = torch.empty(B, L, H, d_v, dtype=like(dtype), device=device)
    lse_BLH = torch.empty(B, L, H, dtype=torch.float32, device=device)
    query_BLHD, latent_BSD = widened(q_BLHD), widened(kv_BSD)
    programs = L * triton.cdiv(H, tile.heads)
    # One launch a batch entry: its rows lie one after another, and so do its slots.
    for b in range(B if programs else 0):
        sparse_mla_forward_kernel[(programs,)](
            query_BLHD, latent_BSD[b], indices_BLK, out_BLHV, lse_BLH, b * L, K, scale, **constants,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out_BLHV.to(dtype), lse_BLH


def specs(arch: int) -> list[KernelSpec]:
    """The kernel as launched at V3.2's dims."""
    H, D, V, K = 128, 576, 512, 2048
    tile = forward_tile(H, K, torch.bfloat16, arch)
    constants = forward_constants(D, V, H, tile)
    signature = {
        "q_ptr": "*bf16", "kv_ptr": "*bf16", "indices_ptr": "*i32", "out_ptr": "*bf16", "lse_ptr": "*fp32",
        "first_row": "i32", "K": "i32", "scale": "fp32", **dict.fromkeys(constants, "constexpr"),
    }  # fmt: skip
    return [
        KernelSpec(
            "sparse_mla.forward", sparse_mla_forward_kernel, signature, constants, tile.num_warps, tile.num_stages,
            frozenset({"first_row"}),
        )
    ]  # fmt: skip
