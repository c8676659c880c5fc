"""The first layer's choices in bf16, where two right models differ by almost nothing.

Deeper layers carry the rounding of all layers below them, and a margin wide enough for that hides a fault of
rounding size: head weights in bf16 flip 5 to 10 % of the rows at 16 heads of 128, and stay within it (transformers;
catalogue A14). The first layer reads embeddings, which are the same bits in every model. So its choices are compared
with the reference's own in bf16, and may differ as often as those of the reference itself when it adds in another
order.

Letters: B batch, L rows, S key slots, M hidden_size, Q q_lora_rank.
"""

import math
from dataclasses import replace

import torch

from reference import DeepseekV32Config
from reference.indexer import select_topk, selected_mask
from reports.schema import Measure, NullCandidate

from ..budgets import FIRST_LAYER
from ..cases import Case, build_case
from ..observe import observe
from ..subjects import ALL, resolve_subject
from .base import Answer, Bench, Check, State
from .choices import layout_of, wrong_selections
from .whole import changed

# Enough rows for a fault that flips 1 % of them.
ROWS = 1280
ORDERS = 4
# Which axis of layer 0's tensors runs over M, and which over Q.
_OVER_HIDDEN = {"embed_tokens.weight": 1, "layers.0.input_layernorm.weight": 0, "q_a_proj.weight": 1,
                "kv_a_proj_with_mqa.weight": 1, "indexer.wk.weight": 1, "weights_proj.weight": 1}  # fmt: skip
_OVER_LATENT = {"q_a_proj.weight": 0, "q_a_layernorm.weight": 0, "q_b_proj.weight": 1, "wq_b.weight": 1}


def one_layer(config: DeepseekV32Config, state: State) -> tuple[DeepseekV32Config, State]:
    """The model cut after its first layer."""
    cut = changed(config, num_hidden_layers=1)
    return cut, {name: x for name, x in state.items() if ".layers." not in name or ".layers.0." in name}


def in_another_order(state: State, generator: torch.Generator) -> State:
    """The same first layer with hidden and latent channels permuted: equal scores, added up in another order."""
    out = dict(state)
    for axes in (_OVER_HIDDEN, _OVER_LATENT):
        order = None
        for suffix, axis in axes.items():
            for name in (n for n in state if n.endswith(suffix)):
                if order is None:
                    order = torch.randperm(state[name].shape[axis], generator=generator)
                out[name] = out[name].index_select(axis, order)
    return out


def _scores(case: Case, state: State, device: torch.device, head_weights: torch.dtype | None = None) -> torch.Tensor:
    """The reference's raw I `[B, L, S]` in bf16, −inf where invisible; head weights rounded when a dtype is given."""
    model = resolve_subject("reference").build(case.config, state, device, torch.bfloat16)
    if head_weights is not None:
        indexer = model.model.layers[0].self_attn.indexer  # type: ignore[union-attr, index]
        exact = indexer.head_weights
        indexer.head_weights = lambda x: exact(x).to(head_weights).float()
    return observe(model, case, ALL, gradients=False, scores=True).scores_BLS[0].double()


def first_layer(bench: Bench) -> Answer:
    """Selected keys of the first layer that differ from the reference's in the same precision."""
    config, state = one_layer(bench.case.config, bench.oracle.state)
    length, k = bench.case.input_ids.shape[1], config.index_topk
    case = build_case("text", config, seed=bench.case.seed, length=length, batch=math.ceil(ROWS / max(length - k, 1)))
    case = replace(case, config=config)
    layout = layout_of(case, bench.device)
    visible = layout.visible_BLS()

    def mask_of(scores_BLS: torch.Tensor) -> torch.Tensor:
        return selected_mask(select_topk(scores_BLS, visible, k), layout.num_slots)

    def reference_side() -> tuple[torch.Tensor, float, dict[str, int]]:
        generator = torch.Generator().manual_seed(case.seed)
        scores = _scores(case, state, bench.device)
        own = mask_of(scores)

        def flips(mask: torch.Tensor) -> int:
            return int((own & ~mask).sum() + (mask & ~own).sum())

        orders = [
            flips(mask_of(_scores(case, in_another_order(state, generator), bench.device))) for _ in range(ORDERS)
        ]
        wrong = {
            kind: flips(selected_mask(layout.from_relative(chosen), layout.num_slots))
            for kind, chosen in wrong_selections(scores, layout, k, generator)
        }
        wrong["head weights in bf16"] = flips(mask_of(_scores(case, state, bench.device, torch.bfloat16)))
        return own, FIRST_LAYER.factor * max(orders) + FIRST_LAYER.floor, wrong

    own, allowed, wrong = bench.oracle.remember("first layer", reference_side)
    module = bench.of_subject(lambda: bench.subject.build(config, state, bench.device, torch.bfloat16))
    seen = bench.of_subject(lambda: observe(module, case, bench.subject.capabilities, gradients=False))
    assert seen.decisions is not None
    chosen = seen.decisions[0].topk_indices
    if chosen is None:
        return Answer([Measure("layers without a selection", 1.0, 0.0)], [], "layer 0 reports no top-k indices")
    mask = selected_mask(layout.from_relative(chosen), layout.num_slots)
    found = int((own & ~mask).sum() + (mask & ~own).sum())
    rows = int((own != mask).any(-1).sum())
    return Answer(
        [
            Measure("keys unlike the reference's", float(found), allowed, "keys"),
            Measure("rows unlike the reference's", float(rows), None, "rows"),
            Measure("rows", float(own.shape[0] * own.shape[1]), None, "rows"),
        ],
        [NullCandidate(kind, count > allowed) for kind, count in wrong.items()],
        f"{rows} rows choose other keys than the reference does in bf16, on the same embeddings"
        if found > allowed
        else "",
    )


CHECKS = [
    Check("choices.first_layer", "choices", first_layer, frozenset({"tape"}), frozenset({"whole"}),
          only_dtypes=frozenset({torch.bfloat16})),
]  # fmt: skip
