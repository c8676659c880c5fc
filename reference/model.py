"""DeepSeek V3.2 as a transformers model: blocks, backbone, causal LM (report section 2; spec 1.3).

    x ← x + attention(norm(x));   x ← x + ffn(norm(x));   logits = lm_head(norm(x))

`optimized` replaces `DeepseekV32Model.layer_class` and nothing else of this file.

Letters: B batch, L rows, M hidden_size, W vocabulary.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import can_return_tuple, logging

from .attention import Ask, DeepseekV32Attention
from .cache import LatentCache
from .checkpoint import check_loading, use_official_names
from .config import DeepseekV32Config
from .decisions import Decisions, LayerDecisions, check_expert_replay
from .layout import Layout, build_layout
from .losses import causal_lm_loss
from .moe import Experts, Gate, MoE, RMSNorm, SwiGLU
from .outputs import BackboneOutput, CausalLMOutput
from .rope import RotaryTable, yarn_inv_freq
from .streaming import load_streaming, prepare

logger = logging.get_logger(__name__)
use_official_names()


class DeepseekV32DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm residual block: attention, then a dense FFN or experts."""

    attention_class: type[DeepseekV32Attention] = DeepseekV32Attention
    moe_class: type[MoE] = MoE

    def __init__(self, config: DeepseekV32Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.self_attn = self.attention_class(config, layer_idx)
        is_moe = config.is_moe_layer(layer_idx)
        self.mlp = self.moe_class(config) if is_moe else SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BLM: torch.Tensor,
        layout: Layout,
        rotary: tuple[torch.Tensor, torch.Tensor],
        ask: Ask,
        replay: LayerDecisions | None = None,
        past_key_values: LatentCache | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        """(output, scores, KL target, KL sum, top-k, experts): a flat tuple, which both kinds of checkpointing keep."""
        replay = replay or LayerDecisions()
        attended, found = self.self_attn(
            self.input_layernorm(x_BLM), layout, rotary, past_key_values, ask, replay.topk_indices
        )
        x_BLM = x_BLM + attended
        normed = self.post_attention_layernorm(x_BLM)
        experts = None
        if isinstance(self.mlp, MoE):
            if replay.expert_indices is not None:
                n_experts, top = self.mlp.router.weight.shape[0], self.mlp.router.top_k
                check_expert_replay(replay.expert_indices, layout.real_BL, top, n_experts, self.layer_idx)
            out, experts = self.mlp(normed, layout.real_BL, replay.expert_indices)
        else:
            if replay.expert_indices is not None:
                raise ValueError(
                    f"decisions, layer {self.layer_idx}: expert_indices given, but this layer has no experts."
                )
            out = self.mlp(normed)
        return x_BLM + out, found.scores_BLS, found.kl_target_BLS, found.kl_sum, found.topk_BLK, experts


class DeepseekV32PreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation, in the official tensor names."""

    config: DeepseekV32Config
    config_class = DeepseekV32Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekV32DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["e_score_correction_bias", "k_norm"]

    def __init__(self, config: DeepseekV32Config, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, DeepseekV32Config):
            raise ValueError(
                f"config is a {type(config).__module__}.{type(config).__name__}; it must be a reference.DeepseekV32Config."
            )
        config.check()
        super().__init__(config, *args, **kwargs)
        # The multi-token-prediction layer of the published files.
        self._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{config.num_hidden_layers}\..*"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As transformers', for safetensors in the official layout: FP8 is dequantised, tensor by tensor.

        A checkpoint that does not fit is refused instead of filled in at random; neither pickles nor code are read.

        Raises:
            ValueError: a tensor or scale that is missing, unknown, truncated, wrongly typed or wrongly shaped, by its
                name; a path that is no checkpoint.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, config=config, **kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        directory, config, kwargs = prepare(pretrained_model_name_or_path, cls, config, kwargs)
        loaded: Any = super().from_pretrained(directory, *args, config=config, output_loading_info=True, **kwargs)
        model, info = loaded
        check_loading(pretrained_model_name_or_path, info)
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        return (model, info) if wants_info else model

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        load = PreTrainedModel._load_pretrained_model
        # Only an adapter, which transformers reads in this way too, comes with the keys that it expects.
        if state_dict is not None or expected_keys is not None:
            return load(model, state_dict, checkpoint_files, load_config, expected_keys)
        return load_streaming(load, model, checkpoint_files, load_config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Gate):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, RotaryTable):
            init.copy_(module.inv_freq, yarn_inv_freq(module.rope_parameters, module.dim))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; experts may also stand one by one under their official names, all of them or, in a shard, some.

        `Trainer` reads its own checkpoints back by this method, and `save_pretrained` has written them in those names.

        Raises:
            RuntimeError: what torch raises for, or an expert of the wrong shape, by its name.
        """
        return super().load_state_dict(self._with_stacked_experts(state_dict, partly=not strict), strict, assign)

    @torch.no_grad()
    def _with_stacked_experts(self, state_dict: Mapping[str, Any], *, partly: bool) -> Mapping[str, Any]:
        """`state_dict` with this model's own stacks, filled, in place of single experts; what it lacks stays as it is.

        partly: whether a stack may lack experts; an incomplete one otherwise keeps its names, which torch refuses.
        """
        found = dict(state_dict)
        for prefix, module in self.named_modules():
            # Nothing can be copied into a stack that is offloaded: torch then says that it is missing.
            if not isinstance(module, Experts) or module.down_proj.is_meta:
                continue
            for name, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
                stack = getattr(module, name).detach()
                places = {
                    f"{prefix}.{i}.{part}.weight": rows
                    for i, expert in enumerate(stack)
                    for part, rows in zip(parts, expert.chunk(len(parts)), strict=True)
                }
                given = [key for key in places if key in found]
                if not given or (len(given) < len(places) and not partly):
                    continue
                for key in given:
                    if found[key].shape != places[key].shape:
                        raise RuntimeError(
                            f"load_state_dict: {key} has shape {tuple(found[key].shape)}; it must be {tuple(places[key].shape)}."
                        )
                    places[key].copy_(found.pop(key))
                found[f"{prefix}.{name}"] = stack
        # Without single experts the very dictionary that was given: torch keeps its versions in an attribute of it.
        return found if found.keys() != state_dict.keys() else state_dict


class DeepseekV32Model(DeepseekV32PreTrainedModel):
    """Embedding, decoder layers, final norm."""

    layer_class: type[DeepseekV32DecoderLayer] = DeepseekV32DecoderLayer

    def __init__(self, config: DeepseekV32Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([self.layer_class(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryTable(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: LatentCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        decisions: Decisions | None = None,
        ask: Ask | None = None,
        output_hidden_states: bool = False,
        layout: Layout | None = None,
    ) -> BackboneOutput:
        """Run the layers; arguments as in `DeepseekV32ForCausalLM.forward`, requests packed into `ask`.

        layout: of these tokens, where it does not follow from mask, positions and `cu_seq_lens_q`, which are then not
        read: they are some rows of a longer sequence, whose keys attention brings together itself.
        """
        ask = ask or Ask()
        x_BLM = self._embed(input_ids, inputs_embeds)
        cache = self._cache(past_key_values, use_cache)
        if decisions is not None and len(decisions) != len(self.layers):
            raise ValueError(f"decisions holds {len(decisions)} layers; the model has {len(self.layers)}.")
        past = None
        if cache is not None:
            cache.check(self.config, x_BLM.shape[0])
            past = cache.layout
        layout = layout or build_layout(
            x_BLM.shape[0], x_BLM.shape[1], x_BLM.device,
            attention_mask=attention_mask, position_ids=position_ids, cu_seq_lens=cu_seq_lens_q, past=past,
        )  # fmt: skip
        # Whatever stands in padding must not matter, not even NaN.
        x_BLM = x_BLM.masked_fill(~layout.real_BL[..., None], 0.0)
        rotary = self.rotary_emb(layout.positions_BL, x_BLM.dtype)

        hidden = [x_BLM] if output_hidden_states else []
        answers: list[tuple[torch.Tensor | None, ...]] = []
        try:
            for i, layer in enumerate(self.layers):
                replay = decisions[i] if decisions is not None else None
                x_BLM, *answer = layer(x_BLM, layout, rotary, ask, replay, past_key_values=cache)
                if output_hidden_states:
                    hidden.append(x_BLM)
                answers.append(tuple(answer))
        except BaseException:
            # A forward that is refused, or interrupted, must not leave half its tokens in the cache.
            if cache is not None:
                cache.keep_first(past.num_slots if past is not None else 0)
            raise
        x_BLM = self.norm(x_BLM)
        if cache is not None:
            cache.layout = layout
        scores, targets, kl_sums, topk, experts = zip(*answers, strict=True)
        return BackboneOutput(
            last_hidden_state=x_BLM,
            past_key_values=cache,
            hidden_states=(*hidden[:-1], x_BLM) if output_hidden_states else None,
            indexer_kl_sum=sum(s.to(x_BLM.device) for s in kl_sums) if ask.kl_loss else None,
            num_rows=layout.real_BL.sum(),
            indexer_scores=scores if ask.scores else None,
            indexer_kl_targets=targets if ask.kl_target else None,
            decisions=Decisions(tuple(map(LayerDecisions, topk, experts))) if ask.decisions else None,
        )

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of input_ids and inputs_embeds must be given.")
        if inputs_embeds is not None:
            return inputs_embeds
        assert input_ids is not None
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; it must be [batch, tokens], with one token or more."
            )
        low, high = (int(v) for v in input_ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(
                f"input_ids holds token id {bad}; ids must be 0 … {self.config.vocab_size - 1} (vocab_size {self.config.vocab_size})."
            )
        embedded: torch.Tensor = self.embed_tokens(input_ids)
        return embedded

    def _cache(self, past_key_values: Any, use_cache: bool | None) -> LatentCache | None:
        if self.gradient_checkpointing and self.training:
            if past_key_values is not None or use_cache:
                logger.warning_once("A cache cannot be filled under gradient checkpointing: use_cache is off.")
            return None
        if past_key_values is None:
            use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
            return LatentCache(self.config) if use_cache else None
        if not isinstance(past_key_values, LatentCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; this model keeps latents: pass a LatentCache(config), or leave it out."
            )
        return past_key_values


class DeepseekV32ForCausalLM(DeepseekV32PreTrainedModel, GenerationMixin):
    """DeepSeek V3.2 with its language-modelling head, the indexer's KL loss and the decision tape."""

    backbone_class: type[DeepseekV32Model] = DeepseekV32Model
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # `Trainer` then passes num_items_in_batch, by which both losses are divided.
    accepts_loss_kwargs = True

    def __init__(self, config: DeepseekV32Config) -> None:
        super().__init__(config)
        self.model = self.backbone_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: LatentCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cu_seq_lens_q: torch.Tensor | None = None,
        output_indexer_scores: bool | Literal["visible"] = False,
        output_indexer_kl_target: bool = False,
        output_indexer_kl_loss: bool = False,
        output_decisions: bool = False,
        decisions: Decisions | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """One forward over `[B, L]` tokens.

        Args:
            input_ids: `[B, L]`; or `inputs_embeds` `[B, L, M]`.
            attention_mask: `[B, P + L]` of 0/1, P cached tokens; 1 for real tokens, anywhere.
            position_ids: `[B, L]`. A document starts where it is not its predecessor + 1.
            cu_seq_lens_q: starts of documents in a flattened batch of one (int, with 0 and L).
            labels: `[B, L]`, −100 for none; row t is scored on label t + 1.
            output_indexer_scores: return raw I, −inf outside the candidate set; `"visible"`: on every visible key.
            output_indexer_kl_target: return p, the target of the KL loss.
            output_indexer_kl_loss: return the KL loss (always on when `config.indexer_kl_coef` > 0).
            decisions: choices to use instead of the model's own. output_decisions: return the model's own.
            num_items_in_batch: what both losses are divided by, instead of their own counts.

        Raises:
            ValueError: a token id outside the vocabulary, a mask, position, cache or tape that does not fit, an
                unknown argument.
        """
        self._refuse_unknown(kwargs)
        coef = self.config.indexer_kl_coef
        if output_indexer_scores not in (False, True, "visible"):
            raise ValueError(
                f"output_indexer_scores is {output_indexer_scores!r}; it must be False, True or 'visible'."
            )
        ask = Ask(
            scores=("visible" if output_indexer_scores == "visible" else "candidates") if output_indexer_scores else False,
            kl_target=output_indexer_kl_target, kl_loss=output_indexer_kl_loss or coef > 0, decisions=output_decisions,
        )  # fmt: skip
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            past_key_values=past_key_values, use_cache=use_cache, cu_seq_lens_q=cu_seq_lens_q, decisions=decisions,
            ask=ask, output_hidden_states=output_hidden_states,
        )  # fmt: skip
        hidden_BLM = out.last_hidden_state
        if labels is None:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden_BLM = hidden_BLM[:, keep, :]
        logits_BLW = self.lm_head(hidden_BLM)

        loss = lm_loss = kl_loss = None
        if out.indexer_kl_sum is not None:
            rows = out.num_rows if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
            kl_loss = out.indexer_kl_sum / rows.to(out.indexer_kl_sum.device, out.indexer_kl_sum.dtype).clamp_min(1)
        if labels is not None:
            lm_loss = self._lm_loss(logits_BLW, labels, self._real(attention_mask, labels), num_items_in_batch)
            loss = lm_loss if coef == 0 or kl_loss is None else lm_loss + coef * kl_loss.to(lm_loss.device)
        return CausalLMOutput(
            loss=loss, logits=logits_BLW, past_key_values=out.past_key_values, hidden_states=out.hidden_states,
            lm_loss=lm_loss, indexer_kl_loss=kl_loss, indexer_scores=out.indexer_scores,
            indexer_kl_targets=out.indexer_kl_targets, decisions=out.decisions,
        )  # fmt: skip

    def _lm_loss(
        self,
        logits_BLW: torch.Tensor,
        labels_BL: torch.Tensor,
        real_BL: torch.Tensor,
        num_items: int | torch.Tensor | None,
    ) -> torch.Tensor:
        return causal_lm_loss(logits_BLW, self._checked_labels(labels_BL, logits_BLW), real_BL, num_items)

    @staticmethod
    def _real(attention_mask: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
        if attention_mask is None:
            return torch.ones_like(labels, dtype=torch.bool)
        return attention_mask[:, -labels.shape[1] :].bool().to(labels.device)

    def _checked_labels(self, labels: torch.Tensor, logits_BLW: torch.Tensor) -> torch.Tensor:
        if labels.shape != logits_BLW.shape[:2]:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}; it must be that of the tokens, {tuple(logits_BLW.shape[:2])}."
            )
        return self._checked_classes(labels)

    def _checked_classes(self, labels: torch.Tensor) -> torch.Tensor:
        wrong = (labels != -100) & ((labels < 0) | (labels >= self.config.vocab_size))
        if bool(wrong.any()):
            raise ValueError(
                f"labels holds {int(labels[wrong][0])}; labels must be −100 or 0 … {self.config.vocab_size - 1}."
            )
        return labels

    @staticmethod
    def _refuse_unknown(kwargs: dict[str, Any]) -> None:
        # What transformers' own loops pass to any model; the first group asks for nothing when False or None.
        for name, value in kwargs.items():
            if name in ("output_attentions", "output_router_logits") and not value:
                continue
            if name in (
                "return_dict",
                "cu_seq_lens_k",
                "max_length_q",
                "max_length_k",
                "seq_idx",
                "cache_position",
            ):
                continue
            raise ValueError(
                f"forward() got {name!r}={value!r}, which this model does not know; see its docstring for the arguments there are."
            )

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation is not None:
                raise ValueError(
                    f"cache_implementation is {generation_config.cache_implementation!r}; this model keeps latents in a LatentCache only: leave it out."
                )
            model_kwargs["past_key_values"] = LatentCache(self.config)
            return
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )
