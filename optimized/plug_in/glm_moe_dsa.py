"""transformers' `glm_moe_dsa` (GLM-5) on our operators: interleaved RoPE in the indexer, which layers share.

`indexer_types` names for each layer "full", an indexer of its own, or "shared": it attends to what the nearest full
layer before it selected, and has no indexer to train. The KL loss compares each indexer with its own layer's attention.

Letters: B batch, L rows, M hidden_size, K selected keys.
"""

from typing import Any

import torch
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa

from .attention import IndexerOperators, LatentAttention, LayerCall
from .layers import LossHandingLayer, WideNorm
from .models import BlockwiseBackbone, TrainableCausalLM

# Ours take the place of its classes' methods, so that nothing of their types is left to check.
upstream: Any = modeling_glm_moe_dsa
upstream_base = upstream.GlmMoeDsaPreTrainedModel


class GlmMoeDsaRMSNorm(WideNorm, upstream.GlmMoeDsaRMSNorm):
    """Rounded once."""


class GlmMoeDsaIndexer(upstream.GlmMoeDsaIndexer, IndexerOperators):
    """Interleaved RoPE, rope lanes first."""

    interleaved = True

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self.widen(config)


class GlmMoeDsaAttention(upstream.GlmMoeDsaAttention, LatentAttention):
    """Takes the selection of the full layer before it where it has no indexer."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self.take_dimensions(self)

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, *_: Any, past_key_values: Any = None,
        prev_topk_indices: torch.Tensor | None = None, plugged: LayerCall | None = None, **__: Any,
    ) -> tuple[torch.Tensor, None, torch.Tensor | None]:  # fmt: skip
        """The output `[B, L, M]`, None for the probabilities, and the selection `[B, L, K]` for the next layer.

        Raises:
            ValueError: a shared layer before any full one.
        """
        if self.indexer is None and self.config.use_sparse_attention and plugged is not None:
            if prev_topk_indices is None:
                raise ValueError(
                    f"indexer_types says that layer {self.layer_idx} shares an indexer, but no layer before it has one."
                )
            plugged.selection.topk_BLK = prev_topk_indices
        out_BLM, selection_BLK = self.blockwise(hidden_states, past_key_values, plugged)
        return out_BLM, None, selection_BLK


class GlmMoeDsaDecoderLayer(LossHandingLayer, upstream.GlmMoeDsaDecoderLayer):
    """transformers' block around this attention."""


class GlmMoeDsaModel(BlockwiseBackbone, upstream.GlmMoeDsaModel):
    """transformers' backbone, without its mask."""

    # Its own: loading under a patch mapping writes into it.
    _can_record_outputs = dict(upstream_base._can_record_outputs)


class GlmMoeDsaForCausalLM(TrainableCausalLM, upstream.GlmMoeDsaForCausalLM):
    """transformers' causal LM, with the indexer's loss."""

    _can_record_outputs = dict(upstream_base._can_record_outputs)


# What a model is made of, by the name that transformers' module has for it, and the models themselves.
PARTS: dict[str, Any] = {
    cls.__name__: cls for cls in (GlmMoeDsaRMSNorm, GlmMoeDsaIndexer, GlmMoeDsaAttention, GlmMoeDsaDecoderLayer)
}
MODELS: dict[Any, Any] = {
    upstream.GlmMoeDsaModel: GlmMoeDsaModel,
    upstream.GlmMoeDsaForCausalLM: GlmMoeDsaForCausalLM,
}
