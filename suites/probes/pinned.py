"""The smallest drawn cases at which a bug was found: of each, what Hypothesis shrank its failure to.

A case is written as what it has more of than the smallest case there is: one row that sees one key, or a model of one
layer and one head. When a drawn case fails, Hypothesis prints it; it belongs here, with the bug of the catalogue that
it shows. A bug that fails by what ran before it, such as a stale buffer, has no smallest case and is not here.
"""

from dataclasses import dataclass, replace

import torch

from harness.model_strategies import Arrangement, Placed
from harness.operators.cases import Family, OperatorCase, Sizes
from reference import DeepseekV32Config

FP32, BF16 = torch.float32, torch.bfloat16
_SMALLEST = Sizes(batch=1, rows=1, slots=1, heads=1, width=2, values=1, index_heads=1, index_width=2, k=1)
_SMALLEST_MODEL = {
    "num_hidden_layers": 1, "first_k_dense_replace": 0, "hidden_size": 16, "num_attention_heads": 1, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "index_n_heads": 1,
    "index_head_dim": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1,
    "norm_topk_prob": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pinned:
    """A bug, by its name in the catalogue, and the check that finds it on a case in a dtype."""

    mutant: str
    check: str
    dtype: torch.dtype
    case: OperatorCase


@dataclass(frozen=True, slots=True)
class PinnedModel:
    """A bug of a model, and the documents that are not what they are alone, in the sparse or the dense path."""

    mutant: str
    drawn: Arrangement
    sparse: bool


def pinned(
    mutant: str, check: str, dtype: torch.dtype = FP32, *, seed: int = 0, family: Family | None = None, **sizes: int
) -> Pinned:
    """The bug on the smallest case but for `sizes`."""
    case_sizes = replace(_SMALLEST, **sizes)
    case = OperatorCase("drawn", case_sizes, family or Family(), seed, float(case_sizes.width**-0.5))
    return Pinned(mutant, check, dtype, case)


def documents(
    mutant: str, *rows: tuple[Placed, ...], cuts: tuple[int, ...] = (), k: int = 1, sparse: bool = False
) -> PinnedModel:
    """The bug on the smallest model: the documents of each batch row, and where the columns are cut into chunks."""
    config = DeepseekV32Config.preset("tiny", **_SMALLEST_MODEL, index_topk=k)
    return PinnedModel(mutant, Arrangement(config, rows, 0, cuts, 0), sparse)


HOLES = Family(holes=True)
NEGATIVE = Family(scores="negative")
PINNED = [
    pinned("A15-no-relu-in-the-operator", "operators.indexer_topk", slots=2, index_heads=4),
    pinned("B05-row-starts-ignored", "operators.indexer_topk", rows=2, slots=16, family=Family(mask="documents")),
    pinned("B10-no-key-read-as-slot-0", "operators.sparse_mla", rows=2, slots=2, family=Family(mask="around k")),
    pinned("B10-no-key-read-as-the-last", "operators.sparse_mla", rows=2, slots=2, k=2),
    pinned("B12-half-precision-sort-keys", "operators.indexer_topk", rows=2, slots=2, family=Family(scores="narrow")),
    pinned("B12-half-of-k-copied", "operators.indexer_topk", slots=2, k=2),
    pinned("B13-highest-index-first", "operators.indexer_topk_ties", rows=6, slots=12, width=6, index_heads=4, index_width=7, k=3, family=NEGATIVE),
    pinned("B18-masked-form-ignores-indices", "operators.dense_mla", slots=2),
    pinned("C01-nan-in-rows-without-keys", "operators.sparse_mla", rows=4, slots=4, family=HOLES),
    pinned("C03-lost-updates-of-dkv", "operators.sparse_mla_gradients", rows=2, slots=2),
    pinned("C03-tail-of-dkv-lost", "operators.sparse_mla_gradients"),
    pinned("C08-tail-lanes-of-odd-heads", "operators.indexer_topk", slots=2, index_heads=2),
    pinned("C09-lse-in-base-2", "operators.sparse_mla_lse"),
    pinned("C11-values-with-the-rope-lanes", "operators.sparse_mla"),
    pinned("A23-output-buffer-used-again", "probes.sparse_mla_batches", batch=2, rows=6, slots=6, width=6, index_heads=4, index_width=6, k=3),
    pinned("logits-in-the-model-s-dtype", "operators.sparse_mla_lse", BF16),
    pinned("softmax-not-subtracted-in-backward", "operators.sparse_mla_gradients"),
    pinned("value-gradient-dropped", "operators.sparse_mla_gradients"),
    pinned("query-gradient-without-scale", "operators.sparse_mla_gradients", slots=2, k=2),
    pinned("last-row-of-a-chunk-stale", "operators.sparse_mla", batch=2, rows=2, slots=2),
    pinned("dense-value-gradient-without-weights", "operators.dense_mla_gradients", slots=2),
    pinned("dense-lse-before-the-mask", "operators.dense_mla", slots=2),
    pinned("lse-of-the-scores-over-selected-keys", "operators.indexer_topk_lse", slots=2),
    pinned("C01-native-nan-in-rows-without-keys", "operators.sparse_mla", rows=4, slots=4, family=HOLES),
    pinned("C03-native-lost-updates-of-dkv", "operators.sparse_mla_gradients"),
    pinned("C08-native-tail-lanes-of-odd-heads", "operators.indexer_topk", batch=2, slots=2, seed=1),
    pinned("C09-native-lse-in-base-2", "operators.sparse_mla_lse"),
    pinned("B12-native-coarse-threshold", "operators.indexer_topk", slots=3, k=2, seed=4),
    pinned("B13-native-highest-index-first", "operators.indexer_topk_ties", rows=6, slots=12, width=6, index_heads=4, index_width=7, k=3, family=NEGATIVE),
    pinned("B12-native-tie-after-the-bar-was-raised", "operators.indexer_topk_ties", rows=6, slots=12, width=6, index_heads=4, index_width=7, k=3, family=NEGATIVE),
    pinned("A15-native-no-relu", "operators.indexer_topk", slots=2, index_heads=4),
    pinned("native-delta-dropped", "operators.sparse_mla_gradients"),
    pinned("D11-target-of-one-head", "operators.indexer_kl", slots=2, heads=2, k=2),
    pinned("kl-gradient-dropped-for-keys", "operators.indexer_kl_gradients", slots=2, k=2, seed=1),
    pinned("kl-gradient-without-target", "operators.indexer_kl_gradients", seed=1),
    pinned("head-weight-gradient-of-half-the-keys", "operators.indexer_kl_gradients", slots=2, index_heads=2),
]  # fmt: skip

ONE, TWO, THREE = (Placed(pads=0, length=n) for n in (1, 2, 3))
PINNED_MODELS = [
    documents("short-rows-filled-with-the-next-document", (TWO,), k=2, sparse=True),
    documents("padding-counts-in-the-lm-loss", (ONE, TWO)),
    documents("pad-rows-in-the-divisor", (Placed(pads=1, length=2),)),
    documents("cache-of-the-first-row", (ONE,), (THREE,), cuts=(1, 2)),
    documents("last-cached-token-overwritten", (TWO,), cuts=(1,)),
    documents("D16-dense-decode", (ONE, TWO), sparse=True),
    documents("D16-index-keys-not-cached-in-prefill", (TWO,), cuts=(1,)),
]
