"""DeepSeek V3.2 as loops: an oracle in fp64, written from the specification and from no other code.

One sequence, no batch, no cache, no padding. Projections, which act on each token alone, are matrix products;
whatever chooses or mixes tokens is a Python loop over queries: index scores, top-k (a sort of Python floats),
attention, the KL of a row. So are the layers and the experts. Native precision: no Hadamard, no FP8.

The indexer sees detached inputs and the KL target p is detached, so the language-model loss never reaches the
indexer and the KL reaches nothing else. Autograd flows through all the rest.

Letters, as suffixes of tensor names in the order of their axes:
    L  tokens: queries or keys           N, R, V  nope and rope dims of a q/k head, dims of a v head
    S  keys that a query sees            H, M     heads and dims of the indexer
    C  keys that attention keeps for it  Q, K     the q latent and the kv latent
    A  attention heads                   D, I, E  hidden width, FFN width, experts
    P  rope pairs, R / 2                 X        two kinds of dims, still joined
Letters of the report: t a query, s a key, I[t, s] an index score, S_t the keys selected for t, and p_t the
target of the KL.
In `logits_LV` V is the vocabulary; `cos_LR` and `sin_LR`, named by the caller, have the P columns.
"Spec" below is the specification sheet, its section and step; "report" is the V3.2-Exp technical report.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import relu, silu

LATENT_EPS = 1e-6  # q_a_layernorm, kv_a_layernorm and k_norm, whatever config.rms_norm_eps says

Weights = Mapping[str, Tensor]
Rows = list[list[int]]  # for each token, indices in ascending order


@dataclass
class NaiveOutput:
    """What a forward says. Lists have one entry a layer.

    `scores[i]` holds raw I on every visible key in both modes, and lies on the path to `kl`, so that
    `torch.autograd.grad(out.kl, out.scores[i])` is the gradient of the KL with respect to I.
    """

    logits_LV: Tensor
    kl: Tensor  # scalar: rows summed, divided by L, summed over layers
    kl_rows: list[Tensor]  # [L]
    topk: list[Rows | None]  # a token's keys; None in dense mode
    scores: list[Tensor]  # [L, L], -inf outside the visible keys
    experts: list[Rows | None]  # a token's experts; None for a dense FFN


def naive_forward(
    config: Any,
    state_dict: Weights,
    input_ids_L: Tensor | Sequence[int],
    position_ids_L: Tensor | Sequence[int],
    cos_LR: Tensor,
    sin_LR: Tensor,
    *,
    sparse: bool,
    documents_L: Tensor | Sequence[int] | None = None,
) -> NaiveOutput:
    """Spec 1.3: embedding, pre-norm residual blocks, final norm, head.

    `cos_LR` and `sin_LR` are [L, rope / 2], the rotary table at `position_ids_L`; `sparse=False` is the dense
    warm-up. Without `documents_L`, a document starts where a position is not its predecessor + 1.
    """
    _refuse_other_variants(config, state_dict, cos_LR, sin_LR)
    input_ids, positions = _ints(input_ids_L), _ints(position_ids_L)
    documents = _documents_of(positions) if documents_L is None else _ints(documents_L)
    L = len(input_ids)
    if not L == len(positions) == len(documents) == len(cos_LR) == len(sin_LR):
        raise ValueError("input_ids, position_ids, documents, cos and sin must have the same length")
    visible = [[s for s in range(t + 1) if documents[s] == documents[t]] for t in range(L)]

    kl = cos_LR.new_zeros(())
    kl_rows, all_topk, all_scores, all_experts = [], [], [], []
    h_LD = state_dict["model.embed_tokens.weight"][input_ids]
    for i in range(config.num_hidden_layers):
        layer = _below(state_dict, f"model.layers.{i}.")

        x_LD = rms_norm(h_LD, layer["input_layernorm.weight"], config.rms_norm_eps)
        attended_LD, scores_LL, topk, kl_L = attention(
            config, _below(layer, "self_attn."), x_LD, cos_LR, sin_LR, visible, sparse
        )
        h_LD = h_LD + attended_LD

        x_LD = rms_norm(h_LD, layer["post_attention_layernorm.weight"], config.rms_norm_eps)
        mlp, experts = _below(layer, "mlp."), None
        if i < config.first_k_dense_replace:
            y_LD = ffn(x_LD, mlp["gate_proj.weight"], mlp["up_proj.weight"], mlp["down_proj.weight"])
        else:
            y_LD, experts = moe(config, mlp, x_LD)
        h_LD = h_LD + y_LD

        kl = kl + kl_L.sum() / L
        kl_rows.append(kl_L)
        all_topk.append(topk)
        all_scores.append(scores_LL)
        all_experts.append(experts)

    x_LD = rms_norm(h_LD, state_dict["model.norm.weight"], config.rms_norm_eps)
    logits_LV = x_LD @ state_dict["lm_head.weight"].T
    return NaiveOutput(logits_LV, kl, kl_rows, all_topk, all_scores, all_experts)


def naive_causal_lm_loss(logits_LV: Tensor, input_ids_L: Tensor | Sequence[int]) -> Tensor:
    """Mean over t of -log P(token t + 1 | tokens up to t), for the L - 1 tokens that have a successor."""
    ids = _ints(input_ids_L)
    log_p_LV = logits_LV - logits_LV.logsumexp(-1, keepdim=True)
    return -torch.stack([log_p_LV[t, ids[t + 1]] for t in range(len(ids) - 1)]).mean()


def attention(
    config: Any, w: Weights, x_LD: Tensor, cos_LP: Tensor, sin_LP: Tensor, visible: Rows, sparse: bool
) -> tuple[Tensor, Tensor, Rows | None, Tensor]:
    """Spec 1.4 and 1.6, prefill form: attention over S_t or, when dense, over every visible key.

    Returns its output, the index scores, the selected keys and the KL of each row.
    """
    A, R = config.num_attention_heads, config.qk_rope_head_dim
    N, V, K = config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
    L = len(x_LD)

    # Spec 1.4: [nope | rope] in a query head, [c_kv | k_pe] in the latent, [k_nope | v] in a head of kv_b.
    c_LQ = rms_norm(x_LD @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"], LATENT_EPS)
    q_LAX = (c_LQ @ w["q_b_proj.weight"].T).view(L, A, N + R)
    latent_LX = x_LD @ w["kv_a_proj_with_mqa.weight"].T
    c_LK = rms_norm(latent_LX[:, :K], w["kv_a_layernorm.weight"], LATENT_EPS)
    kv_LAX = (c_LK @ w["kv_b_proj.weight"].T).view(L, A, N + V)

    q_LAN, q_LAR = q_LAX[:, :, :N], rotate_interleaved(q_LAX[:, :, N:], cos_LP[:, None], sin_LP[:, None])
    k_LAN, k_LR = kv_LAX[:, :, :N], rotate_interleaved(latent_LX[:, K:], cos_LP, sin_LP)
    v_LAV = kv_LAX[:, :, N:]

    indexer = _below(w, "indexer.")
    scores_LL = index_scores(config, indexer, x_LD.detach(), c_LQ.detach(), cos_LP, sin_LP, visible)
    scale = softmax_scale(config)

    out_L, kl_L, chosen = [], [], []
    for t, I_L in enumerate(scores_LL.unbind(0)):
        keys = visible[t]
        if sparse:  # report, eq. 2: attention reads only the keys of S_t
            keys = top_k([(I_L[s].item(), s) for s in keys], config.index_topk)
            chosen.append(keys)

        # Spec 1.6: k_h = [W_uk c_kv | k_pe], so a logit is the sum of a nope and a rope dot product.
        dots_AC = torch.einsum("an,can->ac", q_LAN[t], k_LAN[keys]) + q_LAR[t] @ k_LR[keys].T
        probs_AC = softmax_of(dots_AC * scale)
        out_L.append(torch.einsum("ac,cav->av", probs_AC, v_LAV[keys]).reshape(A * V))
        kl_L.append(kl_of_row(probs_AC, I_L[keys]))

    return torch.stack(out_L) @ w["o_proj.weight"].T, scores_LL, chosen if sparse else None, torch.stack(kl_L)


def softmax_scale(config: Any) -> float:
    """Spec 1.5: (nope + rope)^-1/2, under YaRN times m^2: m = 0.1 * mscale_all_dim * ln(factor) + 1."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    rope = config.rope_parameters
    if rope.get("rope_type", "default") == "yarn" and rope["factor"] > 1:
        scale *= (0.1 * (rope.get("mscale_all_dim") or 0.0) * math.log(rope["factor"]) + 1.0) ** 2
    return scale


def kl_of_row(probs_AC: Tensor, I_C: Tensor) -> Tensor:
    """Report, eq. 3 on all visible keys (spec 3.1) and eq. 4 on S_t (spec 3.2): KL(p_t || softmax I_t).

    p_t is the sum of the probabilities over heads, L1-normalised along the keys, and a constant; 0 log 0 = 0.
    """
    p_C = probs_AC.detach().sum(0)
    p_C = p_C / p_C.abs().sum()
    log_q_C = I_C - I_C.logsumexp(-1)
    return (torch.special.xlogy(p_C, p_C) - p_C * log_q_C).sum()


def index_scores(
    config: Any, w: Weights, x_LD: Tensor, c_LQ: Tensor, cos_LP: Tensor, sin_LP: Tensor, visible: Rows
) -> Tensor:
    """Report, eq. 1; spec 2, steps 1-5 and 9-11: I[t, s] = sum over h of w[t, h] * ReLU(q[t, h] . k[s]).

    -inf where t does not see s. `c_LQ` is the q latent after its norm.
    """
    H, M, L = config.index_n_heads, config.index_head_dim, len(x_LD)
    q_LHM = (c_LQ @ w["wq_b.weight"].T).view(L, H, M)
    q_LHM = rotate_first_dims(q_LHM, cos_LP[:, None], sin_LP[:, None])
    k_LM = layer_norm(x_LD @ w["wk.weight"].T, w["k_norm.weight"], w["k_norm.bias"], LATENT_EPS)
    k_LM = rotate_first_dims(k_LM, cos_LP, sin_LP)
    w_LH = (x_LD @ w["weights_proj.weight"].T) * H**-0.5 * M**-0.5

    rows = []
    for t in range(L):
        dots_HS = q_LHM[t] @ k_LM[visible[t]].T
        I_S = (w_LH[t][:, None] * relu(dots_HS)).sum(0)
        rows.append(x_LD.new_full((L,), -math.inf).index_copy(0, torch.tensor(visible[t]), I_S))
    return torch.stack(rows)


def top_k(scored: Iterable[tuple[float, int]], k: int) -> list[int]:
    """Spec 2, step 12, and its tie rule: highest score first, then lowest index; the result is ascending.

    Zeros of either sign are equal, and NaN ranks highest, so that it is selected and seen.
    """
    ranked = sorted(scored, key=lambda it: (0, 0.0, it[1]) if math.isnan(it[0]) else (1, -it[0], it[1]))
    return sorted(index for _, index in ranked[:k])


def ffn(x: Tensor, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor) -> Tensor:
    """Spec 1.3: w2(silu(w1 x) * w3 x)."""
    return (silu(x @ gate_ID.T) * (x @ up_ID.T)) @ down_DI.T


def moe(config: Any, w: Weights, x_LD: Tensor) -> tuple[Tensor, Rows]:
    """Spec 1.7, steps 1, 6 and 7: weighted experts, summed one at a time, plus the shared expert."""
    gate_up_E2ID, down_EDI = w["experts.gate_up_proj"].unbind(0), w["experts.down_proj"].unbind(0)
    s_LE = torch.sigmoid(x_LD @ w["gate.weight"].T)
    bias_E = w["gate.e_score_correction_bias"].detach().tolist()

    rows, chosen = [], []
    for x_D, s_E in zip(x_LD, s_LE, strict=True):
        experts = choose_experts(config, s_E.detach().tolist(), bias_E)
        total = s_E[experts].sum() if config.norm_topk_prob else 1.0
        y_D = torch.zeros_like(x_D)
        for e in experts:
            gate_ID, up_ID = gate_up_E2ID[e].chunk(2)  # the first half of the rows is the gate
            y_D = y_D + s_E[e] / total * config.routed_scaling_factor * ffn(x_D, gate_ID, up_ID, down_EDI[e])
        rows.append(y_D)
        chosen.append(experts)

    y_LD = torch.stack(rows)
    if config.n_shared_experts:
        shared = _below(w, "shared_experts.")
        gate_ID, up_ID = shared["gate_proj.weight"], shared["up_proj.weight"]
        y_LD = y_LD + ffn(x_LD, gate_ID, up_ID, shared["down_proj.weight"])
    return y_LD, chosen


def choose_experts(config: Any, s_E: list[float], bias_E: list[float]) -> list[int]:
    """Spec 1.7, steps 2-5: biased scores choose groups, by the sum of their two best, then experts."""
    E = config.n_routed_experts
    size = E // config.n_group
    c_E = [s + b for s, b in zip(s_E, bias_E, strict=True)]
    groups = [sum(sorted(c_E[g * size : (g + 1) * size])[-2:]) for g in range(config.n_group)]
    kept = top_k([(score, g) for g, score in enumerate(groups)], config.topk_group)
    masked = [(c_E[e] if e // size in kept else -math.inf, e) for e in range(E)]
    return top_k(masked, config.num_experts_per_tok)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Spec 1.3: x / sqrt(mean(x^2) + eps), times the weight."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Spec 2, step 4: the mean is subtracted, the variance is the biased one; weight and bias."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Spec 1.5, MLA: pair i is (2i, 2i + 1), and stays there."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def rotate_first_dims(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Spec 1.5 and 2, steps 2 and 5, indexer: rope dims come first, and pair i is (i, i + rope / 2)."""
    P = cos.shape[-1]
    a, b, rest = x[..., :P], x[..., P : 2 * P], x[..., 2 * P :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)


def softmax_of(logits: Tensor) -> Tensor:
    """exp(x) over its sum, on the last axis; the maximum is taken out first."""
    e = (logits - logits.detach().amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def _documents_of(positions: list[int]) -> list[int]:
    """Design, section 2, masks: a document starts where a position is not its predecessor + 1."""
    documents = [0] * len(positions)
    for t in range(1, len(positions)):
        documents[t] = documents[t - 1] + (positions[t] != positions[t - 1] + 1)
    return documents


def _below(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """The weights whose name begins with `prefix`, which is taken off."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _ints(values: Tensor | Sequence[int]) -> list[int]:
    return [int(v) for v in values]


def _refuse_other_variants(config: Any, weights: Weights, cos_LP: Tensor, sin_LP: Tensor) -> None:
    """Say no to what this oracle does not compute, rather than answer for something else."""
    only = {
        "indexer_precision": "native",
        "kv_latent_precision": "native",
        "indexer_rope_interleaved": False,
        "detach_indexer_input": True,
    }
    for name, value in only.items():
        if getattr(config, name, value) != value:
            raise ValueError(f"the oracle computes {name}={value!r} only, not {getattr(config, name)!r}")
    tensors = {**weights, "cos_LR": cos_LP, "sin_LR": sin_LP}
    if wrong := [name for name, tensor in tensors.items() if tensor.dtype != torch.float64]:
        raise ValueError(f"the naive oracle computes in float64; other dtypes in {wrong}")
    if 2 * cos_LP.shape[-1] != config.qk_rope_head_dim or cos_LP.shape != sin_LP.shape:
        raise ValueError(f"cos and sin must be [L, {config.qk_rope_head_dim // 2}], got {list(cos_LP.shape)}")
