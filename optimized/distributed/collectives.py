"""The four exchanges between ranks that a forward makes, each with the exchange that its gradient needs.

    forward                                       backward
    sum_over         Σ over ranks                 as it is      partial results of replicated work
    share            as it is                     Σ over ranks  replicated inputs of divided work
    gather_slots     all ranks' rows, in order    Σ over ranks of the part that is this rank's
    exchange         rows to the rank they name   rows back to where they came from

Sums run in at least fp32 where they are of gradients of many rows.

Letters: B batch, N this rank's rows, S slots of all ranks, W rows of the rank that has most, P rows that are sent,
Q rows that are received; * any number of axes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from reference.precision import at_least_fp32

from .rows import RowSplit

# As newer torch calls them, and as all versions know them.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Σ over the ranks of `group`, in a tensor of its own; not differentiable."""
    # A copy is reduced, never what `contiguous` may have made of it: the result would be lost with that.
    summed = x.detach().clone(memory_format=torch.contiguous_format)
    if group.size() > 1:
        dist.all_reduce(summed, group=group)
    return summed


def sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Σ over the ranks of `group`; each rank's gradient is that of its own summand."""
    y: Tensor = _SumOver.apply(x, group) if group.size() > 1 else x
    return y


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return total(x, group)

    @staticmethod
    def backward(_ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


def share(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`x` itself, equal on all ranks of `group`; its gradient is the sum of theirs."""
    y: Tensor = _Share.apply(x, group) if group.size() > 1 else x
    return y


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return total(dy, ctx.group), None


def gather_slots(x_BN: Tensor, split: RowSplit, group: dist.ProcessGroup) -> Tensor:
    """`[B, S, *]` of all ranks' rows `[B, N, *]`, in the order of the sequence; gradients are summed over the ranks."""
    y_BS: Tensor = _GatherSlots.apply(x_BN, split, group) if group.size() > 1 else x_BN
    return y_BS


class _GatherSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BN: Tensor, split: RowSplit, group: dist.ProcessGroup) -> Tensor:
        ctx.split, ctx.group = split, group
        batch, own = x_BN.shape[:2]
        x_BW = x_BN.new_zeros(batch, split.widest, *x_BN.shape[2:])
        x_BW[:, :own] = x_BN
        every = x_BN.new_empty(group.size() * batch, *x_BW.shape[1:])
        _all_gather(every, x_BW, group=group)
        return every.unflatten(0, (-1, batch)).transpose(0, 1).flatten(1, 2).index_select(1, split.place_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BS: Tensor) -> tuple[Tensor, None, None]:
        split, group = ctx.split, ctx.group
        wide_BS = at_least_fp32(dy_BS)
        batch, rest = dy_BS.shape[0], dy_BS.shape[2:]
        every = wide_BS.new_zeros(batch, group.size() * split.widest, *rest)
        every.index_copy_(1, split.place_S, wide_BS)
        every = every.unflatten(1, (group.size(), -1)).transpose(0, 1).flatten(0, 1).contiguous()
        dx_BW = wide_BS.new_empty(batch, split.widest, *rest)
        _reduce_scatter(dx_BW, every, group=group)
        return dx_BW[:, : len(split.own_L)].to(dy_BS.dtype), None, None


def exchange(x_P: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """`[Q, *]`: the first `sent[0]` rows of x go to rank 0 of `group`, and so on; `received` counts what each rank sends here."""
    y_Q: Tensor = _Exchange.apply(x_P, sent, received, group) if group.size() > 1 else x_P
    return y_Q


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_P: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _moved(x_P, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_Q: Tensor) -> tuple[Tensor, None, None, None]:
        return _moved(dy_Q, ctx.received, ctx.sent, ctx.group), None, None, None


def _moved(x_P: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    y_Q = x_P.new_empty(sum(received), *x_P.shape[1:])
    dist.all_to_all_single(y_Q, x_P.contiguous(), received, sent, group=group)
    return y_Q


@torch.no_grad()
def first_rank_s(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`x` of the first rank of `group`, on all of them: a discrete choice that must be one."""
    if group.size() == 1:
        return x
    chosen = x.clone(memory_format=torch.contiguous_format)
    dist.broadcast(chosen, dist.get_global_rank(group, 0), group=group)
    return chosen
