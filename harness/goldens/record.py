"""One forward and two backwards of a model, and everything of them that is stored.

Letters: B batch, L rows, S key slots, M hidden size, W vocabulary, X routed experts, K selected keys, T chosen
experts, Y layers, G gradient rows (parameters); 8 the columns of a gradient summary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from harness.cases import Case
from reference import Decisions, kl_rows
from reference.attention import Ask
from reference.layout import Layout, build_layout
from reference.moe import Gate, MoE

GRADIENT_COLUMNS = ("sum", "sum of magnitudes", "l2 norm", "projection", "value 0", "value 1", "value 2", "value 3")
# Rows whose logits are stored whole where not all of them are.
TAIL = 2


def projection_vector(length: int) -> torch.Tensor:
    """cos(i + 1) for i = 0 … length − 1, fp64: no entry and no two neighbours can change unseen, and C++ has it too."""
    return torch.arange(1, length + 1, dtype=torch.float64).cos()


def official_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by the names of the published files, in name order: stacked experts become one matrix each.

    `gate_up_proj` `[X, 2F, M]` holds an expert's F gate rows, then its F up rows (F the expert's FFN width).
    """
    out = {}
    for name, tensor in tensors.items():
        prefix, _, leaf = name.rpartition(".")
        if not prefix.endswith("mlp.experts"):
            out[name] = tensor
            continue
        for i, expert in enumerate(tensor):
            if leaf == "down_proj":
                out[f"{prefix}.{i}.down_proj.weight"] = expert
            else:
                out[f"{prefix}.{i}.gate_proj.weight"], out[f"{prefix}.{i}.up_proj.weight"] = expert.chunk(2)
    return {name: out[name].contiguous() for name in sorted(out)}


def layout_of(case: Case) -> Layout:
    """Who sees whom in `case`."""
    batch, length = case.input_ids.shape
    return build_layout(
        batch, length, case.input_ids.device, attention_mask=case.attention_mask, position_ids=case.position_ids
    )


def record(model: Any, case: Case, tape: Decisions | None = None) -> dict[str, torch.Tensor]:
    """What `model` computes on `case`, by the names of the golden files; on `tape`, if one is given.

    Pad rows hold 0 in everything that has rows (−1 where choices are stored): what stands there counts for nothing.
    Gradients are those of the parameters that the loss reaches. Raw index scores are −inf on keys that the row does
    not see.

    Returns:
        fp64 for a model in fp64, at least fp32 otherwise; int32 for choices. Names and shapes as in `vectors.py`,
        which says which of them are stored.
    """
    real_BL = case.real_BL
    asked = {**case.inputs(), "labels": case.labels, "output_indexer_kl_target": True, "decisions": tape}
    model.zero_grad(set_to_none=True)
    with _router_scores(model) as router_scores:
        out = model(
            **asked, output_indexer_scores="visible", output_indexer_kl_loss=True, output_decisions=True,
            output_hidden_states=True,
        )  # fmt: skip
    held: dict[str, torch.Tensor] = {}
    held.update(_scores_and_targets(out, real_BL))
    held.update(_choices(model, out, real_BL, router_scores))
    with torch.no_grad():
        candidates = model(**asked, output_indexer_scores=True)
    rows_YBL = torch.stack(
        [kl_rows(s, p) for s, p in zip(candidates.indexer_scores, out.indexer_kl_targets, strict=True)]
    )
    held["kl_rows"] = rows_YBL.masked_fill(~real_BL, 0)
    held["kl_per_layer"] = held["kl_rows"].sum((1, 2)) / real_BL.sum()
    held["kl_loss"] = out.indexer_kl_loss[None]
    held["lm_loss"] = out.lm_loss[None]

    logits_BLW = out.logits.masked_fill(~real_BL[..., None], 0)
    held["logits"], held["logits_tail"] = logits_BLW, logits_BLW[:, -TAIL:]
    held["logit_projections"] = logits_BLW.double() @ projection_vector(logits_BLW.shape[-1])
    hidden_YBLM = torch.stack(out.hidden_states).masked_fill(~real_BL[..., None], 0)
    held["hidden_projections"] = hidden_YBLM.double() @ projection_vector(hidden_YBLM.shape[-1])

    out.lm_loss.backward(retain_graph=True)
    held["gradients.lm"] = gradient_table(model)
    model.zero_grad(set_to_none=True)
    out.indexer_kl_loss.backward()
    held["gradients.kl"] = gradient_table(model)
    model.zero_grad(set_to_none=True)
    return {name: value.detach() for name, value in held.items()}


def gradient_names(model: Any) -> dict[str, list[str]]:
    """Official names of the parameters that each loss reaches, in the order of the gradient tables' rows.

    The LM loss reaches all but the indexers, the KL loss reaches the indexers alone.
    """
    names = list(official_tensors(dict(model.named_parameters())))
    return {
        "lm": [name for name in names if ".indexer." not in name],
        "kl": [name for name in names if ".indexer." in name],
    }


def gradient_table(model: Any) -> torch.Tensor:
    """`[G, 8]` fp64: each reached parameter's gradient in the columns of `GRADIENT_COLUMNS`, in name order.

    The projection is Σ g_i · cos(i + 1) over the gradient's entries in row-major order, i from 0. Values of a vector
    with fewer than four entries are 0.
    """
    grads = official_tensors({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    rows = []
    for grad in grads.values():
        g = grad.double().flatten()
        first = torch.nn.functional.pad(g[:4], (0, max(0, 4 - g.numel())))
        rows.append(torch.stack([g.sum(), g.abs().sum(), g.norm(), g @ projection_vector(g.numel()), *first]))
    return torch.stack(rows)


def record_first_layer(model: Any, case: Case, tape: Decisions | None = None) -> dict[str, torch.Tensor]:
    """What the first layer computes of batch row 0: its input, every tensor that attention reads, and its output.

    Shapes without the batch axis: `[L, ...]`. See `vectors.py` for each one's meaning.
    """
    with torch.no_grad():
        layer, layout = model.model.layers[0], layout_of(case)
        attention = layer.self_attn
        x_BLM = layer.input_layernorm(model.model.embed_tokens(case.input_ids))
        rotary = model.model.rotary_emb(layout.positions_BL, x_BLM.dtype)
        t = attention.project(x_BLM, rotary, None, Ask(scores="visible"))
        out_BLM, _ = attention(x_BLM, layout, rotary, None, Ask(), None if tape is None else tape[0].topk_indices)
        q_latent_BLQ = attention.q_a_layernorm(attention.q_a_proj(x_BLM))
    held = {
        "x": x_BLM, "cos": rotary[0], "sin": rotary[1], "q_latent": q_latent_BLQ, "q_nope": t.q_nope_BLHN,
        "q_pe": t.q_pe_BLHR, "c_kv": t.c_kv_BSC, "k_pe": t.k_pe_BSR, "index_q": t.index_q_BLJE,
        "index_k": t.index_k_BSE, "index_w": t.index_w_BLJ, "attention_out": out_BLM,
    }  # fmt: skip
    return {name: value[0] for name, value in held.items()}


def _scores_and_targets(out: Any, real_BL: torch.Tensor) -> dict[str, torch.Tensor]:
    held = {}
    for i, (scores_BLS, target_BLS) in enumerate(zip(out.indexer_scores, out.indexer_kl_targets, strict=True)):
        held[f"index_scores.{i}"] = scores_BLS
        held[f"kl_targets.{i}"] = target_BLS.masked_fill(~real_BL[..., None], 0)
    return held


def _choices(
    model: Any, out: Any, real_BL: torch.Tensor, router_scores: Mapping[int, torch.Tensor]
) -> dict[str, torch.Tensor]:
    held: dict[str, torch.Tensor] = {}
    key_margins, router_margins = [], []
    for i, chosen in enumerate(out.decisions):
        if chosen.topk_indices is not None:
            held[f"topk_indices.{i}"] = chosen.topk_indices
            key_margins.append(_key_margin(out.indexer_scores[i], model.config.index_topk))
        if chosen.expert_indices is not None:
            held[f"expert_indices.{i}"] = chosen.expert_indices
            scores_BLX = router_scores[i].unflatten(0, real_BL.shape)
            held[f"router_scores.{i}"] = scores_BLX.masked_fill(~real_BL[..., None], 0)
            margin_BL = _router_margin(model.model.layers[i].mlp.gate, scores_BLX)
            router_margins.append(margin_BL.masked_fill(~real_BL, torch.inf))
    if key_margins:
        held["key_margins"] = torch.stack(key_margins)
    held["router_margins"] = torch.stack(router_margins)
    return held


def _key_margin(scores_BLS: torch.Tensor, k: int) -> torch.Tensor:
    # Hidden keys are −inf, so that a row which leaves no visible key out has an infinite margin.
    best = scores_BLS.sort(-1, descending=True).values
    margin_BL = best[..., k - 1] - best[..., k]
    return torch.where(margin_BL.isnan(), torch.inf, margin_BL)


def _router_margin(gate: Gate, scores_BLX: torch.Tensor) -> torch.Tensor:
    biased = scores_BLX + gate.e_score_correction_bias.to(scores_BLX.dtype)
    groups = biased.unflatten(-1, (gate.n_group, -1))
    group_scores = groups.sort(-1, descending=True).values[..., :2].sum(-1)
    ordered, order = group_scores.sort(-1, descending=True)
    kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, order[..., : gate.topk_group], True)
    best = groups.masked_fill(~kept[..., None], -torch.inf).flatten(-2).sort(-1, descending=True).values
    between_groups = ordered[..., gate.topk_group - 1] - ordered[..., gate.topk_group]
    return torch.minimum(between_groups, best[..., gate.top_k - 1] - best[..., gate.top_k])


@contextmanager
def _router_scores(model: Any) -> Iterator[dict[int, torch.Tensor]]:
    seen: dict[int, torch.Tensor] = {}
    handles = [
        layer.mlp.gate.register_forward_hook(lambda _gate, _args, scores, i=i: seen.__setitem__(i, scores.detach()))
        for i, layer in enumerate(model.model.layers)
        if isinstance(layer.mlp, MoE)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
