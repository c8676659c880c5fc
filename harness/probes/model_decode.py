"""Probes of the cache: one prefill, chunks of any size and token-by-token decode are the same numbers (spec B03, D16).

The uncached forward's tape is replayed chunk by chunk; what each chunk would itself have chosen among cached keys must
be what the uncached forward chose.

Letters: B batch, L rows, W vocabulary.
"""

from dataclasses import replace

import torch
from torch import nn

from reference import Decisions

from ..cases import Case
from ..observe import Observation
from .model_invariance import placed, row_of
from .model_isolation import packed
from .model_sides import Notes, Side, each, feed, padded, probe, stacked

# Few keys a row, so that a decode token by token is soon past them.
FEWER_KEYS = 8


def keys_of(side: Side) -> int:
    """index_topk of these probes."""
    return min(side.k, FEWER_KEYS)


def chunkings(k: int, length: int) -> dict[str, list[int]]:
    """Ways to cut `length` tokens, which are more than 3k: where chunks begin below k, at it and beyond it."""
    return {
        "token by token": [1] * length,
        "chunks": [max(k - 3, 1), k + 1, 1, length - k - 2 - max(k - 3, 1)],
        "prefill, then tokens": [length - 4, 1, 1, 1, 1],
    }


def through_the_cache(
    side: Side, notes: Notes, model: nn.Module, case: Case, base: Observation, name: str, sizes: list[int]
) -> None:
    """One chunking against the uncached forward."""
    real_BL = case.real_BL
    seen, _ = feed(side, model, case, sizes, tape=base.decisions, kl=True)
    notes.rows(side, name, seen, case, real_BL, base.logits[real_BL], base.decisions)
    if seen.kl_loss is not None and base.kl_loss is not None:
        notes.same(f"{name}, kl_loss", seen.kl_loss[None], base.kl_loss[None], side.losses)


def decode(side: Side, notes: Notes) -> None:
    """Unpadded rows, sparse and dense, and a short text after a long one."""
    k = keys_of(side)
    length = 3 * k + 1
    for sparse in side.modes:
        model = side.model(index_topk=k, use_sparse_attention=sparse).eval()
        case = side.case(length=length, index_topk=k, use_sparse_attention=sparse)
        base = side.see(model, case, kl=True)
        mode = "sparse" if sparse else "dense"
        for name, sizes in chunkings(k, length).items():
            if name != "token by token":
                through_the_cache(side, notes, model, case, base, f"{mode}, {name}", sizes)
            elif sparse:
                # The cached run chooses, the uncached one replays: decode may go another way that a tape would hide.
                seen, _ = feed(side, model, case, sizes)
                whole = side.see(model, case, tape=seen.decisions)
                notes.rows(side, name, whole, case, case.real_BL, seen.logits.flatten(0, 1), seen.decisions)
        short = side.case(length=k + 3, number=1, index_topk=k, use_sparse_attention=sparse)
        through_the_cache(
            side, notes, model, short, side.see(model, short, kl=True), f"{mode}, short after long", [k + 1, 1, 1]
        )
        cache_matters(side, notes, model, case, base, mode)


def cache_matters(side: Side, notes: Notes, model: nn.Module, case: Case, base: Observation, name: str) -> None:
    """Null candidates: the last chunk without a cache, and with the other row's."""
    length = case.input_ids.shape[1]
    cut = length - 4
    _, cache = feed(side, model, case, [cut])
    swapped_ids = replace(case, input_ids=case.input_ids.flip(0)[:, cut:])
    swapped, _ = feed(side, model, swapped_ids, [length - cut], cache=cache)
    positions = torch.arange(cut, length).expand(len(case.input_ids), -1)
    bare = side.see(
        model, replace(case, input_ids=case.input_ids[:, cut:], labels=case.labels[:, cut:], position_ids=positions)
    )
    expected_NW = base.logits[:, cut:].flatten(0, 1)
    again, _ = feed(side, model, case, [cut, length - cut], tape=base.decisions)
    notes.same(
        f"{name}, last chunk", again.logits[:, cut:].flatten(0, 1), expected_NW, side.shapes,
        {
            "no cache": (bare.logits.flatten(0, 1), expected_NW),
            "the other row's cache": (swapped.logits.flip(0).flatten(0, 1), expected_NW),
        },
    )  # fmt: skip


def decode_padded(side: Side, notes: Notes) -> None:
    """Prompts of unequal length, padded left and right, continued in one cache."""
    k = keys_of(side)
    length, short = 3 * k + 1, 2 * k
    model = side.model(index_topk=k).eval()
    text = side.case(length=length, index_topk=k)
    lone = [side.see(model, row_of(text, 0, 0, short), kl=True), side.see(model, row_of(text, 1), kl=True)]
    pads = range(short, length)
    for name, order in {
        "left-padded": [*pads, *range(short)],
        # A prompt padded on the right, and what follows it, whose positions must be said.
        "pads in the middle": [*range(short - 4), *pads, *range(short - 4, short)],
    }.items():
        case, _ = placed(text, short, 0)
        case, tape = reordered(case, stacked([padded(lone[0].decisions, 0, len(pads)), lone[1].decisions]), order)
        if name == "pads in the middle":
            counted = (case.real_BL.long().cumsum(1) - 1).clamp_min(0)
            case = replace(case, position_ids=counted)
        logits = torch.zeros(2, length, lone[0].logits.shape[-1]).to(lone[0].logits)
        logits[case.real_BL] = torch.cat([seen.logits[0] for seen in lone])
        kl = None if lone[0].kl_loss is None else mean_kl(lone, (short, length))
        for way, sizes in chunkings(k, length).items():
            if way != "token by token":
                base = Observation(logits, logits.new_zeros(()), kl_loss=kl, decisions=tape)
                through_the_cache(side, notes, model, case, base, f"{name}, {way}", sizes)


def mean_kl(seen: list[Observation], rows: tuple[int, ...]) -> torch.Tensor:
    """The KL loss of all rows together, from that of each part and how many rows it has."""
    parts = [one.kl_loss * n for one, n in zip(seen, rows, strict=True) if one.kl_loss is not None]
    return torch.stack(parts).sum() / sum(rows)


def reordered(case: Case, tape: Decisions | None, order: list[int]) -> tuple[Case, Decisions | None]:
    """The first batch row's tokens, and its part of the tape, in another order."""
    moved = {}
    for name in ("input_ids", "labels", "attention_mask"):
        moved[name] = getattr(case, name).clone()
        moved[name][0] = moved[name][0, order]
    return replace(case, **moved), each(tape, lambda x: torch.cat((x[:1, order], x[1:])))


def decode_packed(side: Side, notes: Notes) -> None:
    """Packed documents, cut inside and at their ends, the last one continued token by token."""
    k = keys_of(side)
    lengths = (k + 4, 3, 2 * k + 1)
    model = side.model(index_topk=k).eval()
    case, document_BL = packed(side.case(length=sum(lengths), index_topk=k), lengths)
    base = side.see(model, case, kl=True)
    for name, sizes in {
        "cut inside": [k, k, sum(lengths) - 2 * k],
        "cut at the ends": list(lengths),
        "then tokens": [sum(lengths) - 3, 1, 1, 1],
    }.items():
        through_the_cache(side, notes, model, case, base, name, sizes)
    merged = side.see(model, replace(case, position_ids=None))
    behind_BL = document_BL > 0
    notes.same("uncached", base.logits[behind_BL], base.logits[behind_BL], side.shapes,
               {"read as one document": (merged.logits[behind_BL], base.logits[behind_BL])})  # fmt: skip


CHECKS = [
    probe("decode", decode, {"cache"}),
    probe("decode_padded", decode_padded, {"cache", "padding"}),
    probe("decode_packed", decode_packed, {"cache", "packing"}),
]
