"""The reference, some query rows at a time: the same formulas for models whose L×S tensors would not fit in memory.

A row's attention depends on no other row. So the reference's own `attend` is called on slices of the rows, with keys and
values expanded once. Nothing trains but the indexer, and its inputs are detached: so a slice's part of the KL gradient
is taken when the slice is there, and nothing of it is kept. A layer's frozen weights stay in the dtype that they are
given in, and are widened while the layer runs, its experts one by one: fp64 weights of all layers would be most of the
memory, and those of one layer's experts too where there are 256.

Letters: B batch, L rows, S key slots, H heads, N nope dim, V v_head_dim, J indexer heads, E indexer head dim; in experts
N tokens, M hidden_size, T chosen experts a token.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from reference import DeepseekV32Config
from reference import model as reference_model
from reference.attention import Ask, DeepseekV32Attention, Found, Projected
from reference.layout import Layout
from reference.moe import Experts, MoE
from reference.precision import at_least_fp32
from reference.training import train_only_indexer

from .subjects import load_weights

# At V3.2's 128 heads and 2,304 keys a slice of this many rows holds 0.3 GB of fp64 probabilities.
ROWS = 128


class RowwiseAttention(DeepseekV32Attention):
    """The reference's attention, ROWS rows at a time."""

    def keys_and_values(self, c_kv_BSC: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What a slice was given, `(k_nope_BSHN, v_BSHV)`, or the expansion of the latents."""
        return c_kv_BSC if isinstance(c_kv_BSC, tuple) else super().keys_and_values(c_kv_BSC)

    def attend(
        self, t: Projected, layout: Layout, ask: Ask, replayed_BLK: torch.Tensor | None
    ) -> tuple[torch.Tensor, Found]:
        """As the reference's; only the indexer may require gradient, and only through the KL loss."""
        if t.q_nope_BLHN.requires_grad:
            raise ValueError("The reference by rows has no gradient of its output; freeze all but the indexer.")
        expanded = self.keys_and_values(t.c_kv_BSC)
        trains = torch.is_grad_enabled() and ask.kl_loss and t.index_q_BLJE is not None
        outs, founds, gradients = [], [], []
        for first in range(0, t.q_nope_BLHN.shape[1], ROWS):
            rows = slice(first, first + ROWS)
            part = replace(
                t,
                q_nope_BLHN=t.q_nope_BLHN[:, rows],
                q_pe_BLHR=t.q_pe_BLHR[:, rows],
                c_kv_BSC=cast(Any, expanded),
                index_q_BLJE=_leaf(t.index_q_BLJE, rows, trains),
                index_k_BSE=_leaf(t.index_k_BSE, slice(None), trains),
                index_w_BLJ=_leaf(t.index_w_BLJ, rows, trains),
            )
            replayed = None if replayed_BLK is None else replayed_BLK[:, rows]
            here = replace(layout, bounds_BL2=layout.bounds_BL2[:, rows])
            with torch.set_grad_enabled(trains):
                out_BLHV, found = super().attend(part, here, ask, replayed)
            if trains:
                leaves = (part.index_q_BLJE, part.index_k_BSE, part.index_w_BLJ)
                gradients.append(torch.autograd.grad(cast(Any, found.kl_sum), cast(Any, leaves)))
                found = _detached(found)
            outs.append(out_BLHV)
            founds.append(found)
        sums = [f.kl_sum for f in founds if f.kl_sum is not None]
        kl_sum = torch.stack(sums).sum() if sums else None
        if gradients:
            dq, dk, dw = zip(*gradients, strict=True)
            total_k = torch.stack([at_least_fp32(x) for x in dk]).sum(0).to(dk[0].dtype)
            kl_sum = _WithGradients.apply(
                kl_sum, t.index_q_BLJE, t.index_k_BSE, t.index_w_BLJ, torch.cat(dq, 1), total_k, torch.cat(dw, 1)
            )
        return torch.cat(outs, 1), Found(
            scores_BLS=_joined(founds, lambda f: f.scores_BLS),
            kl_target_BLS=_joined(founds, lambda f: f.kl_target_BLS),
            kl_sum=kl_sum,
            topk_BLK=_joined(founds, lambda f: f.topk_BLK),
        )


def _leaf(x_BL: torch.Tensor | None, rows: slice, trains: bool) -> torch.Tensor | None:
    return None if x_BL is None else x_BL[:, rows].detach().requires_grad_(trains)


class _WithGradients(torch.autograd.Function):
    """A value whose gradients with respect to q, k and w of the indexer are known."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, *q_k_w_and_gradients: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*q_k_w_and_gradients[3:])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *(grads[0].to(known.dtype) * known for known in ctx.saved_tensors), None, None, None


def _detached(found: Found) -> Found:
    held = (found.scores_BLS, found.kl_target_BLS, found.kl_sum, found.topk_BLK)
    return Found(*(None if x is None else x.detach() for x in held))


def _joined(founds: list[Found], part: Callable[[Found], torch.Tensor | None]) -> torch.Tensor | None:
    held = [x for x in map(part, founds) if x is not None]
    return torch.cat(held, 1) if held else None


@dataclass(frozen=True, slots=True)
class _WidenedOneByOne:
    """A stack of experts' weights, each in `dtype` when it is looked at."""

    stack: torch.Tensor
    dtype: torch.dtype

    def unbind(self, _: int) -> "_WidenedOneByOne":
        return self

    def __getitem__(self, expert: int) -> torch.Tensor:
        return self.stack[expert].to(self.dtype)


class RowwiseExperts(Experts):
    """The reference's experts in the dtype of their input, widened one by one."""

    def forward(self, x_NM: torch.Tensor, experts_NT: torch.Tensor, weights_NT: torch.Tensor) -> torch.Tensor:
        """As the reference's; frozen weights only."""
        if x_NM.dtype == self.down_proj.dtype:
            return super().forward(x_NM, experts_NT, weights_NT)
        stacks = {name: _WidenedOneByOne(p.detach(), x_NM.dtype) for name, p in self.named_parameters()}
        return Experts.forward(cast(Any, SimpleNamespace(**stacks)), x_NM, experts_NT, weights_NT)


class RowwiseMoE(MoE):
    """The reference's block with these experts."""

    experts_class = RowwiseExperts


class RowwiseDecoderLayer(reference_model.DeepseekV32DecoderLayer):
    """The reference's block around both, computed in the dtype of its input."""

    attention_class = RowwiseAttention
    moe_class = RowwiseMoE

    def forward(self, x_BLM: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        """As the reference's."""
        with _widened(self, x_BLM.dtype):
            return super().forward(x_BLM, *args, **kwargs)


@contextmanager
def _widened(layer: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """`layer` with its frozen weights, but the experts', in `dtype`. No backward reaches them, so nothing looks at them
    afterwards."""
    experts = {id(p) for module in layer.modules() if isinstance(module, Experts) for p in module.parameters()}
    narrow = [
        (p, p.data) for p in layer.parameters() if not p.requires_grad and p.dtype != dtype and id(p) not in experts
    ]
    for parameter, data in narrow:
        parameter.data = data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in narrow:
            parameter.data = data


class RowwiseModel(reference_model.DeepseekV32Model):
    """The reference's backbone with these layers."""

    layer_class = RowwiseDecoderLayer


class RowwiseForCausalLM(reference_model.DeepseekV32ForCausalLM):
    """The reference's causal LM on this backbone."""

    backbone_class = RowwiseModel


def build_rowwise(
    config: DeepseekV32Config, state: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """The reference by rows that computes in `dtype`, with nothing trainable but the indexer.

    Its frozen weights inside the layers are those of `state`, not copies.
    """
    model = load_weights(RowwiseForCausalLM, config, state, device, None).train()
    train_only_indexer(model)
    in_layers = {id(p) for p in cast(Any, model).model.layers.parameters() if not p.requires_grad}
    for parameter in model.parameters():
        if id(parameter) not in in_layers:
            parameter.data = parameter.data.to(dtype)
    return model
