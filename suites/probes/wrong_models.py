"""Models with one fault each, and the probes that must see it.

Each is the reference or the optimized model with one instance spoilt, so that nobody else is changed. `WRONG` lists
them.

Letters: B batch, L rows, S key slots, K chosen keys, M hidden size, N tokens, W vocabulary.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

import optimized
import reference
from harness.subjects import ALL, Subject, load_weights
from reference import LatentCache
from reference.indexer import select_topk

OURS = {"reference": reference.DeepseekV32ForCausalLM, "optimized": optimized.DeepseekV32ForCausalLM}


@dataclass(frozen=True, slots=True)
class Wrong:
    """A spoilt model and the probes that must fail it."""

    subject: Subject
    seen_by: tuple[str, ...]


WRONG: dict[str, Wrong] = {}


def wrong(*seen_by: str, of: str = "reference", can: frozenset[str] = ALL, **fields: object) -> Callable[[Any], Any]:
    """Decorator: makes a function that spoils a model into a subject, with `fields` of its config changed."""

    def decorate(spoil: Callable[[Any], None]) -> Callable[[Any], None]:
        def factory(config, state_dict, *, device, dtype):
            changed = type(config)(**{**config.to_dict(), **fields})
            model = load_weights(OURS[of], changed, state_dict, device, dtype)
            spoil(model)
            return model

        WRONG[spoil.__name__] = Wrong(Subject(spoil.__name__, factory, can, spoil.__name__), seen_by)
        return spoil

    return decorate


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def routed(model: Any) -> list[Any]:
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def around(owner: Any, method: str, outer: Callable[..., Any]) -> None:
    """Replace a method of one instance by `outer(inner, *args)`."""
    inner = getattr(owner, method)
    setattr(owner, method, lambda *args, **kwargs: outer(inner, *args, **kwargs))


def selection(model: Any, choose: Callable[..., torch.Tensor]) -> None:
    """Replace the top-k of every layer of the reference by `choose(inner, scores, visible, layout)`."""
    for attention in attentions(model):
        around(attention, "choose", choose)


def attending(model: Any, attend: Callable[..., Any]) -> None:
    """Replace every layer's attention by `attend(inner, tensors, layout, ask, replayed)`."""
    for attention in attentions(model):
        around(attention, "attend", attend)


def every_key(layout: Any) -> torch.Tensor:
    """All visible keys of each row, in the reference's compact indices."""
    start, end = layout.bounds_BL2.split(1, -1)
    slots = torch.arange(layout.num_slots, device=start.device)
    seen = (slots >= start) & (slots < end)
    return (
        torch.where(seen, slots, layout.num_slots)
        .sort(-1)
        .values.masked_fill(~seen.sort(-1, descending=True).values, -1)
    )


def caching(model: Any, change: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    """What goes into the cache passes through `change(held slots, c_kv, k_pe, k_idx)`, and what comes out is that."""

    def project(inner, x, rotary, cache, ask, *, layer_idx):
        if cache is None:
            return inner(x, rotary, cache, ask)
        layer = cache.layers[layer_idx]
        held = SimpleNamespace(update=lambda *new: layer.update(*change(layer, *new)))
        return inner(x, rotary, SimpleNamespace(layers={layer_idx: held}), ask)

    for i, attention in enumerate(attentions(model)):
        around(attention, "project", functools.partial(project, layer_idx=i))


# Isolation.


@wrong("future_tokens", "prefixes")
def no_mask_up_to_index_topk(model):
    """Where every visible key is chosen anyway, the mask is left out, and the future is seen (B01)."""

    def choose(inner, scores, visible, layout):
        short = scores.shape[-1] <= model.config.index_topk
        return inner(scores, torch.ones_like(visible) if short else visible, layout)

    selection(model, choose)


@wrong("future_tokens")
def future_keys_may_be_chosen(model):
    selection(model, lambda inner, scores, visible, layout: inner(scores, visible | visible.mT, layout))


@wrong("future_tokens", of="optimized")
def norms_over_the_sequence(model):
    """Hidden states are divided by their size over all rows."""
    model.model.norm.register_forward_pre_hook(lambda _, args: args[0] / args[0].square().mean(1, keepdim=True).sqrt())


@wrong("other_documents", "packing_place")
def documents_are_not_kept_apart(model):
    def choose(inner, scores, visible, layout):
        return inner(scores, torch.ones_like(visible).tril() & layout.real_BS[:, None], layout)

    selection(model, choose)


@wrong("other_documents", of="optimized")
def documents_begin_one_key_early(model):
    def attend(inner, tensors, layout, *rest):
        bounds = layout.bounds_BL2.clone()
        bounds[..., 0] = (bounds[..., 0] - 1).clamp_min(0)
        return inner(tensors, replace(layout, bounds_BL2=bounds), *rest)

    attending(model, attend)


@wrong("padding_content", "padding_place", "decode_padded")
def mask_is_ignored(model):
    def forward(inner, *args, attention_mask=None, **kwargs):
        return inner(*args, **kwargs)

    around(model.model, "forward", forward)


@wrong("padding_poison")
def padding_enters_unmasked(model):
    """What stands in padding is multiplied by probabilities of 0: NaN stays NaN (E13)."""
    raw = {}

    def embed(inner, *args):
        raw["x"] = inner(*args)
        return raw["x"]

    around(model.model, "_embed", embed)
    model.model.layers[0].register_forward_pre_hook(lambda _, args: (raw["x"], *args[1:]))


# Place and company.


@wrong("padding_place", of="optimized")
def losses_are_means_of_the_rows_means(model):
    """Every batch row weighs the same, however long it is."""

    def forward(inner, **kwargs):
        out = inner(**kwargs)
        if kwargs.get("labels") is None or kwargs.get("attention_mask") is None or len(kwargs["labels"]) == 1:
            return out
        pick = ("input_ids", "attention_mask", "labels")
        rows = [inner(**{n: kwargs[n][b : b + 1] for n in pick}, use_cache=False) for b in range(len(kwargs["labels"]))]
        out.lm_loss = out.loss = torch.stack([row.lm_loss for row in rows]).mean()
        return out

    around(model, "forward", forward)


@wrong("padding_place", "kl_rows", of="optimized")
def pads_count_in_the_kl(model):
    """The sum of the real rows, divided by all rows."""

    def forward(inner, *args, **kwargs):
        out = inner(*args, **kwargs)
        mask = kwargs.get("attention_mask")
        if out.indexer_kl_loss is not None and mask is not None and kwargs.get("num_items_in_batch") is None:
            out.indexer_kl_loss = out.indexer_kl_loss * mask.sum() / mask.numel()
        return out

    around(model, "forward", forward)


@wrong("batch", of="optimized")
def first_batch_row_leaks(model):
    def forward(inner, x, *args, **kwargs):
        return inner(x + 1e-2 * x[:1].mean(1, keepdim=True), *args, **kwargs)

    around(model.model.layers[1], "forward", forward)


@wrong("batch", of="optimized")
def experts_have_a_capacity(model):
    """A token that comes too late to its expert is dropped."""

    def experts(inner, x_NM, experts_NT, weights_NT):
        capacity = max(len(x_NM) // 4, 1)
        for expert in range(model.config.n_routed_experts):
            chosen = (experts_NT == expert).flatten()
            late = chosen & (chosen.long().cumsum(0) > capacity)
            weights_NT = weights_NT.flatten().masked_fill(late, 0.0).view_as(weights_NT)
        return inner(x_NM, experts_NT, weights_NT)

    for moe in routed(model):
        around(moe.experts, "forward", experts)


@wrong("memory", "bitwise", of="optimized")
def state_is_kept_between_forwards(model):
    kept = []

    def head(_, args, out):
        found = out + 1e-3 * kept[-1] if kept else out
        kept.append(out.detach().mean())
        return found

    model.lm_head.register_forward_hook(head)


@wrong("memory", of="optimized")
def buffers_are_not_cleared(model):
    """The longest hidden states so far are a buffer, and short ones are its beginning: the mean runs over all of it."""
    buffer = {}

    def norm(_, args):
        x = args[0]
        if "x" not in buffer or buffer["x"].shape[1] < x.shape[1]:
            buffer["x"] = torch.zeros_like(x)
        wide = torch.cat((x, buffer["x"][: len(x), x.shape[1] :]), 1)
        buffer["x"] = wide.detach()
        return x + 1e-3 * wide[:, x.shape[1] :].sum(1, keepdim=True)

    model.model.norm.register_forward_pre_hook(norm)


@wrong("bitwise", of="optimized")
def noise_in_the_last_bit(model):
    calls = []

    def head(_, args, out):
        calls.append(0)
        return out * (1 + len(calls) * 2.0**-23)

    model.lm_head.register_forward_hook(head)


# Positions.


@wrong("shift", of="optimized")
def positions_are_added_to_the_states(model):
    def forward(inner, x, layout, *args, **kwargs):
        return inner(x * (1 + 1e-4 * layout.positions_BL[..., None]), layout, *args, **kwargs)

    around(model.model.layers[0], "forward", forward)


@wrong("shift", of="optimized")
def cos_and_sin_grow_with_the_position(model):
    """Angles that are not turned but scaled: fine at small positions, and of another length far off (E03)."""

    def table(inner, positions, dtype):
        return tuple(t * (1 + 1e-5 * positions[..., None]) for t in inner(positions, dtype))

    around(model.model.rotary_emb, "forward", table)


@wrong("order", of="optimized")
def indexer_without_rope(model):
    """Every invariance holds: only that positions must count is left (A07)."""
    for attention in attentions(model):
        attention.indexer.rotate = lambda x, cos, sin: x


@wrong("order", of="optimized", can=ALL - {"indexer-kl"})
def indexer_without_rope_and_without_a_loss(model):
    indexer_without_rope(model)


@wrong("order", "config", of="optimized")
def attention_without_rope(model):
    around(model.model.rotary_emb, "forward", lambda inner, *args: (inner(*args)[0] * 0 + 1, inner(*args)[1] * 0))


@wrong("order", of="optimized")
def indexer_rope_on_the_last_lanes(model):
    """Rope lanes come first in the indexer (A08)."""

    def turn(indexer):
        def outer(inner, x, cos, sin):
            rest, pe = x.split([indexer.head_dim - indexer.rope_dim, indexer.rope_dim], dim=-1)
            return torch.cat((rest, indexer.rotate(pe, cos, sin)), -1)

        return outer

    for attention in attentions(model):
        around(attention.indexer, "_turn", turn(attention.indexer))


# The cache.


@wrong("decode", "decode_packed")
def index_keys_written_one_slot_late(model):
    caching(model, lambda layer, c_kv, k_pe, k_idx: (c_kv, k_pe, k_idx.roll(1, 1)))


@wrong("decode")
def index_keys_are_not_cached(model):
    """What a chunk did not bring itself is scored as 0 (D16)."""

    def change(layer, c_kv, k_pe, k_idx):
        if layer.k_idx is not None:
            layer.k_idx = torch.zeros_like(layer.k_idx)
        return c_kv, k_pe, k_idx

    caching(model, change)


@wrong("decode")
def rope_keys_of_another_row(model):
    caching(model, lambda layer, c_kv, k_pe, k_idx: (c_kv, k_pe.roll(1, 0) if layer.k_pe is not None else k_pe, k_idx))


@wrong("decode")
def one_stale_slot(model):
    """Each later chunk overwrites the slot before it with its own first latent."""

    def change(layer, c_kv, k_pe, k_idx):
        if layer.c_kv is not None:
            layer.c_kv = torch.cat((layer.c_kv[:, :-1], c_kv[:, :1]), 1)
        return c_kv, k_pe, k_idx

    caching(model, change)


@wrong("decode")
def as_many_keys_as_new_tokens(model):
    """k is cut to the length of the chunk instead of that of the cache."""

    def choose(inner, scores, visible, layout):
        k = min(model.config.index_topk, scores.shape[1])
        return select_topk(scores, visible, k)

    selection(model, choose)


@wrong("decode")
def decode_attends_to_everything(model):
    """A chunk of one token is dense; it reports its indexer's choice nevertheless."""

    def attend(inner, tensors, layout, ask, replayed):
        return inner(tensors, layout, ask, every_key(layout) if layout.positions_BL.shape[1] == 1 else replayed)

    attending(model, attend)


@wrong("decode")
def decode_attends_to_everything_unless_it_replays(model):
    def attend(inner, tensors, layout, ask, replayed):
        single = layout.positions_BL.shape[1] == 1 and replayed is None
        return inner(tensors, layout, ask, every_key(layout) if single else replayed)

    attending(model, attend)


@wrong("decode", of="optimized")
def positions_restart_at_each_chunk(model):
    around(
        model.model.rotary_emb, "forward", lambda inner, positions, dtype: inner(positions - positions[:, :1], dtype)
    )


@wrong("decode_padded", of="optimized")
def positions_count_pads(model):
    """Fine on the left; a prompt padded on the right goes on at the wrong distance."""

    def forward(inner, *args, position_ids=None, attention_mask=None, past_key_values=None, **kwargs):
        if attention_mask is not None:
            length = kwargs["input_ids"].shape[1]
            position_ids = torch.arange(attention_mask.shape[1] - length, attention_mask.shape[1])[None]
        return inner(
            *args, position_ids=position_ids, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )

    around(model.model, "forward", forward)


@wrong("decode_packed", of="optimized")
def a_chunk_begins_a_document(model):
    """Documents are told apart within a chunk only, so that none goes on in the next."""

    def forward(inner, *args, past_key_values=None, **kwargs):
        if isinstance(past_key_values, LatentCache) and past_key_values.layout is not None:
            layout = past_key_values.layout
            past_key_values.layout = replace(layout, position_BS=layout.position_BS - 2)
        return inner(*args, past_key_values=past_key_values, **kwargs)

    around(model.model, "forward", forward)
