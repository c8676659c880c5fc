"""Context parallelism's division of a sequence: which rows a rank computes, and a layout of those rows over all keys.

A row's visible keys are a range of compact indices of the whole sequence (reference/layout.py). Those bounds, the
positions and the documents are found once, of the whole sequence, and cut to the rank's rows afterwards: padding and
packing need no rule of their own.

Letters: B batch, L this rank's rows, S slots of the whole sequence, 2 = [start, end).
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from reference.decisions import Decisions
from reference.layout import Layout

from .layout import RowOrder


@dataclass(frozen=True, slots=True, eq=False)
class RowSplit:
    """One rank's share of S rows, int64 throughout.

    own_L: its rows, ascending. place_S: where each row stands when all ranks' rows, filled up to `widest`, stand one
    behind the other.
    """

    own_L: Tensor
    place_S: Tensor
    widest: int


def split_rows(length: int, parts: int, part: int, order: RowOrder, device: torch.device) -> RowSplit:
    """The share of `part`, of `parts` equal ones but for a row.

    Raises:
        ValueError: a sequence too short for every part to have a row.
    """
    pieces = 2 * parts if order == "balanced" and parts > 1 else parts
    if length < pieces:
        raise ValueError(f"input_ids has {length} tokens a row; with cp = {parts} and {order} rows it needs {pieces}.")
    cut = torch.arange(length, device=device).tensor_split(pieces)
    if pieces > parts:
        cut = tuple(torch.cat((cut[i], cut[-1 - i])) for i in range(parts))
    widest = max(len(rows) for rows in cut)
    place_S = torch.empty(length, dtype=torch.long, device=device)
    for i, rows in enumerate(cut):
        place_S[rows] = torch.arange(len(rows), device=device) + i * widest
    return RowSplit(cut[part], place_S, widest)


@dataclass(frozen=True, slots=True, eq=False)
class RowsLayout(Layout):
    """A layout whose rows are some of the sequence's, anywhere in it: `rows_L`."""

    rows_L: Tensor

    @property
    def real_BL(self) -> Tensor:
        """Which of the rows are real."""
        return self.real_BS[:, self.rows_L]


def cut_layout(layout: Layout, rows_L: Tensor) -> RowsLayout:
    """The layout of the rows `rows_L` of a sequence without a cache, over all its keys."""
    held = {item.name: getattr(layout, item.name) for item in fields(layout)}
    held |= {"positions_BL": layout.positions_BL[:, rows_L], "bounds_BL2": layout.bounds_BL2[:, rows_L]}
    return RowsLayout(**held, rows_L=rows_L)


def cut_decisions(decisions: Decisions, rows_L: Tensor) -> Decisions:
    """The tape of the rows `rows_L`."""
    return Decisions(tuple(layer.map(lambda x: x[:, rows_L.to(x.device)]) for layer in decisions))
