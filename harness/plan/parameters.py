"""Every parameter of a model by name and shape, counted from the config alone: 671 B of them need no memory here.

Letters of the shapes: M hidden_size, H heads, N nope dim, R rope dim, V v_head_dim, C kv_lora_rank, Q q_lora_rank,
J indexer heads, E indexer head dim, F width of an FFN, X routed experts, W vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reference import DeepseekV32Config
from reference.training import GROUPS, LORA_MODULES, LORA_PARAMETERS, LoraPart, Trains, parameter_group

from ..training.audit import may_train

Shape = tuple[int, ...]

# What tensor parallelism cuts besides the experts: projections with a block a head, and the columns of the FFNs.
CUT = ("q_b_proj", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter. `layer` is None outside of the layers."""

    name: str
    shape: Shape
    trains: bool
    layer: int | None

    @property
    def count(self) -> int:
        """Its elements."""
        return math.prod(self.shape)

    @property
    def group(self) -> str:
        """Of `reference.training.GROUPS`."""
        return parameter_group(self.name)

    @property
    def is_expert(self) -> bool:
        """Whether it is a part of the stacked routed experts, which expert parallelism divides."""
        return ".mlp.experts." in self.name

    @property
    def is_cut(self) -> bool:
        """Whether tensor parallelism divides it, experts apart."""
        return not self.is_expert and any(f".{part}." in self.name for part in CUT)


def shapes(config: DeepseekV32Config) -> Iterator[tuple[str, Shape, int | None]]:
    """Name, shape and layer of every parameter of `DeepseekV32ForCausalLM(config)`, in the model's order."""
    c = config
    hidden, heads, latent = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
    yield "model.embed_tokens.weight", (c.vocab_size, hidden), None
    attention: dict[str, Shape] = {
        "q_a_proj.weight": (c.q_lora_rank, hidden),
        "q_a_layernorm.weight": (c.q_lora_rank,),
        "q_b_proj.weight": (heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), c.q_lora_rank),
        "kv_a_proj_with_mqa.weight": (latent + c.qk_rope_head_dim, hidden),
        "kv_a_layernorm.weight": (latent,),
        "kv_b_proj.weight": (heads * (c.qk_nope_head_dim + c.v_head_dim), latent),
        "o_proj.weight": (hidden, heads * c.v_head_dim),
        "indexer.wq_b.weight": (c.index_n_heads * c.index_head_dim, c.q_lora_rank),
        "indexer.wk.weight": (c.index_head_dim, hidden),
        "indexer.k_norm.weight": (c.index_head_dim,),
        "indexer.k_norm.bias": (c.index_head_dim,),
        "indexer.weights_proj.weight": (c.index_n_heads, hidden),
    }
    for layer in range(c.num_hidden_layers):
        stem = f"model.layers.{layer}"
        for name, shape in attention.items():
            yield f"{stem}.self_attn.{name}", shape, layer
        if c.is_moe_layer(layer):
            experts, inner = c.n_routed_experts, c.moe_intermediate_size
            yield f"{stem}.mlp.gate.weight", (experts, hidden), layer
            yield f"{stem}.mlp.experts.gate_up_proj", (experts, 2 * inner, hidden), layer
            yield f"{stem}.mlp.experts.down_proj", (experts, hidden, inner), layer
            ffn, width = f"{stem}.mlp.shared_experts", inner * c.n_shared_experts
        else:
            ffn, width = f"{stem}.mlp", c.intermediate_size
        yield f"{ffn}.gate_proj.weight", (width, hidden), layer
        yield f"{ffn}.up_proj.weight", (width, hidden), layer
        yield f"{ffn}.down_proj.weight", (hidden, width), layer
        yield f"{stem}.input_layernorm.weight", (hidden,), layer
        yield f"{stem}.post_attention_layernorm.weight", (hidden,), layer
    yield "model.norm.weight", (hidden,), None
    yield "lm_head.weight", (c.vocab_size, hidden), None


def parameters(
    config: DeepseekV32Config, trains: Trains, lora: Sequence[LoraPart] = (), rank: int = 8
) -> list[Parameter]:
    """Every parameter, those of the adapters of `reference.training.add_lora` on the parts `lora` among them.

    An adapter on a matrix is two: A of rank rows, B of rank columns. On the stacked experts, one an expert.
    """
    found = []
    for name, shape, layer in shapes(config):
        # Tied to the embedding, the head is the same parameter under a second name.
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found.append(Parameter(name, shape, may_train(name, trains, bool(lora)), layer))
        if any(_adapted(name, part) for part in lora):
            stacked = shape[0] if len(shape) == 3 else 1
            out, into = shape[-2:]
            stem = name.removesuffix(".weight")
            for factor, own in (("A", (rank * stacked, into)), ("B", (out, rank * stacked))):
                adapter = f"{stem}.lora_{factor}.default.weight"
                found.append(Parameter(adapter, own, may_train(adapter, trains, adapted=True), layer))
    return found


def _adapted(name: str, part: LoraPart) -> bool:
    modules = tuple(f".{module}.weight" for module in LORA_MODULES[part])
    return name.endswith(modules) or name.endswith(tuple(f".{stack}" for stack in LORA_PARAMETERS[part]))


def by_group(found: Sequence[Parameter]) -> dict[str, tuple[int, int]]:
    """For each group that there is, its parameters and how many of them train, in the order of `GROUPS`."""
    counts = {group: [0, 0] for group in GROUPS}
    for parameter in found:
        counts[parameter.group][0] += parameter.count
        counts[parameter.group][1] += parameter.count if parameter.trains else 0
    return {group: (total, trained) for group, (total, trained) in counts.items() if total}
