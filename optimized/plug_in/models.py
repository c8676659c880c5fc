"""Backbone and causal LM of transformers' models: who sees whom as two numbers a row, and the indexer's loss.

transformers' backbone makes a mask of L×S elements. Here it gets none: the backbone builds a `Layout` of the 2-D mask,
the positions and what the cache holds, and hands it to its layers with the rotary table.

Letters: B batch, L rows, P slots cached before them, S = P + L key slots, M hidden_size, R rope dim.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from reference.layout import Layout, build_layout

from .attention import Forward, WithOwnFields, check_fields
from .layers import LossHandingLayer

# The attention implementations of transformers that stand for "no special one"; ours takes the place of both.
REPLACED_ATTENTIONS = ("sdpa", "eager")


class OfTransformers(nn.Module):
    """A model that transformers takes for one of its own: what it reads off the module of a class, it reads off its own."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: files hold the experts one by one, as those of transformers' own classes."""
        return False

    @staticmethod
    def _check_parts(model: nn.Module, part: nn.Module, ours: type[nn.Module]) -> None:
        if not isinstance(part, ours):
            raise RuntimeError(
                f"{type(model).__name__} is a class of plug_into_transformers, which is not in: its parts would be "
                "transformers' own; build the model while it is in."
            )

    @classmethod
    def _upstream(cls) -> Any:
        return next(c for c in cls.__mro__ if c.__module__.startswith("transformers.models."))

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return bool(cls._upstream()._can_set_attn_implementation())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(cls._upstream()._can_set_experts_implementation())


@dataclass(slots=True)
class IndexerLoss:
    """What a causal LM asks its backbone for: Σ over layers and rows of the KL, and the number of real rows."""

    kl_sum: torch.Tensor | None = None
    num_rows: torch.Tensor | None = None


class BlockwiseBackbone(OfTransformers):
    """Mixed in before a transformers' backbone, which has these."""

    config: Any
    embed_tokens: Any
    rotary_emb: Any
    layers: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._check_parts(self, self.layers[0], LossHandingLayer)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        indexer_loss: IndexerLoss | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' own; `indexer_loss` is filled with the loss of the layers' indexers.

        Args:
            attention_mask: `[B, P + L]` of 0/1, or a bool; pads may stand anywhere.
            position_ids: `[B, L]` or `[1, L]`. A document starts where it is not its predecessor + 1, with a cache too.
            cu_seq_lens_q: starts of documents in a flattened batch of one.

        Raises:
            ValueError: a mask, positions, a config field or an attention that the operators cannot honour.
        """
        config = self.config
        self._check(config, indexer_loss, past_key_values, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of input_ids and inputs_embeds must be given.")
        x_BLM = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = x_BLM.shape[:2]
        layout = build_layout(
            batch, length, x_BLM.device, attention_mask=attention_mask, position_ids=position_ids,
            cu_seq_lens=kwargs.get("cu_seq_lens_q"),
            past=cached_layout(past_key_values, batch, x_BLM.device, attention_mask, position_ids),
        )  # fmt: skip
        if layout.padded:
            # Whatever stands in padding must not matter, not even NaN.
            x_BLM = x_BLM.masked_fill(~layout.real_BL[..., None], 0.0)
        shared = Forward(layout, self._rotary(x_BLM, layout), indexer_loss is not None)
        as_tuple = kwargs.pop("return_dict", None) is False
        out = super().forward(
            # Layer types have other names in other versions; None is what each of them finds.
            attention_mask=dict.fromkeys({"indexed_attention", *config.layer_types}),
            position_ids=layout.positions_BL, past_key_values=past_key_values, inputs_embeds=x_BLM, use_cache=use_cache,
            plugged=shared, return_dict=True, **kwargs,
        )  # fmt: skip
        if out.past_key_values is not None:
            out.past_key_values.slots = layout
        if indexer_loss is not None:
            sums = [kl_sum.to(x_BLM.device) for kl_sum in shared.kl_sums.values()]
            indexer_loss.kl_sum, indexer_loss.num_rows = torch.stack(sums).sum(), layout.real_BL.sum()
        return out.to_tuple() if as_tuple else out

    def _rotary(self, x_BLM: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin `[B, L, R/2]` of transformers' table, in at least fp32 where it would round them to x's dtype."""
        wide = x_BLM.new_empty(0, dtype=torch.promote_types(x_BLM.dtype, torch.float32))
        cos, sin = self.rotary_emb(wide, position_ids=layout.positions_BL)
        return cos.chunk(2, -1)[0], sin.chunk(2, -1)[0]

    def _check(self, config: Any, indexer_loss: IndexerLoss | None, cache: Any, kwargs: dict[str, Any]) -> None:
        check_fields(config)
        if config._attn_implementation not in REPLACED_ATTENTIONS:
            raise ValueError(
                f"attn_implementation is {config._attn_implementation!r}, which a model that is plugged in would not "
                f"call; it must be one of {', '.join(REPLACED_ATTENTIONS)}, whose place our operators take."
            )
        if kwargs.get("output_attentions", config.output_attentions):
            raise ValueError(
                "output_attentions is True, but the operators never hold the probabilities, L×L a head: "
                "use a model that was built without the plug-in."
            )
        asked = kwargs.get("output_indexer_kl_loss") or WithOwnFields(config).indexer_kl_coef > 0
        if asked and indexer_loss is None:
            raise ValueError(
                "The indexer's KL loss is asked for, by output_indexer_kl_loss or indexer_kl_coef, of a model whose "
                f"forward does not report it; ask it of transformers' own causal LM, and not of {type(self).__name__} "
                "or a subclass."
            )
        recomputed = self.training and any(layer.gradient_checkpointing for layer in self.layers)
        if recomputed and cache is not None and int(cache.get_seq_length()):
            raise ValueError(
                "past_key_values holds tokens, but gradient checkpointing drops caches: switch it off, or train on "
                "the whole row."
            )


def cached_layout(
    cache: Any, batch: int, device: torch.device, mask_BS: torch.Tensor | None, position_ids: torch.Tensor | None
) -> Layout | None:
    """The layout of the slots that `cache` holds, or None where it holds none.

    It is kept with the cache. Where the cache was cropped since, it is cut; where its batch was changed, or another model
    filled it, the mask says which slots are real, and each row is one document that the new tokens continue.

    Raises:
        ValueError: the batch was changed while rows held several documents.
    """
    filled = 0 if cache is None else int(cache.get_seq_length())
    if filled == 0:
        return None
    held: Layout | None = getattr(cache, "slots", None)
    if held is not None and held.num_slots >= filled and len(held.real_BS) == batch:
        return held if held.num_slots == filled else held.first_slots(filled)
    if held is not None and bool((held.document_BS > 0).any()):
        raise ValueError(
            f"past_key_values holds packed documents in {len(held.real_BS)} rows; they cannot be told apart once its "
            f"batch is {batch}."
        )
    real_BP = None if mask_BS is None or mask_BS.dim() != 2 else mask_BS[:, :filled].to(device)
    ones_BP = torch.ones(batch, filled, dtype=torch.long, device=device)
    count_BP = (ones_BP if real_BP is None else real_BP.long()).cumsum(1) - 1
    if position_ids is not None:
        first_new = position_ids[:, :1].to(device).expand(batch, -1)
        count_BP = count_BP + first_new - 1 - count_BP[:, -1:]
    return build_layout(batch, filled, device, attention_mask=real_BP, position_ids=count_BP.clamp_min(0))


class TrainableCausalLM(OfTransformers):
    """Mixed in before a transformers' causal LM."""

    config: Any
    model: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._check_parts(self, self.model, BlockwiseBackbone)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_indexer_kl_loss: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As transformers' own, and the indexer's KL loss (report eq. 3 in dense mode, eq. 4 in sparse mode).

        Args:
            output_indexer_kl_loss: return `indexer_kl_loss`: Σ over the rows of each layer that has an indexer, divided
                by the real rows, or by `num_items_in_batch` where that is given. Always on with `indexer_kl_coef` > 0.

        Returns:
            transformers' output. With the KL loss on also `indexer_kl_loss` and, with labels, `lm_loss`; `loss` is then
            lm_loss + indexer_kl_coef · indexer_kl_loss.

        Raises:
            TypeError: an argument is all but called output_indexer_kl_loss; transformers ignores names it does not know.
            ValueError: as the backbone's.
        """
        if misspelt := get_close_matches("output_indexer_kl_loss", kwargs, n=1, cutoff=0.8):
            raise TypeError(
                f"The forward got {misspelt[0]!r}, which nobody reads; the name is 'output_indexer_kl_loss'."
            )
        config = self.config
        coef = WithOwnFields(config).indexer_kl_coef
        loss_of = IndexerLoss() if output_indexer_kl_loss or coef else None
        as_tuple = kwargs.pop("return_dict", None) is False
        out = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache,
            logits_to_keep=logits_to_keep, indexer_loss=loss_of, return_dict=True, **kwargs,
        )  # fmt: skip
        if loss_of is not None:
            self._report(out, loss_of, coef, kwargs.get("num_items_in_batch"))
        return out.to_tuple() if as_tuple else out

    @staticmethod
    def _report(out: Any, found: IndexerLoss, coef: float, num_items: int | torch.Tensor | None) -> None:
        assert found.kl_sum is not None and found.num_rows is not None
        rows = found.num_rows if num_items is None else torch.as_tensor(num_items)
        kl_loss = found.kl_sum / rows.to(found.kl_sum.device, found.kl_sum.dtype).clamp_min(1)
        out["indexer_kl_loss"] = kl_loss
        if out.loss is not None:
            out["lm_loss"] = out.loss
            out["loss"] = out.loss if coef == 0 else out.loss + coef * kl_loss.to(out.loss.device)

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor | None:
        """The 2-D mask as it is: transformers would make one of L×S elements of it for a static cache."""
        return attention_mask

    def _valid_auto_compile_criteria(self, *_: Any, **__: Any) -> bool:
        # The operators are opaque to torch.compile, and a row's bounds are read on the host.
        return False
