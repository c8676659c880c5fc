"""Kernels on tensors whose elements lie more than 2^31 apart: `python -m suites.kernels.far_offsets strides|length`.

Prints its argument and the peak of resident memory in MiB. The memory is promised, not given: pages that nobody
touches cost nothing. An offset computed in 32 bits wraps around to where no memory is, which ends this process.

Letters: as in test_triton_indexer.
"""

import mmap
import re
import sys
from pathlib import Path

import torch

from optimized.kernels.index_logits import Tile, index_logits
from optimized.kernels.indexer_kl_dense import dense_dk, dense_dq
from optimized.kernels.indexer_kl_selected import selected_gradients, selected_logits
from optimized.kernels.indexer_kl_target import dense_target, selected_target
from optimized.kernels.radix_topk import radix_topk
from optimized.ops import indexer_topk

APART = 2**30
ROWS = 3
# Linux's flag for memory that is not even promised.
MAP_NORESERVE = 0x4000
TILE = Tile(16, 16, 4, 1)


class Far:
    """Copies of small tensors whose first axis is 2^30 elements apart, so that the third row lies at 2^31."""

    def __init__(self) -> None:
        size = 4 * (ROWS * APART)
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        self.memory = torch.frombuffer(pages, dtype=torch.float32)
        self.used = 0

    def __call__(self, tensor):
        assert len(tensor) == ROWS
        memory = self.memory.view(tensor.dtype)
        far = memory.as_strided(tensor.shape, (APART, *tensor[0].stride()), self.used)
        self.used += 4096
        far.copy_(tensor)
        return far


def equal(run, far, *tensors):
    """The same bits from `run` whether its tensors are near or far; it returns what it wrote."""
    for mine, theirs in zip(run(*map(far, tensors)), run(*tensors), strict=True):
        assert torch.equal(mine, theirs)


def strides() -> None:
    far = Far()
    J, E, H, D = 2, 16, 2, 24
    q, k, w = torch.randn(ROWS, J, E), torch.randn(ROWS, E), torch.randn(ROWS, J)
    main_q, main_k, lse = torch.randn(ROWS, H, D), torch.randn(ROWS, H, D), torch.randn(ROWS, H)
    bounds = torch.tensor([[0, 1], [0, 2], [0, 3]], dtype=torch.int32)
    slots = torch.tensor([[0, -1], [0, 1], [2, 0]], dtype=torch.int32)
    di, di_selected = torch.randn(ROWS, 16), torch.randn(ROWS, 2)
    indices = torch.full((ROWS, 2), -1, dtype=torch.int32)

    def score(q, k, logits):
        sums = index_logits(q, k, w, bounds, logits, TILE)
        return sums, logits[:, :3].tril()

    def select(logits, indices):
        radix_topk(logits, bounds, 2, 0, indices)
        return (indices,)

    def target(q, k, p):
        dense_target(q, k, lse, bounds, 1.0, p, TILE)
        return (p[:, :3].tril(),)

    def gradients(q, k, di):
        dq, dw, dk = torch.zeros(ROWS, J, E), torch.zeros(ROWS, J), torch.zeros(1, ROWS, E)
        dense_dq(q, k, w, bounds, di, dq, dw, TILE)
        dense_dk(q, k, w, bounds, di, dk, TILE)
        return dq, dw, dk

    def gathered(q, k, main_q, main_k):
        logits, p, share = torch.zeros(ROWS, 2), torch.zeros(ROWS, 2), torch.zeros(ROWS, 2, E)
        dq, dw = torch.zeros(ROWS, J, E), torch.zeros(ROWS, J)
        sums = selected_logits(q, k, w, slots, logits, TILE)
        selected_target(main_q, main_k, lse, slots, 1.0, p, TILE)
        selected_gradients(q, k, w, slots, di_selected, dq, dw, share, TILE)
        return sums, logits, p, dq, dw, share

    equal(score, far, q, k, torch.zeros(ROWS, 16))
    equal(select, far, torch.randn(ROWS, 16), indices)
    equal(target, far, main_q, main_k, torch.zeros(ROWS, 16))
    equal(target, far, main_q, main_k[:, 0].contiguous(), torch.zeros(ROWS, 16))
    equal(gradients, far, q, k, di)
    equal(gathered, far, q, k, main_q, main_k[:, 0].contiguous())


def length() -> None:
    """A selection among 128K keys by rows of 64 heads, of which the last two see any."""
    L, J, E = 131072, 64, 128
    q, k, w = torch.empty(1, L, J, E), torch.empty(1, L, E), torch.empty(1, L, J)
    bounds = torch.zeros(1, L, 2, dtype=torch.int32)
    bounds[0, -2:] = torch.tensor([[L - 200, L - 1], [L - 200, L]])
    for tensor, slots in ((q, 2), (k, 200), (w, 2)):
        tensor[0, -slots:].random_(-1, 2)
    indices, lse = indexer_topk(q, k, w, bounds, 5, backend="triton")
    near, near_lse = indexer_topk(q[:, -2:], k[:, -200:], w[:, -2:], bounds[:, -2:] - (L - 200), 5, backend="torch")
    assert torch.equal(indices[:, -2:], near + (L - 200))
    assert torch.allclose(lse[:, -2:], near_lse)
    assert bool((indices[:, :-2] == -1).all())


if __name__ == "__main__":
    {"strides": strides, "length": length}[sys.argv[1]]()
    # Not getrusage, whose peak starts from that of the process that started this one.
    print(sys.argv[1], int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
