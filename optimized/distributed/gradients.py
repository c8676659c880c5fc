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
def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all `gradients` together: a scalar, on every rank."""
    by_place: dict[Any, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        place = None
        if isinstance(gradient, DTensor):
            cut = tuple(i for i, placement in enumerate(gradient.placements) if not placement.is_replicate())
            place = (gradient.device_mesh, cut)
        by_place[place].append(at_least_fp32(own_shard(gradient)).square().sum())
    found: list[Tensor] = []
    for place, parts in by_place.items():
        value = torch.stack(parts).sum()
        if place is not None:
            mesh, cut = place
            for axis in cut:
                dist.all_reduce(value, group=mesh.get_group(axis))
        found.append(value)
    if not found:
        return torch.zeros(())
    return torch.stack(found).sum().sqrt()


@torch.no_grad()
def largest_entries(gradients: Iterable[Tensor]) -> list[Tensor]:
    """The largest absolute value of each gradient over all ranks, infinite where an entry is NaN; one reduction for all."""
    shards = [at_least_fp32(own_shard(gradient)) for gradient in gradients]
    if not shards:
        return []
    values = torch.stack([shard.abs().amax() if shard.numel() else shard.new_zeros(()) for shard in shards])
    # A maximum over ranks may lose a NaN, depending on the order in which it meets it.
    values = values.nan_to_num(nan=float("inf"), posinf=float("inf"))
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return list(values.unbind())


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
