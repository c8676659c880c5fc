"""Norms and decoder layer of transformers' models; the layer hands the indexer's loss out beside its hidden states.

A layer's loss must be an output of the function that gradient checkpointing recomputes: what leaves it another way has
no gradient under reentrant checkpointing. So `forward`, which is recomputed, answers with one element more than
transformers' own, and `__call__`, which is not, takes it away again.

Letters: B batch, L rows, M hidden_size.
"""

from typing import Any

import torch
from torch import nn

from optimized.model import Selection
from optimized.norm import rms_norm

from .attention import Forward, LayerCall


class WideNorm(nn.Module):
    """Mixed in before a transformers' RMSNorm, which rounds to x's dtype before it multiplies by the weight, and after."""

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype as `hidden_states`, rounded once."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class LossHandingLayer(nn.Module):
    """Mixed in before a transformers' decoder layer."""

    self_attn: Any

    def __call__(self, x_BLM: torch.Tensor, *args: Any, plugged: Forward | None = None, **kwargs: Any) -> Any:
        """What transformers' layer answers; its indexer's loss goes to `plugged`."""
        if plugged is None:
            return super().__call__(x_BLM, *args, **kwargs)[:-1]
        # Each call has a place of its own for its selection, however calls interleave.
        call = LayerCall(plugged, Selection())
        *answer, kl_sum = super().__call__(x_BLM, *args, plugged=call, **kwargs)
        if kl_sum is not None:
            plugged.kl_sums[self.self_attn.layer_idx] = kl_sum
        return answer[0] if len(answer) == 1 else tuple(answer)

    def forward(self, x_BLM: torch.Tensor, *args: Any, plugged: LayerCall | None = None, **kwargs: Any) -> Any:
        """transformers' layer, and the Σ over rows of its indexer's KL, or None."""
        answer = super().forward(x_BLM, *args, plugged=plugged, **kwargs)
        kl_sum = None
        if plugged is not None:
            kl_sum, plugged.kl_sum = plugged.kl_sum, None
        return (*answer, kl_sum) if isinstance(answer, tuple) else (answer, kl_sum)
