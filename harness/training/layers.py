"""What the attention of each layer answers while a forward runs, one layer at a time, for all query rows or for some.

Nothing of a layer is kept when the next one computes. A row's attention depends on no other row: so some rows are
measured by calling the layer's own `attend` again with these rows alone, a few at a time, and with all keys.

Letters: B batch, L rows, R measured rows, N rows of a call, W measured rows of the rank that has most, S key slots.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from reference.attention import Ask
from reference.layout import Layout

from .ranks import gather_rows, own_places

# Is given a layer's number, its raw scores `[B, R, S]`, −inf where a key is no candidate, and p `[B, R, S]`.
Visit = Callable[[int, Tensor, Tensor], None]


def spread_rows(length: int, count: int) -> Tensor:
    """int64 `[count]`: that many of `length` rows, evenly spaced, ascending, the last one among them.

    Raises:
        ValueError: a `count` that is not 1 … `length`.
    """
    if not 1 <= count <= length:
        raise ValueError(f"count is {count}; it must be 1 … {length}, the rows of the sequence.")
    return torch.arange(1, count + 1) * length // count - 1


@dataclass(frozen=True, slots=True)
class _Look:
    """What is asked of every layer: `rows_R` of `length` rows, all where None; `largest` elements of a head's product."""

    ask: Ask
    visit: Visit
    length: int
    rows_R: Tensor | None
    largest: int


@torch.no_grad()
def visit_layers(
    model: nn.Module, inputs: Mapping[str, Tensor], visit: Visit, *, visible: bool, rows_R: Tensor | None, largest: int
) -> None:  # fmt: skip
    """Run `model` on `inputs` and show `visit` every layer's scores and targets, in the order of the layers.

    On several ranks each calls it with the same arguments, and each is shown the rows of all.

    Args:
        inputs: `input_ids` `[B, L]`, with `attention_mask` and `position_ids` where there are any.
        visible: scores of every visible key, and not of the candidates of the model's mode alone.
        rows_R: int64, ascending, the query rows that are measured; None for all of them at once.
        largest: with `rows_R`, about how many elements the attention logits of the rows of one call may have.
    """
    ask = Ask(scores="visible" if visible else "candidates", kl_target=True)
    look = _Look(ask, visit, inputs["input_ids"].shape[1], rows_R, largest)
    with ExitStack() as stack:
        # Not by class: a patched copy of the reference has classes of its own.
        for module in model.modules():
            if hasattr(module, "attend") and hasattr(module, "layer_idx"):
                stack.enter_context(_watched(model, cast(Any, module), look))
        model(**inputs, use_cache=False, logits_to_keep=1)


@contextmanager
def _watched(model: nn.Module, attention: Any, look: _Look) -> Iterator[None]:
    """`attention` with an `attend` that shows what it finds, and a `project` that makes the indexer's inputs for it."""
    project, attend = attention.project, attention.attend

    def projecting(x_BLM: Tensor, rotary: Any, cache: Any, _ask: Ask) -> Any:
        return project(x_BLM, rotary, cache, look.ask)

    def attending(t: Any, layout: Layout, _ask: Ask, replayed_BLK: Tensor | None) -> Any:
        if look.rows_R is None:
            out_BLHV, found = attend(t, layout, look.ask, replayed_BLK)
            scores, target = found.scores_BLS, found.kl_target_BLS
            found.scores_BLS = found.kl_target_BLS = None
        else:
            # A dense forward asks its indexer nothing.
            plain = t if attention.config.use_sparse_attention else _without_indexer(t)
            out_BLHV, found = attend(plain, layout, Ask(), replayed_BLK)
            places_W = own_places(model, look.length, look.rows_R.to(layout.bounds_BL2.device))
            scores, target = _of_rows(attention, attend, t, layout, look, places_W)
        look.visit(attention.layer_idx, *(gather_rows(model, look.length, look.rows_R, x) for x in (scores, target)))
        return out_BLHV, found

    attention.project, attention.attend = projecting, attending
    try:
        yield
    finally:
        del attention.project, attention.attend


def _without_indexer(t: Any) -> Any:
    return replace(t, index_q_BLJE=None, index_k_BSE=None, index_w_BLJ=None)


def _of_rows(
    attention: Any, attend: Callable[..., Any], t: Any, layout: Layout, look: _Look, places_W: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores and p of the rows at `places_W`, as many a call as keep its logits small."""
    wide = len(layout.bounds_BL2) * layout.num_slots * max(attention.n_heads, attention.config.index_n_heads)
    scores, targets = [], []
    for rows_N in places_W.split(max(1, look.largest // wide)):
        part = replace(
            t, q_nope_BLHN=t.q_nope_BLHN[:, rows_N], q_pe_BLHR=t.q_pe_BLHR[:, rows_N],
            index_q_BLJE=t.index_q_BLJE[:, rows_N], index_w_BLJ=t.index_w_BLJ[:, rows_N],
        )  # fmt: skip
        _, found = attend(part, replace(layout, bounds_BL2=layout.bounds_BL2[:, rows_N]), look.ask, None)
        scores.append(found.scores_BLS)
        targets.append(found.kl_target_BLS)
    return torch.cat(scores, 1), torch.cat(targets, 1)
