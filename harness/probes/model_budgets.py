"""The budgets of the probes of models, each with the measurement that justifies it.

As in harness/budgets.py a subject may differ from itself by factor times what the reference in the same dtype differs
from itself in the same experiment, plus a floor. The shares are the largest that the optimized model used on seeds 0-19
at tiny, on a CPU with the native operators: `python -m harness.calibrate --checks probes`.
"""

from ..budgets import Rule
from ..metrics import Errors

_FP32 = Errors(max=4e-6, mean=1e-6, row=6e-6, channel=6e-6, gain=2e-6)

CONTENT = Rule(
    3.0, _FP32, "The same shapes, so untouched rows are the same bits: 0.00. Other devices may choose other kernels."
)
SHAPES = Rule(4.0, _FP32, "The same sums in another order: decode 0.51, lengths 0.43, prefixes 0.42, padding 0.39.")
# Share of rows that may choose otherwise on replayed states of other shapes: near ties.
FLIPS = 0.01
LOSSES = Rule(4.0, Errors(*[5e-7] * 5), "Losses of other shapes: micro-batches 0.55, packing 0.18, order 0.12.")
POSITIONS = Rule(2.0, _FP32, "All positions moved: shift 0.50, of what the reference itself is moved by.")
FREE = Rule(
    4.0, Errors(max=0.5, mean=0.02, row=0.7, channel=0.2, gain=0.02),
    "With choices of its own, of which some flip: shift 0.50, decode of padded rows 0.51.",
)  # fmt: skip
KL_OF_ONE_ROW = Rule(4.0, Errors(*[2e-5] * 5), "A divergence of one row is a small difference: shift 0.50.")
GRADIENTS = Rule(4.0, _FP32, "Gradients of other shapes: micro-batches 0.55, layers 0.00.")
OTHER_LENGTH = Rule(
    4.0, Errors(max=8e-6, mean=2e-6, row=1.2e-5, channel=1.2e-5, gain=4e-6),
    "At another length a model may compute attention in another form, absorbed or not, and each rounds p, and with it "
    "the small differences that KL gradients are made of, in its own way: the floor counts twice. The reference has one "
    "form, and does not show it. kl_rows 0.66, with torch operators 0.73.",
)  # fmt: skip
DERIVATIVES = Rule(
    4.0,
    Errors(*[1e-7] * 5),
    "fp64 against central differences, of what the reference is off: 0.93 (a kink beside a step).",
)
CHANGES = Rule(4.0, Errors(*[1e-5] * 5), "What a field of the config changes, on the tape: config 0.31.")
CHOICES_CHANGED = Rule(4.0, Errors(*[0.5] * 5), "The same where the field changes choices: config 0.31, stages 0.31.")
FREE_LOSSES = Rule(4.0, Errors(*[2e-3] * 5), "Losses of free runs: decode 0.41, shift 0.50.")
