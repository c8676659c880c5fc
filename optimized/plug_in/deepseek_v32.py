"""transformers' `deepseek_v32` on our operators: subclasses of its classes, under the same names.

The names matter to transformers: plans, `_no_split_modules`, wrapping policies and saved configs hold them.

Letters: B batch, L rows, M hidden_size.
"""

from typing import Any

import torch
from transformers.models.deepseek_v32 import modeling_deepseek_v32

from .attention import IndexerOperators, LatentAttention, LayerCall
from .layers import LossHandingLayer, WideNorm
from .models import BlockwiseBackbone, TrainableCausalLM

# Ours take the place of its classes' methods, so that nothing of their types is left to check.
upstream: Any = modeling_deepseek_v32
upstream_base = upstream.DeepseekV32PreTrainedModel


class DeepseekV32RMSNorm(WideNorm, upstream.DeepseekV32RMSNorm):
    """Rounded once."""


class DeepseekV32Indexer(upstream.DeepseekV32Indexer, IndexerOperators):
    """Half-split RoPE, rope lanes first."""

    interleaved = False

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self.widen(config)


class DeepseekV32Attention(upstream.DeepseekV32Attention, LatentAttention):
    """Every layer has an indexer."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self.take_dimensions(self)

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, *_: Any, past_key_values: Any = None, plugged: LayerCall | None = None,
        **__: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """The output `[B, L, M]`, and None for the probabilities that nobody holds."""
        out_BLM, _selection = self.blockwise(hidden_states, past_key_values, plugged)
        return out_BLM, None


class DeepseekV32DecoderLayer(LossHandingLayer, upstream.DeepseekV32DecoderLayer):
    """transformers' block around this attention."""


class DeepseekV32Model(BlockwiseBackbone, upstream.DeepseekV32Model):
    """transformers' backbone, without its mask."""

    # Its own: loading under a patch mapping writes into it.
    _can_record_outputs = dict(upstream_base._can_record_outputs)


class DeepseekV32ForCausalLM(TrainableCausalLM, upstream.DeepseekV32ForCausalLM):
    """transformers' causal LM, with the indexer's loss."""

    _can_record_outputs = dict(upstream_base._can_record_outputs)


# What a model is made of, by the name that transformers' module has for it, and the models themselves.
PARTS: dict[str, Any] = {
    cls.__name__: cls for cls in (DeepseekV32RMSNorm, DeepseekV32Indexer, DeepseekV32Attention, DeepseekV32DecoderLayer)
}
MODELS: dict[Any, Any] = {
    upstream.DeepseekV32Model: DeepseekV32Model,
    upstream.DeepseekV32ForCausalLM: DeepseekV32ForCausalLM,
}
