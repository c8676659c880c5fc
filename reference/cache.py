"""The cache of a decode or a chunked prefill: latents, rope keys and indexer keys (spec 1.4, 2.8).

Three small vectors a token and layer, and once for all layers the layout of the slots: which hold
real tokens, of which document, at which position.

Letters: B batch, S key slots, C kv_lora_rank, R rope lanes, E indexer head dim.
"""

from dataclasses import replace
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from .config import DeepseekV32Config
from .layout import Layout


class LatentLayer(CacheLayerMixin):
    """One layer's slots.

    c_kv `[B, S, C]`: the latent after its norm. k_pe `[B, S, R]`: after RoPE, interleaved as in the official files.
    k_idx `[B, S, E]`: the indexer's key after RoPE and before Hadamard.
    """

    is_croppable = True
    is_sliding = False
    fields = ("c_kv", "k_pe", "k_idx")

    def __init__(self) -> None:
        super().__init__()
        self.c_kv: torch.Tensor | None = None
        self.k_pe: torch.Tensor | None = None
        self.k_idx: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare: the first `update` brings the tensors."""

    def update(  # type: ignore[override]
        self, c_kv: torch.Tensor, k_pe: torch.Tensor, k_idx: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Append the new tokens' vectors; returns those of all S slots."""
        for name, new in zip(self.fields, (c_kv, k_pe, k_idx), strict=True):
            held = getattr(self, name)
            setattr(self, name, new if held is None else torch.cat((held, new), 1))
        self.is_initialized = True
        assert self.c_kv is not None and self.k_pe is not None and self.k_idx is not None
        return self.c_kv, self.k_pe, self.k_idx

    def apply(self, fn: Any) -> None:
        """Replace each tensor by `fn` of it."""
        for name in self.fields:
            if (held := getattr(self, name)) is not None:
                setattr(self, name, fn(held))

    def get_seq_length(self) -> int:
        """Slots in use."""
        return 0 if self.c_kv is None else self.c_kv.shape[1]

    def get_max_length(self) -> int:
        """−1: it grows without limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(S, 0): the mask covers every slot."""
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.c_kv = self.k_pe = self.k_idx = None
        self.is_initialized = False


class LatentCache(Cache):
    """The cache of one model: `past_key_values` of its forward, and what `generate` makes by default."""

    layers: list[LatentLayer]  # type: ignore[assignment]

    def __init__(self, config: DeepseekV32Config) -> None:
        super().__init__(layers=[LatentLayer() for _ in range(config.num_hidden_layers)])
        self.layout: Layout | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots in use, pads included."""
        return self.layers[layer_idx].get_seq_length()

    def check(self, config: DeepseekV32Config, batch: int) -> None:
        """Refuse to go on for another model or batch.

        Raises:
            ValueError: layers, widths or batch rows that do not match.
        """
        if len(self.layers) != config.num_hidden_layers:
            raise ValueError(
                f"past_key_values has {len(self.layers)} layers; the model has {config.num_hidden_layers}."
            )
        widths = (config.kv_lora_rank, config.qk_rope_head_dim, config.index_head_dim)
        for name, width in zip(LatentLayer.fields, widths, strict=True):
            held = getattr(self.layers[0], name)
            if held is not None and tuple(held.shape[::2]) != (batch, width):
                raise ValueError(
                    f"past_key_values holds {name} of shape {tuple(held.shape)}; it must be [{batch}, slots, {width}]."
                )

    def keep_first(self, slots: int) -> None:
        """Cut every layer back to its first `slots` slots, after a forward that did not end."""
        for layer in self.layers:
            if slots == 0:
                layer.reset()
            else:
                layer.apply(lambda x: x[:, :slots])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.layout = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: batch row i continues row beam_idx[i]."""
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each batch row `repeats` times, in place of it."""
        self._rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the batch rows `indices`."""
        self._rows(lambda x: x[indices.to(x.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last |tokens_to_remove| slots of every layer (transformers passes the number negated)."""
        if (drop := abs(tokens_to_remove)) == 0 or self.layout is None:
            return
        keep = self.get_seq_length() - drop
        if keep <= 0:
            self.reset()
            return
        self.keep_first(keep)
        self.layout = self.layout.first_slots(keep)

    def _rows(self, fn: Any) -> None:
        for layer in self.layers:
            layer.apply(fn)
        if (layout := self.layout) is not None:
            names = [n for n in layout.__dataclass_fields__ if n != "padded"]
            self.layout = replace(layout, **{n: fn(getattr(layout, n)) for n in names})
