"""Gradients of attention over gathered keys, in three kernels for each chunk of query rows.

Shape legend: S key slots, H attention heads, D q/k width, V value width (= first d_v columns of the latent), K selected
keys, C query rows of a chunk.

    P = exp(z - lse)      dP = dout . v      Delta = dout . out      dS = scale * P (dP - Delta)
    dq = dS @ kv          dkv[idx] += dS' q, and P' dout in the first V columns

One kernel for all of it needs more registers than there are (some 2 KB a thread would be spilled), so it is split:

    probabilities   query-stationary, gathers keys: stores P and dS, [C, K, H]
    dq              query-stationary, gathers keys again, reads dS
    dkv             key-stationary within a row: no gather, the heads are what is summed over. Stores the row's share in
                    the gradient of each of its keys, [C, K, D], which `scatter_rows_` adds up in ascending row: the same
                    bits in every run. Or (deterministic=False) adds it to dkv at once by fp32 atomics, for which no
                    [C, K, D] is needed.

Delta. Σ P dP over a row's keys, divided by Σ P, would take a pass of its own over them, before dS can be formed.
dout . out is the same number and costs nothing, so `out` is kept; having been rounded to 16 bits, it is as exact as P and
dS are, which are rounded to them as well when they are operands of matrix products. In fp32 (EXACT) the pass is made:
see dense_mla_backward.py.

Columns of K after the last slot of a row that is not -1 are neither written nor read. Between slots, P and dS are 0.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.common import KernelSpec, architecture, like, widened
from optimized.kernels.segment_sum import scatter_rows_
from optimized.kernels.sparse_mla_forward import (
    LOG2E,
    Tile,
    block_heads,
    load_part,
    padded,
    parts,
    store_part,
    used_slots,
)

# What the chunk's P, dS and shares may take together: 1.7 GB for 512 rows at V3.2's dims.
CHUNK_BYTES = 2 * 2**30
MAX_CHUNK_ROWS = 512
# Columns of shares that a program of the dkv kernel makes at most.
BLOCK_COLUMNS = 256


@triton.jit(do_not_specialize=["first_row"])
def sparse_mla_probabilities_kernel(
    q_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    out_ptr: tl.tensor,
    dout_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    p_ptr: tl.tensor,
    ds_ptr: tl.tensor,
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
    EXACT: tl.constexpr,
) -> None:
    head_blocks = tl.cdiv(H, BLOCK_H)
    row_in_chunk = tl.program_id(0) // head_blocks
    row = (first_row + row_in_chunk).to(tl.int64)
    head = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = head < H
    index_ptr = indices_ptr + row * K

    q_offset = (row * H + head) * D
    out_offset = (row * H + head) * V
    q0 = load_part(q_ptr, q_offset, is_head, 0, V, PART)
    dout0 = load_part(dout_ptr, out_offset, is_head, 0, V, PART)
    if TWO:
        q1 = load_part(q_ptr, q_offset, is_head, PART, V, PART)
        dout1 = load_part(dout_ptr, out_offset, is_head, PART, V, PART)
    if REST > 0:
        q2 = load_part(q_ptr, q_offset, is_head, V, D, REST)
    lse = tl.load(lse_ptr + row * H + head, mask=is_head, other=0.0) * LOG2E

    if EXACT:
        delta = tl.zeros((BLOCK_H,), tl.float32)
        weight_sum = tl.zeros((BLOCK_H,), tl.float32)
        for start in range(0, used_slots(index_ptr, K), BLOCK_K):
            position = start + tl.arange(0, BLOCK_K)
            slot = tl.load(index_ptr + position, mask=position < K, other=-1)
            is_key = slot >= 0
            kv_offset = slot.to(tl.int64) * D
            kv0 = load_part(kv_ptr, kv_offset, is_key, 0, V, PART)
            logit = tl.dot(q0, tl.trans(kv0), input_precision="ieee")
            dp = tl.dot(dout0, tl.trans(kv0), input_precision="ieee")
            if TWO:
                kv1 = load_part(kv_ptr, kv_offset, is_key, PART, V, PART)
                logit = tl.dot(q1, tl.trans(kv1), logit, input_precision="ieee")
                dp = tl.dot(dout1, tl.trans(kv1), dp, input_precision="ieee")
            if REST > 0:
                kv2 = load_part(kv_ptr, kv_offset, is_key, V, D, REST)
                logit = tl.dot(q2, tl.trans(kv2), logit, input_precision="ieee")
            p = tl.exp2(logit * (scale * LOG2E) - lse[:, None])
            weight_sum += tl.sum(tl.where(is_key[None, :], p, 0.0), 1)
            delta += tl.sum(tl.where(is_key[None, :], p * dp, 0.0), 1)
        delta /= tl.where(weight_sum > 0, weight_sum, 1.0)
    else:
        out0 = load_part(out_ptr, out_offset, is_head, 0, V, PART)
        delta = tl.sum(dout0.to(tl.float32) * out0.to(tl.float32), 1)
        if TWO:
            out1 = load_part(out_ptr, out_offset, is_head, PART, V, PART)
            delta += tl.sum(dout1.to(tl.float32) * out1.to(tl.float32), 1)

    for start in range(0, used_slots(index_ptr, K), BLOCK_K):
        position = start + tl.arange(0, BLOCK_K)
        slot = tl.load(index_ptr + position, mask=position < K, other=-1)
        is_key = slot >= 0
        kv_offset = slot.to(tl.int64) * D
        kv0 = load_part(kv_ptr, kv_offset, is_key, 0, V, PART)
        logit = tl.dot(q0, tl.trans(kv0), input_precision="ieee")
        dp = tl.dot(dout0, tl.trans(kv0), input_precision="ieee")
        if TWO:
            kv1 = load_part(kv_ptr, kv_offset, is_key, PART, V, PART)
            logit = tl.dot(q1, tl.trans(kv1), logit, input_precision="ieee")
            dp = tl.dot(dout1, tl.trans(kv1), dp, input_precision="ieee")
        if REST > 0:
            kv2 = load_part(kv_ptr, kv_offset, is_key, V, D, REST)
            logit = tl.dot(q2, tl.trans(kv2), logit, input_precision="ieee")
        # Hidden after exp2, not before: lse is -inf in a row without keys.
        p = tl.exp2(logit * (scale * LOG2E) - lse[:, None])
        ds = p * (dp - delta[:, None]) * scale
        p = tl.where(is_key[None, :], p, 0.0)
        ds = tl.where(is_key[None, :], ds, 0.0)
        offset = (row_in_chunk.to(tl.int64) * K + position)[None, :] * H + head[:, None]
        mask = is_head[:, None] & (position < K)[None, :]
        tl.store(p_ptr + offset, p.to(p_ptr.dtype.element_ty), mask=mask)
        tl.store(ds_ptr + offset, ds.to(ds_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_row"])
def sparse_mla_dq_kernel(
    kv_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    ds_ptr: tl.tensor,
    dq_ptr: tl.tensor,
    first_row: tl.tensor,
    K: tl.tensor,
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
    row_in_chunk = tl.program_id(0) // head_blocks
    row = (first_row + row_in_chunk).to(tl.int64)
    head = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = head < H
    index_ptr = indices_ptr + row * K

    total0 = tl.zeros((BLOCK_H, PART), tl.float32)
    if TWO:
        total1 = tl.zeros((BLOCK_H, PART), tl.float32)
    if REST > 0:
        total2 = tl.zeros((BLOCK_H, REST), tl.float32)
    for start in range(0, used_slots(index_ptr, K), BLOCK_K):
        position = start + tl.arange(0, BLOCK_K)
        slot = tl.load(index_ptr + position, mask=position < K, other=-1)
        is_key = slot >= 0
        # A block of these may reach beyond what the other kernel wrote: only keys are read.
        offset = (row_in_chunk.to(tl.int64) * K + position)[:, None] * H + head[None, :]
        ds = tl.trans(tl.load(ds_ptr + offset, mask=is_key[:, None] & is_head[None, :], other=0.0))
        kv_offset = slot.to(tl.int64) * D
        kv0 = load_part(kv_ptr, kv_offset, is_key, 0, V, PART)
        total0 = tl.dot(ds, kv0, total0, input_precision="ieee")
        if TWO:
            kv1 = load_part(kv_ptr, kv_offset, is_key, PART, V, PART)
            total1 = tl.dot(ds, kv1, total1, input_precision="ieee")
        if REST > 0:
            kv2 = load_part(kv_ptr, kv_offset, is_key, V, D, REST)
            total2 = tl.dot(ds, kv2, total2, input_precision="ieee")

    dq_offset = (row * H + head) * D
    store_part(dq_ptr, dq_offset, is_head, total0, 0, V, PART)
    if TWO:
        store_part(dq_ptr, dq_offset, is_head, total1, PART, V, PART)
    if REST > 0:
        store_part(dq_ptr, dq_offset, is_head, total2, V, D, REST)


@triton.jit(do_not_specialize=["first_row"])
def sparse_mla_dkv_kernel(
    q_ptr: tl.tensor,
    dout_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    p_ptr: tl.tensor,
    ds_ptr: tl.tensor,
    dkv_ptr: tl.tensor,
    first_row: tl.tensor,
    K: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    VALUES: tl.constexpr,
    ATOMIC: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """Columns FIRST to LAST - 1 of the shares; VALUES: they are values as well as keys."""
    column_blocks = tl.cdiv(LAST - FIRST, BLOCK_X)
    key_blocks = tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    column = FIRST + program % column_blocks * BLOCK_X + tl.arange(0, BLOCK_X)
    position = program // column_blocks % key_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    row_in_chunk = (program // (column_blocks * key_blocks)).to(tl.int64)
    row = first_row + row_in_chunk
    slot = tl.load(indices_ptr + row * K + position, mask=position < K, other=-1)
    is_key = slot >= 0
    if tl.max(slot, 0) < 0:
        return

    inside = (column < LAST)[None, :]
    total = tl.zeros((BLOCK_K, BLOCK_X), tl.float32)
    for start in range(0, H, BLOCK_H):
        head = start + tl.arange(0, BLOCK_H)
        is_head = head < H
        offset = (row_in_chunk * K + position)[:, None] * H + head[None, :]
        mask = is_key[:, None] & is_head[None, :]
        ds = tl.load(ds_ptr + offset, mask=mask, other=0.0)
        query = tl.load(
            q_ptr + (row * H + head)[:, None] * D + column[None, :], mask=is_head[:, None] & inside, other=0.0
        )
        total = tl.dot(ds, query, total, input_precision="ieee")
        if VALUES:
            p = tl.load(p_ptr + offset, mask=mask, other=0.0)
            dout = tl.load(
                dout_ptr + (row * H + head)[:, None] * V + column[None, :], mask=is_head[:, None] & inside, other=0.0
            )
            total = tl.dot(p, dout, total, input_precision="ieee")

    mask = is_key[:, None] & inside
    if ATOMIC:
        tl.atomic_add(dkv_ptr + slot.to(tl.int64)[:, None] * D + column[None, :], total, mask=mask, sem="relaxed")
    else:
        offset = (row_in_chunk * K + position)[:, None] * D + column[None, :]
        tl.store(dkv_ptr + offset, total.to(dkv_ptr.dtype.element_ty), mask=mask)


def probabilities_tile(H: int, K: int, dtype: torch.dtype, arch: int) -> Tile:
    """Tile of the kernel for P and dS: q and dout, 64 heads of them, stay in shared memory for the whole row."""
    if dtype == torch.float32:
        return Tile(block_heads(H, 16), 16, 8, 1)
    # On sm_100 Triton 3.6 would double more than shared memory holds.
    return Tile(block_heads(H, 64), min(32 if arch >= 90 else 16, padded(K)), 8, 1 if arch >= 100 else 2)


def dq_tile(H: int, K: int, dtype: torch.dtype, arch: int) -> Tile:
    """Tile of the kernel for dq, which accumulates all D columns."""
    if dtype == torch.float32:
        return Tile(block_heads(H, 16), 16, 8, 1)
    return Tile(block_heads(H, 64 if arch >= 90 else 32), min(64, padded(K)), 8, 2)


def dkv_tile(H: int, K: int, dtype: torch.dtype, arch: int) -> Tile:
    """Tile of the kernel for dkv, where keys are the rows of the products and heads are summed over."""
    if dtype == torch.float32:
        return Tile(block_heads(H, 16), min(32, padded(K)), 4, 1)
    return Tile(block_heads(H, 64), min(128 if arch == 90 else 64, padded(K)), 8, 2)


def _gathering_constants(H: int, D: int, V: int, tile: Tile) -> Mapping[str, int | bool]:
    part, two, rest = parts(D, V)
    return {
        "H": H, "D": D, "V": V, "PART": part, "TWO": two, "REST": rest, "BLOCK_H": tile.heads, "BLOCK_K": tile.keys,
    }  # fmt: skip


def dkv_constants(H: int, D: int, V: int, tile: Tile, deterministic: bool) -> Iterator[Mapping[str, int | bool]]:
    """The compile-time arguments of both launches: columns that are values too, columns that are key only."""
    for first, last, values in ((0, V, True), (V, D, False)):
        if first < last:
            yield {
                "H": H, "D": D, "V": V, "FIRST": first, "LAST": last, "VALUES": values, "ATOMIC": not deterministic,
                "BLOCK_K": tile.keys, "BLOCK_X": min(BLOCK_COLUMNS, padded(last - first)), "BLOCK_H": tile.heads,
            }  # fmt: skip


def chunk_rows(L: int, H: int, D: int, K: int, itemsize: int, deterministic: bool) -> int:
    """Query rows of a chunk: by sizes alone, so that the same inputs are always cut in the same way."""
    row_bytes = K * (2 * H + (D if deterministic else 0)) * itemsize
    return max(1, min(L, MAX_CHUNK_ROWS, CHUNK_BYTES // max(1, row_bytes)))


def backward(
    dout_BLHV: Tensor,
    q_BLHD: Tensor,
    kv_BSD: Tensor,
    indices_BLK: Tensor,
    out_BLHV: Tensor,
    lse_BLH: Tensor,
    scale: float,
    needs_dq: bool,
    needs_dkv: bool,
    deterministic: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dq_BLHD, dkv_BSD): in the dtype of q, and in fp32, in which dkv is accumulated. Takes what `forward` takes."""
    B, L, H, D = q_BLHD.shape
    V, K = out_BLHV.shape[-1], indices_BLK.shape[-1]
    dtype, device, arch = q_BLHD.dtype, q_BLHD.device, architecture(q_BLHD.device)
    rows = chunk_rows(L, H, D, K, dtype.itemsize, deterministic)
    new: dict[str, Any] = {"dtype": like(dtype), "device": device}
    dq_BLHD = torch.empty(q_BLHD.shape, **new) if needs_dq else None
    dkv_BSD = torch.zeros(kv_BSD.shape, dtype=torch.float32, device=device) if needs_dkv else None
    p_CKH, ds_CKH = (torch.empty(rows, K, H, **new) for _ in range(2))
    share_CKD = torch.empty(rows, K, D, **new) if needs_dkv and deterministic else None
    query_BLHD, latent_BSD, dout_BLHV, out_BLHV = (widened(x) for x in (q_BLHD, kv_BSD, dout_BLHV, out_BLHV))

    tile = probabilities_tile(H, K, dtype, arch)
    tile_dq, tile_dkv = dq_tile(H, K, dtype, arch), dkv_tile(H, K, dtype, arch)
    constants, constants_dq = _gathering_constants(H, D, V, tile), _gathering_constants(H, D, V, tile_dq)
    for b in range(B if L * H * K else 0):
        for first in range(0, L, rows):
            C, first_row = min(rows, L - first), b * L + first
            sparse_mla_probabilities_kernel[(C * triton.cdiv(H, tile.heads),)](
                query_BLHD, latent_BSD[b], indices_BLK, out_BLHV, dout_BLHV, lse_BLH, p_CKH, ds_CKH,
                first_row, K, scale, **constants, EXACT=dtype == torch.float32, num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
            if dq_BLHD is not None:
                sparse_mla_dq_kernel[(C * triton.cdiv(H, tile_dq.heads),)](
                    latent_BSD[b], indices_BLK, ds_CKH, dq_BLHD, first_row, K, **constants_dq,
                    num_warps=tile_dq.num_warps, num_stages=tile_dq.num_stages,
                )  # fmt: skip
            if dkv_BSD is None:
                continue
            for columns in dkv_constants(H, D, V, tile_dkv, deterministic):
                blocks = triton.cdiv(K, tile_dkv.keys) * triton.cdiv(
                    columns["LAST"] - columns["FIRST"], columns["BLOCK_X"]
                )
                sparse_mla_dkv_kernel[(C * blocks,)](
                    query_BLHD, dout_BLHV, indices_BLK, p_CKH, ds_CKH, dkv_BSD[b] if share_CKD is None else share_CKD,
                    first_row, K, **columns, num_warps=tile_dkv.num_warps, num_stages=tile_dkv.num_stages,
                )  # fmt: skip
            if share_CKD is not None:
                scatter_rows_(dkv_BSD[b], indices_BLK[b, first : first + C], share_CKD[:C])
    if dq_BLHD is not None and K == 0:
        dq_BLHD.zero_()
    return None if dq_BLHD is None else dq_BLHD.to(dtype), dkv_BSD


def specs(arch: int) -> list[KernelSpec]:
    """The kernels as launched at V3.2's dims."""
    H, D, V, K, dtype = 128, 576, 512, 2048, torch.bfloat16
    tile, tile_dq, tile_dkv = (f(H, K, dtype, arch) for f in (probabilities_tile, dq_tile, dkv_tile))
    numbers = {"first_row": "i32", "K": "i32"}
    constants, constants_dq = _gathering_constants(H, D, V, tile), _gathering_constants(H, D, V, tile_dq)
    found = [
        KernelSpec(
            "sparse_mla.probabilities", sparse_mla_probabilities_kernel,
            {
                "q_ptr": "*bf16", "kv_ptr": "*bf16", "indices_ptr": "*i32", "out_ptr": "*bf16", "dout_ptr": "*bf16",
                "lse_ptr": "*fp32", "p_ptr": "*bf16", "ds_ptr": "*bf16", **numbers, "scale": "fp32",
                **dict.fromkeys(constants, "constexpr"), "EXACT": "constexpr",
            },
            {**constants, "EXACT": False}, tile.num_warps, tile.num_stages, frozenset({"first_row"}),
        ),
        KernelSpec(
            "sparse_mla.dq", sparse_mla_dq_kernel,
            {
                "kv_ptr": "*bf16", "indices_ptr": "*i32", "ds_ptr": "*bf16", "dq_ptr": "*bf16", **numbers,
                **dict.fromkeys(constants_dq, "constexpr"),
            },
            constants_dq, tile_dq.num_warps, tile_dq.num_stages, frozenset({"first_row"}),
        ),
    ]  # fmt: skip
    for deterministic in (True, False):
        for columns in dkv_constants(H, D, V, tile_dkv, deterministic):
            name = f"sparse_mla.dkv.{'values' if columns['VALUES'] else 'rest'}{'' if deterministic else '.atomic'}"
            signature = {
                "q_ptr": "*bf16", "dout_ptr": "*bf16", "indices_ptr": "*i32", "p_ptr": "*bf16", "ds_ptr": "*bf16",
                "dkv_ptr": "*bf16" if deterministic else "*fp32", **numbers, **dict.fromkeys(columns, "constexpr"),
            }  # fmt: skip
            found.append(
                KernelSpec(
                    name, sparse_mla_dkv_kernel, signature, columns, tile_dkv.num_warps, tile_dkv.num_stages,
                    frozenset({"first_row"}),
                )
            )  # fmt: skip
    return found
