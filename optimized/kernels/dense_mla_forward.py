"""Flash attention with a range of visible keys for every row and, if given, a selection among them.

Shape legend: B batch, L query rows, S key slots, H attention heads, D q/k width, V value width, K selected keys, T tiles
of query rows, W words of 32 bits.

A program owns a tile of query rows of one head and walks over the keys with an online softmax. It starts at the
smallest start among its rows' bounds and stops at the largest end, so that causal and packed batches cost what they
must. A selection comes as bits, [B, L, W], made from the indices by a kernel of its own: 1/8 byte a pair, read as the
tile goes along. Programs with many keys come first.

The width D is cut into the largest power of two that it holds and the rest, padded to one: 192 = 128 + 64.

Values that a row may not see. A hidden logit is overwritten by -inf, so a hidden key never matters. A hidden value does:
its weight is 0, but 0 * NaN is NaN. Hence the kernel is compiled in two forms. As long as all values are finite, which
the launcher looks up first, the plain form is right. The guarded form takes what is not finite as 0, and writes NaN in
all columns of a row that sees such a value, whichever column it is in.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.common import KernelSpec, architecture, like, widened
from optimized.kernels.sparse_mla_forward import INF, LN2, LOG2E, load_part, padded, store_part

NAN = tl.constexpr(math.nan)
BLOCK_INDICES = 256


class Tile(NamedTuple):
    """Query rows and keys of a step, and how the kernel is compiled for it."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def split_width(D: int) -> tuple[int, int]:
    """(main, rest): the powers of two that columns 0 to main - 1, and those after them (0: none), are padded to."""
    if D <= 16:
        return 16, 0
    main = 1 << (D.bit_length() - 1)
    return main, padded(D - main) if main < D else 0


def forward_tile(D: int, V: int, dtype: torch.dtype, arch: int, guarded: bool) -> Tile:
    """Tile of the forward kernel: fewer rows where registers are fewer, or needed for more than MLA's widths.

    fp32 has no tensor cores. Bits of a selection come in words of 32, so 32 keys are the fewest.
    """
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1)
    if max(D, V) > 256:
        return Tile(64, 32, 8, 2)
    if guarded:
        return Tile(32, 64, 8, 2)
    return Tile(128 if arch >= 90 else 64, 64, 8, 3 if arch >= 90 else 2)


def tile_ranges(bounds_BL2: Tensor, S: int, rows: int) -> Tensor:
    """int32 [B, T, 2]: the smallest start and the largest end in each tile of that many rows; S and 0 if it has no key."""
    start_BL, end_BL = bounds_BL2.unbind(-1)
    empty_BL = start_BL >= end_BL
    padding = (0, -bounds_BL2.shape[1] % rows)
    low_BL = F.pad(start_BL.masked_fill(empty_BL, S), padding, value=S)
    high_BL = F.pad(end_BL.masked_fill(empty_BL, 0), padding, value=0)
    ends = (low_BL.unflatten(1, (-1, rows)).amin(-1), high_BL.unflatten(1, (-1, rows)).amax(-1))
    return torch.stack(ends, -1).to(torch.int32)


@triton.jit
def _selection_bits_kernel(
    indices_ptr: tl.tensor, bits_ptr: tl.tensor, K: tl.tensor, W: tl.tensor, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(indices_ptr + row * K + position, mask=position < K, other=-1)
    bit = tl.full((BLOCK,), 1, tl.int32) << (slot & 31)
    tl.atomic_or(bits_ptr + row * W + (slot >> 5), bit, mask=slot >= 0, sem="relaxed")


def selection_bits(indices_BLK: Tensor, S: int) -> Tensor:
    """int32 [B, L, W]: bit s % 32 of word s // 32 is set where a row selects slot s. Takes int32, contiguous."""
    B, L, K = indices_BLK.shape
    # As many words as a tile of up to 128 keys reaches, so that none ends outside of its row.
    W = 4 * triton.cdiv(S, 128)
    bits_BLW = torch.zeros(B, L, W, dtype=torch.int32, device=indices_BLK.device)
    if B * L * K:
        grid = (B * L, triton.cdiv(K, BLOCK_INDICES))
        _selection_bits_kernel[grid](indices_BLK, bits_BLW, K, W, BLOCK_INDICES)
    return bits_BLW


def words(bits_BLW: Tensor | None) -> int:
    """Words of a row of `selection_bits`, 0 without."""
    return 0 if bits_BLW is None else bits_BLW.shape[2]


@triton.jit
def visible_pairs(
    row: tl.tensor,
    is_row: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    first: tl.tensor,
    bits_ptr: tl.tensor,
    W: tl.tensor,
    SELECTED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    KEYS: tl.constexpr,
) -> tl.tensor:
    """Which rows may see which of the BLOCK_S slots from `first` on, a multiple of 32. KEYS is the axis of the slots.

    `row` counts through the batch; rows that are none have bounds of 0 and 0.
    """
    column = tl.expand_dims(tl.arange(0, BLOCK_S), 1 - KEYS)
    slot = first + column
    visible = (slot >= tl.expand_dims(start, KEYS)) & (slot < tl.expand_dims(end, KEYS))
    if SELECTED:
        # A word a row for every 32 slots, not one for every pair.
        words = tl.zeros_like(visible.to(tl.int32))
        for i in tl.static_range(BLOCK_S // 32):
            word = tl.load(bits_ptr + row * W + first // 32 + i, mask=is_row, other=0)
            words = tl.where(column // 32 == i, tl.expand_dims(word, KEYS), words)
        visible &= ((words >> (column % 32)) & 1) != 0
    return visible


@triton.jit
def is_finite(x: tl.tensor) -> tl.tensor:
    """False for NaN and infinities."""
    return tl.abs(x.to(tl.float32)) < INF


@triton.jit
def has_nonfinite(x: tl.tensor) -> tl.tensor:
    """int32: 1 for each row of x with an entry that is not finite, else 0."""
    return tl.max(tl.where(is_finite(x), 0, 1), 1)


@triton.jit
def finite_part(x: tl.tensor) -> tl.tensor:
    """x with 0 for entries that are not finite."""
    return tl.where(is_finite(x), x, 0.0)


@triton.jit
def dense_mla_forward_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    ranges_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    L: tl.tensor,
    S: tl.tensor,
    W: tl.tensor,
    scale: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    VALUE: tl.constexpr,
    SELECTED: tl.constexpr,
    GUARDED: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    tiles = tl.cdiv(L, BLOCK_L)
    tile = tiles - 1 - tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % H
    # 64 bits: q passes 2^31 elements at 87,382 rows of V3.2.
    batch = (tl.program_id(0) // (tiles * H)).to(tl.int64)
    row_in_entry = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    is_row = row_in_entry < L
    row = batch * L + row_in_entry
    start = tl.load(bounds_ptr + 2 * row, mask=is_row, other=0)
    end = tl.load(bounds_ptr + 2 * row + 1, mask=is_row, other=0)
    range_ptr = ranges_ptr + 2 * (batch * tiles + tile)

    q_offset = (row * H + head) * D
    q0 = load_part(q_ptr, q_offset, is_row, 0, min(MAIN, D), MAIN)
    if REST > 0:
        q1 = load_part(q_ptr, q_offset, is_row, MAIN, D, REST)
    total = tl.zeros((BLOCK_L, VALUE), tl.float32)
    if GUARDED:
        poisoned = tl.zeros((BLOCK_L,), tl.int32)
    top = tl.full((BLOCK_L,), -INF, tl.float32)
    weight_sum = tl.zeros((BLOCK_L,), tl.float32)

    # From a multiple of BLOCK_S: what a row gets does not depend, in any bit, on the other rows of its tile.
    for first in range(tl.load(range_ptr) // BLOCK_S * BLOCK_S, tl.load(range_ptr + 1), BLOCK_S):
        slot = first + tl.arange(0, BLOCK_S)
        is_slot = slot < S
        key = (batch * S + slot) * H + head
        k0 = load_part(k_ptr, key * D, is_slot, 0, min(MAIN, D), MAIN)
        logit = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if REST > 0:
            k1 = load_part(k_ptr, key * D, is_slot, MAIN, D, REST)
            logit = tl.dot(q1, tl.trans(k1), logit, input_precision="ieee")
        visible = visible_pairs(row, is_row, start, end, first, bits_ptr, W, SELECTED, BLOCK_S, 1)
        logit = tl.where(visible, logit * (scale * LOG2E), -INF)

        new_top = tl.maximum(top, tl.max(logit, 1))
        # While a row has seen no key, its maximum is -inf, and -inf - -inf would be NaN.
        subtracted = tl.where(new_top == -INF, 0.0, new_top)
        weight = tl.exp2(logit - subtracted[:, None])
        shrink = tl.exp2(top - subtracted)
        weight_sum = weight_sum * shrink + tl.sum(weight, 1)
        v = load_part(v_ptr, key * V, is_slot, 0, V, VALUE)
        if GUARDED:
            poisoned = tl.maximum(poisoned, tl.max(tl.where(visible, has_nonfinite(v)[None, :], 0), 1))
            v = finite_part(v)
        total = tl.dot(weight.to(v.dtype), v, total * shrink[:, None], input_precision="ieee")
        top = new_top

    # Only a row without keys has weights that sum to 0: its output is 0 / 1, its logsumexp -inf + 0.
    divisor = tl.where(weight_sum != 0, weight_sum, 1.0)
    out = total / divisor[:, None]
    if GUARDED:
        out = tl.where((poisoned > 0)[:, None], NAN, out)
    store_part(out_ptr, (row * H + head) * V, is_row, out, 0, V, VALUE)
    tl.store(lse_ptr + row * H + head, (top + tl.log2(divisor)) * LN2, mask=is_row)


def constants(H: int, D: int, V: int, selected: bool, guarded: bool, tile: Tile) -> Mapping[str, int | bool]:
    """The compile-time arguments of the kernels, forward and backward."""
    main, rest = split_width(D)
    return {
        "H": H, "D": D, "V": V, "MAIN": main, "REST": rest, "VALUE": padded(V), "SELECTED": selected,
        "GUARDED": guarded, "BLOCK_L": tile.rows, "BLOCK_S": tile.keys,
    }  # fmt: skip


def all_finite(*tensors: Tensor) -> bool:
    """Whether no tensor holds NaN or an infinity. Without a temporary of their size; waits for the device once."""
    extremes = [extreme.float() for x in tensors if x.numel() for extreme in torch.aminmax(x)]
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def forward(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHV: Tensor, bounds_BL2: Tensor, bits_BLW: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """out_BLHV in q's dtype and lse_BLH in fp32. Takes contiguous tensors, q, k and v of one dtype, int32 bounds."""
    B, L, H, D = q_BLHD.shape
    S, V = v_BSHV.shape[1], v_BSHV.shape[3]
    dtype, device = q_BLHD.dtype, q_BLHD.device
    guarded = not all_finite(v_BSHV)
    tile = forward_tile(D, V, dtype, architecture(device), guarded)
    out_BLHV = torch.empty(B, L, H, V, dtype=like(dtype), device=device)
    lse_BLH = torch.empty(B, L, H, dtype=torch.float32, device=device)
    if B * L * H:
        dense_mla_forward_kernel[(triton.cdiv(L, tile.rows) * H * B,)](
            widened(q_BLHD), widened(k_BSHD), widened(v_BSHV), bounds_BL2, tile_ranges(bounds_BL2, S, tile.rows),
            bounds_BL2 if bits_BLW is None else bits_BLW, out_BLHV, lse_BLH, L, S, words(bits_BLW), scale,
            **constants(H, D, V, bits_BLW is not None, guarded, tile),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out_BLHV.to(dtype), lse_BLH


def specs(arch: int) -> list[KernelSpec]:
    """The kernels as launched at V3.2's dims: all keys of the bounds, selected keys, and each with its guarded form."""
    H, D, V = 128, 192, 128
    bits = {"indices_ptr": "*i32", "bits_ptr": "*i32", "K": "i32", "W": "i32", "BLOCK": "constexpr"}
    found = [
        KernelSpec(
            "dense_mla.selection_bits", _selection_bits_kernel, bits, {"BLOCK": BLOCK_INDICES}, 4, 3,
            tensor_cores=False,
        )
    ]  # fmt: skip
    for selected in (False, True):
        for guarded in (False, True):
            tile = forward_tile(D, V, torch.bfloat16, arch, guarded)
            compiled = constants(H, D, V, selected, guarded, tile)
            signature = {
                "q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "bounds_ptr": "*i32", "ranges_ptr": "*i32",
                "bits_ptr": "*i32", "out_ptr": "*bf16", "lse_ptr": "*fp32", "L": "i32", "S": "i32", "W": "i32",
                "scale": "fp32", **dict.fromkeys(compiled, "constexpr"),
            }  # fmt: skip
            name = f"dense_mla.forward{'.selected' if selected else ''}{'.guarded' if guarded else ''}"
            found.append(
                KernelSpec(
                    name, dense_mla_forward_kernel, signature, compiled, tile.num_warps, tile.num_stages,
                )
            )  # fmt: skip
    return found
