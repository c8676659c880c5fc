"""Probes of the cache: one prefill, chunks of any size and token-by-token decode are the same numbers (spec B03, D16).

The uncached forward's tape is replayed chunk by chunk; what each chunk would itself have chosen among cached keys must
be what the uncached forward chose.

Letters: B batch, L rows, W vocabulary.
"""

from dataclasses import replace

import torch
from torch import nn

from ..cases import Case
from ..observe import Observation
from .model_invariance import placed
from .model_isolation import packed
from .model_sides import Notes, Side, feed, probe

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
    for name, before in (("left-padded", length - short), ("pads in the middle", 0)):
        case, real_BL = placed(text, short, before)
        if before == 0:
            # The prompt's pads stand between it and what follows, which needs its positions said.
            case, real_BL = _split(case, real_BL, short - 4)
        base = side.see(model, case, kl=True)
        for way, sizes in chunkings(k, length).items():
            if way != "token by token":
                through_the_cache(side, notes, model, case, base, f"{name}, {way}", sizes)


def _split(case: Case, real_BL: torch.Tensor, prompt: int) -> tuple[Case, torch.Tensor]:
    """The first batch row's tokens from `prompt` on moved to the row's end, pads in between."""
    length = real_BL.shape[1]
    rest = int(real_BL[0].sum()) - prompt
    order = [*range(prompt), *range(prompt + rest, length), *range(prompt, prompt + rest)]
    ids, labels, mask = (x.clone() for x in (case.input_ids, case.labels, real_BL))
    for x in (ids, labels, mask):
        x[0] = x[0, order]
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    return replace(case, input_ids=ids, labels=labels, attention_mask=mask.long(), position_ids=positions), mask


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
