"""What a forward returns. Letters: B batch, L rows, S key slots, M hidden_size, W vocabulary."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .cache import LatentCache
from .decisions import Decisions


@dataclass
class BackboneOutput(ModelOutput):
    """Output of `DeepseekV32Model`; fields as in `CausalLMOutput`. `indexer_kl_sum`: Σ over layers and rows."""

    last_hidden_state: torch.Tensor | None = None
    past_key_values: LatentCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    indexer_kl_sum: torch.Tensor | None = None
    num_rows: torch.Tensor | None = None
    indexer_scores: tuple[torch.Tensor, ...] | None = None
    indexer_kl_targets: tuple[torch.Tensor, ...] | None = None
    decisions: Decisions | None = None


@dataclass
class CausalLMOutput(ModelOutput):
    """Output of `DeepseekV32ForCausalLM`.

    loss: lm_loss + indexer_kl_coef · indexer_kl_loss, when labels are given.
    lm_loss: cross-entropy, nats a target. indexer_kl_loss: nats a row, summed over layers.
    logits: `[B, L, W]`, model dtype. past_key_values: the cache, when one is in use.
    hidden_states: embeddings and each layer's output, `[B, L, M]`; the last one is after the final norm.
    indexer_scores: per layer raw I `[B, L, S]`, −inf outside the candidate set.
    indexer_kl_targets: per layer p `[B, L, S]`, detached, 0 outside the candidate set.
    decisions: what the model itself chose.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: LatentCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    lm_loss: torch.Tensor | None = None
    indexer_kl_loss: torch.Tensor | None = None
    indexer_scores: tuple[torch.Tensor, ...] | None = None
    indexer_kl_targets: tuple[torch.Tensor, ...] | None = None
    decisions: Decisions | None = None
