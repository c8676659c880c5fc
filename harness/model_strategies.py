"""Hypothesis strategies over whole models: a small configuration, and documents laid out in padded and packed rows.

As in strategies.py what is drawn are small integers, so that a failure shrinks to the fewest documents, tokens, pads
and chunks at which it still fails.

Letters: B batch, L rows.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from hypothesis import strategies as st

from reference import DeepseekV32Config

from .cases import Case
from .strategies import SEEDS, model_configs
from .text import PAD, text_batch


@dataclass(frozen=True, slots=True)
class Placed:
    """One document of a batch row: how many pads stand before it, and how many tokens it has."""

    pads: int
    length: int


@dataclass(frozen=True, slots=True)
class Arrangement:
    """A model in one of its modes, and where its documents stand.

    rows: the documents of each batch row; shorter rows are padded at the end. offset: the position of each document's
    first token. cuts: where the columns are cut into chunks, ascending.
    """

    config: DeepseekV32Config
    rows: tuple[tuple[Placed, ...], ...]
    offset: int
    cuts: tuple[int, ...]
    seed: int

    @property
    def length(self) -> int:
        """L."""
        return max(sum(d.pads + d.length for d in row) for row in self.rows)

    @property
    def chunks(self) -> list[int]:
        """The sizes of the chunks."""
        edges = [0, *self.cuts, self.length]
        return [b - a for a, b in pairwise(edges)]

    def starts(self, row: int) -> list[int]:
        """The column of each document's first token."""
        documents = self.rows[row]
        ends = accumulate(d.pads + d.length for d in documents)
        return [end - d.length for end, d in zip(ends, documents, strict=True)]

    def document_BL(self) -> torch.Tensor:
        """The number of each token's document within its batch row, −1 in padding."""
        found = torch.full((len(self.rows), self.length), -1)
        for b, row in enumerate(self.rows):
            for i, (start, document) in enumerate(zip(self.starts(b), row, strict=True)):
                found[b, start : start + document.length] = i
        return found

    def case(self) -> Case:
        """The case: positions begin anew in each document, and no first token is a target."""
        ids = text_batch(len(self.rows), self.length, self.seed)
        labels, positions = torch.full_like(ids, -100), torch.zeros_like(ids)
        for b, row in enumerate(self.rows):
            for start, document in zip(self.starts(b), row, strict=True):
                span = slice(start, start + document.length)
                labels[b, span] = ids[b, span]
                labels[b, start] = -100
                positions[b, span] = torch.arange(document.length) + self.offset
        real_BL = self.document_BL() >= 0
        mask = None if bool(real_BL.all()) else real_BL.long()
        return Case("drawn", self.config, self.seed, ids.masked_fill(~real_BL, PAD), labels, mask, positions)

    def alone(self, row: int, index: int) -> Case:
        """One document by itself: a batch of one, no padding, positions from 0."""
        case, start = self.case(), self.starts(row)[index]
        span = (slice(row, row + 1), slice(start, start + self.rows[row][index].length))
        return Case("drawn", self.config, self.seed, case.input_ids[span], case.labels[span])


@st.composite
def arrangements(draw: st.DrawFn) -> Arrangement:
    """A drawn model, one to three rows of one to three documents around index_topk tokens, and a few chunks."""
    config = draw(model_configs())
    most = config.index_topk + 6
    rows = draw(
        st.lists(
            st.lists(
                st.builds(Placed, pads=st.integers(0, 3), length=st.integers(1, most)), min_size=1, max_size=3
            ).map(tuple),
            min_size=1,
            max_size=3,
        ).map(tuple),
        label="rows of documents",
    )
    made = Arrangement(config, rows, draw(st.sampled_from((0, 1, 700)), label="offset"), (), draw(SEEDS, label="seed"))
    cuts = draw(st.sets(st.integers(1, max(made.length - 1, 1)), max_size=3), label="cuts")
    inside = tuple(sorted(cut for cut in cuts if cut < made.length))
    return Arrangement(made.config, made.rows, made.offset, inside, made.seed)
