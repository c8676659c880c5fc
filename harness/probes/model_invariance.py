"""Probes of invariance: where a row stands, and in which company, does not matter to it (spec B05, B08, B11, A07).

Shapes differ between the two runs, and with them the order of sums: the tape of the first is replayed in the second,
and what the second would have chosen may differ in near ties only.

Letters: B batch, L rows, W vocabulary.
"""

from dataclasses import replace

import torch

from ..cases import Case
from ..observe import Observation
from ..text import PAD
from .model_isolation import packed, same_losses
from .model_sides import (
    Notes,
    Side,
    joined,
    of_batch,
    padded,
    probe,
    stacked,
)  # fmt: skip


def row_of(case: Case, b: int, start: int = 0, stop: int | None = None) -> Case:
    """Tokens start … stop of one batch row of a case without mask and positions."""
    rows = (slice(b, b + 1), slice(start, stop))
    return replace(case, input_ids=case.input_ids[rows], labels=case.labels[rows])


def placed(case: Case, short: int, before: int) -> tuple[Case, torch.Tensor]:
    """Both rows of a case, of the first only `short` tokens behind `before` pads; and which tokens are real."""
    batch, length = case.input_ids.shape
    real_BL = torch.ones(batch, length, dtype=torch.bool)
    real_BL[0] = (torch.arange(length) >= before) & (torch.arange(length) < before + short)
    ids, labels = case.input_ids.clone(), case.labels.clone()
    ids[0], labels[0] = PAD, -100
    ids[0, before : before + short] = case.input_ids[0, :short]
    # The first token of a document is nobody's target.
    labels[0, before + 1 : before + short] = case.input_ids[0, 1:short]
    return replace(case, input_ids=ids, labels=labels, attention_mask=real_BL.long()), real_BL


def padding_place(side: Side, notes: Notes) -> None:
    """Left-padded, right-padded and unpadded rows are the same rows; pads add nothing to the losses."""
    model = side.model()
    length, short = 3 * side.k, 2 * side.k + 1
    case = side.case(length=length)
    lone = [side.see(model, row_of(case, 0, 0, short), kl=True), side.see(model, row_of(case, 1), kl=True)]
    expected_NW = torch.cat([seen.logits[0] for seen in lone])
    # Targets of the LM loss, and rows of the KL: pads count for neither.
    means = {"lm_loss": (short - 1, length - 1), "kl_loss": (short, length)}
    for before in (0, 3, length - short):
        batch, real_BL = placed(case, short, before)
        tape = stacked([padded(lone[0].decisions, before, length - short - before), lone[1].decisions])
        seen = side.see(model, batch, tape=tape, kl=True)
        name = f"{before} pads before, {length - short - before} behind"
        notes.rows(side, name, seen, batch, real_BL, expected_NW, tape)
        for loss, counts in means.items():
            parts = [getattr(one, loss) for one in lone]
            if parts[0] is None:
                continue
            mean = sum(n * part for n, part in zip(counts, parts, strict=True)) / sum(counts)
            unweighted = sum(parts) / 2
            notes.same(f"{name}, {loss}", getattr(seen, loss)[None], mean[None], side.losses,
                       {"mean of the rows' means": (unweighted[None], mean[None])})  # fmt: skip


def packing_place(side: Side, notes: Notes) -> None:
    """A document in a pack is the document alone."""
    model = side.model()
    lengths = (2 * side.k + 3, 3, 1, side.k + 5)
    case = side.case(length=sum(lengths))
    pack, document_BL = packed(case, lengths)
    parts = []
    for b in range(2):
        starts = (pack.position_ids[b] == 0).nonzero().flatten().tolist() if pack.position_ids is not None else []
        ends = [*starts[1:], sum(lengths)]
        parts.append([side.see(model, row_of(case, b, s, e)) for s, e in zip(starts, ends, strict=True)])
    tape = stacked([joined([one.decisions for one in row]) for row in parts])
    expected_NW = torch.cat([one.logits[0] for row in parts for one in row])
    seen = side.see(model, pack, tape=tape)
    notes.rows(side, "packed", seen, pack, torch.ones_like(document_BL, dtype=torch.bool), expected_NW, tape)


def batch(side: Side, notes: Notes) -> None:
    """Batch rows in another order, and each by itself, are the same rows; unequally padded where that is declared."""
    model = side.model()
    kind = "left-padded" if "padding" in side.can else "text"
    case, order = side.case(kind, length=3 * side.k, batch=4), [2, 0, 3, 1]
    base = side.see(model, case)
    picks = [order, *([b] for b in range(4))]
    for rows in picks:
        part = replace(
            case, input_ids=case.input_ids[rows], labels=case.labels[rows],
            attention_mask=None if case.attention_mask is None else case.attention_mask[rows],
        )  # fmt: skip
        tape = of_batch(base.decisions, rows)
        seen = side.see(model, part, tape=tape)
        name = f"rows {', '.join(map(str, rows))} of 4"
        notes.rows(side, name, seen, part, part.real_BL, base.logits[rows][part.real_BL], tape)


def prefixes(side: Side, notes: Notes) -> None:
    """The first rows of a text do not depend on how it goes on: lengths 1, k − 1, k, k + 1 against 3k."""
    model = side.model()
    case = side.case(length=3 * side.k)
    free = side.see(model, case)
    for length in sorted({1, max(side.k - 1, 1), side.k, side.k + 1}):
        part = replace(case, input_ids=case.input_ids[:, :length], labels=case.labels[:, :length])
        # The short run chooses, the long one replays: short texts may go another way that a tape would hide.
        seen = side.see(model, part)
        rest = None if free.decisions is None else free.decisions.rows(length, 3 * side.k)
        tape = joined([seen.decisions, rest])
        whole = side.see(model, case, tape=tape)
        first_BL = torch.arange(3 * side.k).expand_as(case.input_ids) < length
        notes.rows(side, f"length {length}", whole, case, first_BL, seen.logits.flatten(0, 1), tape)


def memory(side: Side, notes: Notes) -> None:
    """A short text after long ones, in other modes of use, is what it is in a fresh model (spec B11, C05)."""
    long, short = side.case(length=4 * side.k), side.case(length=side.k + 3, number=1)
    fresh = side.see(side.model(), short, kl=True, gradients=True)
    model = side.model()
    before = side.see(model, long, kl=True, gradients=True)
    seen = side.see(model, short, tape=fresh.decisions, kl=True, gradients=True)
    again = side.see(model, long, tape=before.decisions, kl=True, gradients=True)
    for name, one, other in (("short after long", seen, fresh), ("long, short, long", again, before)):
        notes.same(name, one.logits.flatten(0, 1), other.logits.flatten(0, 1), side.shapes)
        same_losses(notes, name, one, other)
        notes.same_gradients(f"{name}, LM", one.lm_grads, other.lm_grads, side.shapes)
        notes.same_gradients(f"{name}, KL", one.kl_grads, other.kl_grads, side.shapes)


def bitwise(side: Side, notes: Notes) -> None:
    """Run again, after a shorter text, and in a second module: the same bits, gradients and choices among them."""
    long, short = side.case(length=4 * side.k), side.case(length=side.k + 3, number=1)
    model = side.model()
    first, _, again = (side.see(model, case, kl=True, gradients=True) for case in (long, short, long))
    twin = side.see(side.model(), long, kl=True, gradients=True)
    other = side.see(model, side.case(length=4 * side.k, number=2), kl=True, gradients=True)
    wrong = {
        "another text": float(entries_apart(other, first)),
        "one bit": float(entries_apart(_one_bit_off(first), first)),
    }
    notes.count("entries with other bits", "long, short, long", float(entries_apart(again, first)), 0.0, wrong)
    notes.count("entries with other bits", "a second module", float(entries_apart(twin, first)), 0.0)


def everything(seen: Observation) -> list[torch.Tensor]:
    """All tensors of an observation, in an order of their own."""
    chosen = [x for d in seen.decisions or () for x in (d.topk_indices, d.expert_indices)]
    found = [seen.logits, seen.lm_loss, seen.kl_loss, *seen.lm_grads.values(), *seen.kl_grads.values(), *chosen]
    return [x for x in found if x is not None]


def entries_apart(actual: Observation, expected: Observation) -> int:
    """How many entries of two observations are not equal."""
    pairs = zip(everything(actual), everything(expected), strict=True)
    return sum(int((a != e).sum()) if a.shape == e.shape else max(a.numel(), e.numel()) for a, e in pairs)


def _one_bit_off(seen: Observation) -> Observation:
    logits = seen.logits.clone()
    last = logits[..., -1, -1, -1]
    last.copy_(torch.nextafter(last, last + 1))
    return replace(seen, logits=logits)


CHECKS = [
    probe("padding_place", padding_place, {"padding"}),
    probe("packing_place", packing_place, {"packing"}),
    probe("batch", batch),
    probe("prefixes", prefixes),
    probe("memory", memory),
    probe("bitwise", bitwise, {"bitwise"}),
]
