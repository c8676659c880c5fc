"""The ReLU's kinks: the one place where a KL gradient jumps, and by how much.

A dot product q·k within rounding of zero may fall on either side of the ReLU. Its score hardly changes, but the
gradient through it is there or not: a third kind of discrete choice, too fine for a tape. What it may do to a
gradient is computed instead, by the fp64 reference with every kink within the margin open, and with every one shut.

Letters: B batch, L rows (L' of them), S key slots, J indexer heads, E indexer head dim.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import reference.attention as reference_attention
from reference import Decisions, DeepseekV32Attention
from reference.precision import at_least_fp32

from .budgets import MARGIN_FACTOR
from .cases import Case
from .metrics import Errors, errors
from .observe import Gradients, observe
from .subjects import ALL

# index_scores of one layer: (layer, q_BLJE, k_BSE, w_BLJ) → scores_BLS.
Scores = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Dot products of a layer that are looked at for how far rounding moves them, in rows spread over the whole case.
LOOKED_AT = 2**25


@contextmanager
def _scores_by(function: Scores) -> Iterator[None]:
    """The reference's index scores computed by `function`, within the block."""
    own, own_attend = reference_attention.index_scores, DeepseekV32Attention.attend
    layer = -1

    def attend(self: DeepseekV32Attention, *args: Any, **kwargs: Any) -> Any:
        nonlocal layer
        layer = self.layer_idx
        return own_attend(self, *args, **kwargs)

    reference_attention.index_scores = lambda q_BLJE, k_BSE, w_BLJ: function(layer, q_BLJE, k_BSE, w_BLJ)
    DeepseekV32Attention.attend = attend  # type: ignore[method-assign]
    try:
        yield
    finally:
        reference_attention.index_scores = own
        DeepseekV32Attention.attend = own_attend  # type: ignore[method-assign]


def _dots(q_BLJE: torch.Tensor, k_BSE: torch.Tensor) -> torch.Tensor:
    return torch.einsum("blje,bse->bljs", at_least_fp32(q_BLJE), at_least_fp32(k_BSE))


def dot_products(model: nn.Module, case: Case, tape: Decisions) -> list[torch.Tensor]:
    """q·k `[B, L', J, S]` of each layer of a reference model, on the tape: of all rows, or of every so many."""
    batch, rows = case.input_ids.shape
    stride = -(-batch * rows * rows * case.config.index_n_heads // LOOKED_AT)
    found: dict[int, list[torch.Tensor]] = {}

    def scores(layer: int, q: torch.Tensor, k: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        dots = _dots(q, k)
        found.setdefault(layer, []).append(dots[:, ::stride].detach().clone())
        return torch.einsum("bljs,blj->bls", dots.relu(), at_least_fp32(w))

    with _scores_by(scores):
        observe(model, case, ALL, tape=tape, gradients=False)
    return [torch.cat(found[layer], 1) for layer in sorted(found)]


def kl_gradients_beyond(model: nn.Module, case: Case, tape: Decisions, thresholds: list[float]) -> Gradients:
    """The KL gradients of a reference model whose layer i lets a dot product through when it exceeds thresholds[i]."""

    def scores(layer: int, q: torch.Tensor, k: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        dots = _dots(q, k)
        return torch.einsum("bljs,blj->bls", dots * (dots > thresholds[layer]), at_least_fp32(w))

    with _scores_by(scores):
        return observe(model, case, ALL, tape=tape, lm_gradients=False).kl_grads


def kink_errors(
    exact: Callable[[], nn.Module], low: Callable[[], nn.Module], case: Case, tape: Decisions, expected: Gradients
) -> dict[str, Errors]:
    """What the kinks may do to each KL gradient: its change from all shut to all open, as errors against `expected`.

    Kinks are the dot products within MARGIN_FACTOR times the error that `low()`, the reference in the subject's
    precision, makes in them; `exact()` is the reference in fp64. Both are built when they are needed: two of a large
    model would not fit.
    """
    margins = [
        MARGIN_FACTOR * float((a.double() - b).abs().max())
        for a, b in zip(dot_products(low(), case, tape), dot_products(exact(), case, tape), strict=True)
    ]
    opened = kl_gradients_beyond(exact(), case, tape, [-m for m in margins])
    shut = kl_gradients_beyond(exact(), case, tape, margins)
    found = {}
    for name, gradient in expected.items():
        a, b = opened[name], shut[name]
        if gradient is not None and a is not None and b is not None:
            # Twice: in the sum over all kinks some cancel that need not cancel in a subject, which flips a few.
            change = errors(gradient + 2 * (a - b), gradient)
            size = float(gradient.norm())
            found[name] = replace(change, gain=2 * float((a - b).norm()) / size if size else change.gain)
    return found
