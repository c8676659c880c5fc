"""Index scores of one chunk of query rows, tile by tile, with their logsumexp as a by-product (report eq. 1).

Shape legend: C query rows of a chunk, n key slots that the chunk visits, J indexer heads, E indexer head dim,
T tiles of keys.

    I[t, s] = sum_j w[t, j] * relu(q[t, j] . k[s])

A program owns a tile of rows and keys, holds the keys' tile, and walks over the heads: one matrix product each, whose
relu is weighted and summed in registers. Scores leave as fp32. Tiles without a visible pair are skipped, so a causal
chunk costs what it must, and their part of the buffer keeps what was there: whoever reads scores applies the rows'
bounds. Each tile also leaves the logsumexp of its visible scores; over the tiles of a row they make the row's.

A NaN reaches only the scores of its own row or key: a score is a sum over heads and lanes, never over keys.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.common import KernelSpec, interpreted, widened

# A buffer of one chunk aims at this many bytes: 512 rows of fp32 scores at 128K keys.
CHUNK_BYTES = 256 * 2**20
MAX_CHUNK_ROWS = 2048


class Tile(NamedTuple):
    """Block sizes of one launch, `rows` x `keys` of them in a program, and how it is compiled."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


# The tile of every kernel where operands live in registers, for want of tensor cores, or are wider than V3.2's.
PLAIN_TILE = Tile(32, 32, 4, 1)


def is_plain(dtype: torch.dtype, width: int) -> bool:
    """Whether index queries and keys of `width` lanes get the plain tile."""
    return dtype == torch.float32 or width > 128


def logits_tile(arch: int, dtype: torch.dtype, width: int) -> Tile:
    """The tile of `index_logits_kernel` for queries and keys of `width` lanes."""
    if interpreted():
        return Tile(64, 128, 4, 1)
    if is_plain(dtype, width):
        return PLAIN_TILE if width > 128 else Tile(64, 64, 8, 1)
    return Tile(128, 128, 8, 3 if arch >= 90 else 2)


def padded(width: int) -> int:
    """The power of two, 16 at least, that a matrix product pads `width` to."""
    return max(16, triton.next_power_of_2(width))


def rows_per_chunk(rows: int, bytes_per_row: int, multiple: int) -> int:
    """Rows of a chunk whose largest buffer has that many bytes a row: a multiple of the tile, by sizes alone."""
    fitting = min(MAX_CHUNK_ROWS, CHUNK_BYTES // max(1, bytes_per_row), rows)
    return max(1, math.ceil(max(fitting, 1) / multiple)) * multiple


def row_length(keys: int) -> int:
    """Of a row in a chunk's buffers: a multiple of 16, so that loads and stores can be wide."""
    return math.ceil(keys / 16) * 16


def operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` as a matrix operand in `dtype` that a kernel can read, its last axis contiguous."""
    tensor = widened(tensor.to(dtype))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@triton.jit
def load_rows(
    base: tl.tensor, rows: tl.tensor, row_stride: tl.tensor, lanes: tl.tensor, WIDTH: tl.constexpr, PADDED: tl.constexpr
) -> tl.tensor:
    """[rows, lanes] of a matrix whose rows lie `row_stride` apart; lanes from WIDTH on are 0."""
    pointers = base + rows.to(tl.int64)[:, None] * row_stride + lanes[None, :]
    return tl.load(pointers) if WIDTH == PADDED else tl.load(pointers, mask=(lanes < WIDTH)[None, :], other=0.0)


@triton.jit
def relu(x: tl.tensor) -> tl.tensor:
    """max(x, 0), which is NaN for NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def visible_span(start: tl.tensor, end: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The smallest start and largest end among the rows that see a key; an empty span where none does."""
    seeing = start < end
    return tl.min(tl.where(seeing, start, 2147483647), 0), tl.max(tl.where(seeing, end, 0), 0)


@triton.jit
def masked_lse(x: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """Natural logsumexp along `axis`; entries of -inf count for nothing, and -inf is what nothing amounts to."""
    top = tl.max(x, axis)
    # An infinite top would give inf - inf; against 0 it comes out right.
    top = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    total = tl.sum(tl.exp(x - tl.expand_dims(top, axis)), axis)
    some = total != 0.0
    return tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf"))


@triton.jit
def index_logits_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    w_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    rows: tl.tensor,
    keys: tl.tensor,
    heads: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    logits_row: tl.tensor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    # Neighbouring programs share their queries, which are `heads` times as many bytes as their keys.
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_key = tl.program_id(0) * BLOCK_N
    key = first_key + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_E)
    live = row < rows
    start = tl.load(bounds_ptr + 2 * row, mask=live, other=0)
    end = tl.load(bounds_ptr + 2 * row + 1, mask=live, other=0)
    lse_ptrs = lse_ptr + tl.program_id(0).to(tl.int64) * rows + row
    low, high = visible_span(start, end)
    if (first_key >= high) | (first_key + BLOCK_N <= low):
        tl.store(lse_ptrs, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=live)
        return

    # Rows and keys past the last repeat it: that is cheaper than a mask, and nobody reads their scores.
    inside = tl.minimum(row, rows - 1)
    k = load_rows(k_ptr, tl.minimum(key, keys - 1), k_row, lane, E, BLOCK_E)
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(heads):
        q = load_rows(q_ptr, inside, q_row, lane, E, BLOCK_E)
        logits += relu(tl.dot(q, tl.trans(k), input_precision="ieee")) * tl.load(w_ptr + inside)[:, None]
        q_ptr += q_head
        w_ptr += rows

    offsets = row.to(tl.int64)[:, None] * logits_row + key[None, :]
    tl.store(logits_ptr + offsets, logits, mask=live[:, None] & (key < logits_row)[None, :])
    visible = (key[None, :] >= start[:, None]) & (key[None, :] < end[:, None])
    tl.store(lse_ptrs, masked_lse(tl.where(visible, logits, float("-inf")), 1), mask=live)


def index_logits(q_CJE: Tensor, k_nE: Tensor, w_CJ: Tensor, bounds_C2: Tensor, logits_Cn: Tensor, tile: Tile) -> Tensor:
    """Fills the visible tiles of `logits_Cn` and returns each row's logsumexp over its visible keys, fp32 [C].

    q and k are of one dtype that kernels can read (`operand`), w fp32, bounds int32 and counted from the first of
    the n keys; w, bounds and rows of the logits are contiguous.
    """
    (C, J, E), n = q_CJE.shape, len(k_nE)
    tiles = triton.cdiv(n, tile.keys)
    lse_TC = logits_Cn.new_empty(tiles, C)
    index_logits_kernel[tiles, triton.cdiv(C, tile.rows)](
        q_CJE,
        k_nE,
        # The rows of a tile read one head's weights together.
        w_CJ.T.contiguous(),
        bounds_C2,
        logits_Cn,
        lse_TC,
        C,
        n,
        J,
        q_CJE.stride(0),
        q_CJE.stride(1),
        k_nE.stride(0),
        logits_Cn.stride(0),
        E=E,
        BLOCK_E=padded(E),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return lse_TC.logsumexp(0)


def specs(arch: int) -> list[KernelSpec]:
    """The scorer at V3.2's dims: 64 heads of 128 lanes, bf16."""
    tile = logits_tile(arch, torch.bfloat16, 128)
    pointers = {"q_ptr": "*bf16", "k_ptr": "*bf16", "w_ptr": "*fp32", "bounds_ptr": "*i32"}
    results = {"logits_ptr": "*fp32", "lse_ptr": "*fp32"}
    sizes = dict.fromkeys(("rows", "keys", "heads", "q_row", "q_head", "k_row", "logits_row"), "i32")
    constexprs = {"E": 128, "BLOCK_E": 128, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
    return [
        KernelSpec(
            "index_logits",
            index_logits_kernel,
            {**pointers, **results, **sizes, **dict.fromkeys(constexprs, "constexpr")},
            constexprs,
            tile.num_warps,
            tile.num_stages,
            frozenset({"keys"}),
        )
    ]
