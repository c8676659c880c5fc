"""Gradients of flash attention with bounds and a selection: one kernel for dq, one for dk and dv.

Shape legend: B batch, L query rows, S key slots, H attention heads, D q/k width, V value width, T tiles of query rows,
W words of 32 bits.

    P = exp(z - lse)     dP = dout . v     Delta = dout . out     dS = P (dP - Delta)
    dq = scale * dS @ k      dk = scale * dS' q      dv = P' dout

Both recompute P and dP, each where it can sum in registers: the first owns query rows and walks over keys, the second
owns keys and walks over the query rows that may see them. So nothing is added up in memory, and the gradients are the
same bits in every run. Delta is computed by the first kernel and read by the second. Σ P dP over the keys, divided by
Σ P, is the same number, but only after a pass of its own. In 16 bits P and dS are rounded to far more than it would
gain. In fp32 (EXACT) the pass is made: where one key has nearly all of a row's weight, dP - Delta is a small difference,
and holds only if Delta was added up from that same dP.

The second kernel finds its rows by the ranges of the tiles: it starts at the first tile and stops at the last one whose
range touches its keys. With causal or packed bounds there is nothing superfluous in between.

P and dS are overwritten by 0 for pairs that may not see each other. The sums still multiply those zeros by what is
hidden: k in dq, q in dk, dout in dv. If one of these is not finite, the guarded form of the kernels takes such entries
as 0, and writes NaN in all columns where one of them is visible. For q that is not needed: a query that is not finite
has made all its dS NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.common import KernelSpec, architecture, like, widened
from optimized.kernels.dense_mla_forward import (
    NAN,
    Tile,
    all_finite,
    constants,
    finite_part,
    has_nonfinite,
    tile_ranges,
    visible_pairs,
    words,
)
from optimized.kernels.sparse_mla_forward import LOG2E, load_part, store_part

# Tiles that a program looks over at once for those that may see its keys.
BLOCK_TILES = tl.constexpr(1024)


@triton.jit
def dense_mla_dq_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    ranges_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    out_ptr: tl.tensor,
    dout_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    dq_ptr: tl.tensor,
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
    EXACT: tl.constexpr,
) -> None:
    tiles = tl.cdiv(L, BLOCK_L)
    tile = tiles - 1 - tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % H
    batch = (tl.program_id(0) // (tiles * H)).to(tl.int64)
    row_in_entry = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    is_row = row_in_entry < L
    row = batch * L + row_in_entry
    start = tl.load(bounds_ptr + 2 * row, mask=is_row, other=0)
    end = tl.load(bounds_ptr + 2 * row + 1, mask=is_row, other=0)
    range_ptr = ranges_ptr + 2 * (batch * tiles + tile)

    out_offset = (row * H + head) * V
    dout = load_part(dout_ptr, out_offset, is_row, 0, V, VALUE)
    lse = tl.load(lse_ptr + row * H + head, mask=is_row, other=0.0) * LOG2E
    q_offset = (row * H + head) * D
    q0 = load_part(q_ptr, q_offset, is_row, 0, min(MAIN, D), MAIN)
    total0 = tl.zeros((BLOCK_L, MAIN), tl.float32)
    if GUARDED:
        poisoned = tl.zeros((BLOCK_L,), tl.int32)
    if REST > 0:
        q1 = load_part(q_ptr, q_offset, is_row, MAIN, D, REST)
        total1 = tl.zeros((BLOCK_L, REST), tl.float32)

    if EXACT:
        delta = tl.zeros((BLOCK_L,), tl.float32)
        weight_sum = tl.zeros((BLOCK_L,), tl.float32)
        for first in range(tl.load(range_ptr) // BLOCK_S * BLOCK_S, tl.load(range_ptr + 1), BLOCK_S):
            slot = first + tl.arange(0, BLOCK_S)
            is_slot = slot < S
            key = (batch * S + slot) * H + head
            k0 = load_part(k_ptr, key * D, is_slot, 0, min(MAIN, D), MAIN)
            logit = tl.dot(q0, tl.trans(k0), input_precision="ieee")
            if REST > 0:
                k1 = load_part(k_ptr, key * D, is_slot, MAIN, D, REST)
                logit = tl.dot(q1, tl.trans(k1), logit, input_precision="ieee")
            v = load_part(v_ptr, key * V, is_slot, 0, V, VALUE)
            dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
            visible = visible_pairs(row, is_row, start, end, first, bits_ptr, W, SELECTED, BLOCK_S, 1)
            p = tl.exp2(logit * (scale * LOG2E) - lse[:, None])
            weight_sum += tl.sum(tl.where(visible, p, 0.0), 1)
            delta += tl.sum(tl.where(visible, p * dp, 0.0), 1)
        delta /= tl.where(weight_sum > 0, weight_sum, 1.0)
    else:
        out = load_part(out_ptr, out_offset, is_row, 0, V, VALUE)
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + row * H + head, delta, mask=is_row)

    for first in range(tl.load(range_ptr) // BLOCK_S * BLOCK_S, tl.load(range_ptr + 1), BLOCK_S):
        slot = first + tl.arange(0, BLOCK_S)
        is_slot = slot < S
        key = (batch * S + slot) * H + head
        k0 = load_part(k_ptr, key * D, is_slot, 0, min(MAIN, D), MAIN)
        logit = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if REST > 0:
            k1 = load_part(k_ptr, key * D, is_slot, MAIN, D, REST)
            logit = tl.dot(q1, tl.trans(k1), logit, input_precision="ieee")
        v = load_part(v_ptr, key * V, is_slot, 0, V, VALUE)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        visible = visible_pairs(row, is_row, start, end, first, bits_ptr, W, SELECTED, BLOCK_S, 1)
        # Hidden after exp2, not before: lse is -inf in a row without keys.
        ds = tl.exp2(logit * (scale * LOG2E) - lse[:, None]) * (dp - delta[:, None])
        ds = tl.where(visible, ds, 0.0).to(k0.dtype)
        if GUARDED:
            bad = has_nonfinite(k0)
            k0 = finite_part(k0)
            if REST > 0:
                bad = tl.maximum(bad, has_nonfinite(k1))
                k1 = finite_part(k1)
            poisoned = tl.maximum(poisoned, tl.max(tl.where(visible, bad[None, :], 0), 1))
        total0 = tl.dot(ds, k0, total0, input_precision="ieee")
        if REST > 0:
            total1 = tl.dot(ds, k1, total1, input_precision="ieee")

    if GUARDED:
        total0 = tl.where((poisoned > 0)[:, None], NAN, total0)
        if REST > 0:
            total1 = tl.where((poisoned > 0)[:, None], NAN, total1)
    store_part(dq_ptr, q_offset, is_row, total0 * scale, 0, min(MAIN, D), MAIN)
    if REST > 0:
        store_part(dq_ptr, q_offset, is_row, total1 * scale, MAIN, D, REST)


@triton.jit
def tiles_that_see(
    ranges_ptr: tl.tensor, tiles: tl.tensor, first: tl.tensor, BLOCK_S: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """[from, to): the tiles of query rows from the first to the last whose range touches BLOCK_S keys from `first` on."""
    begin = tiles
    stop = 0
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        low = tl.load(ranges_ptr + 2 * tile, mask=tile < tiles, other=0)
        high = tl.load(ranges_ptr + 2 * tile + 1, mask=tile < tiles, other=0)
        sees = (low < first + BLOCK_S) & (high > first)
        begin = tl.minimum(begin, tl.min(tl.where(sees, tile, tiles), 0))
        stop = tl.maximum(stop, tl.max(tl.where(sees, tile + 1, 0), 0))
    return begin, stop


@triton.jit
def dense_mla_dkv_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    ranges_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    dout_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    dk_ptr: tl.tensor,
    dv_ptr: tl.tensor,
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
    key_tiles = tl.cdiv(S, BLOCK_S)
    first = tl.program_id(0) % key_tiles * BLOCK_S
    head = tl.program_id(0) // key_tiles % H
    batch = (tl.program_id(0) // (key_tiles * H)).to(tl.int64)
    slot = first + tl.arange(0, BLOCK_S)
    is_slot = slot < S
    key = (batch * S + slot) * H + head

    k0 = load_part(k_ptr, key * D, is_slot, 0, min(MAIN, D), MAIN)
    v = load_part(v_ptr, key * V, is_slot, 0, V, VALUE)
    dk0 = tl.zeros((BLOCK_S, MAIN), tl.float32)
    dv = tl.zeros((BLOCK_S, VALUE), tl.float32)
    if REST > 0:
        k1 = load_part(k_ptr, key * D, is_slot, MAIN, D, REST)
        dk1 = tl.zeros((BLOCK_S, REST), tl.float32)
    if GUARDED:
        poisoned = tl.zeros((BLOCK_S,), tl.int32)

    tiles = tl.cdiv(L, BLOCK_L)
    begin, stop = tiles_that_see(ranges_ptr + 2 * batch * tiles, tiles, first, BLOCK_S)
    for tile in range(begin, stop):
        row_in_entry = tile * BLOCK_L + tl.arange(0, BLOCK_L)
        is_row = row_in_entry < L
        row = batch * L + row_in_entry
        start = tl.load(bounds_ptr + 2 * row, mask=is_row, other=0)
        end = tl.load(bounds_ptr + 2 * row + 1, mask=is_row, other=0)
        lse = tl.load(lse_ptr + row * H + head, mask=is_row, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + row * H + head, mask=is_row, other=0.0)
        q_offset = (row * H + head) * D
        # Keys are the rows of these products, so that P and dS need no transposition.
        q0 = load_part(q_ptr, q_offset, is_row, 0, min(MAIN, D), MAIN)
        logit = tl.dot(k0, tl.trans(q0), input_precision="ieee")
        if REST > 0:
            q1 = load_part(q_ptr, q_offset, is_row, MAIN, D, REST)
            logit = tl.dot(k1, tl.trans(q1), logit, input_precision="ieee")
        visible = visible_pairs(row, is_row, start, end, first, bits_ptr, W, SELECTED, BLOCK_S, 0)
        p = tl.exp2(logit * (scale * LOG2E) - lse[None, :])
        p = tl.where(visible, p, 0.0)
        dout = load_part(dout_ptr, (row * H + head) * V, is_row, 0, V, VALUE)
        if GUARDED:
            poisoned = tl.maximum(poisoned, tl.max(tl.where(visible, has_nonfinite(dout)[None, :], 0), 1))
            dout = finite_part(dout)
            q0 = finite_part(q0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        ds = tl.where(visible, p * (dp - delta[None, :]), 0.0).to(q0.dtype)
        dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
        if REST > 0:
            if GUARDED:
                q1 = finite_part(q1)
            dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")

    if GUARDED:
        dv = tl.where((poisoned > 0)[:, None], NAN, dv)
    store_part(dv_ptr, key * V, is_slot, dv, 0, V, VALUE)
    store_part(dk_ptr, key * D, is_slot, dk0 * scale, 0, min(MAIN, D), MAIN)
    if REST > 0:
        store_part(dk_ptr, key * D, is_slot, dk1 * scale, MAIN, D, REST)


def dq_tile(D: int, V: int, dtype: torch.dtype, arch: int, guarded: bool) -> Tile:
    """Tile of the kernel for dq, which holds q, dout and the sums of its rows; the guarded form needs more registers."""
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1)
    if max(D, V) > 256:
        return Tile(64, 32, 8, 1)
    return Tile(128 if arch >= 90 and not guarded else 32, 64, 8, 2)


def dkv_tile(D: int, V: int, dtype: torch.dtype, arch: int, guarded: bool) -> Tile:
    """Tile of the kernel for dk and dv, which holds k, v and the sums of its keys.

    Keys are the rows of its products. On sm_90 it is better to walk in steps of 32 query rows than to own fewer than 128
    keys, with which the two warp groups would share the rows of their products.
    """
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1)
    if max(D, V) > 256:
        return Tile(32, 64, 8, 1)
    if guarded:
        return Tile(32, 32, 8, 2)
    if arch < 90:
        return Tile(64, 32, 8, 2)
    return Tile(32, 128, 8, 2)


def backward(
    dout_BLHV: Tensor,
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHV: Tensor,
    bounds_BL2: Tensor,
    bits_BLW: Tensor | None,
    out_BLHV: Tensor,
    lse_BLH: Tensor,
    scale: float,
    needs_dkv: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dq, dk and dv in the dtype of q, k and v; the last two only if asked for. Takes what `forward` takes."""
    B, L, H, D = q_BLHD.shape
    S, V = v_BSHV.shape[1], v_BSHV.shape[3]
    dtype, device, arch = q_BLHD.dtype, q_BLHD.device, architecture(q_BLHD.device)
    guarded = not all_finite(q_BLHD, k_BSHD, dout_BLHV)
    selected, W = bits_BLW is not None, words(bits_BLW)
    bits = bounds_BL2 if bits_BLW is None else bits_BLW
    query_BLHD, key_BSHD, value_BSHV = widened(q_BLHD), widened(k_BSHD), widened(v_BSHV)
    dout_BLHV, out_BLHV = widened(dout_BLHV), widened(out_BLHV)
    delta_BLH = torch.empty_like(lse_BLH)
    dq_BLHD = torch.empty(q_BLHD.shape, dtype=like(dtype), device=device)
    if B * L * H:
        tile = dq_tile(D, V, dtype, arch, guarded)
        dense_mla_dq_kernel[(triton.cdiv(L, tile.rows) * H * B,)](
            query_BLHD, key_BSHD, value_BSHV, bounds_BL2, tile_ranges(bounds_BL2, S, tile.rows), bits,
            out_BLHV, dout_BLHV, lse_BLH, delta_BLH, dq_BLHD, L, S, W, scale,
            **constants(H, D, V, selected, guarded, tile), EXACT=dtype == torch.float32,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    if not needs_dkv:
        return dq_BLHD.to(dtype), None, None
    dk_BSHD, dv_BSHV = (torch.empty(x.shape, dtype=like(dtype), device=device) for x in (k_BSHD, v_BSHV))
    if B * S * H:
        tile = dkv_tile(D, V, dtype, arch, guarded)
        dense_mla_dkv_kernel[(triton.cdiv(S, tile.keys) * H * B,)](
            query_BLHD, key_BSHD, value_BSHV, bounds_BL2, tile_ranges(bounds_BL2, S, tile.rows), bits,
            dout_BLHV, lse_BLH, delta_BLH, dk_BSHD, dv_BSHV, L, S, W, scale,
            **constants(H, D, V, selected, guarded, tile),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return dq_BLHD.to(dtype), dk_BSHD.to(dtype), dv_BSHV.to(dtype)


def specs(arch: int) -> list[KernelSpec]:
    """The kernels as launched at V3.2's dims: all keys of the bounds, selected keys, and each with its guarded form."""
    H, D, V = 128, 192, 128
    inputs = {
        "q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "bounds_ptr": "*i32", "ranges_ptr": "*i32",
        "bits_ptr": "*i32",
    }  # fmt: skip
    statistics = {"lse_ptr": "*fp32", "delta_ptr": "*fp32"}
    numbers = {"L": "i32", "S": "i32", "W": "i32", "scale": "fp32"}
    pointers = {
        "dq": inputs | {"out_ptr": "*bf16", "dout_ptr": "*bf16"} | statistics | {"dq_ptr": "*bf16"},
        "dkv": inputs | {"dout_ptr": "*bf16"} | statistics | {"dk_ptr": "*bf16", "dv_ptr": "*bf16"},
    }
    found = []
    for name, kernel, tile_of in (("dq", dense_mla_dq_kernel, dq_tile), ("dkv", dense_mla_dkv_kernel, dkv_tile)):
        for selected in (False, True):
            for guarded in (False, True):
                tile = tile_of(D, V, torch.bfloat16, arch, guarded)
                compiled = {**constants(H, D, V, selected, guarded, tile), **({"EXACT": False} if name == "dq" else {})}
                form = f"dense_mla.{name}{'.selected' if selected else ''}{'.guarded' if guarded else ''}"
                signature = {**pointers[name], **numbers, **dict.fromkeys(compiled, "constexpr")}
                found.append(KernelSpec(form, kernel, signature, compiled, tile.num_warps, tile.num_stages))
    return found
