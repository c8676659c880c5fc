"""Which of three computations serves one sparse attention, decided from its dimensions (report section 2.2).

    dense     every visible key is selected (no row sees more than k): plain flash MHA, no scores, no gathers
    masked    MHA over all visible keys, those not selected hidden: the report's form for short sequences
    gathered  absorbed MQA over the selected latents only

They give the same numbers up to rounding. Absorption makes a pair of query and key dearer, 2C + R products a head
instead of N + R + V (3.4 times at V3.2's dims), so gathering pays only once it skips most pairs; where that is depends
on the dimensions, and is computed here.

Letters: B batch, L rows, S key slots, H heads, N nope dim, R rope dim, V v_head_dim, C kv_lora_rank, K selected keys.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from reference.config import DeepseekV32Config

AttentionPath = Literal["dense", "masked", "gathered"]
PATHS: tuple[AttentionPath, ...] = get_args(AttentionPath)

# Time of a product in the gathered form, in products of the masked form, by implementation. Measured on the CPU at the
# presets bench and small; for triton it is the ratio of the published speeds of kernels of both forms on Hopper.
GATHER_COST = {"torch": 1.0, "native": 1.0, "triton": 1.6}


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What one attention costs by: sizes of the model, and pairs of a query row and a key in one batch entry."""

    heads: int
    nope: int
    rope: int
    value: int
    latent: int
    rows: int
    slots: int
    visible_pairs: int
    selected_pairs: int

    @property
    def masked_products(self) -> int:
        """Multiplications of the masked form: keys and values of all slots are expanded, every visible pair is met."""
        expansion = self.slots * self.latent * (self.nope + self.value)
        return self.heads * (expansion + self.visible_pairs * (self.nope + self.rope + self.value))

    @property
    def gathered_products(self) -> int:
        """Multiplications of the gathered form: queries and outputs go through the latent, selected pairs are met."""
        absorption = self.rows * self.latent * (self.nope + self.value)
        return self.heads * (absorption + self.selected_pairs * (2 * self.latent + self.rope))


def causal_pairs(rows: int, slots: int, most: int | None = None) -> int:
    """Pairs of `rows` query rows, the last of `slots`, with the keys up to their own, `most` a row at most."""
    first = slots - rows + 1
    if most is None or most >= slots:
        return rows * (first + slots) // 2
    growing = max(0, min(rows, most - first + 1))
    return growing * (2 * first + growing - 1) // 2 + (rows - growing) * most


def choose_path(config: DeepseekV32Config, rows: int, slots: int, backend: str, *, all_selected: bool) -> AttentionPath:
    """The cheapest path for `rows` query rows, the last of `slots`, by the operators of `backend`.

    `all_selected`: no row sees more than k keys. Then the masked form needs no mask, and is called dense.
    """
    shape = AttentionShape(
        config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim,
        config.kv_lora_rank, rows, slots, causal_pairs(rows, slots), causal_pairs(rows, slots, config.index_topk),
    )  # fmt: skip
    if shape.gathered_products * GATHER_COST.get(backend, 1.0) < shape.masked_products:
        return "gathered"
    return "dense" if all_selected else "masked"
