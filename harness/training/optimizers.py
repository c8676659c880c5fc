"""Optimizers of a stage: Muon for the layers' matrices, AdamW for the rest and for the indexer.

Muon orthogonalises a 2-D matrix. The routed experts are stacked in 3-D and not all of them see tokens in a step, so
they train by AdamW, with embedding, head, gate and norms, as Muon's authors do with all but hidden matrices.

The router's bias is no parameter. V3 balances it without a loss: after each step it falls by a fixed amount for
experts with more than the mean load and rises for the others (report of V3, section 2.1.2; 0.001 there).

Letters: N tokens, T chosen experts, X experts.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from reference.moe import MoE
from reference.training import is_indexer, parameter_group

from .ranks import ranks_of, total_load
from .stages import Stage


def build_optimizers(model: nn.Module, stage: Stage) -> list[torch.optim.Optimizer]:
    """Optimizers for every parameter that requires gradient, each once.

    A group's `"name"` is `"matrices"`, `"rest"`, `"indexer"` or `"router bias"`, its `"base_lr"` the stage's rate,
    which `set_rates` scales. Optimizers without parameters are left out.

    Raises:
        ValueError: nothing requires gradient, or the indexer does and the stage has no rate for it.
    """
    found: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[_group(name, parameter, stage)].append(parameter)
    if not found:
        raise ValueError("model has no parameter that requires gradient; an optimizer needs at least one.")
    if "indexer" in found and stage.lr_indexer is None:
        raise ValueError(
            f"stage {stage.name} has no lr_indexer, but parameters of the indexer require gradient: "
            "freeze them, or give a rate."
        )
    optimizers: list[torch.optim.Optimizer] = []
    if matrices := found.get("matrices"):
        assert stage.lr_matrices is not None
        groups = [_named("matrices", matrices, stage.lr_matrices)]
        optimizers.append(_muon(model)(groups, weight_decay=stage.weight_decay))
    rates = {"rest": stage.lr, "indexer": stage.lr_indexer}
    adamw = [_named(name, found[name], rate) for name, rate in rates.items() if name in found and rate is not None]
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, betas=stage.betas, weight_decay=stage.weight_decay))
    if stage.bias_rate:
        optimizers.append(RouterBias(model, stage.bias_rate))
    return optimizers


def _muon(model: nn.Module) -> type[torch.optim.Muon]:
    if ranks_of(model) is None:
        return torch.optim.Muon
    from optimized.distributed import ShardedMuon

    return ShardedMuon


def scale_at(stage: Stage, step: int) -> float:
    """The factor on every rate at `step` (from 0): linear growth over `stage.ramp` steps, then 1, and over the last
    fifth of the stage a linear fall towards a tenth."""
    left = (stage.steps - step) / max(1, stage.steps // 5)
    return min(1.0, (step + 1) / max(1, stage.ramp), max(0.1, left))


def set_rates(optimizers: list[torch.optim.Optimizer], stage: Stage, step: int) -> None:
    """Set every group's `"lr"` for `step`."""
    factor = scale_at(stage, step)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


class RouterBias(torch.optim.Optimizer):
    """Moves every gate's bias by ±rate against its experts' load since the last step; it has no state and no gradient.

    Loads are counted as tokens reach the experts in training mode, as long as this object lives; a recomputed forward
    counts twice for all alike.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        self._model = model
        self._blocks = [block for block in model.modules() if isinstance(block, MoE)]
        biases = [block.gate.e_score_correction_bias for block in self._blocks]
        super().__init__([{"params": biases, "name": "router bias", "base_lr": rate}], {"lr": rate})
        self._loads: dict[nn.Module, Tensor] = {}
        count = _counter(self._loads)
        for block in self._blocks:
            weakref.finalize(self, block.experts.register_forward_pre_hook(count).remove)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move each bias and forget the loads.

        Raises:
            ValueError: a closure, which could not be asked for anything.
        """
        if closure is not None:
            raise ValueError(f"closure is {closure!r}; the router's bias has no loss to evaluate: leave it out.")
        rate = self.param_groups[0]["lr"]
        for block in self._blocks:
            if (load_X := self._loads.get(block.experts)) is not None:
                load_X = total_load(self._model, load_X).to(block.gate.e_score_correction_bias.dtype)
                block.gate.e_score_correction_bias += rate * (load_X.mean() - load_X).sign()
        self._loads.clear()


def _counter(loads: dict[nn.Module, Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that adds, to the experts' own entry of `loads`, how many tokens each expert `[X]` is given."""

    def count(experts: nn.Module, inputs: tuple[Any, ...]) -> None:
        if experts.training:
            chosen_NT: Tensor = inputs[1]
            load_X = torch.bincount(chosen_NT.flatten(), minlength=len(cast(Any, experts).down_proj))
            loads[experts] = loads[experts] + load_X if experts in loads else load_X

    return count


def _group(name: str, parameter: nn.Parameter, stage: Stage) -> str:
    if is_indexer(name):
        return "indexer"
    hidden = parameter.dim() == 2 and parameter_group(name) in ("attention", "FFN, shared experts")
    return "matrices" if hidden and stage.lr_matrices is not None else "rest"


def _named(name: str, parameters: list[nn.Parameter], rate: float) -> dict[str, Any]:
    return {"params": parameters, "name": name, "lr": rate, "base_lr": rate}
