"""Index scores over selected keys, and the sparse divergence's gradients from dI = softmax(I) - p (report eq. 4).

Shape legend: C query rows of a chunk, n key slots that the chunk visits, K selected keys, T tiles of them, J indexer
heads, E indexer head dim.

    a_j = q_j . k     dw_j = sum_s dI relu(a_j)     dq_j = w_j sum_s dI 1[a_j > 0] k     dk = sum_tj dI w_j 1[a_j > 0] q_j

Every row has keys of its own, so a program works on one row, gathers a tile of its keys, and the rows of its matrix
products are heads. Scores and key gradients are per tile of keys, and the heads are summed in the program; query
gradients are per tile of heads, and the keys are summed in it. A row's share of dk is written where the row and the
place in its selection say; `segment_sum` adds the shares up, in a fixed order and without float atomics.

`slots` are int32, counted from the first of the n keys; -1 is a key that the row does not have. There the score is
-inf, the gathered key reads as zeros and dI is 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.common import KernelSpec, interpreted
from optimized.kernels.index_logits import PLAIN_TILE, Tile, is_plain, load_rows, masked_lse, padded, relu


def selected_tile(dtype: torch.dtype, width: int) -> Tile:
    """The tile of all three kernels, heads x keys."""
    if interpreted():
        return Tile(64, 256, 4, 1)
    return PLAIN_TILE if is_plain(dtype, width) else Tile(64, 64, 4, 2)


@triton.jit
def load_gathered(
    base: tl.tensor, slot: tl.tensor, row_stride: tl.tensor, lane: tl.tensor, WIDTH: tl.constexpr
) -> tl.tensor:
    """[slots, lanes] of a matrix, zeros where a slot is -1 and from lane WIDTH on."""
    pointers = base + slot.to(tl.int64)[:, None] * row_stride + lane[None, :]
    return tl.load(pointers, mask=(slot >= 0)[:, None] & (lane < WIDTH)[None, :], other=0.0)


@triton.jit
def selected_logits_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    w_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    selected: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_E)
    slot = tl.load(slots_ptr + row * selected + place, mask=place < selected, other=-1)
    logits_ptrs = logits_ptr + row * selected + place
    lse_ptr += tl.program_id(0).to(tl.int64) * rows + row
    if tl.max(slot, 0) < 0:
        tl.store(logits_ptrs, tl.full([BLOCK_K], float("-inf"), tl.float32), mask=place < selected)
        tl.store(lse_ptr, float("-inf"))
        return

    k = load_gathered(k_ptr, slot, k_row, lane, E)
    logits = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, heads, BLOCK_J):
        head = first + tl.arange(0, BLOCK_J)
        live = head < heads
        q = load_rows(q_ptr + row * q_row, tl.minimum(head, heads - 1), q_head, lane, E, BLOCK_E)
        w = tl.load(w_ptr + row * heads + head, mask=live, other=0.0)
        a = relu(tl.dot(q, tl.trans(k), input_precision="ieee"))
        logits += tl.sum(tl.where(live[:, None], a * w[:, None], 0.0), 0)
    logits = tl.where(slot >= 0, logits, float("-inf"))
    tl.store(logits_ptrs, logits, mask=place < selected)
    tl.store(lse_ptr, masked_lse(logits, 0))


@triton.jit
def selected_dq_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    w_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    di_ptr: tl.tensor,
    dq_ptr: tl.tensor,
    dw_ptr: tl.tensor,
    heads: tl.tensor,
    selected: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    lane = tl.arange(0, BLOCK_E)
    live = head < heads
    q = load_rows(q_ptr + row * q_row, tl.minimum(head, heads - 1), q_head, lane, E, BLOCK_E)
    dq = tl.zeros([BLOCK_J, BLOCK_E], tl.float32)
    dw = tl.zeros([BLOCK_J], tl.float32)
    for first in range(0, selected, BLOCK_K):
        place = first + tl.arange(0, BLOCK_K)
        slot = tl.load(slots_ptr + row * selected + place, mask=place < selected, other=-1)
        di = tl.load(di_ptr + row * selected + place, mask=place < selected, other=0.0)
        k = load_gathered(k_ptr, slot, k_row, lane, E)
        a = tl.dot(q, tl.trans(k), input_precision="ieee")
        dw += tl.sum(di[None, :] * relu(a), 1)
        dq += tl.dot((di[None, :] * (a > 0.0).to(tl.float32)).to(k.dtype), k, input_precision="ieee")
    w = tl.load(w_ptr + row * heads + head, mask=live, other=0.0)
    tl.store(dw_ptr + row * heads + head, dw, mask=live)
    dq_ptrs = dq_ptr + (row * heads + head)[:, None] * E + lane[None, :]
    tl.store(dq_ptrs, dq * w[:, None], mask=live[:, None] & (lane < E)[None, :])


@triton.jit
def selected_dk_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    w_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    di_ptr: tl.tensor,
    dk_ptr: tl.tensor,
    heads: tl.tensor,
    selected: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_E)
    listed = place < selected
    slot = tl.load(slots_ptr + row * selected + place, mask=listed, other=-1)
    # Shares that belong to no key are not read.
    if tl.max(slot, 0) < 0:
        return

    di = tl.load(di_ptr + row * selected + place, mask=listed, other=0.0)
    k = load_gathered(k_ptr, slot, k_row, lane, E)
    dk = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
    for first in range(0, heads, BLOCK_J):
        head = first + tl.arange(0, BLOCK_J)
        q = load_rows(q_ptr + row * q_row, tl.minimum(head, heads - 1), q_head, lane, E, BLOCK_E)
        # A weight of 0 leaves out what lies behind the last head.
        w = tl.load(w_ptr + row * heads + head, mask=head < heads, other=0.0)
        a = tl.dot(k, tl.trans(q), input_precision="ieee")
        da = di[:, None] * w[None, :] * (a > 0.0).to(tl.float32)
        dk += tl.dot(da.to(q.dtype), q, input_precision="ieee")
    dk_ptrs = dk_ptr + (row * selected + place)[:, None] * E + lane[None, :]
    tl.store(dk_ptrs, dk.to(dk_ptr.dtype.element_ty), mask=listed[:, None] & (lane < E)[None, :])


def _compiled(J: int, E: int, tile: Tile) -> dict[str, int]:
    blocks = {"E": E, "BLOCK_E": padded(E), "BLOCK_J": min(tile.rows, padded(J)), "BLOCK_K": tile.keys}
    return {**blocks, "num_warps": tile.num_warps, "num_stages": tile.num_stages}


def selected_logits(
    q_CJE: Tensor, k_nE: Tensor, w_CJ: Tensor, slots_CK: Tensor, logits_CK: Tensor, tile: Tile
) -> Tensor:
    """Fills `logits_CK`, fp32, and returns each row's logsumexp over its selected keys, fp32 [C].

    q and k are of one dtype that kernels can read (`operand`), w fp32; w, slots and logits are contiguous.
    """
    (C, J, E), K = q_CJE.shape, slots_CK.shape[1]
    tiles = triton.cdiv(K, tile.keys)
    lse_TC = logits_CK.new_empty(tiles, C)
    strides = (q_CJE.stride(0), q_CJE.stride(1), k_nE.stride(0))
    selected_logits_kernel[tiles, C](
        q_CJE, k_nE, w_CJ, slots_CK, logits_CK, lse_TC, C, J, K, *strides, **_compiled(J, E, tile)
    )
    return lse_TC.logsumexp(0)


def selected_gradients(
    q_CJE: Tensor,
    k_nE: Tensor,
    w_CJ: Tensor,
    slots_CK: Tensor,
    di_CK: Tensor,
    dq_CJE: Tensor,
    dw_CJ: Tensor,
    dk_CKE: Tensor,
    tile: Tile,
) -> None:
    """Fills `dq_CJE` and `dw_CJ`, contiguous fp32, and every row's shares of its keys' gradient, contiguous `dk_CKE`.

    q, k and w have no NaN or infinities; `di_CK` is 0 where a slot is -1.
    """
    (C, J, E), K = q_CJE.shape, slots_CK.shape[1]
    sizes = (J, K, q_CJE.stride(0), q_CJE.stride(1), k_nE.stride(0))
    inputs = (q_CJE, k_nE, w_CJ, slots_CK, di_CK)
    compiled = _compiled(J, E, tile)
    selected_dq_kernel[triton.cdiv(J, compiled["BLOCK_J"]), C](*inputs, dq_CJE, dw_CJ, *sizes, **compiled)
    selected_dk_kernel[triton.cdiv(K, tile.keys), C](*inputs, dk_CKE, *sizes, **compiled)


def specs(arch: int) -> list[KernelSpec]:  # noqa: ARG001
    """The kernels at V3.2's dims, 64 heads of 128 lanes, bf16 and k = 2048 (the same on every architecture)."""
    tile = selected_tile(torch.bfloat16, 128)
    blocks = {"E": 128, "BLOCK_E": 128, "BLOCK_J": tile.rows, "BLOCK_K": tile.keys}
    inputs = {"q_ptr": "*bf16", "k_ptr": "*bf16", "w_ptr": "*fp32", "slots_ptr": "*i32"}
    sizes = dict.fromkeys(("heads", "selected", "q_row", "q_head", "k_row"), "i32")
    found = []
    for name, kernel, results, counts in (
        ("selected_logits", selected_logits_kernel, {"logits_ptr": "*fp32", "lse_ptr": "*fp32"}, {"rows": "i32"}),
        ("selected_dq", selected_dq_kernel, {"di_ptr": "*fp32", "dq_ptr": "*fp32", "dw_ptr": "*fp32"}, {}),
        ("selected_dk", selected_dk_kernel, {"di_ptr": "*fp32", "dk_ptr": "*bf16"}, {}),
    ):
        signature = {**inputs, **results, **counts, **sizes, **dict.fromkeys(blocks, "constexpr")}
        found.append(KernelSpec(f"indexer_kl.{name}", kernel, signature, blocks, tile.num_warps, tile.num_stages))
    return found
