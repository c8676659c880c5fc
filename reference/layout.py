"""Who sees whom: padding, packed documents and cached keys, as one [start, end) range a row.

Padding may stand anywhere (left, right, or in the middle after a cached right-padded prompt). Leaving
the pads out makes every row's visible keys contiguous, so that the whole rule of visibility is two
numbers a row, here and in every kernel. Two index spaces follow:

- slot: where a key lies in the cache, pads included, 0 <= slot < S;
- compact: its rank among the real keys of the batch row, pads behind them.

Letters: B batch, L rows (new tokens), P slots cached before them, S = P + L key slots, 2 = [start, end).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Visibility of S key slots to L rows.

    positions_BL: RoPE positions of the new tokens.
    real_BS: which slots hold real tokens. document_BS: document number of each slot (pads: their left neighbour's).
    position_BS: positions of all slots.
    bounds_BL2: int64 [start, end) in compact space; start == end for pad rows.
    order_BS: the slot at each compact index. compact_BS: the compact index of each slot.
    padded: whether compact and slot space differ at all.
    """

    positions_BL: torch.Tensor
    real_BS: torch.Tensor
    document_BS: torch.Tensor
    position_BS: torch.Tensor
    bounds_BL2: torch.Tensor
    order_BS: torch.Tensor
    compact_BS: torch.Tensor
    padded: bool

    @property
    def num_slots(self) -> int:
        """S."""
        return self.real_BS.shape[1]

    @property
    def real_BL(self) -> torch.Tensor:
        """Which of the new tokens are real."""
        return self.real_BS[:, -self.positions_BL.shape[1] :]

    def visible_BLS(self) -> torch.Tensor:
        """The visibility rule spelt out over slots: same document, not later, both real. L×S elements."""
        start, end = self.bounds_BL2.unbind(-1)
        compact = self.compact_BS[:, None, :]
        return (compact >= start[..., None]) & (compact < end[..., None]) & self.real_BS[:, None, :]

    def compact(self, x_BSX: torch.Tensor) -> torch.Tensor:
        """Keys in compact order, `[B, S, ...]`; pads behind the real ones and zeroed."""
        if not self.padded:
            return x_BSX
        index = self.order_BS.view(*self.order_BS.shape, *(1,) * (x_BSX.dim() - 2)).expand(x_BSX.shape)
        real = self.real_BS.gather(1, self.order_BS).view(*self.order_BS.shape, *(1,) * (x_BSX.dim() - 2))
        return x_BSX.gather(1, index).masked_fill(~real, 0)

    def to_slots(self, compact_BLK: torch.Tensor) -> torch.Tensor:
        """Compact indices (−1 stays −1) as slots; ascending order is kept."""
        if not self.padded:
            return compact_BLK
        rows = compact_BLK.clamp_min(0).flatten(1).long()
        slots = self.order_BS.gather(1, rows).view_as(compact_BLK).to(compact_BLK.dtype)
        return torch.where(compact_BLK < 0, compact_BLK, slots)

    def first_slots(self, keep: int) -> "Layout":
        """What a later forward needs to know of the first `keep` slots."""
        real, document, position = (x[:, :keep] for x in (self.real_BS, self.document_BS, self.position_BS))
        return build_layout_of_slots(real, document, position, length=keep)

    def to_relative(self, compact_BLK: torch.Tensor) -> torch.Tensor:
        """Compact indices as counted from the row's own document start: what a decision tape holds."""
        start = self.bounds_BL2[..., :1].to(compact_BLK.dtype)
        return torch.where(compact_BLK < 0, compact_BLK, compact_BLK - start)

    def from_relative(self, relative_BLK: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_relative`."""
        start = self.bounds_BL2[..., :1].to(relative_BLK.dtype)
        return torch.where(relative_BLK < 0, relative_BLK, relative_BLK + start)


def build_layout(
    batch: int,
    length: int,
    device: torch.device,
    *,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
    past: Layout | None = None,
) -> Layout:
    """The layout of `length` new tokens after those of `past`.

    A document starts where `position_ids` is not its predecessor + 1 among real tokens, or where `cu_seq_lens`
    (starts of documents in a flattened batch of one, with 0 and L) says so. Without `position_ids` real tokens are
    counted, from 0 in each document of `cu_seq_lens`.

    Args:
        attention_mask: `[B, P + L]` of 0/1 (bool, integer or float), 1 for real tokens.
        position_ids: `[B, L]` or `[1, L]`, integer.

    Raises:
        ValueError: a wrong shape, a mask value other than 0 and 1, a negative position, bad `cu_seq_lens`.
    """
    cached = past.num_slots if past is not None else 0
    real_BL = _real_tokens(attention_mask, batch, length, cached, device)
    starts_BL = _document_starts(cu_seq_lens, batch, length, cached, device)
    if position_ids is None:
        position_ids = _count_positions(real_BL, starts_BL, past)
    else:
        position_ids = _checked_positions(position_ids, batch, length, real_BL)

    real_BS = real_BL if past is None else torch.cat((past.real_BS, real_BL), 1)
    position_BS = position_ids if past is None else torch.cat((past.position_BS, position_ids), 1)
    slots = torch.arange(real_BS.shape[1], device=device).expand(batch, -1)
    # The last real slot before each slot, -1 when there is none.
    last_real = torch.where(real_BS, slots, -1).cummax(1).values
    previous = torch.cat((last_real.new_full((batch, 1), -1), last_real[:, :-1]), 1)
    follows = position_BS == position_BS.gather(1, previous.clamp_min(0)) + 1
    begins_BS = real_BS & ((previous < 0) | ~follows)
    # Where a document of cu_seq_lens begins with padding, its first real token is the start.
    section_BL = starts_BL.long().cumsum(1)
    other_section = section_BL != section_BL.gather(1, (previous[:, cached:] - cached).clamp_min(0))
    new_BL = begins_BS[:, cached:] | (other_section & real_BL)
    if past is None:
        document_BS = new_BL.long().cumsum(1) - 1
    else:
        document_BS = torch.cat((past.document_BS, past.document_BS[:, -1:] + new_BL.long().cumsum(1)), 1)

    return build_layout_of_slots(real_BS, document_BS, position_BS, length=length)


def build_layout_of_slots(
    real_BS: torch.Tensor, document_BS: torch.Tensor, position_BS: torch.Tensor, *, length: int
) -> Layout:
    """The layout whose last `length` slots are the rows, from what each slot holds."""
    batch, num_slots = real_BS.shape
    device = real_BS.device
    slots = torch.arange(num_slots, device=device).expand(batch, -1)
    padded = not bool(real_BS.all())
    if padded:
        order_BS = torch.argsort((~real_BS).byte(), dim=1, stable=True)
        compact_BS = torch.empty_like(order_BS).scatter_(1, order_BS, slots)
    else:
        order_BS = compact_BS = slots
    # The compact index at which each document starts: the smallest one of its real tokens. Documents are numbered
    # from -1, which only pads before the first real token can have.
    unset = torch.full((batch, num_slots + 1), num_slots, dtype=torch.long, device=device)
    begin = unset.scatter_reduce(1, document_BS + 1, torch.where(real_BS, compact_BS, num_slots), "amin")
    start_BL = begin.gather(1, document_BS[:, -length:] + 1)
    end_BL = compact_BS[:, -length:] + 1
    bounds = torch.stack((start_BL, end_BL), -1).masked_fill(~real_BS[:, -length:, None], 0)
    return Layout(position_BS[:, -length:], real_BS, document_BS, position_BS, bounds, order_BS, compact_BS, padded)


def _real_tokens(mask: torch.Tensor | None, batch: int, length: int, cached: int, device: torch.device) -> torch.Tensor:
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if mask.dim() != 2 or mask.shape != (batch, cached + length):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; it must be [batch, cached + new tokens] = "
            f"[{batch}, {cached + length}]: 4-D masks are not part of this model's contract."
        )
    mask = mask.to(device)
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask holds values other than 0 and 1; it must be 1 for tokens and 0 for padding.")
    return mask[:, cached:].bool()


def _document_starts(
    cu_seq_lens: torch.Tensor | None, batch: int, length: int, cached: int, device: torch.device
) -> torch.Tensor:
    starts = torch.zeros(batch, length, dtype=torch.bool, device=device)
    if cu_seq_lens is None:
        return starts
    if batch != 1 or cached:
        raise ValueError(
            f"cu_seq_lens_q needs a flattened batch of one and an empty cache; batch is {batch}, cache {cached}."
        )
    if cu_seq_lens.is_floating_point() or cu_seq_lens.dtype == torch.bool:
        raise ValueError(f"cu_seq_lens_q is {cu_seq_lens.dtype}; it must be of an integer dtype.")
    edges = cu_seq_lens.to(device).long()
    rising = edges.dim() == 1 and len(edges) >= 2 and bool((edges.diff() > 0).all())
    if not rising or int(edges[0]) != 0 or int(edges[-1]) != length:
        raise ValueError(f"cu_seq_lens_q is {cu_seq_lens.tolist()}; it must rise from 0 to the {length} tokens given.")
    starts[0, edges[:-1]] = True
    return starts


def _count_positions(real_BL: torch.Tensor, starts_BL: torch.Tensor, past: Layout | None) -> torch.Tensor:
    count = real_BL.long().cumsum(1)
    # Counting restarts at each document of cu_seq_lens.
    before = torch.where(starts_BL, count - real_BL.long(), 0).cummax(1).values
    position = (count - 1 - before).clamp_min(0)
    if past is None:
        return position
    slots = torch.arange(past.num_slots, device=real_BL.device)
    last = torch.where(past.real_BS, slots, -1).amax(1, keepdim=True)
    following = torch.where(last >= 0, past.position_BS.gather(1, last.clamp_min(0)) + 1, 0)
    return position + following


def _checked_positions(position_ids: torch.Tensor, batch: int, length: int, real_BL: torch.Tensor) -> torch.Tensor:
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}; it must be [{batch}, {length}] or [1, {length}]."
        )
    if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
        raise ValueError(f"position_ids is {position_ids.dtype}; it must be of an integer dtype.")
    position_ids = position_ids.to(real_BL.device).long().expand(batch, -1)
    if bool(((position_ids < 0) & real_BL).any()):
        raise ValueError("position_ids holds a negative position for a real token; positions count from 0.")
    return position_ids
