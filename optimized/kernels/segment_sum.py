"""Adds many rows into few, in a fixed order and without sorting: target[indices[c, j]] += partial[c, j].

Shape legend: C rows of a chunk, K indices of a row, S target rows, X columns, W words of 32 bits, ceil(C / 32).

The gradient of shared keys is such a sum: every query row c has a share for each key that it selected. Adding the
shares by float atomics gives other bits in every run. Here each (c, j) is given a place instead (a counting sort whose
counters are bitmaps), and then every target row adds up its own shares in ascending c:

    mark     bitmap[s] has bit c set where row c names s        (integer atomics: their order cannot be seen)
    count    n[s] = popcount of bitmap[s], and `first` its exclusive prefix sum
    place    order[first[s] + number of bits of bitmap[s] below c] = c * K + j
    sum      target[s] += partial[order[i]] for i from first[s] to first[s] + n[s] - 1, one after another

As target[s] is where the sum begins, cutting the rows into other chunks does not change a bit of it.

A slot that a row names twice has one bit, so one place. Its shares are then taken to be equal, as they are when they
depend on c and on the slot alone: the one of smallest j is added as many times as the slot is named.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.common import KernelSpec

INT32_MAX = 2**31 - 1

# (c, j) pairs of one row that a program marks or places, target rows that it counts.
BLOCK_PAIRS = 128
BLOCK_COUNTED = 64
# Target rows and columns that a program sums.
BLOCK_SUMMED = 32
BLOCK_COLUMNS = 128
SUMMING_WARPS = 8


@triton.jit
def _mark_kernel(
    indices_ptr: tl.tensor, bitmap_ptr: tl.tensor, K: tl.tensor, W: tl.tensor, BLOCK: tl.constexpr
) -> None:
    c = tl.program_id(0)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(indices_ptr + c.to(tl.int64) * K + j, mask=j < K, other=-1)
    word_ptr = bitmap_ptr + slot.to(tl.int64) * W + c // 32
    tl.atomic_or(word_ptr, tl.full((BLOCK,), 1, tl.int32) << (c % 32), mask=slot >= 0, sem="relaxed")


@triton.jit
def _popcount(word: tl.tensor) -> tl.tensor:
    """Bits set in each uint32. By hand: the interpreter knows no libdevice."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def _count_kernel(
    bitmap_ptr: tl.tensor, count_ptr: tl.tensor, S: tl.tensor, W: tl.tensor, W_PADDED: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.arange(0, W_PADDED)
    word_ptr = bitmap_ptr + slot.to(tl.int64)[:, None] * W + w[None, :]
    words = tl.load(word_ptr, mask=(slot < S)[:, None] & (w < W)[None, :], other=0)
    tl.store(count_ptr + slot, tl.sum(_popcount(words.to(tl.uint32, bitcast=True)), 1), mask=slot < S)


@triton.jit
def _place_kernel(
    indices_ptr: tl.tensor,
    bitmap_ptr: tl.tensor,
    end_ptr: tl.tensor,
    count_ptr: tl.tensor,
    order_ptr: tl.tensor,
    times_ptr: tl.tensor,
    K: tl.tensor,
    W: tl.tensor,
    W_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    c = tl.program_id(0)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(indices_ptr + c.to(tl.int64) * K + j, mask=j < K, other=-1)
    named = slot >= 0
    w = tl.arange(0, W_PADDED)
    # Words before that of c count in full, its own word below bit c, later words not at all.
    below = tl.where(w < c // 32, -1, tl.where(w == c // 32, (tl.full((W_PADDED,), 1, tl.int32) << (c % 32)) - 1, 0))
    word_ptr = bitmap_ptr + slot.to(tl.int64)[:, None] * W + w[None, :]
    words = tl.load(word_ptr, mask=named[:, None] & (w < W)[None, :], other=0) & below[None, :]
    rank = tl.sum(_popcount(words.to(tl.uint32, bitcast=True)), 1)
    end = tl.load(end_ptr + slot, mask=named, other=0)
    place = end - tl.load(count_ptr + slot, mask=named, other=0) + rank
    # Atomics, so that a slot named twice counts twice and the smallest j wins whoever comes first.
    tl.atomic_min(order_ptr + place, c * K + j, mask=named, sem="relaxed")
    tl.atomic_add(times_ptr + place, tl.full((BLOCK,), 1, tl.int32), mask=named, sem="relaxed")


@triton.jit
def _sum_kernel(
    target_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    end_ptr: tl.tensor,
    count_ptr: tl.tensor,
    order_ptr: tl.tensor,
    times_ptr: tl.tensor,
    S: tl.tensor,
    X: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_X: tl.constexpr,
) -> None:
    slot = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    column = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    inside = column[None, :] < X
    count = tl.load(count_ptr + slot, mask=slot < S, other=0)
    first = tl.load(end_ptr + slot, mask=slot < S, other=0) - count
    target_ptrs = target_ptr + slot.to(tl.int64)[:, None] * X + column[None, :]
    # Rows that nobody named are neither read nor written.
    touched = (count > 0)[:, None] & inside
    total = tl.load(target_ptrs, mask=touched, other=0.0)
    for i in tl.range(0, tl.max(count, 0), num_stages=3):
        more = i < count
        pair = tl.load(order_ptr + first + i, mask=more, other=0).to(tl.int64)
        times = tl.load(times_ptr + first + i, mask=more, other=0).to(tl.float32)
        share = tl.load(partial_ptr + pair[:, None] * X + column[None, :], mask=more[:, None] & inside, other=0.0)
        total += share.to(tl.float32) * times[:, None]
    tl.store(target_ptrs, total, mask=touched)


def scatter_rows_(target_SX: Tensor, indices_CK: Tensor, partial_CKX: Tensor) -> None:
    """target[s] += Σ partial[c, j] over the (c, j) with indices[c, j] = s, in place; the same bits in every run.

    Args:
        target_SX: fp32, contiguous.
        indices_CK: int32 rows of the target; -1, anywhere, is none, and whatever `partial` holds there is not read.
            Named twice in one row c, a target row gets the share of smallest j as often as it is named.
        partial_CKX: fp16, bf16 or fp32, contiguous; summed in fp32, in ascending c.

    Raises:
        ValueError: more than 2^31 - 1 pairs (c, j), which are numbered by int32.
    """
    S, X = target_SX.shape
    C, K = indices_CK.shape
    if C * K > INT32_MAX:
        raise ValueError(f"indices_CK has {C} x {K} entries, but at most {INT32_MAX} are allowed: use fewer rows.")
    if S * X * C * K == 0:
        return
    indices_CK, partial_CKX = indices_CK.contiguous(), partial_CKX.contiguous()
    W = triton.cdiv(C, 32)
    W_padded = triton.next_power_of_2(W)
    new: dict[str, Any] = {"dtype": torch.int32, "device": target_SX.device}
    bitmap_SW = torch.zeros(S, W, **new)
    count_S = torch.empty(S, **new)
    order_N, times_N = torch.full((C * K,), INT32_MAX, **new), torch.zeros(C * K, **new)
    pairs = (C, triton.cdiv(K, BLOCK_PAIRS))
    _mark_kernel[pairs](indices_CK, bitmap_SW, K, W, BLOCK_PAIRS)
    _count_kernel[(triton.cdiv(S, BLOCK_COUNTED),)](bitmap_SW, count_S, S, W, W_padded, BLOCK_COUNTED)
    end_S = count_S.cumsum(0, dtype=torch.int32)
    _place_kernel[pairs](indices_CK, bitmap_SW, end_S, count_S, order_N, times_N, K, W, W_padded, BLOCK_PAIRS)
    block_X = min(BLOCK_COLUMNS, triton.next_power_of_2(X))
    _sum_kernel[triton.cdiv(S, BLOCK_SUMMED), triton.cdiv(X, block_X)](
        target_SX, partial_CKX, end_S, count_S, order_N, times_N, S, X, BLOCK_SUMMED, block_X, num_warps=SUMMING_WARPS
    )


def specs(arch: int) -> list[KernelSpec]:  # noqa: ARG001
    """The kernels as launched at V3.2's dims, for chunks of 512 rows (the same on every architecture)."""
    W = 16
    mark = {"indices_ptr": "*i32", "bitmap_ptr": "*i32", "K": "i32", "W": "i32", "BLOCK": "constexpr"}
    count = {"bitmap_ptr": "*i32", "count_ptr": "*i32", "S": "i32", "W": "i32"}
    count |= {"W_PADDED": "constexpr", "BLOCK": "constexpr"}
    tables = {"end_ptr": "*i32", "count_ptr": "*i32", "order_ptr": "*i32", "times_ptr": "*i32"}
    place = {"indices_ptr": "*i32", "bitmap_ptr": "*i32", **tables, "K": "i32", "W": "i32"}
    place |= {"W_PADDED": "constexpr", "BLOCK": "constexpr"}
    total = {"target_ptr": "*fp32", "partial_ptr": "*bf16", **tables, "S": "i32"}
    total |= {"X": "constexpr", "BLOCK_S": "constexpr", "BLOCK_X": "constexpr"}
    pairs = {"W_PADDED": W, "BLOCK": BLOCK_PAIRS}
    sums = {"X": 576, "BLOCK_S": BLOCK_SUMMED, "BLOCK_X": BLOCK_COLUMNS}
    return [
        KernelSpec("segment_sum.mark", _mark_kernel, mark, {"BLOCK": BLOCK_PAIRS}, 4, 3, tensor_cores=False),
        KernelSpec(
            "segment_sum.count", _count_kernel, count, {"W_PADDED": W, "BLOCK": BLOCK_COUNTED}, 4, 3, tensor_cores=False
        ),
        KernelSpec("segment_sum.place", _place_kernel, place, pairs, 4, 3, tensor_cores=False),
        KernelSpec("segment_sum.sum", _sum_kernel, total, sums, SUMMING_WARPS, 3, tensor_cores=False),
    ]
