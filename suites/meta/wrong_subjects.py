"""Subjects with one known bug each: what a harness worth its name must not let pass.

Each factory builds the reference's or the optimized model from the given weights and spoils that instance alone, so
that neither a class nor a module is changed for anybody else. `WRONG` lists them with the families that must see them.

Letters: B batch, L rows, S key slots, H heads, N tokens, X experts, G groups, J indexer heads.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

import optimized
import reference
from harness.subjects import ALL, load_weights
from reference.attention import Ask, attention_target, masked_attention
from reference.indexer import select_topk
from reference.losses import kl_rows
from reference.moe import RMSNorm
from reference.rope import rotate_half_split, rotate_interleaved, yarn_inv_freq

OURS = {"reference": reference.DeepseekV32ForCausalLM, "optimized": optimized.DeepseekV32ForCausalLM}


@dataclass(frozen=True, slots=True)
class Wrong:
    """A factory and the families of checks of which each must fail it."""

    factory: Callable[..., Any]
    seen_by: frozenset[str]


WRONG: dict[str, Wrong] = {}


def wrong(*seen_by: str, of: str = "reference", **fields: object) -> Callable[[Callable[[Any], None]], Any]:
    """Decorator: makes a function that spoils a model into a factory, with `fields` of its config changed."""

    def decorate(spoil: Callable[[Any], None]) -> Callable[..., Any]:
        def factory(config, state_dict, *, device, dtype):
            changed = type(config)(**{**config.to_dict(), **fields})
            model = load_weights(OURS[of], changed, state_dict, device, dtype)
            spoil(model)
            return model

        factory.capabilities = ALL
        factory.__name__, factory.__doc__ = spoil.__name__, spoil.__doc__
        WRONG[spoil.__name__] = Wrong(factory, frozenset(seen_by))
        return factory

    return decorate


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def routed(model: Any) -> list[Any]:
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def around(owner: Any, method: str, outer: Callable[..., Any]) -> None:
    """Replace a method of one instance by `outer(inner, *args)`."""
    inner = getattr(owner, method)
    setattr(owner, method, lambda *args, **kwargs: outer(inner, *args, **kwargs))


def projected(model: Any, change: Callable[..., dict[str, torch.Tensor]]) -> None:
    """Replace fields of what every attention projects by `change(tensors, cos, sin)`."""

    def project(inner, x, rotary, cache, ask):
        tensors = inner(x, rotary, cache, ask)
        return replace(tensors, **change(tensors, *rotary))

    for attention in attentions(model):
        around(attention, "project", project)


def index_inputs(model: Any, change: Callable[..., dict[str, torch.Tensor]]) -> None:
    """As `projected`, only where the indexer runs."""
    projected(model, lambda t, cos, sin: {} if t.index_q_BLJE is None else change(t, cos, sin))


def selection(model: Any, choose: Callable[..., torch.Tensor]) -> None:
    """Replace the top-k of every layer by `choose(inner, scores, visible, layout, k)`."""
    k = model.config.index_topk

    def chosen(inner, scores_BLS, visible_BLS, layout):
        return choose(inner, scores_BLS, visible_BLS, layout, k)

    for attention in attentions(model):
        around(attention, "choose", chosen)


def kl_by(model: Any, divergence: Callable[..., torch.Tensor]) -> None:
    """Replace each layer's KL by the sum of `divergence(attention, tensors, scores, target)` over rows."""

    def attend(attention):
        def outer(inner, tensors, layout, ask, replayed):
            if not ask.kl_loss:
                return inner(tensors, layout, ask, replayed)
            full = Ask(scores="candidates", kl_target=True, kl_loss=True, decisions=ask.decisions)
            out, found = inner(tensors, layout, full, replayed)
            found.kl_sum = divergence(attention, tensors, found.scores_BLS, found.kl_target_BLS).sum()
            return out, found

        return outer

    for attention in attentions(model):
        around(attention, "attend", attend(attention))


@wrong("choices", "kl", of="optimized", indexer_rope_interleaved=True)
def interleaved_indexer_rope(model):
    """The most frequent public bug: the indexer turns the pairs that MLA turns."""


@wrong("choices", "kl")
def interleaved_indexer_keys(model):
    """As before, for the keys alone."""

    def keys(indexer):
        def outer(inner, *args):
            right, indexer.rotate = indexer.rotate, rotate_interleaved
            try:
                return inner(*args)
            finally:
                indexer.rotate = right

        return outer

    for attention in attentions(model):
        around(attention.indexer, "keys", keys(attention.indexer))


@wrong("choices", "kl", of="optimized")
def no_indexer_rope(model):
    for attention in attentions(model):
        attention.indexer.rotate = lambda x, cos, sin: x


@wrong("choices", "kl", of="optimized")
def no_relu(model):
    """Twice the heads, the second half negated: w·ReLU(a) − w·ReLU(−a) = w·a."""

    def signed(t, cos, sin):
        return {
            "index_q_BLJE": torch.cat((t.index_q_BLJE, -t.index_q_BLJE), 2),
            "index_w_BLJ": torch.cat((t.index_w_BLJ, -t.index_w_BLJ), 2),
        }

    index_inputs(model, signed)


def _spoil_k_norm(model: Any, norm: Callable[..., torch.Tensor]) -> None:
    def keys(indexer):
        def outer(inner, x, cos, sin):
            return indexer._turn(norm(indexer, indexer.wk(x)), cos, sin)

        return outer

    for attention in attentions(model):
        around(attention.indexer, "keys", keys(attention.indexer))


@wrong("choices", "kl")
def rms_instead_of_layer_norm_on_keys(model):
    def norm(indexer, k):
        return F.rms_norm(k, (indexer.head_dim,), indexer.k_norm.weight, indexer.k_norm.eps) + indexer.k_norm.bias

    _spoil_k_norm(model, norm)


@wrong("kl", of="optimized")
def k_norm_eps_1e_3(model):
    for attention in attentions(model):
        attention.indexer.k_norm.eps = 1e-3


@wrong("kl", of="optimized")
def no_head_weight_scale(model):
    """Chooses the same keys: only the KL loss can see it."""
    factor = (model.config.index_n_heads * model.config.index_head_dim) ** 0.5
    index_inputs(model, lambda t, cos, sin: {"index_w_BLJ": t.index_w_BLJ * factor})


@wrong("kl")
def index_keys_through_bfloat16(model):
    """Rounding that a bf16 budget would hide, in an fp32 run."""
    index_inputs(model, lambda t, cos, sin: {"index_k_BSE": t.index_k_BSE.bfloat16().to(t.index_k_BSE.dtype)})


@wrong("choices", "kl")
def unnormalised_query_latent(model):
    """The indexer reads q_a_proj's output before its norm."""

    def indexer_of(attention):
        seen = {}
        attention.q_a_layernorm.register_forward_pre_hook(lambda _, args: seen.update(raw=args[0].detach()))
        return lambda inner, latent, cos, sin: inner(seen["raw"], cos, sin)

    for attention in attentions(model):
        around(attention.indexer, "queries", indexer_of(attention))


@wrong("choices")
def one_key_less(model):
    def choose(inner, scores, visible, layout, k):
        slots = select_topk(scores, visible, k - 1)
        assert not layout.padded
        return F.pad(slots, (0, 1), value=-1)

    selection(model, choose)


@wrong("choices")
def most_recent_keys(model):
    selection(
        model,
        lambda inner, scores, visible, layout, k: inner(
            torch.arange(scores.shape[-1], device=scores.device).expand_as(scores).to(scores), visible, layout
        ),
    )


@wrong("choices")
def smallest_scores(model):
    selection(model, lambda inner, scores, visible, layout, k: inner(-scores, visible, layout))


@wrong("choices")
def future_keys_may_be_chosen(model):
    selection(model, lambda inner, scores, visible, layout, k: inner(scores, visible | visible.mT, layout))


@wrong("choices")
def keys_of_other_documents(model):
    """Seen by the packed case alone: causal, but over everything before."""
    selection(model, lambda inner, scores, visible, layout, k: inner(scores, torch.ones_like(visible).tril(), layout))


@wrong("choices")
def highest_index_first_among_equals(model):
    """Scores rounded to tenths of their spread: near ties are broken by position, far beyond any margin."""
    selection(
        model, lambda inner, scores, visible, layout, k: inner((scores * 10 / scores.std()).round(), visible, layout)
    )


@wrong("kl")
def copies_the_tape_over_a_wrong_indexer(model):
    """What it was told to choose it reports as its own choice; the KL loss still reads its scores."""

    def attend(inner, tensors, layout, ask, replayed):
        out, found = inner(tensors, layout, ask, replayed)
        if replayed is not None:
            found.topk_BLK = replayed
        return out, found

    for attention in attentions(model):
        around(attention, "attend", attend)
        attention.indexer.rotate = rotate_interleaved


@wrong("parity", "kl", of="optimized")
def no_yarn_factor_in_the_softmax_scale(model):
    config = model.config
    for attention in attentions(model):
        attention.scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5


@wrong("parity", "kl", of="optimized")
def half_split_rope_in_mla(model):
    def turned(t, cos, sin):
        def other(x, *angles):
            return rotate_half_split(rotate_interleaved(x, angles[0], -angles[1]), *angles)

        return {
            "q_pe_BLHR": other(t.q_pe_BLHR, cos[..., None, :], sin[..., None, :]),
            "k_pe_BSR": other(t.k_pe_BSR, cos, sin),
        }

    projected(model, turned)


@wrong("parity", "kl", of="optimized")
def rope_without_yarn(model):
    plain = {"rope_type": "default", "rope_theta": model.config.rope_parameters["rope_theta"]}

    def forward(positions, dtype):
        angles = positions[..., None].float() * yarn_inv_freq(plain, model.config.qk_rope_head_dim)
        return angles.to(dtype).cos(), angles.to(dtype).sin()

    model.model.rotary_emb.forward = forward


@wrong("parity")
def attends_to_every_key(model):
    """Dense attention where the config asks for the selected keys."""

    def attend(inner, tensors, layout, ask, replayed):
        every = torch.arange(layout.num_slots, device=layout.bounds_BL2.device)
        start, end = layout.bounds_BL2.split(1, -1)
        every = torch.where((every >= start) & (every < end), every, -1).to(torch.int32)
        return inner(tensors, layout, ask, None if replayed is None else every)

    for attention in attentions(model):
        around(attention, "attend", attend)


@wrong("parity", of="optimized")
def rope_keys_get_no_gradient(model):
    projected(model, lambda t, cos, sin: {"k_pe_BSR": t.k_pe_BSR.detach()})


@wrong("parity")
def router_weights_from_biased_scores(model):
    def weights(gate):
        return lambda inner, scores, experts: inner(scores + gate.e_score_correction_bias.to(scores.dtype), experts)

    for moe in routed(model):
        around(moe.gate, "weights", weights(moe.gate))


@wrong("choices")
def dropped_groups_masked_with_zero(model):
    def choose(gate):
        def outer(inner, scores_NX):
            biased = (scores_NX + gate.e_score_correction_bias.to(scores_NX.dtype)).detach()
            groups = biased.unflatten(-1, (gate.n_group, -1))
            best = groups.topk(2, -1).values.sum(-1).topk(gate.topk_group, -1).indices
            kept = torch.zeros(groups.shape[:2], dtype=torch.bool, device=biased.device).scatter_(1, best, True)
            masked = groups.masked_fill(~kept[..., None], 0.0).flatten(1)
            return masked.topk(gate.top_k, -1).indices.sort(-1).values.to(torch.int32)

        return outer

    for moe in routed(model):
        around(moe.gate, "choose", choose(moe.gate))


@wrong("parity")
def no_routed_scaling_factor(model):
    for moe in routed(model):
        moe.gate.scale = 1.0


@wrong("parity", of="optimized")
def routing_weights_not_normalised(model):
    for moe in routed(model):
        moe.gate.normalise = False


@wrong("parity", of="optimized")
def no_shared_expert(model):
    for moe in routed(model):
        moe.shared_experts.forward = torch.zeros_like


@wrong("kl")
def reversed_kl(model):
    def divergence(attention, tensors, scores, target):
        inside = scores.isfinite()
        # A large negative number instead of −inf: its gradient is 0 and not NaN.
        logq = scores.masked_fill(~inside, -1e4).log_softmax(-1)
        term = logq.exp() * (logq - target.detach().clamp_min(1e-12).log())
        return term.masked_fill(~inside, 0.0)

    kl_by(model, divergence)


def _target_of(attention: Any, t: Any, scores: torch.Tensor, heads: slice) -> torch.Tensor:
    """Probabilities of `heads`, with gradient."""
    k_nope, v = attention.keys_and_values(t.c_kv_BSC)
    return masked_attention(
        t.q_nope_BLHN[:, :, heads], t.q_pe_BLHR[:, :, heads], k_nope[:, :, heads], v[:, :, heads], t.k_pe_BSR,
        attention.scale, scores.isfinite(),
    )[1]  # fmt: skip


@wrong("kl")
def kl_target_of_one_head(model):
    kl_by(
        model,
        lambda attention, t, scores, target: kl_rows(
            scores, attention_target(_target_of(attention, t, scores, slice(0, 1)))
        ),
    )


@wrong("kl", "gradients")
def kl_target_not_detached(model):
    def divergence(attention, t, scores, target):
        p = _target_of(attention, t, scores, slice(None)).mean(1)
        shown = scores.masked_fill(~scores.isfinite(), 0.0)
        return p.clamp_min(1e-30).log().mul(p).sum(-1) - (p * shown).sum(-1) + scores.logsumexp(-1)

    kl_by(model, divergence)


@wrong("kl", "gradients", of="optimized", detach_indexer_input=False)
def indexer_input_not_detached(model):
    """The KL loss trains the backbone."""


@wrong("kl", of="optimized")
def kl_averaged_over_layers(model):
    for attention in attentions(model):

        def attend(inner, *args):
            out, found = inner(*args)
            found.kl_sum = None if found.kl_sum is None else found.kl_sum / len(model.model.layers)
            return out, found

        around(attention, "attend", attend)


@wrong("parity", "gradients")
def lm_loss_trains_the_indexer(model):
    """Same numbers everywhere, but the attention's output depends on the indexer for autograd."""

    def attend(inner, tensors, layout, ask, replayed):
        out, found = inner(tensors, layout, ask, replayed)
        if tensors.index_w_BLJ is not None:
            leak = tensors.index_w_BLJ.sum() + tensors.index_q_BLJE.sum() + tensors.index_k_BSE.sum()
            out = out + 1e-3 * (leak - leak.detach())
        return out, found

    for attention in attentions(model):
        around(attention, "attend", attend)


@wrong("parity", of="optimized")
def norm_eps_1e_3(model):
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = 1e-3


@wrong("parity")
def logits_4_percent_too_large(model):
    model.lm_head.register_forward_hook(lambda _, args, out: out * 1.04)


@wrong("parity", of="optimized")
def one_dead_channel(model):
    """Channel 5 of the attention's output in the middle layer."""
    alive = torch.ones(model.config.hidden_size)
    alive[5] = 0
    attentions(model)[1].o_proj.register_forward_hook(lambda _, args, out: out * alive.to(out))


@wrong("parity")
def one_wrong_row(model):
    """The last token reads its neighbour's hidden state."""
    model.lm_head.register_forward_pre_hook(lambda _, args: torch.cat((args[0][:, :-1], args[0][:, -2:-1]), 1))


@wrong("parity")
def zero_output(model):
    model.lm_head.register_forward_hook(lambda _, args, out: out * 0)


@wrong("finite")
def one_not_a_number(model):
    spot = torch.zeros(model.config.vocab_size)
    spot[7] = torch.nan
    model.lm_head.register_forward_hook(lambda _, args, out: out + spot.to(out))


@wrong("parity")
def labels_shifted_by_two(model):
    def forward(inner, *args, labels=None, **kwargs):
        late = None if labels is None else F.pad(labels[:, 1:], (0, 1), value=-100)
        return inner(*args, labels=late, **kwargs)

    around(model, "forward", forward)


@wrong("parity")
def stale_weights(model):
    """The last layer's down projections never took the checkpoint's values."""
    stale = copy.deepcopy(model.model.layers[-1].mlp.experts.down_proj).data.flip(0)
    model.model.layers[-1].mlp.experts.down_proj.data.copy_(stale)
