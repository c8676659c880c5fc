"""The tolerances of models and operators, each with the measurement that justifies it.

Those of the probes of models are in probes/model_budgets.py, of the same kind. Goldens (goldens/tolerances.py) are read by
other languages and so have fixed ones; kernels/budgets.py counts registers and spills, which are no errors.

The measuring stick is the reference in fp64. A subject in a lower precision is allowed

    budget = factor · (error of the reference itself in that precision, same case, same tape) + floor

on each side of `metrics.Errors`. The factor covers another order of operations, the floor what rounding alone
may do when the reference happened to be lucky. Without the tape no such budget holds: one flipped choice is
larger than all of it.

The measurements: `python -m harness.calibrate` prints, for seeds 0-19 at tiny on the CPU (torch 2.13), the largest
share of each budget that the optimized model uses over all cases, sparse and dense, padded, packed and far off.
Seeds 1000-1099 are never used here. On another device nothing has been measured yet.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from .metrics import SIDES, Errors

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Rule:
    """How a budget follows from the reference's own error.

    `luck`: independent errors cancel in `gain` like 1 / √entries, so that a short vector's own gain may be small by
    luck; this many times (mean error / √entries) is allowed besides. `elsewhere`: the rules of other types of device,
    each with a measurement of its own; a device that is not in it is judged by this one, measured on the CPU.
    """

    factor: float
    floor: Errors
    why: str
    luck: float = 0.0
    elsewhere: Mapping[str, "Rule"] = field(default_factory=dict)


_FP32 = Errors(max=4e-6, mean=1e-6, row=6e-6, channel=6e-6, gain=2e-6)
# Of what cancels: gradients through a softmax, and divergences, are differences of larger numbers.
_FP32_SUMS = Errors(max=1e-5, mean=3e-6, row=1.5e-5, channel=1.5e-5, gain=5e-6)
_BF16_SUMS = Errors(max=1e-2, mean=6e-3, row=1.5e-2, channel=1.2e-2, gain=4e-3)
_BF16 = Errors(max=8e-3, mean=4e-3, row=8e-3, channel=8e-3, gain=4e-3)

RULES: dict[tuple[str, torch.dtype], Rule] = {
    ("logits", torch.float32): Rule(
        3.0, _FP32, "Seeds 0-19, tiny, all cases: the optimized model uses at most 0.24 of it (largest entry)."
    ),
    ("logits", torch.bfloat16): Rule(
        3.0,
        _BF16,
        "Seeds 0-19, tiny, all cases: at most 0.45 of it used (worst row).",
    ),
    ("lm gradients", torch.float32): Rule(
        3.0, _FP32, "Seeds 0-19, tiny, every parameter: at most 0.52 of it used (gain)."
    ),
    ("lm gradients", torch.bfloat16): Rule(
        4.0, _BF16, "Seeds 0-19, tiny, every parameter: at most 0.74 of it used (gain of a norm's weight).", luck=15.0
    ),
    ("kl gradients", torch.float32): Rule(
        3.0,
        _FP32,
        "Seeds 0-19, tiny: at most 0.40 of it used; where a ReLU kink flips, kinks.py adds what it may do: medium, L = 2304, 0.53 with that and 1.85 without.",
    ),
    ("kl gradients", torch.bfloat16): Rule(
        6.0,
        replace(_BF16, gain=8e-3),
        "Seeds 0-19, tiny: at most 0.86 of it used (largest entry of wq_b, with grouped experts); with factor 5 it was 1.03. Seeds 20-119, transformers' models plugged in: the gain of wq_b is off by 0.0098 where the reference's is by 0.0002.",
        luck=15.0,
    ),
    # Parts of one layer on given hidden states, choices and attention output: `python -m harness.layerwise calibrate`.
    ("layer index scores", torch.float32): Rule(3.0, _FP32, "Seeds 0-19, tiny: at most 0.18 of it used."),
    ("layer index scores", torch.bfloat16): Rule(3.0, _BF16, "Seeds 0-19, tiny: at most 0.28 of it used."),
    ("layer attention", torch.float32): Rule(3.0, _FP32, "Seeds 0-19, tiny: at most 0.20 of it used."),
    ("layer attention", torch.bfloat16): Rule(3.0, _BF16, "Seeds 0-19, tiny: at most 0.35 of it used."),
    ("layer ffn", torch.float32): Rule(3.0, _FP32, "Seeds 0-19, tiny: at most 0.17 of it used."),
    ("layer ffn", torch.bfloat16): Rule(3.0, _BF16, "Seeds 0-19, tiny: at most 0.28 of it used."),
    ("layer output", torch.float32): Rule(3.0, _FP32, "Seeds 0-19, tiny: at most 0.12 of it used."),
    ("layer output", torch.bfloat16): Rule(3.0, _BF16, "Seeds 0-19, tiny: at most 0.25 of it used."),
    # Of one stage on the oracle's own states; index scores by the rule of fp32 in every dtype.
    ("stages", torch.float32): Rule(
        3.0, _FP32, "Seeds 0-19, tiny, text, padded and packed: optimized 0.16 of it used, transformers 0.23 (RoPE)."
    ),
    ("stages", torch.bfloat16): Rule(
        3.0, _BF16, "Seeds 0-19, tiny, text, padded and packed: optimized 0.40 of it used, transformers 0.52 (RoPE)."
    ),
    # Of single operators the shares are those of the optimized, of the plain and of the tensor-core operators, in this
    # order: the last are plain PyTorch that rounds probabilities and their gradients to bf16 (suites/kernels).
    ("index_scores", torch.float32): Rule(
        3.0, _FP32, "Seeds 0-19, tiny, all cases, fp32 and bf16 inputs: plain 0.11 of it used (mean)."
    ),
    ("index_scores gradients", torch.float32): Rule(
        3.0, _FP32, "Seeds 0-19, tiny, all cases: plain 0.25 of it used (narrow range)."
    ),
    ("index_scores gradients", torch.bfloat16): Rule(3.0, _BF16, "Seeds 0-19, tiny, all cases: plain 0.20 of it used."),
    ("sparse_mla", torch.float32): Rule(3.0, _FP32, "Seeds 0-19, tiny, all cases: 0.29, 0.22 and 0.21 of it used."),
    ("sparse_mla", torch.bfloat16): Rule(3.0, _BF16, "Seeds 0-19, tiny, all cases: 0.19, 0.19 and 0.24 of it used."),
    ("sparse_mla gradients", torch.float32): Rule(
        5.0, _FP32_SUMS, "Seeds 0-19, tiny, all cases: 0.59, 0.14 and 0.28 of it used (worst row of dkv)."
    ),
    ("sparse_mla gradients", torch.bfloat16): Rule(
        5.0,
        _BF16_SUMS,
        "Seeds 0-19, tiny, all cases: 0.13, 0.13 and 0.98 of it used, the last with what cancels (Δ from a rounded out).",
    ),
    ("dense_mla", torch.float32): Rule(3.0, _FP32, "Seeds 0-19, tiny, all cases: 0.29, 0.25 and 0.22 of it used."),
    ("dense_mla", torch.bfloat16): Rule(3.0, _BF16, "Seeds 0-19, tiny, all cases: 0.19, 0.19 and 0.27 of it used."),
    ("dense_mla gradients", torch.float32): Rule(
        5.0, _FP32_SUMS, "Seeds 0-19, tiny, all cases: 0.86, 0.14 and 0.46 of it used (magnitudes, worst row of dk)."
    ),
    ("dense_mla gradients", torch.bfloat16): Rule(
        5.0, _BF16_SUMS, "Seeds 0-19, tiny, all cases: 0.13, 0.13 and 0.99 of it used, the last with what cancels."
    ),
    ("indexer_kl", torch.float32): Rule(
        5.0, _FP32_SUMS, "Seeds 0-19, tiny, all cases, fp32 and bf16 inputs: 0.61, 0.13 and 0.11 of it used."
    ),
    ("indexer_kl gradients", torch.float32): Rule(
        5.0, _FP32_SUMS, "Seeds 0-19, tiny, all cases: 0.99, 0.20 and 0.82 of it used; dw of narrow ranges cancels."
    ),
    ("indexer_kl gradients", torch.bfloat16): Rule(
        4.0, _BF16, "Seeds 0-19, tiny, all cases: 0.17, 0.17 and 0.51 of it used (narrow range, worst row of dik)."
    ),
}


@dataclass(frozen=True, slots=True)
class DerivativeRule:
    """How far a gradient may be from central differences with `step` (a share of the argument's size), as a share of
    its own size; `noise` is what a smooth output may be off a straight line over that step, of its largest entry."""

    step: float
    allowed: float
    noise: float
    why: str


DERIVATIVES: dict[torch.dtype, DerivativeRule] = {
    torch.float64: DerivativeRule(
        1e-5, 1e-6, 1e-8, "Seeds 0-19, tiny: off by at most 1.2e-9 (optimized and plain); noise at most 3.1e-10."
    ),
    torch.float32: DerivativeRule(
        3e-3, 1e-3, 1e-3, "Seeds 0-19, tiny, operators that refuse fp64: off by at most 1.1e-4 (dk of dense_mla)."
    ),
}


@dataclass(frozen=True, slots=True)
class ScalarRule:
    """A budget for |a − e| / |e| of one number, or in the unit of the output where a caller gives its own error so."""

    factor: float
    floor: float
    why: str
    elsewhere: Mapping[str, "ScalarRule"] = field(default_factory=dict)


SCALARS: dict[tuple[str, torch.dtype], ScalarRule] = {
    ("lm loss", torch.float32): ScalarRule(3.0, 5e-7, "Seeds 0-19, tiny: at most 0.24 of it used."),
    ("lm loss", torch.bfloat16): ScalarRule(3.0, 1e-3, "Seeds 0-19, tiny: at most 0.46 of it used."),
    ("kl loss", torch.float32): ScalarRule(3.0, 2e-6, "Seeds 0-19, tiny: at most 0.11 of it used."),
    ("kl loss", torch.bfloat16): ScalarRule(3.0, 4e-3, "Seeds 0-19, tiny: at most 0.30 of it used."),
    ("free lm loss", torch.float32): ScalarRule(
        3.0, 2e-3, "Seeds 0-19, tiny: at most 0.01 of it used; the floor is 0.013 of 6.3 nats."
    ),
    ("free lm loss", torch.bfloat16): ScalarRule(3.0, 2e-2, "Seeds 0-19, tiny: at most 0.17 of it used."),
    ("indexer_topk lse", torch.float32): ScalarRule(
        3.0, 1e-5, "In nats. Seeds 0-19, tiny, all cases, fp32 and bf16 inputs: 0.12 of it used by all three."
    ),
    ("sparse_mla lse", torch.float32): ScalarRule(
        3.0, 1e-5, "In nats. Seeds 0-19, tiny, all cases: 0.50, 0.27 and 0.35 of it used (magnitudes)."
    ),
    ("dense_mla lse", torch.float32): ScalarRule(
        3.0, 1e-5, "In nats. Seeds 0-19, tiny, all cases: 0.64, 0.26 and 0.35 of it used (magnitudes)."
    ),
}

# A row, a channel or an entry that is wrong by nearly its own size is a fault in any precision.
CAP = 0.9
# Unless the reference itself is beyond that: in bf16 flipped ReLUs move a quiet row of a KL gradient by 1.13 of its size in
# the reference and in the optimized model alike. Then this many times what the reference is off.
BEYOND_CAP = 1.25
# Rounding of the terms of a sum, as a share of their size, where a sum cancels so far that its own size says nothing:
# four roundings of fp32; in bf16 one of its own, because a kernel keeps probabilities and their gradients in it.
CANCELLATION = {torch.float32: 4 * 2.0**-24, torch.bfloat16: 2.0**-9}
# A key whose score is farther than this many score errors from the boundary is decided. The score error is that
# of the reference itself in the same precision: a subject with random scores must not excuse itself.
MARGIN_FACTOR = 2.0
# Sparse attention with k ≥ L against dense attention: the same numbers through another path.
SPARSE_IS_DENSE = Rule(4.0, _FP32, "Seeds 0-19, tiny: at most 0.19 of it used (mean).")
# Keys of the first layer in bf16 that differ from the reference's: factor · (those of the reference itself when it adds
# in another order, the worst of four) + floor keys.
FIRST_LAYER = ScalarRule(
    2.0,
    6.0,
    "Seeds 0-19, tiny: 0 keys differ for the optimized model, whose allowance is 6, and 22 to 60 with head weights in "
    "bf16; small, seeds 0-2: 0 of 10 to 70 allowed, against 210 to 310.",
)
# Two loss curves of 12 steps on one tape: factor · (distance of the reference's own curve to its fp64 one) + floor.
CURVES = ScalarRule(4.0, 2e-4, "Seeds 0-19, tiny: at most 0.04 used; largest distance met 7.0e-6.")

# A loss that falls must fall by this share of its first round in 12 steps; seeds 0-19: by 0.27 at least.
LEAST_FALL = 0.1
# KL / KL_uniform of an indexer without information is 1. Both are computed in fp64 from the same p; constant scores come
# within 1e-11 of it even where attention is so even that KL_uniform is 1e-4 nats.
NO_INFORMATION = 1 - 1e-9
# Collapse was at most 0.12 in every layer of models at random, calibrated, dense-trained (60 and 300 steps) and
# warmed-up weights (L = 4k and 8k, batches of 8), 1.15 to 1.96 for constant scores, and at least 0.84 for one random
# ranking of the keys in all rows wherever attention itself was not alike in all rows.
MOST_COLLAPSE = 0.6


def budget(output: str, dtype: torch.dtype, own: Errors, entries: int, device: str = "cpu") -> Errors:
    """The budget of `output` in `dtype`, from the reference's own errors on a tensor of `entries` entries.

    Raises:
        ValueError: no rule for this output and dtype.
    """
    rule = _rule(RULES, output, dtype)
    return scale(rule.elsewhere.get(device, rule), own, entries)


def scale(rule: Rule, own: Errors, entries: int) -> Errors:
    """factor · own + floor, side by side, and above CAP only where `own` is."""
    allowed = Errors(*(rule.factor * getattr(own, side) + getattr(rule.floor, side) for side in SIDES))
    allowed = replace(allowed, gain=allowed.gain + rule.luck * own.mean / math.sqrt(entries))
    caps = {side: max(CAP, BEYOND_CAP * getattr(own, side)) for side in SIDES}
    return Errors(*(min(getattr(allowed, side), caps[side]) for side in SIDES))


def scalar_budget(output: str, dtype: torch.dtype, own: float, device: str = "cpu") -> float:
    """The budget of the error of one number, from the reference's own.

    Raises:
        ValueError: no rule for this output and dtype.
    """
    rule = _rule(SCALARS, output, dtype)
    rule = rule.elsewhere.get(device, rule)
    return rule.factor * own + rule.floor


def measured_on(output: str, dtype: torch.dtype, device: str) -> str:
    """The type of device on which the budget of `output` in `dtype` was measured that is applied on `device`.

    Raises:
        ValueError: no rule for this output and dtype.
    """
    rules: Mapping[tuple[str, torch.dtype], Rule | ScalarRule] = {**RULES, **SCALARS}
    return device if device in _rule(rules, output, dtype).elsewhere else "cpu"


def _rule(rules: Mapping[tuple[str, torch.dtype], R], output: str, dtype: torch.dtype) -> R:
    if (rule := rules.get((output, dtype))) is None:
        known = sorted({str(d).removeprefix("torch.") for _, d in rules})
        raise ValueError(f"There is no budget for {output} in {dtype}; dtypes with budgets are {', '.join(known)}.")
    return rule
