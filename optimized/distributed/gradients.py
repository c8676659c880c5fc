"""Norms of gradients that lie on many ranks, and clipping by them.

Every rank holds a shard of each gradient, and the shards of a parameter lie on a mesh of its own: of all ranks, or of
those that differ in data where tp holds copies. So squares are added up over the axes that a parameter is cut along,
and over no other: a copy counts once.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from reference.precision import at_least_fp32


def own_shard(x: Tensor) -> Tensor:
    """This rank's part of `x`, which may be a DTensor; no copy."""
    return x.to_local() if isinstance(x, DTensor) else x


@torch.no_grad()
def global_norm(gradients: Iterable[Tensor], order: float = 2.0) -> Tensor:
    """The 2-norm (or, with `order` inf, the largest absolute value) of all `gradients` together: a scalar, on every rank.

    Raises:
        ValueError: another order.
    """
    if order not in (2.0, float("inf")):
        raise ValueError(f"order is {order}; it must be 2 or inf.")
    most = order != 2.0
    by_place: dict[Any, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        place = None
        if isinstance(gradient, DTensor):
            cut = tuple(i for i, placement in enumerate(gradient.placements) if not placement.is_replicate())
            place = (gradient.device_mesh, cut)
        shard = at_least_fp32(own_shard(gradient))
        empty = shard.new_zeros(())
        by_place[place].append((shard.abs().amax() if shard.numel() else empty) if most else shard.square().sum())
    found: list[Tensor] = []
    for place, parts in by_place.items():
        stacked = torch.stack(parts)
        value = stacked.amax() if most else stacked.sum()
        if place is not None:
            mesh, cut = place
            for axis in cut:
                dist.all_reduce(value, dist.ReduceOp.MAX if most else dist.ReduceOp.SUM, group=mesh.get_group(axis))
        found.append(value)
    if not found:
        return torch.zeros(())
    every = torch.stack(found)
    return every.amax() if most else every.sum().sqrt()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Shorten the gradients of `parameters` together to the norm `limit` at most; returns the norm before.

    As `torch.nn.utils.clip_grad_norm_`, for parameters on different meshes.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = global_norm(gradients)
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        own_shard(gradient).mul_(factor.to(gradient.dtype))
    return norm
