"""What an operator of the optimized model takes while it runs, by implementation: buffers, copies, its gradients.

The chunk sizes are the operators' own (`optimized.ops.backend`, `optimized.kernels`), so that a change there is a change
here. Letters as in `blocks`.
"""

import math

import torch

from optimized.ops.backend import chunk_rows

from .step import WIDE, Step

MIB = 2**20
# Of `optimized.kernels.index_logits` and `sparse_mla_backward`, which cannot be imported without triton.
SCORE_BYTES, SCORE_ROWS = 256 * MIB, 2048
PAIR_BYTES, PAIR_ROWS = 2048 * MIB, 512


def padded(width: int, backend: str) -> int:
    """Elements that the native operators give a row, whole vectors of 16; others give it its width."""
    return width + -width % 16 if backend == "native" else width


def _sizes(step: Step) -> tuple[int, int, int]:
    """Heads, and widths of a key and a value as the operator sees them."""
    c = step.config
    if step.path == "gathered":
        return step.heads, c.kv_lora_rank + c.qk_rope_head_dim, c.kv_lora_rank
    return step.heads, c.qk_nope_head_dim + c.qk_rope_head_dim, c.v_head_dim


def attention_forward(step: Step) -> int:
    """Beside operands and output, while the attention operator runs."""
    h, key, value = _sizes(step)
    n, s, a = step.rows, step.keys, step.itemsize
    if step.backend == "triton":
        return n // 32 * step.length // 8 if step.path == "masked" else 0
    if step.backend == "native":
        copies = 0 if a == WIDE else n * h * (key + value) * WIDE
        if step.path != "gathered":
            copies += s * h * (key + value) * WIDE
        return copies + (n * h * value * WIDE if step.path == "gathered" and not step.graph else 0)
    if step.path == "gathered":
        rows = chunk_rows(n // step.batch, step.selected * max(key, h), torch.float32)
        return rows * step.selected * (key + h) * WIDE
    rows = chunk_rows(n // step.batch, h * step.length, torch.float32)
    return (rows * h * step.length + step.length * h * (key + value)) * WIDE


def attention_backward(step: Step) -> int:
    """The operator's incoming gradient, its own gradients, its copies and buffers."""
    h, key, value = _sizes(step)
    n, s, a = step.rows, step.keys, step.itemsize
    incoming = n * h * value * a
    if step.path == "gathered":
        if step.backend == "triton":
            item = a
            per_row = step.selected * (2 * h + key) * item
            rows = max(1, min(n // step.batch, PAIR_ROWS, PAIR_BYTES // max(1, per_row)))
            tables = step.length * math.ceil(rows / 32) * 4 + rows * step.selected * 8
            return incoming + n * h * key * a + s * key * WIDE + rows * per_row + tables
        if step.backend == "native":
            # The incoming gradient comes heads first, and is copied; attended latents are free by now.
            copies = n * h * value * WIDE + (0 if a == WIDE else n * h * key * WIDE)
            freed = n * h * value * a
            return incoming + copies - freed + n * h * key * WIDE + s * padded(key, "native") * WIDE
        rows = chunk_rows(n // step.batch, step.selected * max(key, h), torch.float32)
        return incoming + n * h * key * a + s * key * WIDE + rows * step.selected * 2 * (key + h) * WIDE
    gradients = n * h * key * a + s * h * (key + value) * a
    if step.backend == "triton":
        return incoming + gradients + n * h * WIDE
    if step.backend == "native":
        wide = n * h * key * WIDE + s * h * (padded(key, "native") + padded(value, "native")) * WIDE
        copies = s * h * (key + value) * WIDE + (0 if a == WIDE else n * h * (key + value) * WIDE)
        return incoming + wide + copies
    rows = chunk_rows(n // step.batch, h * step.length, torch.float32)
    return incoming + gradients + (2 * rows * h * step.length + 2 * step.length * h * (key + value)) * WIDE


def kl_workspace(step: Step) -> int:
    """Of the indexer's loss: copies in fp32, and the scores of a chunk; its gradients are counted as kept."""
    c, n, s, a = step.config, step.rows, step.keys, step.itemsize
    h, key, _ = _sizes(step)
    selected = step.path == "gathered"
    index = c.index_n_heads * c.index_head_dim
    if step.kl_backend == "native":
        return 0 if a == WIDE else (n * (index + h * key) + s * (1 if selected else h) * key) * WIDE
    visited = step.selected if selected else step.length
    if step.kl_backend == "triton":
        per_row = 4 * (step.selected * c.index_head_dim if selected else step.length)
        rows = max(1, min(SCORE_ROWS, SCORE_BYTES // max(1, per_row), n // step.batch))
        shares = rows * step.selected * c.index_head_dim * a if selected else 0
        return 2 * rows * visited * WIDE + shares
    widest = max(h, c.index_n_heads, *((key, c.index_head_dim) if selected else ()))
    rows = chunk_rows(n // step.batch, visited * widest, torch.float32)
    return rows * visited * (c.index_n_heads + h + 4) * WIDE
