"""The passes of a whole model: what is run, where its gradients are, and how it is left for the next time."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import optimized

from ..text import text_batch
from .point import FORWARD, WARM_UP, Point
from .subjects import DENSE_FLASH, FLASH_KERNEL, build

# Tokens of the text that a model warms up on.
WARM_UP_TOKENS = 512
MIB = 2**20

Outputs = dict[str, torch.Tensor]


def forward(model: Any, ids: torch.Tensor) -> Outputs:
    """Logits of every token."""
    with torch.no_grad():
        return {"logits": model(input_ids=ids, use_cache=False).logits}


def training(model: Any, ids: torch.Tensor) -> Outputs:
    """The LM loss of every token; its gradients are in the parameters."""
    out = model(input_ids=ids, labels=ids, use_cache=False)
    loss = out.lm_loss if getattr(out, "loss", None) is None else out.loss
    loss.backward()
    return {"loss": loss.detach()}


def warm_up_step(model: Any, ids: torch.Tensor) -> Outputs:
    """The indexer's KL loss; its gradients are in the indexer's parameters. Of the logits only one row is made."""
    out = model(input_ids=ids, use_cache=False, output_indexer_kl_loss=True, logits_to_keep=1)
    out.indexer_kl_loss.backward()
    return {"loss": out.indexer_kl_loss.detach()}


def step_of(pass_: str) -> Callable[[Any, torch.Tensor], Outputs]:
    """The function that runs a pass."""
    return {FORWARD: forward, WARM_UP: warm_up_step}.get(pass_, training)


class Kernels(TorchDispatchMode):
    """The names of the operators of torch that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


class ModelPass:
    """A contestant's model on text, and the pass that it runs."""

    def __init__(self, point: Point) -> None:
        self.point = point
        self.model: Any = build(point)
        self.run_step = step_of(point.pass_)
        self.ids = text_batch(point.batch, point.length, point.seed).to(point.device)
        self.backend = str(getattr(self.model, "backend", "")) or point.contestant
        self.implementations: dict[str, str] = {}
        if isinstance(self.model, optimized.DeepseekV32ForCausalLM):
            dtype = getattr(torch, point.dtype)
            self.implementations = optimized.implementations(
                self.model.config, point.length, backend=self.backend, device=point.device, dtype=dtype
            )
        self.weights_mib = sum(p.numel() * p.element_size() for p in self.model.parameters()) / MIB

    def warm_up(self) -> Outputs:
        """The pass on a short text.

        Raises:
            RuntimeError: dense-flash ran another kernel than the one that it is named after.
        """
        with Kernels() as kernels:
            outputs = self.run_step(self.model, self.ids[:, :WARM_UP_TOKENS])
        if self.point.contestant == DENSE_FLASH and not any(FLASH_KERNEL in name for name in kernels.names):
            ran = sorted(name for name in kernels.names if "attention" in name)
            raise RuntimeError(f"dense-flash did not take a flash kernel, but {', '.join(ran) or 'none of SDPA'}")
        return outputs

    def run(self) -> Outputs:
        """The pass."""
        return self.run_step(self.model, self.ids)

    def gradients(self) -> list[torch.Tensor] | None:
        """What the last pass left in the parameters; None for a pass that has no gradients."""
        if self.point.pass_ == FORWARD:
            return None
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def forget(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad(set_to_none=True)
