"""How far an implementation may be from a golden tensor, with the measurement behind each number.

`python -m harness.goldens.measure` prints the largest errors of both models on the tape of these vectors, as shares of
what a tensor is judged by (torch 2.13, CPU). An fp32 share here is about ten times the largest one met, for another
compiler's order of operations and another libm.

There is none for bf16: its errors (up to 0.03 in scores, 0.06 in KL gradients) would ask for numbers behind which a
gain of 4 % hides. Those who run in bf16 test their fp32 build on these files.
"""

from dataclasses import dataclass
from typing import Literal

import torch

# One rounding to fp32 on either side of the comparison.
_STORED = 2.0**-23


@dataclass(frozen=True, slots=True)
class Rule:
    """What a kind of tensor is stored as, and how it is judged.

    float64, float32: shares that an implementation in that arithmetic may be off by. judged: "entry", of the largest
    finite magnitude in the tensor; "gradient row", of the row's sum of magnitudes (columns sum, sum of magnitudes,
    projection) or of its l2 norm (the other columns).
    """

    storage: torch.dtype
    float64: float
    float32: float
    why: str
    judged: Literal["entry", "gradient row"] = "entry"


RULES: dict[str, Rule] = {
    "input": Rule(torch.int32, 0.0, 0.0, "Integers that are given."),
    "choice": Rule(
        torch.int32, 0.0, 0.0, "The smallest margin of a choice is 8e-4, a thousand times what fp32 scores are off by."
    ),
    "weight": Rule(
        torch.float32, 5e-7, 5e-7, "Given. Normal numbers drawn without vector instructions differ by 1.2e-7."
    ),
    "first layer": Rule(torch.float32, _STORED, 6e-6, "fp32: 5.7e-7 (attention_out); fp64: 4.6e-8, the storage."),
    "forward": Rule(torch.float32, _STORED, 1.5e-5, "fp32: 1.4e-6 (logits_tail); fp64: 4.7e-8, the storage."),
    "projection": Rule(torch.float64, 1e-11, 1e-5, "fp32: 1.0e-6 (kl_rows); fp64: 3.1e-15."),
    "margin": Rule(torch.float64, 1e-11, 2.5e-5, "fp32: 2.3e-6 (router_margins); fp64: 6.4e-15."),
    "loss": Rule(torch.float64, 1e-12, 2.5e-6, "fp32: 2.4e-7 (kl_per_layer); fp64: 4.0e-16."),
    "gradient": Rule(
        torch.float64, 1e-11, 1e-5, "fp32: 8.7e-7 (gradients.lm); fp64: 3.1e-15.", judged="gradient row"
    ),
}  # fmt: skip


def tolerance(rule: Rule, value: torch.Tensor) -> dict[str, float]:
    """The rule's two numbers for `value`: absolute and rounded up to two digits for "entry", else the shares."""
    shares = {"float64": rule.float64, "float32": rule.float32}
    if rule.judged == "gradient row":
        return shares
    finite = value[value.isfinite()] if value.is_floating_point() else value
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return {name: _up_to_two_digits(share * largest) for name, share in shares.items()}


def limits(rule: Rule, value: torch.Tensor, arithmetic: Literal["float64", "float32"] = "float64") -> torch.Tensor:
    """The largest allowed |a − value| of each entry, fp64, in the shape of `value`."""
    share = tolerance(rule, value)[arithmetic]
    if rule.judged == "entry":
        return torch.full(value.shape, share, dtype=torch.float64)
    magnitudes, norm = value[:, 1:2], value[:, 2:3]
    return share * torch.cat([magnitudes, magnitudes, norm, magnitudes, norm.expand(-1, value.shape[1] - 4)], 1)


def _up_to_two_digits(x: float) -> float:
    # By way of seven digits, because 2e-5 times 3 is a little more than 6e-5.
    mantissa, exponent = f"{x:.6e}".split("e")
    tenths = -(-int(mantissa.replace(".", "")) // 100_000)
    return float(f"{tenths}e{int(exponent) - 1}")
