"""Every tensor of the golden vectors: its file, its name, its shape in letters, its meaning, and how it is judged.

The letters are those of `LETTERS`; O and I are the output and input axes of a weight matrix.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from harness.cases import Case, calibrated_state
from harness.subjects import load_weights
from reference import DeepseekV32Config, DeepseekV32ForCausalLM

from .constants import Constant, all_constants
from .inputs import CASES, MODES, SEED, golden_case, golden_config
from .record import TAIL, gradient_names, layout_of, official_tensors, record, record_first_layer
from .tolerances import RULES, Rule

WEIGHTS_FILE, CONFIG_FILE, CONSTANTS_FILE = "model.safetensors", "config.json", "constants.json"
# The run of which all is stored that shows where something is wrong; the others find out that something is.
FULL = ("text", "sparse")
LETTERS = {
    "B": "sequence", "L": "row", "S": "key", "K": "place", "T": "place", "Y": "layer", "M": "hidden lane", "W": "token",
    "X": "expert", "H": "head", "N": "lane", "R": "rope lane", "P": "rope pair", "C": "kv latent lane",
    "Q": "q latent lane", "J": "indexer head", "E": "indexer lane", "G": "parameter", "U": "column", "1": "entry",
    "O": "output", "I": "input",
}  # fmt: skip
# What a config.json says of a model; the rest of a transformers config is how to run one.
CONFIG_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "first_k_dense_replace", "num_attention_heads", "num_key_value_heads", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_n_heads", "index_head_dim", "index_topk",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob",
    "routed_scaling_factor", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias", "tie_word_embeddings",
    "max_position_embeddings", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
    "use_sparse_attention", "detach_indexer_input", "indexer_rope_interleaved", "indexer_precision",
    "kv_latent_precision",
)  # fmt: skip

_WEIGHTS = {
    "embed_tokens.weight": ("WM", "The embedding of each token id."),
    "q_a_proj.weight": ("OI", "Hidden state to q latent."),
    "q_a_layernorm.weight": ("O", "RMSNorm of the q latent, eps 1e-6."),
    "q_b_proj.weight": ("OI", "Normed q latent to queries: a head's lanes without rotation, then its rope lanes."),
    "kv_a_proj_with_mqa.weight": ("OI", "Hidden state to kv latent, then the rope lanes that all heads share."),
    "kv_a_layernorm.weight": ("O", "RMSNorm of the kv latent, eps 1e-6; the rope lanes are not normed."),
    "kv_b_proj.weight": ("OI", "Normed kv latent to a head's key lanes without rotation, then its value lanes."),
    "o_proj.weight": ("OI", "Values of all heads to hidden state."),
    "indexer.wq_b.weight": ("OI", "Normed q latent to indexer queries, head by head, rope lanes first."),
    "indexer.wk.weight": ("OI", "Hidden state to the one indexer key, rope lanes first."),
    "indexer.k_norm.weight": ("O", "LayerNorm of the indexer key, eps 1e-6: gain."),
    "indexer.k_norm.bias": ("O", "LayerNorm of the indexer key: bias."),
    "indexer.weights_proj.weight": ("OI", "Hidden state to head weights."),
    "gate_proj.weight": ("OI", "SwiGLU: what goes through silu."),
    "up_proj.weight": ("OI", "SwiGLU: what multiplies it."),
    "down_proj.weight": ("OI", "SwiGLU: the product to hidden state."),
    "mlp.gate.weight": ("OI", "Router: one row an expert."),
    "e_score_correction_bias": ("O", "Router: added to the scores for the choice only."),
    "input_layernorm.weight": ("O", "RMSNorm before attention."),
    "post_attention_layernorm.weight": ("O", "RMSNorm before the feed-forward block."),
    "model.norm.weight": ("O", "RMSNorm after the last layer."),
    "lm_head.weight": ("WM", "Hidden state to logits."),
}


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """One stored tensor. letters: one of `LETTERS` a dimension. owner: what it belongs to, in a sentence."""

    file: str
    name: str
    value: torch.Tensor
    letters: str
    kind: str
    meaning: str
    owner: str

    @property
    def rule(self) -> Rule:
        """How it is judged."""
        return RULES[self.kind]


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """All that is exported. gradient_rows: the parameter behind each row of a gradient table, by loss."""

    config: dict[str, Any]
    constants: list[Constant]
    goldens: list[Golden]
    gradient_rows: dict[str, list[str]]


def build_vectors(weights: Mapping[str, torch.Tensor] | None = None) -> Vectors:
    """Run the reference in fp64 on every case.

    `weights` are official tensors to use instead of the recipe's: on another machine the same recipe may round some
    normal numbers differently, and what was exported there is what has to be computed with here.
    """
    config = golden_config("sparse")
    state = recipe_state() if weights is None else _stacked(weights, recipe_state())
    goldens = list(_weights(state))
    gradient_rows: dict[str, list[str]] = {}
    for name in CASES:
        goldens += _inputs(golden_case(name, "sparse"))
        for mode in MODES:
            case = golden_case(name, mode)
            model: Any = load_weights(
                DeepseekV32ForCausalLM, golden_config(mode), state, torch.device("cpu"), torch.float64
            )
            gradient_rows = gradient_names(model)
            goldens += _outputs(name, mode, record(model, case))
            if (name, mode) == FULL:
                goldens += _first_layer(name, mode, record_first_layer(model, case))
    return Vectors(config_fields(config), all_constants(), goldens, gradient_rows)


def recipe_state() -> dict[str, torch.Tensor]:
    """The weights by recipe: `harness.cases.calibrated_state` with the seed of `inputs.py`, fp32, experts stacked."""
    return calibrated_state(golden_config("sparse"), SEED)


def config_fields(config: DeepseekV32Config) -> dict[str, Any]:
    """The fields of `CONFIG_FIELDS`, as JSON values."""
    held = config.to_dict()
    return {name: held[name] for name in CONFIG_FIELDS}


def _stacked(official: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for name, tensor in like.items():
        prefix, _, leaf = name.rpartition(".")
        if not prefix.endswith("mlp.experts"):
            out[name] = official[name]
            continue
        parts = ("down_proj",) if leaf == "down_proj" else ("gate_proj", "up_proj")
        out[name] = torch.stack([
            torch.cat([official[f"{prefix}.{i}.{part}.weight"] for part in parts]) for i in range(len(tensor))
        ])  # fmt: skip
    return out


def _weights(state: Mapping[str, torch.Tensor]) -> Iterator[Golden]:
    for name, value in official_tensors(state).items():
        letters, meaning = next(described for suffix, described in _WEIGHTS.items() if name.endswith(suffix))
        yield _golden(WEIGHTS_FILE, name, value, letters, "weight", meaning, "the weights")


def _inputs(case: Case) -> Iterator[Golden]:
    layout = layout_of(case)
    real_BL = case.real_BL
    start_BL = layout.order_BS.gather(1, layout.bounds_BL2[..., 0])
    held = {
        "input_ids": (case.input_ids, "Token ids: 256 begins a row, then bytes of text; 258 is padding."),
        "attention_mask": (real_BL, "1 for tokens, 0 for padding."),
        "position_ids": (layout.positions_BL, "RoPE positions; a document starts where this is not its predecessor + 1."),
        "labels": (case.labels, "Row t is scored on label t + 1; -100 is no label."),
        "document_start": (
            start_BL.masked_fill(~real_BL, -1),
            "Key slot at which the row's document starts: row t sees keys document_start ... t. -1 in pad rows.",
        ),
    }  # fmt: skip
    for name, (value, meaning) in held.items():
        yield _golden(
            f"{case.name}.inputs.safetensors", name, value, "BL", "input", meaning, f"the inputs of case {case.name}"
        )


def _first_layer(case: str, mode: str, held: Mapping[str, torch.Tensor]) -> Iterator[Golden]:
    described = {
        "x": ("LM", "The layer's normed input: RMSNorm of the embeddings."),
        "cos": ("LP", "cos of position times inv_freq."),
        "sin": ("LP", "sin of position times inv_freq."),
        "q_latent": ("LQ", "Normed q latent: what both q_b_proj and the indexer's wq_b read."),
        "q_nope": ("LHN", "Queries, lanes without rotation."),
        "q_pe": ("LHR", "Queries, rope lanes, turned in interleaved pairs."),
        "c_kv": ("LC", "Normed kv latent: what the cache holds and kv_b_proj reads."),
        "k_pe": ("LR", "Rope lanes of the keys, turned in interleaved pairs, one for all heads."),
        "index_q": ("LJE", "Indexer queries, their first 16 lanes turned in half-split pairs."),
        "index_k": ("LE", "Indexer keys after LayerNorm, their first 16 lanes turned in half-split pairs."),
        "index_w": ("LJ", "Head weights, times J^(-1/2) E^(-1/2). With index_q and index_k they give index_scores.0."),
        "attention_out": ("LM", "What the first layer's attention adds to the hidden state."),
    }
    file = f"{case}.{mode}.layer0.safetensors"
    for name, value in held.items():
        letters, meaning = described[name]
        owner = f"the first layer of case {case}, {mode}"
        yield _golden(file, name, value, letters, "first layer", f"{meaning} Sequence 0 only.", owner)


def _outputs(case: str, mode: str, held: Mapping[str, torch.Tensor]) -> Iterator[Golden]:
    full = (case, mode) == FULL
    file, owner = f"{case}.{mode}.safetensors", f"case {case}, {mode}"
    seen = "selected" if mode == "sparse" else "visible"
    for name, value in held.items():
        what, _, layer = name.partition(".")
        letters, kind, meaning = _OUTPUTS[name if what == "gradients" else what]
        if layer.isdecimal():
            meaning = f"Layer {layer}: {meaning}"
        stored = {
            "logits": full,
            "logits_tail": not full,
            "index_scores": full or (mode == "sparse" and layer == "0"),
            "kl_targets": case == FULL[0] and layer == "0",
        }.get(what, True)
        if stored:
            yield _golden(file, name, value, letters, kind, meaning.format(seen=seen, tail=TAIL), owner)


_OUTPUTS = {
    "index_scores": ("BLS", "forward", "raw index scores I on every visible key, -inf on the others."),
    "kl_targets": (
        "BLS", "forward", "target p of the KL: attention probabilities summed over heads, divided by their number; 0 "
        "outside the {seen} keys.",
    ),
    "topk_indices": (
        "BLK", "choice", "selected keys, ascending, counted from document_start; -1 at the tail and in pad rows.",
    ),
    "key_margins": (
        "YBL", "margin", "Score of the last selected key minus that of the best one left out; inf where none is.",
    ),
    "expert_indices": ("BLT", "choice", "chosen experts, ascending; -1 in pad rows."),
    "router_scores": ("BLX", "forward", "sigmoid of the router's logits, without the bias; 0 in pad rows."),
    "router_margins": (
        "YBL", "margin", "By layer with experts: the smaller of two gaps in biased scores, between the last group kept "
        "and the first dropped, and between the last expert chosen and the next in the kept groups; inf in pad rows.",
    ),
    "kl_rows": ("YBL", "projection", "KL(p || softmax(I)) over the {seen} keys, nats, each layer and row; 0 in pad rows."),
    "kl_per_layer": ("Y", "loss", "kl_rows of a layer added up, divided by the number of real rows."),
    "kl_loss": ("1", "loss", "kl_per_layer added up: indexer_kl_loss."),
    "lm_loss": ("1", "loss", "Next-token cross-entropy, nats, mean over the labels that count."),
    "logits": ("BLW", "forward", "Logits; 0 in pad rows."),
    "logits_tail": ("BLW", "forward", "Logits of the last {tail} rows of each sequence."),
    "logit_projections": ("BL", "projection", "Logits of every row times the projection vector; 0 in pad rows."),
    "hidden_projections": (
        "YBL", "projection", "Embeddings, each layer's output but the last, and the last one's after the final norm: "
        "every row times the projection vector; 0 in pad rows.",
    ),
    "gradients.lm": ("GU", "gradient", "Gradient of lm_loss: one row a parameter (gradient_rows.lm), gradient_columns."),
    "gradients.kl": ("GU", "gradient", "Gradient of kl_loss: one row a parameter (gradient_rows.kl), gradient_columns."),
}  # fmt: skip


def _golden(file: str, name: str, value: torch.Tensor, letters: str, kind: str, meaning: str, owner: str) -> Golden:
    assert value.dim() == len(letters), f"{name}: {tuple(value.shape)} is not {letters}"
    return Golden(file, name, value.detach().to(RULES[kind].storage).contiguous(), letters, kind, meaning, owner)
