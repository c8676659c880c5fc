"""Exact top-k of rows of scores by radix selection: no sort, any k, any length, ties to the lowest index.

Shape legend: C rows of a chunk, n key slots that the chunk visits, K selected keys.

A score becomes an integer of the same order (`ordered`). The k-th largest of a row's integers is found digit by digit,
eight bits at a time from the top: a histogram of the digits of those that agree with the digits found so far tells
which digit the k-th largest has, and how many are larger. Four passes over the row give the threshold exactly, and how
many of the integers equal to it are still wanted: `room`. A last pass, in ascending order of keys, takes what is above
the threshold and the first `room` of what equals it, and writes their positions one after another, by prefix sums.
Nothing depends on the order in which programs or threads run.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.common import KernelSpec, interpreted

DIGITS = tl.constexpr(256)
# Flipping the sign bit makes signed integers compare as unsigned ones do, digit by digit.
SIGN = tl.constexpr(-2147483648)


class RowBlock(NamedTuple):
    """What a program works on at a time: `keys` keys of each of `rows` rows."""

    rows: int
    keys: int
    num_warps: int


ROW_BLOCK = RowBlock(1, 2048, 8)


def row_block() -> RowBlock:
    """`ROW_BLOCK`; under the interpreter, where a step costs the same for many rows, many rows a program."""
    return RowBlock(16, 1024, 8) if interpreted() else ROW_BLOCK


@triton.jit
def ordered(score: tl.tensor) -> tl.tensor:
    """int32 of the scores' order: -0.0 and 0.0 alike, NaN of any sign the largest.

    IEEE floats of one sign compare as their bits do; the bits of negative ones, sign excepted, are flipped. Written on
    the bits throughout, so that no flushing of subnormals can come between.
    """
    bits = score.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    key = tl.where((bits < 0) & (magnitude > 0), bits ^ 0x7FFFFFFF, magnitude)
    return tl.where(magnitude > 0x7F800000, 0x7FFFFFFF, key)


@triton.jit
def load_ordered(
    logits_ptr: tl.tensor, row: tl.tensor, logits_row: tl.tensor, key: tl.tensor, start: tl.tensor, end: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """(integers of the scores of some keys, which of them are visible), both [rows, keys]."""
    visible = (key[None, :] >= start[:, None]) & (key[None, :] < end[:, None])
    # Rows are stored a multiple of 16 long: a mask by that length leaves loads wide, one by the bounds would not.
    stored = (end > start)[:, None] & (key < logits_row)[None, :]
    score = tl.load(logits_ptr + row.to(tl.int64)[:, None] * logits_row + key[None, :], mask=stored, other=0.0)
    return ordered(score), visible


@triton.jit
def radix_topk_kernel(
    logits_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    rows: tl.tensor,
    k: tl.tensor,
    base: tl.tensor,
    logits_row: tl.tensor,
    indices_row: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    lane = tl.arange(0, ROWS)
    row = tl.program_id(0) * ROWS + lane
    live = row < rows
    start = tl.load(bounds_ptr + 2 * row, mask=live, other=0)
    end = tl.load(bounds_ptr + 2 * row + 1, mask=live, other=0)
    length = end - start
    seeing = length > 0
    low = tl.min(tl.where(seeing, start, 2147483647), 0)
    high = tl.max(tl.where(seeing, end, 0), 0)
    # Blocks of keys begin at multiples of their size, where loads are aligned.
    low = tl.minimum(low, high) // BLOCK * BLOCK
    key = tl.arange(0, BLOCK)
    digit = tl.arange(0, DIGITS)

    # Where all are taken, the lowest integer is a threshold that no visible score is below.
    threshold = tl.zeros([ROWS], tl.int32)
    room = tl.minimum(length, k)
    if tl.max(length, 0) > k:
        # The threshold's bits that are known, and `room` is its rank among the integers that agree with them.
        known = 0
        for step in range(4):
            shift = 24 - 8 * step
            count = tl.zeros([ROWS * DIGITS], tl.int32)
            for first in range(low, high, BLOCK):
                value, visible = load_ordered(logits_ptr, row, logits_row, first + key, start, end)
                value ^= SIGN
                candidate = visible & (((value ^ threshold[:, None]) & known) == 0)
                # One histogram for all rows: each has its own 256 bins.
                bins = tl.reshape(lane[:, None] * DIGITS + ((value >> shift) & 255), [ROWS * BLOCK])
                count += tl.histogram(bins, ROWS * DIGITS, mask=tl.reshape(candidate, [ROWS * BLOCK]))
            table = tl.reshape(count, [ROWS, DIGITS])
            # Counts from a digit up fall with the digit: the last that reaches the rank is the threshold's.
            reaches = tl.cumsum(table, 1, reverse=True) >= room[:, None]
            found = tl.sum(reaches.to(tl.int32), 1) - 1
            room -= tl.sum(tl.where(digit[None, :] > found[:, None], table, 0), 1)
            threshold |= found << shift
            known = -(1 << shift)

    threshold ^= SIGN
    taken = tl.zeros([ROWS], tl.int32)
    tied = tl.zeros([ROWS], tl.int32)
    for first in range(low, high, BLOCK):
        value, visible = load_ordered(logits_ptr, row, logits_row, first + key, start, end)
        equal = visible & (value == threshold[:, None])
        rank = tied[:, None] + tl.cumsum(equal.to(tl.int32), 1)
        selected = (visible & (value > threshold[:, None])) | (equal & (rank <= room[:, None]))
        place = taken[:, None] + tl.cumsum(selected.to(tl.int32), 1) - 1
        slot = tl.zeros([ROWS, BLOCK], tl.int32) + (base + first + key)[None, :]
        tl.store(indices_ptr + row.to(tl.int64)[:, None] * indices_row + place, slot, mask=selected)
        taken += tl.sum(selected.to(tl.int32), 1)
        tied += tl.sum(equal.to(tl.int32), 1)


def radix_topk(logits_Cn: Tensor, bounds_C2: Tensor, k: int, base: int, indices_CK: Tensor) -> None:
    """Writes base + the positions of each row's k highest visible scores, ascending, to the front of `indices_CK`.

    Only scores within the rows' bounds (int32, contiguous) are read; what lies behind the selected ones stays as it is.
    """
    block = row_block()
    radix_topk_kernel[(triton.cdiv(len(logits_Cn), block.rows),)](
        logits_Cn,
        bounds_C2,
        indices_CK,
        len(logits_Cn),
        k,
        base,
        logits_Cn.stride(0),
        indices_CK.stride(0),
        ROWS=block.rows,
        BLOCK=block.keys,
        num_warps=block.num_warps,
    )


def specs(arch: int) -> list[KernelSpec]:  # noqa: ARG001
    """The selection of k = 2048 keys, which is the same on every architecture."""
    block = ROW_BLOCK
    pointers = {"logits_ptr": "*fp32", "bounds_ptr": "*i32", "indices_ptr": "*i32"}
    sizes = dict.fromkeys(("rows", "k", "base", "logits_row", "indices_row"), "i32")
    constexprs = {"ROWS": block.rows, "BLOCK": block.keys}
    return [
        KernelSpec(
            "radix_topk",
            radix_topk_kernel,
            {**pointers, **sizes, **dict.fromkeys(constexprs, "constexpr")},
            constexprs,
            block.num_warps,
            3,
            tensor_cores=False,
        )
    ]
