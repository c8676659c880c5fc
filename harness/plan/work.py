"""Floating-point operations, bytes between ranks and seconds of one training step, by part of the model, on one rank.

The counting is that of `harness.bench.flops`: matrix products, a multiply-add as two; a backward computes scores again. With
checkpointing every layer's forward is computed twice. Times are floors: operations at the data sheet's rate, bytes at its
bandwidth, with no launch, no wait, no imbalance between experts or ranks, and communication wholly behind computation.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .hardware import Cluster
from .memory import MOMENTS, optimizer_of
from .step import Step

# A layer's weights are gathered for its forward and, having been set free, for its backward.
GATHERS = 2


@dataclass(frozen=True, slots=True)
class Work:
    """Of one rank and one step. flop: by part. sent: bytes that the rank sends or receives, by purpose. update: bytes of
    memory that the optimizer reads and writes."""

    flop: Mapping[str, float]
    sent: Mapping[str, float]
    update: float
    seconds: Mapping[str, float]

    @property
    def computing(self) -> float:
        """Seconds of computation."""
        return self.seconds["computation"] + self.seconds["update"]

    @property
    def floor(self) -> float:
        """Seconds of the step: computation, or communication where that takes longer."""
        return max(self.computing, self.seconds["communication"])


def work(step: Step, cluster: Cluster) -> Work:
    """The work of one rank of `cluster`."""
    flop = {part: value for part, value in _flop(step) if value}
    sent = {purpose: size for purpose, size, _ in _sent(step, cluster) if size}
    trained = [p for p in step.parameters if p.trains]
    # Weights and moments are read and written, gradients read.
    update = step.itemsize * sum(step.shard(p) * (3 + 2 * MOMENTS[optimizer_of(step, p)]) for p in trained)
    seconds = {
        "computation": sum(flop.values()) / cluster.gpu.flops,
        "update": update / cluster.gpu.bandwidth,
        "communication": sum(size / rate for _, size, rate in _sent(step, cluster)),
    }
    return Work(flop, sent, float(update), seconds)


def kl_flop(step: Step, *, dense: bool) -> float:
    """FLOP of the indexer's loss and its gradients on the rank: over every visible key, or over the selected ones.

    The target once, and index scores: twice in dense mode, where their logsumexp comes first; again for the gradient,
    and dq and dk.
    """
    c, layers = step.config, step.config.num_hidden_layers
    index = c.index_n_heads * c.index_head_dim
    if dense or step.path != "gathered":
        per_pair, pairs = step.heads * (c.qk_nope_head_dim + c.qk_rope_head_dim) + 5 * index, step.causal_pairs
    else:
        per_pair, pairs = step.heads * (c.kv_lora_rank + c.qk_rope_head_dim) + 4 * index, step.selected_pairs
    return 2.0 * layers * pairs * per_pair


def _flop(step: Step) -> Iterator[tuple[str, float]]:
    c, n, layers = step.config, step.rows, step.config.num_hidden_layers
    heads, nope, rope, value, latent = (
        step.heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank,
    )  # fmt: skip
    model = step.trains != "indexer"
    # Forward, again under checkpointing, and twice in the backward of what trains.
    again = 2 if step.checkpointing else 1
    passes = again + (2 if model else 0)

    projections = (
        c.hidden_size * (c.q_lora_rank + latent + rope) + c.q_lora_rank * heads * (nope + rope)
        + heads * latent * (nope + value) + heads * value * c.hidden_size
    )  # fmt: skip
    yield "projections", 2.0 * n * layers * projections * passes
    if step.path == "gathered":
        width, pairs = latent + rope, step.selected_pairs
        forward, backward = heads * (width + latent), heads * (3 * width + 2 * latent)
    else:
        query, pairs = nope + rope, step.causal_pairs
        forward, backward = heads * (query + value), heads * (3 * query + 2 * value)
    yield "attention", 2.0 * layers * pairs * (forward * again + (backward if model else 0))
    index = c.index_n_heads * c.index_head_dim
    if step.scored:
        inside = c.q_lora_rank * index + c.hidden_size * (c.index_head_dim + c.index_n_heads)
        # Its inputs are detached: weights get gradients, what feeds them does not.
        yield "indexer projections", 2.0 * n * layers * inside * (again + (1 if step.kl else 0))
    if step.sparse and step.length > c.index_topk:
        # A recomputed layer takes its selection again.
        yield "index scores and selection", 2.0 * layers * step.causal_pairs * index
    if step.kl:
        # Computed in the forward with its gradients, so that recomputation computes it again.
        yield "KL of the indexer", kl_flop(step, dense=not step.sparse) * again
    dense_layers = min(c.first_k_dense_replace, layers)
    dense = 3 * c.hidden_size * c.intermediate_size // step.layout.tp
    yield "dense FFN", 2.0 * n * dense_layers * dense * passes
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    shared = n * (c.hidden_size * c.n_routed_experts + expert * c.n_shared_experts // step.layout.tp)
    yield "experts", 2.0 * (layers - dense_layers) * (shared + step.pairs * expert) * passes
    yield "head", 2.0 * n * c.hidden_size * c.vocab_size * (3 if model else 1)


def _sent(step: Step, cluster: Cluster) -> Iterator[tuple[str, float, float]]:
    """Purpose, bytes of the rank, and bytes a second of the link that the rank's group needs."""
    layout, a, layers = step.layout, step.itemsize, step.config.num_hidden_layers
    again = 2 if step.checkpointing else 1
    backward = 1 if step.trains != "indexer" else 0
    # Ranks count tp fastest, then ep, cp, dp: how far apart the members of a group are.
    reach = {"tp": layout.tp, "ep": layout.tp * layout.ep, "cp": layout.tp * layout.ep * layout.cp}
    rate = {axis: cluster.link(0, ranks - 1) for axis, ranks in reach.items()}
    whole = cluster.link(0, layout.world - 1)
    moved = {True: 0.0, False: 0.0}
    for parameter in step.parameters:
        shards = step.sharding(parameter)
        size = step.whole(parameter) * (1 - 1 / shards)
        reduced = max(a, 4) if parameter.trains else 0
        moved[parameter.is_expert] += size * (GATHERS * a + reduced)
    yield "weights and gradients (FSDP)", moved[False] + moved[True], whole
    hidden = step.rows * step.config.hidden_size
    moe = layers - min(step.config.first_k_dense_replace, layers)
    exchanged = step.pairs * step.config.hidden_size * a * (1 - 1 / layout.ep)
    yield "pairs of tokens and experts (ep)", 2.0 * moe * exchanged * (again + backward), rate["ep"]
    c = step.config
    latents = step.keys * (c.kv_lora_rank + c.qk_rope_head_dim + (c.index_head_dim if step.scored else 0)) * a
    yield "latents (cp)", layers * latents * (1 - 1 / layout.cp) * (again + 1), rate["cp"]
    summed = 2 * hidden * a * 2 * (1 - 1 / layout.tp)
    yield "sums over heads and columns (tp)", layers * summed * (again + backward), rate["tp"]
