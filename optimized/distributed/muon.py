"""Muon where matrices are sharded: momentum on each rank's shard, the orthogonalisation on the whole matrix.

Newton-Schulz runs in bf16, so that the order of its sums would show: every rank computes it of the whole matrix, the
same bits, and keeps its part. A matrix is whole for the time of its own update.

Letters: F rows of a matrix, M columns.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class ShardedMuon(torch.optim.Muon):
    """`torch.optim.Muon` on DTensors; the same arguments, state and update."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Raises:
            ValueError: a closure, which nothing here would ask again.
        """
        if closure is not None:
            raise ValueError(f"closure is {closure!r}; ShardedMuon evaluates no loss: leave it out.")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        change_FM = _orthogonal_step(direction, group)
        if isinstance(parameter, DTensor):
            change_FM = distribute_tensor(change_FM, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(change_FM)


def _orthogonal_step(direction: Tensor, group: dict[str, Any]) -> Tensor:
    """−lr · orthogonalised direction, whole: what torch's Muon makes of zeros without momentum and decay."""
    whole_FM = direction.full_tensor() if isinstance(direction, DTensor) else direction
    zeros_FM = nn.Parameter(torch.zeros_like(whole_FM))
    zeros_FM.grad = whole_FM
    torch.optim.Muon(
        [zeros_FM], lr=group["lr"], weight_decay=0.0, momentum=0.0, nesterov=False, eps=group["eps"],
        ns_coefficients=group["ns_coefficients"], ns_steps=group["ns_steps"], adjust_lr_fn=group["adjust_lr_fn"],
    ).step()  # fmt: skip
    return zeros_FM.detach()
