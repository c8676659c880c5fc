"""transformers' own `DeepseekV32ForCausalLM` as a subject, with the tape added from outside.

Nothing of what it computes is touched: the wrappers swap the choices that its indexer and its router
return, and write down what they would have chosen. `plugged.py` puts the same tape on the models that are plugged in.

Letters: B batch, L rows, S key slots, K chosen keys, N = B·L tokens, T chosen experts.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as upstream
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config as UpstreamConfig

from reference import Decisions, DeepseekV32Config, LayerDecisions
from reference.layout import Layout, build_layout

# It has no KL loss, no dense switch and no detach switch: what needs those is not applicable to it.
UPSTREAM_CAPABILITIES = frozenset({"model", "tape", "packing", "padding", "cache", "checkpointing", "bitwise"})
_OURS_ONLY = (
    "use_sparse_attention", "detach_indexer_input", "indexer_kl_coef", "indexer_rope_interleaved", "indexer_precision",
    "kv_latent_precision", "model_type", "transformers_version", "architectures",
)  # fmt: skip


def upstream_config(config: DeepseekV32Config, attention: str) -> UpstreamConfig:
    """transformers' config of the same sizes, with `attention` as its attn_implementation."""
    fields = upstream_fields(config)
    made: Any = UpstreamConfig
    return cast(UpstreamConfig, made(**fields, attn_implementation=attention))


def upstream_fields(config: DeepseekV32Config) -> dict[str, Any]:
    """The fields that a config of transformers has in common with `config`."""
    return {name: value for name, value in config.to_dict().items() if name not in _OURS_ONLY}


def upstream_factory(attention: str) -> Any:
    """A subject factory for transformers' model with `attention` ("sdpa" or "eager")."""

    def factory(
        config: DeepseekV32Config,
        state_dict: Mapping[str, torch.Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> nn.Module:
        return with_weights(TapedUpstream(upstream_config(config, attention)), state_dict, device, dtype)

    return factory


def with_weights(
    model: Any, state_dict: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A model of transformers with copies of the weights, kept as its from_pretrained keeps them.

    The router bias stays in fp32, and the rotary table unrounded.
    """
    model.load_state_dict(dict(state_dict), strict=True)
    biases = {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    fp32_biases = {n: b.clone() for n, b in biases.items()}
    model = model.to(device, dtype)
    if dtype.itemsize < 4:
        for name, buffer in model.named_buffers():
            if name in fp32_biases:
                buffer.data = fp32_biases[name].to(device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    return cast(nn.Module, model)


class TapeRun:
    """The tape of one forward: what it replays, what it would itself have chosen, and in which layout.

    It travels with the forward's arguments, so that a layer that is recomputed in a later backward finds its own
    forward's choices, whatever ran in between.
    """

    def __init__(self, layout: Layout, replay: Decisions | None, layers: int) -> None:
        self.layout, self.replay = layout, replay
        self.own: list[dict[str, torch.Tensor]] = [{} for _ in range(layers)]

    def decisions(self) -> Decisions:
        """What the model itself chose."""
        return Decisions(tuple(LayerDecisions(own.get("topk_indices"), own.get("expert_indices")) for own in self.own))


class Taped(nn.Module):
    """Mixed in before a causal LM of transformers: recording and replaying choices."""

    model: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # The run that each layer is in; set when its attention begins, in a forward and in a recomputation alike.
        self.runs: list[TapeRun | None] = [None for _ in self.model.layers]
        for i, layer in enumerate(self.model.layers):
            self._follow(layer.self_attn, i)
            self._tape_selection(layer.self_attn, i)
            if hasattr(layer.mlp, "gate"):
                self._tape_gate(layer.mlp.gate, i)

    def forward(
        self, *args: Any, decisions: Decisions | None = None, output_decisions: bool = False, **kwargs: Any
    ) -> Any:
        """As upstream's, with the tape. A cache carries the layout of its slots."""
        ids, cache = kwargs["input_ids"], kwargs.get("past_key_values")
        layout = build_layout(
            ids.shape[0],
            ids.shape[1],
            ids.device,
            attention_mask=kwargs.get("attention_mask"),
            position_ids=kwargs.get("position_ids"),
            past=getattr(cache, "tape_layout", None),
        )
        run = TapeRun(layout, decisions, len(self.model.layers))
        out = super().forward(*args, **kwargs, tape_run=run)
        if (held := out.get("past_key_values")) is not None:
            held.tape_layout = layout
        if output_decisions:
            out["decisions"] = run.decisions()
        return out

    def _follow(self, attention: nn.Module, layer_idx: int) -> None:
        inner = attention.forward

        def forward(*args: Any, tape_run: TapeRun, **kwargs: Any) -> Any:
            self.runs[layer_idx] = tape_run
            return inner(*args, **kwargs)

        attention.forward = forward

    def _run(self, layer_idx: int) -> TapeRun:
        run = self.runs[layer_idx]
        assert run is not None, "a layer's attention runs before its gate"
        return run

    def _tape_selection(self, attention: Any, layer_idx: int) -> None:
        indexer = attention.indexer
        inner = indexer.forward

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            own_BLK = inner(*args, **kwargs)
            run = self._run(layer_idx)
            run.own[layer_idx]["topk_indices"] = as_decisions(own_BLK, run.layout)
            relative = None if run.replay is None else run.replay[layer_idx].topk_indices
            if relative is None:
                return cast(torch.Tensor, own_BLK)
            slots = run.layout.to_slots(run.layout.from_relative(relative))
            # Upstream knows no −1: a key that is selected anyway stands in for it. Pad rows attend to nothing.
            return torch.where(slots < 0, slots[..., :1].clamp_min(0), slots).to(torch.int32)

        indexer.forward = forward

    def _tape_gate(self, gate: nn.Module, layer_idx: int) -> None:
        inner = gate.forward
        router = cast(Any, gate)

        def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits, weights, own_NT = inner(*args, **kwargs)
            run = self._run(layer_idx)
            real_BL1 = run.layout.real_BL[..., None]
            own_BLT = own_NT.unflatten(0, real_BL1.shape[:2]).sort(-1).values.to(torch.int32)
            run.own[layer_idx]["expert_indices"] = torch.where(real_BL1, own_BLT, -1)
            replayed = None if run.replay is None else run.replay[layer_idx].expert_indices
            if replayed is None:
                return logits, weights, own_NT
            used_NT = torch.where(real_BL1, replayed, own_BLT).flatten(0, 1).long()
            chosen = logits.sigmoid().gather(1, used_NT)
            if router.norm_topk_prob:
                chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
            return logits, chosen * router.routed_scaling_factor, used_NT

        gate.forward = forward


class TapedUpstream(Taped, upstream.DeepseekV32ForCausalLM):
    """transformers' model with the tape."""


def as_decisions(slots_BLK: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Selected slots in any order, invisible ones among them, as a tape holds them.

    Upstream fills rows with fewer than k visible keys with invisible ones, which its mask neutralises again.
    """
    slots = slots_BLK.long()
    rows = slots.shape[:2]
    compact = layout.compact_BS.gather(1, slots.flatten(1)).view_as(slots)
    start, end = (layout.bounds_BL2[..., i, None] for i in (0, 1))
    real = layout.real_BS.gather(1, slots.flatten(1)).view_as(slots)
    seen = (compact >= start) & (compact < end) & real
    ordered = torch.where(seen, compact - start, layout.num_slots).sort(-1).values
    return torch.where(ordered == layout.num_slots, -1, ordered).view(*rows, -1).to(torch.int32)
