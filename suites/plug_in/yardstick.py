"""How far a plugged model may be from transformers' own: not much farther than transformers' two attentions lie apart.

sdpa and eager compute the same sums in another order on the same input and weights, so that what they differ by is
rounding. A budget is their distance times the factor of `SHAPES`, and its floor, for each side of `metrics.Errors`.
Needs no pytest: ranks and the other version of transformers run this without.
"""

from collections.abc import Mapping
from typing import Any

import torch

from harness.budgets import scale
from harness.metrics import SIDES, errors, null_candidates, rejected
from harness.probes.model_budgets import SHAPES
from harness.upstream import with_weights

from .pairs import CPU, config_of, construct, weights_of


def upstream(family: str, attention: str) -> Any:
    """transformers' own model under its attention "sdpa" or "eager", on calibrated weights in fp32, in eval mode."""
    config = config_of(family)
    config._attn_implementation = attention
    return with_weights(construct(family)(config), weights_of(family), CPU, torch.float32).eval()


def assert_near(
    actual: torch.Tensor,
    expected: torch.Tensor,
    two_right_ones: tuple[torch.Tensor, torch.Tensor],
    wrong: Mapping[str, torch.Tensor] | None = None,
    name: str = "",
) -> None:
    """`actual` is `expected` up to rounding, and no wrong answer would be.

    Args:
        two_right_ones: the same numbers by other sums, whose distance is the yardstick: by eager and by sdpa.
        wrong: candidates to reject besides those of `metrics.null_candidates`.
        name: of the tensor, for the message.

    Raises:
        AssertionError: an error exceeds its budget, or a wrong answer exceeds none.
    """
    allowed = scale(SHAPES, errors(*two_right_ones), expected.numel())
    seen = errors(actual, expected)
    for side in SIDES:
        off, most = getattr(seen, side), getattr(allowed, side)
        assert off <= most, f"{name}: the {side} error is {off:.3g}, and {most:.3g} is allowed."
    for kind, candidate in [*null_candidates(expected), *(wrong or {}).items()]:
        assert rejected(candidate, expected, allowed), f"{name}: {kind} would pass; allowed is {allowed}."
