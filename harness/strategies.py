"""Hypothesis strategies: configurations of operators and of models, and a seed, never the entries of a tensor.

What is drawn are small integers and names, so that a failure shrinks to the fewest rows, keys and heads at which it
still fails. The only file of the harness that imports hypothesis, which the suites bring.
"""

from typing import get_args

import torch
from hypothesis import strategies as st

from reference import DeepseekV32Config

from .operators.cases import Family, Mask, OperatorCase, Scores, Sizes, Values

DTYPES = (torch.float32, torch.bfloat16)
# Seeds from 1000 on count false alarms and are drawn by nobody.
SEEDS = st.integers(0, 999)


@st.composite
def operator_cases(draw: st.DrawFn, *, least: int = 1) -> OperatorCase:
    """A case of single operators: sizes down to `least` keys, and any family of inputs.

    With one key a row, or one indexer head whose ReLU is shut, every loss and gradient is 0: a property that asks what
    changes needs some of each, and numbers of a usual size. It gets them from `least` = 6.
    """
    slots = draw(st.integers(least, 24), label="slots")
    width = draw(st.integers(max(2, least), 24), label="width")
    sizes = Sizes(
        batch=draw(st.integers(1, 3), label="batch"),
        rows=draw(st.integers(least, slots), label="rows"),
        slots=slots,
        heads=draw(st.integers(1, 5), label="heads"),
        width=width,
        values=draw(st.integers(1, width), label="values"),
        index_heads=draw(st.integers(min(least, 4), 5), label="index heads"),
        index_width=draw(st.integers(max(2, least), 24), label="index width"),
        k=draw(st.integers(min(least, 3), slots + 2), label="k"),
    )
    family = Family(
        mask=draw(st.sampled_from(get_args(Mask)), label="mask"),
        scores=draw(st.sampled_from(get_args(Scores) if least == 1 else ("spread", "negative")), label="scores"),
        values=draw(st.sampled_from(get_args(Values) if least == 1 else ("plain",)), label="values"),
        holes=draw(st.booleans(), label="holes"),
        strided=least == 1 and draw(st.booleans(), label="strided"),
    )
    return OperatorCase("drawn", sizes, family, draw(SEEDS, label="seed"), float(width**-0.5))


@st.composite
def model_configs(draw: st.DrawFn) -> DeepseekV32Config:
    """A small model: one or two layers, any head counts, groups and k, with or without YaRN."""
    groups, per_group = draw(st.sampled_from(((1, 4), (2, 2), (2, 4), (4, 2))), label="groups, experts in each")
    experts = groups * per_group
    kept = draw(st.integers(1, groups), label="groups kept")
    rope = draw(st.sampled_from((4, 8, 16)), label="rope lanes")
    fields: dict[str, object] = {
        "num_hidden_layers": draw(st.integers(1, 2), label="layers"),
        "first_k_dense_replace": draw(st.integers(0, 1), label="dense layers"),
        "hidden_size": 8 * draw(st.integers(2, 6), label="hidden / 8"),
        "num_attention_heads": draw(st.integers(1, 4), label="heads"),
        "q_lora_rank": draw(st.integers(8, 32), label="q latent"),
        "kv_lora_rank": draw(st.integers(8, 32), label="kv latent"),
        "qk_nope_head_dim": draw(st.integers(4, 16), label="nope"),
        "qk_rope_head_dim": rope,
        "v_head_dim": draw(st.integers(4, 16), label="v"),
        "index_n_heads": draw(st.integers(1, 8), label="index heads"),
        "index_head_dim": rope + 4 * draw(st.integers(0, 3), label="index lanes without rope / 4"),
        "index_topk": draw(st.integers(1, 12), label="k"),
        "n_routed_experts": experts,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": draw(st.integers(1, kept * per_group), label="experts a token"),
        "norm_topk_prob": draw(st.booleans(), label="normalised"),
        "indexer_rope_interleaved": draw(st.booleans(), label="interleaved"),
    }
    if draw(st.booleans(), label="without YaRN"):
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    return DeepseekV32Config.preset("tiny", **fields)
