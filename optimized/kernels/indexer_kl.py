"""The indexer's divergence on Triton kernels, streamed over chunks of query rows (report eq. 3, and eq. 4).

Shape legend: B batch, L query rows, S key slots, H attention heads, D q/k width, J indexer heads, E indexer head dim,
K selected keys, C queries in a chunk, n key slots that a chunk visits, G groups of heads.

For each chunk: index scores and their logsumexp, then the target p, then row by row the divergence and dI = softmax(I)
- p in place of the scores, then the gradients from dI. Scores and p, C x n (or C x K) in fp32, are all that is held of
a chunk; with selected keys so are the rows' shares of the keys' gradient, C x K x E.

Selected keys are gathered. Only main keys per head are not, which would be H times as large: there p is computed as if
dense and then picked from, as the torch implementation does.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.common import KernelSpec, architecture, check_runnable
from optimized.kernels.index_logits import index_logits, logits_tile, operand, row_length, rows_per_chunk
from optimized.kernels.indexer_kl_dense import dense_dk, dense_dk_tile, dense_dq, dense_dq_tile, head_groups
from optimized.kernels.indexer_kl_selected import selected_gradients, selected_logits, selected_tile
from optimized.kernels.indexer_kl_target import dense_target, dense_target_tile, selected_target, selected_target_tile
from optimized.kernels.radix_topk import ROW_BLOCK, row_block
from optimized.kernels.segment_sum import scatter_rows_
from optimized.ops.backend import carve, register, row_chunks
from optimized.ops.indexer_kl import streamed

# A batch entry and a range of its rows or key slots.
Part = tuple[int, slice]


class Inputs(NamedTuple):
    """The operator's, as its public function names them."""

    iq_BLJE: Tensor
    ik_BSE: Tensor
    w_BLJ: Tensor
    q_BLHD: Tensor
    k: Tensor
    lse_BLH: Tensor
    bounds_BL2: Tensor
    scale: float

    @property
    def index_dtype(self) -> torch.dtype:
        """What index queries and keys are multiplied in."""
        return torch.promote_types(self.iq_BLJE.dtype, self.ik_BSE.dtype)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """What they are multiplied with dI in: fp16 would lose the small ones."""
        return torch.float32 if self.index_dtype == torch.float16 else self.index_dtype

    @property
    def main_dtype(self) -> torch.dtype:
        """What main queries and keys are multiplied in."""
        return torch.promote_types(self.q_BLHD.dtype, self.k.dtype)

    def index_operands(self, here: Part, keys: Part) -> tuple[Tensor, Tensor, Tensor]:
        """(iq_CJE, ik_nE, w_CJ) of the rows `here` and a range of keys, for the scores."""
        iq_CJE, ik_nE = (operand(x, self.index_dtype) for x in (self.iq_BLJE[here], self.ik_BSE[keys]))
        return iq_CJE, ik_nE, self.w_BLJ[here].float().contiguous()

    def gradient_operands(self, here: Part, keys: Part) -> tuple[Tensor, Tensor, Tensor]:
        """The same for the gradients, zeros in the place of NaN and infinities."""
        iq_CJE, ik_nE = (operand(x, self.gradient_dtype) for x in (self.iq_BLJE[here], self.ik_BSE[keys]))
        w_CJ = self.w_BLJ[here].float().contiguous()
        return iq_CJE.nan_to_num(0, 0, 0), ik_nE.nan_to_num(0, 0, 0), w_CJ.nan_to_num(0, 0, 0)

    def main_operands(self, here: Part, keys: Part) -> tuple[Tensor, Tensor, Tensor]:
        """(q_CHD, k [n, D] or [n, H, D], lse_CH) for the target."""
        q_CHD, k = (operand(x, self.main_dtype) for x in (self.q_BLHD[here], self.k[keys]))
        return q_CHD, k, self.lse_BLH[here].float().contiguous()

    def zero_gradients(self, groups: int) -> "Gradients":
        """Fresh sums, `groups` of them for the keys."""
        B, S, E = self.ik_BSE.shape
        shapes = (self.iq_BLJE.shape, (B, groups, S, E), self.w_BLJ.shape)
        return Gradients(*(torch.zeros(shape, dtype=torch.float32, device=self.ik_BSE.device) for shape in shapes))


class Gradients(NamedTuple):
    """Of the sum of all divergences, fp32. The keys' gradient is the sum of `dik` over its groups."""

    diq_BLJE: Tensor
    dik_BGSE: Tensor
    dw_BLJ: Tensor


@triton.jit
def divergence_kernel(
    score_ptr: tl.tensor,
    p_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    visible_ptr: tl.tensor,
    kl_ptr: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    SELECTED: tl.constexpr,
    GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """KL of each row, and dI in place of its scores. `visible_ptr`: the rows' bounds, or their slots if SELECTED."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    if SELECTED:
        low = 0
        high = width
    else:
        start = tl.load(visible_ptr + 2 * row, mask=live, other=0)
        end = tl.load(visible_ptr + 2 * row + 1, mask=live, other=0)
        seeing = start < end
        high = tl.max(tl.where(seeing, end, 0), 0)
        low = tl.minimum(tl.min(tl.where(seeing, start, 2147483647), 0), high) // BLOCK * BLOCK
    lse = tl.load(lse_ptr + row, mask=live, other=0.0)
    # p sums to 1 only within the rounding of the main attention's lse.
    mass = tl.zeros([ROWS], tl.float32)
    for first in range(low, high, BLOCK):
        key = first + tl.arange(0, BLOCK)
        offsets = row.to(tl.int64)[:, None] * width + key[None, :]
        stored = live[:, None] & (key < width)[None, :]
        p = tl.load(p_ptr + offsets, mask=stored, other=0.0)
        if SELECTED:
            visible = tl.load(visible_ptr + offsets, mask=stored, other=-1) >= 0
        else:
            visible = (key[None, :] >= start[:, None]) & (key[None, :] < end[:, None])
        mass += tl.sum(tl.where(visible, p, 0.0), 1)
    share = 1.0 / tl.where(mass > 0, mass, 1.0)
    kl = tl.zeros([ROWS], tl.float32)
    for first in range(low, high, BLOCK):
        key = first + tl.arange(0, BLOCK)
        offsets = row.to(tl.int64)[:, None] * width + key[None, :]
        stored = live[:, None] & (key < width)[None, :]
        score = tl.load(score_ptr + offsets, mask=stored, other=0.0)
        p = tl.load(p_ptr + offsets, mask=stored, other=0.0)
        if SELECTED:
            visible = tl.load(visible_ptr + offsets, mask=stored, other=-1) >= 0
        else:
            visible = (key[None, :] >= start[:, None]) & (key[None, :] < end[:, None])
        p = tl.where(visible, p * share[:, None], 0.0)
        log_softmax = tl.where(visible, score, 0.0) - tl.where(visible, lse[:, None], 0.0)
        # 0 log 0 is 0, whatever the score; NaN stays NaN.
        some = p != 0.0
        kl += tl.sum(tl.where(some, p * (tl.log(tl.where(some, p, 1.0)) - log_softmax), 0.0), 1)
        if GRADIENT:
            di = tl.where(visible, tl.exp(log_softmax) - p, 0.0)
            tl.store(score_ptr + offsets, di, mask=stored)
    tl.store(kl_ptr + row, kl, mask=live)


def _divergence(
    score_Cn: Tensor, p_Cn: Tensor, lse_C: Tensor, visible: Tensor, kl_C: Tensor, *, selected: bool, gradient: bool
) -> None:
    block = row_block()
    divergence_kernel[(triton.cdiv(len(score_Cn), block.rows),)](
        score_Cn,
        p_Cn,
        lse_C,
        visible,
        kl_C,
        *score_Cn.shape,
        SELECTED=selected,
        GRADIENT=gradient,
        ROWS=block.rows,
        BLOCK=block.keys,
        num_warps=block.num_warps,
    )


@register("indexer_kl", "triton")
def indexer_kl_triton(
    iq_BLJE: Tensor,
    ik_BSE: Tensor,
    w_BLJ: Tensor,
    q_BLHD: Tensor,
    k: Tensor,
    lse_BLH: Tensor,
    bounds_BL2: Tensor,
    scale: float,
    indices_BLK: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`optimized.ops.indexer_kl` by kernels.

    Operands of one 16-bit dtype are multiplied in it, with fp32 sums; otherwise they are taken to fp32. In the
    gradients' products dI is rounded to bf16 with bf16 inputs; fp16 has not its range, so fp16 inputs are taken to fp32
    there. Raises ValueError for tensors that no kernel can take here (`check_runnable`).
    """
    check_runnable("indexer_kl", iq_BLJE, ik_BSE, w_BLJ, q_BLHD, k, lse_BLH)
    inputs = (iq_BLJE, ik_BSE, w_BLJ, q_BLHD, k, lse_BLH, bounds_BL2, scale, indices_BLK)
    kl_sum, kl_BL = streamed(_stream, *inputs)
    return kl_sum, kl_BL


def _stream(*arguments: Any) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """The rows' divergences and, if wanted, the gradients of their sum."""
    *floats, indices_BLK, wanted = arguments
    inputs = Inputs(*floats)
    with torch.cuda.device_of(inputs.iq_BLJE):
        if indices_BLK is None:
            kl_BL, grads = _stream_dense(inputs, wanted)
        else:
            kl_BL, grads = _stream_selected(inputs, indices_BLK, wanted)
    return kl_BL, None if grads is None else (grads.diq_BLJE, grads.dik_BGSE.sum(1), grads.dw_BLJ)


def _stream_dense(x: Inputs, wanted: bool) -> tuple[Tensor, Gradients | None]:
    """Every row's divergence over all keys in its bounds, and the gradients if they are wanted."""
    (B, L, J, E), S = x.iq_BLJE.shape, x.ik_BSE.shape[1]
    arch = architecture(x.iq_BLJE.device)
    tile = logits_tile(arch, x.index_dtype, E)
    p_tile = dense_target_tile(arch, x.main_dtype, x.q_BLHD.shape[-1], x.k.ndim == 3)
    dq_tile, dk_tile = dense_dq_tile(arch, x.gradient_dtype, E), dense_dk_tile(x.gradient_dtype, E)
    kl_BL = torch.zeros(B, L, dtype=torch.float32, device=x.iq_BLJE.device)
    grads = x.zero_gradients(head_groups(S, J, dk_tile)) if wanted else None
    rows = rows_per_chunk(L, 4 * S, tile.rows)
    score_buffer, p_buffer = kl_BL.new_empty(2, min(rows, L) * (S + tile.keys))
    for b, first, last, low, high in row_chunks(x.bounds_BL2, rows):
        here, keys = (b, slice(first, last)), (b, slice(low // tile.keys * tile.keys, high))
        bounds_C2 = (x.bounds_BL2[here] - keys[1].start).int().contiguous()
        shape = (last - first, row_length(high - keys[1].start))
        score_Cn, p_Cn = carve(score_buffer, *shape), carve(p_buffer, *shape)
        lse_C = index_logits(*x.index_operands(here, keys), bounds_C2, score_Cn, tile)
        dense_target(*x.main_operands(here, keys), bounds_C2, x.scale, p_Cn, p_tile)
        _divergence(score_Cn, p_Cn, lse_C, bounds_C2, kl_BL[here], selected=False, gradient=wanted)
        if grads is not None:
            operands = x.gradient_operands(here, keys)
            dense_dq(*operands, bounds_C2, score_Cn, grads.diq_BLJE[here], grads.dw_BLJ[here], dq_tile)
            dense_dk(*operands, bounds_C2, score_Cn, grads.dik_BGSE[b, :, keys[1]], dk_tile)
    return kl_BL, grads


def _stream_selected(x: Inputs, indices_BLK: Tensor, wanted: bool) -> tuple[Tensor, Gradients | None]:
    """Every row's divergence over its selected keys, and the gradients if they are wanted."""
    (B, L, _, E), S, K = x.iq_BLJE.shape, x.ik_BSE.shape[1], indices_BLK.shape[-1]
    arch, D, per_head = architecture(x.iq_BLJE.device), x.q_BLHD.shape[-1], x.k.ndim == 4
    tile, gradient_tile = selected_tile(x.index_dtype, E), selected_tile(x.gradient_dtype, E)
    dense_tile = dense_target_tile(arch, x.main_dtype, D, shared=False)
    kl_BL = torch.zeros(B, L, dtype=torch.float32, device=x.iq_BLJE.device)
    grads = x.zero_gradients(1) if wanted else None
    if K == 0:
        return kl_BL, grads
    row_bytes = 4 * max(K * E if wanted else K, S if per_head else 0)
    rows = rows_per_chunk(L, row_bytes, dense_tile.rows if per_head else 1)
    score_buffer, p_buffer = kl_BL.new_empty(2, min(rows, L) * K)
    for b, first, last, low, high in row_chunks(x.bounds_BL2, rows):
        here, keys = (b, slice(first, last)), (b, slice(low // tile.keys * tile.keys, high))
        bounds_C2 = (x.bounds_BL2[here] - keys[1].start).int().contiguous()
        slots_CK = indices_BLK[here].int().contiguous() - keys[1].start
        slots_CK = slots_CK.masked_fill_((slots_CK < bounds_C2[:, :1]) | (slots_CK >= bounds_C2[:, 1:]), -1)
        score_CK, p_CK = carve(score_buffer, last - first, K), carve(p_buffer, last - first, K)
        lse_C = selected_logits(*x.index_operands(here, keys), slots_CK, score_CK, tile)
        main = x.main_operands(here, keys)
        if per_head:
            p_Cn = kl_BL.new_empty(last - first, row_length(high - keys[1].start))
            dense_target(*main, bounds_C2, x.scale, p_Cn, dense_tile)
            torch.gather(p_Cn, 1, slots_CK.clamp(min=0).long(), out=p_CK)
        else:
            selected_target(*main, slots_CK, x.scale, p_CK, selected_target_tile(arch, x.main_dtype, D))
        _divergence(score_CK, p_CK, lse_C, slots_CK, kl_BL[here], selected=True, gradient=wanted)
        if grads is not None:
            operands = x.gradient_operands(here, keys)
            share_CKE = torch.empty(last - first, K, E, dtype=operands[1].dtype, device=kl_BL.device)
            results = (grads.diq_BLJE[here], grads.dw_BLJ[here], share_CKE)
            selected_gradients(*operands, slots_CK, score_CK, *results, gradient_tile)
            scatter_rows_(grads.dik_BGSE[b, 0, keys[1]], slots_CK, share_CKE)
    return kl_BL, grads


def specs(arch: int) -> list[KernelSpec]:  # noqa: ARG001
    """The divergence of a row with its gradient, dense and selected (the same on every architecture)."""
    pointers = {"score_ptr": "*fp32", "p_ptr": "*fp32", "lse_ptr": "*fp32", "visible_ptr": "*i32", "kl_ptr": "*fp32"}
    block = ROW_BLOCK
    found = []
    for selected in (False, True):
        constexprs = {"SELECTED": selected, "GRADIENT": True, "ROWS": block.rows, "BLOCK": block.keys}
        signature = {**pointers, "rows": "i32", "width": "i32", **dict.fromkeys(constexprs, "constexpr")}
        name = f"indexer_kl.divergence_{'selected' if selected else 'dense'}"
        found.append(KernelSpec(name, divergence_kernel, signature, constexprs, block.num_warps, 3, tensor_cores=False))
    return found
