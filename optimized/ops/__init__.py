"""The operators of sparse attention, one a file; every one validates its inputs and names its implementation.

`indexer_topk` selects keys, `sparse_mla` attends to selected keys, `dense_mla` to all visible ones (or masked
ones), `indexer_kl` is the indexer's loss, `hadamard` the rotation before FP8. Shapes, formulas and errors: see each
function.
"""

from optimized.ops.dense_mla import dense_mla
from optimized.ops.hadamard import hadamard, hadamard_implementation
from optimized.ops.indexer_kl import indexer_kl
from optimized.ops.indexer_topk import indexer_topk
from optimized.ops.sparse_mla import sparse_mla

__all__ = ["dense_mla", "hadamard", "hadamard_implementation", "indexer_kl", "indexer_topk", "sparse_mla"]
