"""Attention and indexer of transformers' models on our operators: their modules and names, our arithmetic.

`LatentAttention` is mixed in behind a transformers' attention class, which builds the modules; what computes is
`optimized.model.DeepseekV32Attention.attend`, as in our own model. Keys and latents go through whatever cache of
transformers is in use.

Letters: B batch, L rows, S key slots, M hidden_size, H heads, R rope dim, C kv_lora_rank, K selected keys, J indexer
heads, E indexer head dim.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from optimized.model import CheckpointedAsk, LightningIndexer, Selection
from optimized.model import DeepseekV32Attention as BlockwiseAttention
from reference.attention import Ask, Projected
from reference.layout import Layout
from reference.precision import WideLayerNorm, WideLinear
from reference.rope import rotate_half_split, rotate_interleaved

# Our own config fields that a plugged model honours, and what they are where transformers' config does not have them.
OWN_FIELDS: dict[str, Any] = {"use_sparse_attention": True, "detach_indexer_input": True, "indexer_kl_coef": 0.0}
# Fields that it does not: accepted with the one value that says so.
FIXED_FIELDS = {"indexer_precision": "native", "kv_latent_precision": "native"}


class WithOwnFields:
    """transformers' config, read as it is at that moment, with our own fields where it lacks them."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name in OWN_FIELDS:
            return getattr(self._config, name, OWN_FIELDS[name])
        return getattr(self._config, name)


def check_fields(config: Any) -> None:
    """Refuse values of our own config fields that a plugged model cannot honour.

    Raises:
        ValueError: a flag that is not True or False, a coefficient that is no number of at least 0, a precision other
            than native, or dropout in attention.
    """
    fields = WithOwnFields(config)
    for name in ("use_sparse_attention", "detach_indexer_input", "indexer_rope_interleaved"):
        if not isinstance(value := getattr(fields, name, False), bool):
            raise ValueError(f"{name} is {value!r}; it must be True or False.")
    coef = fields.indexer_kl_coef
    if isinstance(coef, bool) or not isinstance(coef, int | float) or not 0 <= coef < float("inf"):
        raise ValueError(f"indexer_kl_coef is {coef!r}; it must be a number of at least 0.")
    for name, only in FIXED_FIELDS.items():
        if (value := getattr(config, name, only)) != only:
            raise ValueError(f"{name} is {value!r}; a model of transformers that is plugged in knows {only!r} only.")
    if config.attention_dropout:
        raise ValueError(
            f"attention_dropout is {config.attention_dropout!r}; the operators have no dropout: it must be 0."
        )


@dataclass(slots=True)
class Forward:
    """What all layers of one forward share.

    rotary: cos and sin `[B, L, R/2]` in at least fp32. kl_loss: whether each indexer's loss is wanted.
    kl_sums: what each layer with an indexer answered, Σ over rows.
    """

    layout: Layout
    rotary: tuple[torch.Tensor, torch.Tensor]
    kl_loss: bool
    kl_sums: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class LayerCall:
    """One call of one layer: the place for its selection, which a recomputation takes again, and for its KL."""

    forward: Forward
    selection: Selection
    kl_sum: torch.Tensor | None = None


class IndexerOperators(LightningIndexer):
    """Our indexer's projections for the modules that a transformers' indexer class builds.

    interleaved: which pairs its model rotates, unless the config's `indexer_rope_interleaved` says otherwise.
    """

    fp8 = False
    interleaved = False

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def widen(self, config: Any) -> None:
        """Called once the modules are there: head weights and the key norm compute in at least fp32 from now on.

        The key norm keeps its parameters in it, too.
        """
        interleaved = getattr(config, "indexer_rope_interleaved", self.interleaved)
        self.rotate = rotate_interleaved if interleaved else rotate_half_split
        self.rope_dim = config.qk_rope_head_dim
        self.weights_proj.__class__ = WideLinear
        # Built in the dtype of the model, which from_pretrained would round its parameters to.
        self.k_norm.to(torch.promote_types(self.k_norm.weight.dtype, torch.float32)).__class__ = WideLayerNorm


class LatentAttention(BlockwiseAttention):
    """Our attention for the modules that a transformers' attention class builds.

    The class before it in the order of resolution brings q_a_proj, q_a_layernorm, q_b_proj, kv_a_proj_with_mqa,
    kv_a_layernorm, kv_b_proj, o_proj, `scaling`, and `indexer`, which is None in a layer that shares another's.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)

    @property
    def config(self) -> Any:
        """transformers' config, with our own fields."""
        return WithOwnFields(self._upstream_config)

    @config.setter
    def config(self, config: Any) -> None:
        self._upstream_config = config

    def take_dimensions(self, layer: Any) -> None:
        """Called once the modules are there: transformers' names for sizes, as the operators' callers call them."""
        check_fields(self._upstream_config)
        self.nope_dim, self.rope_dim = layer.qk_nope_head_dim, layer.qk_rope_head_dim
        self.v_dim, self.latent_dim = layer.v_head_dim, layer.kv_lora_rank
        self.n_heads, self.scale = layer.num_heads, layer.scaling

    def blockwise(
        self, x_BLM: torch.Tensor, cache: Any, call: LayerCall | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention's output `[B, L, M]`, 0 in pad rows, and the selection `[B, L, K]` (None in dense mode).

        Raises:
            RuntimeError: the model around this layer is not plugged in.
        """
        if call is None:
            raise RuntimeError(
                f"{type(self).__name__} was built by plug_into_transformers, but the model around it was not: "
                "build the model itself while the plug-in is in, and not a subclass of its backbone."
            )
        forward = call.forward
        ask = CheckpointedAsk(kl_loss=forward.kl_loss and self.indexer is not None, selection=call.selection)
        projected = self.project_plugged(x_BLM, forward, cache, ask)
        out_BLHV, found = self.attend(projected, forward.layout, ask, None)
        call.kl_sum = found.kl_sum
        out_BLHV = out_BLHV.masked_fill(~forward.layout.real_BL[..., None, None], 0)
        return self.o_proj(out_BLHV.flatten(2)), found.topk_BLK

    def project_plugged(self, x_BLM: torch.Tensor, forward: Forward, cache: Any, ask: Ask) -> Projected:
        """As `reference.attention`'s `project`, with a cache of transformers.

        A layer without an indexer projects none: its selection is given to it.
        """
        cos, sin = forward.rotary
        q_latent_BLQ = self.q_a_layernorm(self.q_a_proj(x_BLM))
        q = self.q_b_proj(q_latent_BLQ).unflatten(-1, (-1, self.nope_dim + self.rope_dim))
        self._share_heads(q.shape[2], ask)
        q_nope, q_pe = q.split([self.nope_dim, self.rope_dim], dim=-1)
        q_pe = rotate_interleaved(q_pe, cos[..., None, :], sin[..., None, :])
        latent, k_pe = self.kv_a_proj_with_mqa(x_BLM).split([self.latent_dim, self.rope_dim], dim=-1)
        c_kv, k_pe = self.kv_a_layernorm(latent), rotate_interleaved(k_pe, cos, sin)

        index_q = index_k = index_w = None
        scored = self.indexer is not None and (self.config.use_sparse_attention or ask.reads_indexer)
        with torch.set_grad_enabled(torch.is_grad_enabled() and ask.reads_indexer):
            detached = self.config.detach_indexer_input
            x, latent_in = (x_BLM.detach(), q_latent_BLQ.detach()) if detached else (x_BLM, q_latent_BLQ)
            # A cache that is filled in dense mode may be read in sparse mode later.
            if scored or (cache is not None and self.indexer is not None):
                index_k = self.indexer.keys(x, cos, sin)
            if scored:
                index_q = self.indexer.queries(latent_in, cos, sin)
                index_w = self.indexer.head_weights(x)
        if cache is not None:
            # A static cache answers with all of its slots, those that nobody has filled among them.
            slots = forward.layout.num_slots
            c_kv, k_pe = (t[:, 0, :slots] for t in cache.update(c_kv[:, None], k_pe[:, None], self.layer_idx))
            if index_k is not None:
                index_k = cache.update_indexer(index_k, self.layer_idx)[:, :slots]
        return Projected(q_nope, q_pe, c_kv, k_pe, index_q, index_k, index_w)

    def _share_heads(self, heads: int, ask: Ask) -> None:
        """Takes notice of a tensor-parallel plan of transformers, under which this process has `heads` of all heads.

        Its hooks sum the gradients of what kv_b_proj reads, so that keys and values must come out of that module.

        Raises:
            ValueError: the indexer's loss is asked for, whose target is a mean over all heads.
        """
        self.n_heads = heads
        if heads == self.config.num_attention_heads:
            return
        if ask.kl_loss:
            raise ValueError(
                f"The indexer's KL loss needs all {self.config.num_attention_heads} heads, and this process has {heads} "
                "of them: train the indexer without a tensor-parallel plan."
            )
        self.forced_path = "masked"
