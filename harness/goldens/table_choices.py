"""Constants of what is chosen, and of the loss that trains the choice: top-k ties, the gate (spec 1.7), the KL (spec 3).

Letters: S keys, X experts, T chosen experts, N tokens.
"""

import math

import torch

from reference import DeepseekV32Config, compute_indexer_kl_loss, kl_rows
from reference.attention import attention_target, masked_attention
from reference.indexer import select_topk
from reference.moe import Gate

from . import plain
from .constants import Constant

# Scores, visibility, k, and the chosen indices with −1 where there is no key.
TIES: tuple[tuple[str, list[float], list[int] | None, int, list[int]], ...] = (
    ("sixteen_zeros", [0.0] * 16, None, 4, [0, 1, 2, 3]),
    ("plateau", [0.5, 2.0, 0.5, 0.5, 0.5], None, 3, [0, 1, 2]),
    ("minus_zero", [-0.0, 0.0, -0.0, 0.0], None, 2, [0, 1]),
    ("nan_ranks_highest", [3.0, math.nan, 9.0, 1.0], None, 2, [1, 2]),
    ("hidden_keys", [9.0, 1.0, -5.0, 2.0, 9.0], [0, 1, 1, 1, 0], 4, [1, 2, 3, -1]),
    ("negative_scores", [-1.0, -3.0, -2.0], None, 2, [0, 2]),
)
# Groups {0, 1}, {2, 3}, {4, 5}, {6, 7}. Token 0: by the sum of two, groups 1 and 2 are kept, by the maximum 0 would be;
# all that is kept is negative once biased, so that a dropped group masked with 0 would win. Token 1: the bias turns the
# choice within the kept groups. Token 2: equal scores and biases, so the lowest indices win.
GATE_SCORES = [
    [0.90, 0.05, 0.60, 0.58, 0.55, 0.57, 0.30, 0.20],
    [0.20, 0.10, 0.80, 0.70, 0.50, 0.60, 0.10, 0.15],
    [0.50] * 8,
]
GATE_BIAS = [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0]
GATE_TURNED_BIAS = [-1.0, -1.0, -1.6, -1.0, -1.0, -0.8, -1.0, -1.0]
KL_SCORES = [1.0, 2.0, 0.0, -1.0, 0.5]
KL_TARGET = [0.4, 0.3, 0.2, 0.1, 0.0]


def constants() -> list[Constant]:
    """Ties, the gate by example, and the KL in closed form."""
    return [*_ties(), *_gate(), *_kl()]


def _ties() -> list[Constant]:
    rows = []
    for name, scores, visible, k, expected in TIES:
        seen = [bool(v) for v in visible] if visible is not None else [True] * len(scores)
        chosen = select_topk(torch.tensor([[scores]], dtype=torch.float64), torch.tensor([[seen]]), k)[0, 0].tolist()
        given = {"scores": scores, "visible": [int(v) for v in seen], "k": k}
        rows.append(
            Constant(
                f"topk.{name}",
                "2",
                "Chosen keys, ascending, -1 at the tail. Ties: lowest index first; -0 equals 0; NaN ranks highest.",
                chosen,
                expected,
                "the tie rule, spec 2, other facts",
                arithmetic="exact",
                given=given,
            )
        )
    return rows


def _gate() -> list[Constant]:
    config = DeepseekV32Config.preset("tiny", hidden_size=4)
    v32 = DeepseekV32Config.preset("v32")
    gate = Gate(config).double()
    scores = torch.tensor(GATE_SCORES, dtype=torch.float64)

    def chosen(bias: list[float]) -> tuple[list[list[int]], torch.Tensor]:
        gate.e_score_correction_bias.copy_(torch.tensor(bias))
        experts = gate.choose(scores)
        return experts.tolist(), gate.weights(scores, experts)

    plain_choice, weights = chosen(GATE_BIAS)
    turned_choice, turned_weights = chosen(GATE_TURNED_BIAS)
    sizes = {"groups": 4, "kept groups": 2, "experts a token": 2, "routed_scaling_factor": 2.5, "scores": GATE_SCORES}
    given, turned = {**sizes, "bias": GATE_BIAS}, {**sizes, "bias": GATE_TURNED_BIAS}
    return [
        Constant(
            "gate.sizes", "1.7", "Routed experts, groups, kept groups, experts a token, routed_scaling_factor.",
            [v32.n_routed_experts, v32.n_group, v32.topk_group, v32.num_experts_per_tok, v32.routed_scaling_factor],
            [256, 8, 4, 8, 2.5], "spec 1.1", arithmetic="exact",
        ),
        Constant(
            "gate.experts", "1.7",
            "Chosen experts, ascending: best of the groups with the largest sum of two biased scores; dropped groups "
            "count as -inf, not 0; ties go to the lowest index.",
            plain_choice, [[2, 3], [2, 3], [0, 1]], "worked out by hand", arithmetic="exact", given=given,
        ),
        Constant(
            "gate.weights", "1.7", "Their weights: scores without the bias, divided by their sum, times 2.5.",
            weights.tolist(), [[2.5 * 0.60 / 1.18, 2.5 * 0.58 / 1.18], [2.5 * 0.8 / 1.5, 2.5 * 0.7 / 1.5], [1.25, 1.25]],
            "worked out by hand", within=1e-12, given=given,
        ),
        Constant(
            "gate.biased_experts", "1.7", "The same scores with another bias: it turns choices, within groups and between.",
            turned_choice, [[0, 5], [3, 5], [0, 5]], "worked out by hand", arithmetic="exact", given=turned,
        ),
        Constant(
            "gate.biased_weights", "1.7", "Their weights: the bias is not in them.", turned_weights.tolist(),
            [[2.5 * 0.90 / 1.47, 2.5 * 0.57 / 1.47], [2.5 * 0.7 / 1.3, 2.5 * 0.6 / 1.3], [1.25, 1.25]],
            "worked out by hand", within=1e-12, given=turned,
        ),
        Constant(
            "gate.sum_of_weights", "1.7", "The weights of a token add up to routed_scaling_factor.",
            weights.sum(-1).tolist(), [2.5, 2.5, 2.5], "spec 1.7, step 6", within=1e-12, given=given,
        ),
    ]  # fmt: skip


def _kl() -> list[Constant]:
    rows = torch.tensor(
        [[[0.0, math.log(3.0), -math.inf], [0.0, 0.0, -math.inf], [1.0, 5.0, 2.0]]], dtype=torch.float64
    )
    targets = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]], dtype=torch.float64)
    values = kl_rows(rows, targets)[0]
    leaf = rows[:, :1, :2].clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(kl_rows(leaf, targets[:, :1, :2]).sum(), leaf)
    five = kl_rows(torch.tensor([[KL_SCORES]], dtype=torch.float64), torch.tensor([[KL_TARGET]], dtype=torch.float64))
    probabilities = torch.tensor([[[[1.0, 0.0]], [[0.5, 0.5]]]], dtype=torch.float64)
    heads = torch.arange(128 * 5, dtype=torch.float64).cos().view(1, 1, 128, 5)
    keys = torch.arange(6 * 5, dtype=torch.float64).sin().view(1, 6, 1, 5).expand(1, 6, 128, 5)
    nothing = torch.zeros(1, 6, 0, dtype=torch.float64)
    seen = torch.tensor([[[True] * 4 + [False] * 2]])
    _, of_heads = masked_attention(heads, heads[..., :0], keys, keys, nothing, 1.0, seen)
    quarter, two = math.log(4 / 3) / 2, math.log(2)
    given = {"scores": rows[0].tolist(), "target": targets[0].tolist()}
    return [
        Constant(
            "kl.rows", "3",
            "KL(p || softmax(I)) of three rows in nats: ln(4/3)/2, ln 2, and 0 for a row without a target (padding). "
            "A score of -inf is outside the candidate set, on both sides.",
            values.tolist(), [0.14384103622589045, 0.6931471805599453, 0.0], "closed form", within=1e-14, given=given,
        ),
        Constant(
            "kl.gradient", "3", "dKL/dI of the first row: softmax(I) - p on the candidate set.",
            slope[0, 0].tolist(), [-0.25, 0.25], "closed form, spec 3.3", within=1e-14, given={"scores": [0.0, math.log(3.0)], "target": [0.5, 0.5]},
        ),
        Constant(
            "kl.five_keys", "3", "KL of one row of five keys, one of them without target mass but inside the set.",
            float(five[0, 0]), plain.kl(KL_TARGET, KL_SCORES), "plain.kl", within=1e-13, given={"scores": KL_SCORES, "target": KL_TARGET},
        ),
        Constant(
            "kl.mean", "3", "reduction mean: the sum over rows divided by the two rows that have a target.",
            float(compute_indexer_kl_loss(rows, targets)), (quarter + two) / 2, "closed form", within=1e-14, given=given,
        ),
        Constant(
            "kl.sum", "3", "reduction sum: the report's sum over rows.",
            float(compute_indexer_kl_loss(rows, targets, reduction="sum")), quarter + two, "closed form", within=1e-14,
            given=given,
        ),
        Constant(
            "kl.two_layers", "3", "Layers are added, not averaged: twice the mean for two equal layers.",
            float(compute_indexer_kl_loss([rows, rows], [targets, targets])), quarter + two, "closed form", within=1e-14,
            given=given,
        ),
        Constant(
            "kl.target", "3", "p of two heads: their probabilities added, divided by the sum along the keys.",
            attention_target(probabilities)[0, 0].tolist(), [0.75, 0.25], "closed form, spec 3.1", within=1e-14,
            given={"probabilities": probabilities[0, :, 0].tolist()},
        ),
        Constant(
            "kl.target_normaliser", "3",
            "What the probabilities of 128 heads add up to over the keys of a row: the number of heads divides the target.",
            float(of_heads.sum()), 128.0, "spec 3.1", within=1e-10,
        ),
    ]  # fmt: skip
