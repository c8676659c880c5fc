"""What a training step is asked for, on one rank: the numbers that memory and work are computed from.

A rank holds `batch` sequences. Context parallelism gives it a part of their query rows and all of their keys, tensor
parallelism a part of the heads and of the FFNs' columns, expert parallelism some of the routed experts (see
`optimized.distributed.layout`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from optimized.distributed.layout import ParallelLayout
from optimized.paths import AttentionPath, causal_pairs, choose_path
from reference import DeepseekV32Config
from reference.training import LoraPart, Trains

from .parameters import Parameter, parameters

ITEMSIZES = {"float32": 4, "bfloat16": 2}
# At least fp32: what norms, gates, losses and the operators' sums are computed and kept in.
WIDE = 4
INT32, INT64 = 4, 8


@dataclass(frozen=True)
class Step:
    """One training step of `config`.

    length: tokens of a sequence. batch: sequences that a rank holds. sparse, trains: as in
    `harness.training.stages.Stage`. dtype: of parameters, gradients and optimizer state, which the loop keeps alike.
    backend, linear: what computes operators and matrix products, as `optimized.model.implementations` names them.
    on_gpu: whether the optimizer works on all parameters at once, as torch's does there.
    muon: whether the layers' matrices train by Muon, as in the dense stage, whose state is half of AdamW's.
    """

    config: DeepseekV32Config
    length: int
    batch: int
    sparse: bool
    trains: Trains
    dtype: str = "float32"
    checkpointing: bool = False
    backend: str = "native"
    linear: str = "blas"
    on_gpu: bool = False
    muon: bool = False
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    lora: Sequence[LoraPart] = ()
    rank: int = 8

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the model's dtype."""
        return ITEMSIZES[self.dtype]

    @property
    def keys(self) -> int:
        """Key slots that the rank's sequences have."""
        return self.batch * self.length

    @property
    def rows(self) -> int:
        """Query rows that the rank computes."""
        return self.batch * math.ceil(self.length / self.layout.cp)

    @property
    def heads(self) -> int:
        """Attention heads that the rank computes."""
        return self.config.num_attention_heads // self.layout.tp

    @property
    def selected(self) -> int:
        """Keys a row selects at most."""
        return min(self.config.index_topk, self.length)

    @property
    def pairs(self) -> int:
        """Pairs of a token and one of its experts that the rank computes, if every expert gets as many."""
        return math.ceil(self.rows * self.config.num_experts_per_tok / self.layout.tp)

    @property
    def kl(self) -> bool:
        """Whether the indexer's loss is computed."""
        return self.trains != "model"

    @property
    def kl_backend(self) -> str:
        """What computes that loss: with heads on several ranks the one implementation that adds their p up."""
        return self.backend if self.layout.tp == 1 else "torch"

    @property
    def graph(self) -> bool:
        """Whether autograd records the model itself, and not the indexer's part alone.

        transformers' checkpointing makes the embedding's output require gradient, and with it all that follows.
        """
        return self.trains != "indexer" or self.checkpointing

    @property
    def forgets(self) -> bool:
        """Whether checkpointing sets a layer's activations free after its forward, until its own backward comes.

        Not for good where the indexer alone trains: the layer is computed again for the KL, and what it kept for a
        backward of the model, which never comes, stays to the end of the step.
        """
        return self.checkpointing

    @property
    def scored(self) -> bool:
        """Whether the indexer computes queries: for the KL, or to choose among more keys than it may take."""
        return self.kl or (self.sparse and self.length > self.config.index_topk)

    @cached_property
    def path(self) -> AttentionPath:
        """Of `optimized.paths`, as the model chooses it for unpadded sequences."""
        if not self.sparse:
            return "dense"
        fits = self.length <= self.config.index_topk
        rows = self.rows // self.batch
        return choose_path(self.config, rows, self.length, self.backend, all_selected=fits)

    @cached_property
    def parameters(self) -> list[Parameter]:
        """Those of the whole model."""
        return parameters(self.config, self.trains, self.lora, self.rank)

    def shard(self, parameter: Parameter) -> int:
        """Elements of `parameter` that the rank holds between steps: its part of the largest shard.

        Experts are cut by ep · tp and sharded over dp · cp; heads and FFN columns are cut by tp, and all that is not an
        expert is sharded over dp · cp · ep.
        """
        return math.ceil(self.whole(parameter) / self.sharding(parameter))

    def whole(self, parameter: Parameter) -> int:
        """Elements of `parameter` that the rank computes with: gathered from its shards, cut by ep and tp."""
        if parameter.is_expert:
            return math.ceil(parameter.count / self.layout.expert_parts)
        return math.ceil(parameter.count / self.layout.tp) if parameter.is_cut else parameter.count

    def sharding(self, parameter: Parameter) -> int:
        """Ranks that the rank's part of `parameter` is sharded over."""
        return self.layout.dp * self.layout.cp if parameter.is_expert else self.layout.data

    @property
    def causal_pairs(self) -> int:
        """Pairs of a query row of the rank and a key that it sees, rows being dealt out evenly over cp."""
        return self.batch * causal_pairs(self.length, self.length) // self.layout.cp

    @property
    def selected_pairs(self) -> int:
        """Of these the pairs that selection leaves."""
        return self.batch * causal_pairs(self.length, self.length, self.config.index_topk) // self.layout.cp
