"""More models with one fault each, in choices, training and flags; with them `WRONG` is complete."""

from dataclasses import replace

import torch

from reference.indexer import select_topk

from .wrong_models import WRONG, around, attending, attentions, every_key, routed, selection, wrong

__all__ = ["WRONG"]


@wrong("tape")
def the_tape_is_reported_as_its_own_choice(model):
    def attend(inner, tensors, layout, ask, replayed):
        out, found = inner(tensors, layout, ask, replayed)
        found.topk_BLK = found.topk_BLK if replayed is None else replayed
        return out, found

    attending(model, attend)


@wrong("tape")
def attends_to_other_keys_than_it_reports(model):
    def attend(inner, tensors, layout, ask, replayed):
        recent = select_topk(torch.arange(layout.num_slots).expand(layout.visible_BLS().shape).float(),
                             layout.visible_BLS(), model.config.index_topk)  # fmt: skip
        return inner(tensors, layout, ask, recent if replayed is None else replayed)

    attending(model, attend)


@wrong("tape")
def the_tape_is_not_used(model):
    attending(model, lambda inner, tensors, layout, ask, replayed: inner(tensors, layout, ask, None))


@wrong("tape")
def the_tapes_experts_are_not_used(model):
    for moe in routed(model):
        around(moe, "forward", lambda inner, x, real, replayed=None: inner(x, real))


@wrong("nested")
def few_keys_are_the_most_recent(model):
    """Below nine keys by recency, above by score."""

    def choose(inner, scores, visible, layout):
        recent = torch.arange(scores.shape[-1]).expand_as(scores).to(scores)
        return inner(recent if model.config.index_topk < 9 else scores, visible, layout)

    selection(model, choose)


@wrong("nested", "lengths", "config")
def index_topk_of_another_model(model):
    """A default of 12 wins over the config (B16)."""
    selection(model, lambda inner, scores, visible, layout: select_topk(scores, visible, 12))


@wrong("lengths", "config")
def sparse_attention_is_dense(model):
    attending(model, lambda inner, t, layout, ask, replayed: inner(t, layout, ask, every_key(layout)))


@wrong("routed_weights", "config", of="optimized")
def routing_weights_are_not_normalised(model):
    for moe in routed(model):
        moe.gate.normalise = False


@wrong("choice_only", of="optimized")
def routing_weights_are_biased(model):
    """Weights from the scores that choose (E04); normalised, so that their sum is right."""

    def weights(gate):
        return lambda inner, scores, experts: inner(scores + gate.e_score_correction_bias.to(scores.dtype), experts)

    for moe in routed(model):
        around(moe.gate, "weights", weights(moe.gate))


@wrong("choice_only")
def index_scores_reach_attention(model):
    """The indexer's queries leak into those of attention."""

    def attend(inner, tensors, *rest):
        leak = 0.0 if tensors.index_w_BLJ is None else 1e-2 * tensors.index_w_BLJ.detach().mean(-1)[..., None, None]
        return inner(replace(tensors, q_nope_BLHN=tensors.q_nope_BLHN + leak), *rest)

    attending(model, attend)


@wrong("routed_weights", "config", of="optimized")
def routed_scaling_factor_is_not_read(model):
    for moe in routed(model):
        moe.gate.scale = 2.5


# Training.


def forwards(model):
    """Holds something while a forward runs, and nothing in a recomputation."""
    inside = []

    def forward(inner, *args, **kwargs):
        inside.append(True)
        try:
            return inner(*args, **kwargs)
        finally:
            inside.pop()

    around(model.model, "forward", forward)
    return inside


@wrong("checkpointing")
def recomputation_chooses_again_otherwise(model):
    """Within the forward the right keys, in the recomputation the most recent ones (C12)."""
    inside = forwards(model)

    def choose(inner, scores, visible, layout):
        recent = torch.arange(scores.shape[-1]).expand_as(scores).to(scores)
        return inner(scores if inside else recent, visible, layout)

    selection(model, choose)


@wrong("checkpointing")
def selection_on_a_carrier_that_outlives_the_forward(model):
    """The recomputation of one forward takes what the next one chose (C12)."""
    inside = forwards(model)

    def carried(attention):
        def choose(inner, scores, visible, layout):
            if inside:
                attention.kept = inner(scores, visible, layout)
            return attention.kept

        return choose

    for attention in attentions(model):
        around(attention, "choose", carried(attention))


@wrong("checkpointing", of="optimized")
def recomputation_is_another_function(model):
    """In the recomputation attention's output is a little larger: no shape tells."""
    inside = forwards(model)

    for attention in attentions(model):
        attention.o_proj.register_forward_hook(lambda _, args, out: out if inside else out * 1.01)


@wrong("derivatives")
def rope_keys_get_no_gradient(model):
    def attend(inner, tensors, *rest):
        return inner(replace(tensors, k_pe_BSR=tensors.k_pe_BSR.detach()), *rest)

    attending(model, attend)


@wrong("derivatives", of="optimized")
def kl_gradient_twice(model):
    def attend(inner, *args):
        out, found = inner(*args)
        if found.kl_sum is not None:
            found.kl_sum = 2 * found.kl_sum - found.kl_sum.detach()
        return out, found

    attending(model, attend)


@wrong("derivatives", of="optimized")
def gate_gets_no_gradient(model):
    for moe in routed(model):
        around(moe.gate, "weights", lambda inner, scores, experts: inner(scores.detach(), experts))


@wrong("micro_batches", of="optimized")
def kl_is_divided_by_its_own_rows(model):
    """num_items_in_batch counts for the LM loss alone (D01)."""

    def forward(inner, *args, num_items_in_batch=None, **kwargs):
        out = inner(*args, num_items_in_batch=num_items_in_batch, **kwargs)
        if num_items_in_batch is not None and out.indexer_kl_loss is not None:
            mask = kwargs.get("attention_mask")
            rows = kwargs["input_ids"].numel() if mask is None else mask.sum()
            out.indexer_kl_loss = out.indexer_kl_loss * num_items_in_batch / rows
        return out

    around(model, "forward", forward)


@wrong("layers", of="optimized")
def kl_is_averaged_over_layers(model):
    def attend(inner, *args):
        out, found = inner(*args)
        found.kl_sum = None if found.kl_sum is None else found.kl_sum / len(model.model.layers)
        return out, found

    attending(model, attend)


@wrong("kl_rows", of="optimized")
def kl_without_its_entropy(model):
    """Only Σ p·I − lse, of the wrong sign."""

    def attend(inner, *args):
        out, found = inner(*args)
        found.kl_sum = None if found.kl_sum is None else -found.kl_sum
        return out, found

    attending(model, attend)


# Flags.


@wrong("stages")
def asking_for_the_kl_makes_it_dense(model):
    """The flag of the warm-up is taken for its mode (B19)."""

    def attend(inner, tensors, layout, ask, replayed):
        return inner(tensors, layout, ask, every_key(layout) if ask.kl_loss else replayed)

    attending(model, attend)


@wrong("stages")
def evaluation_is_dense(model):
    def attend(inner, tensors, layout, ask, replayed):
        return inner(tensors, layout, ask, replayed if model.training else every_key(layout))

    attending(model, attend)


@wrong("stages", of="optimized")
def coefficient_is_not_read(model):
    def forward(inner, *args, **kwargs):
        out = inner(*args, **kwargs)
        out.loss = out.lm_loss
        return out

    around(model, "forward", forward)


@wrong("config", of="optimized", rms_norm_eps=1e-6)
def norm_eps_is_not_read(model):
    """rms_norm_eps is parsed and a default is used."""


@wrong("config", of="optimized")
def groups_are_not_read(model):
    """A single group, whatever the config says of n_group and topk_group."""
    for moe in routed(model):
        moe.gate.n_group = moe.gate.topk_group = 4
        moe.gate.topk_group = 2


@wrong("config", of="optimized", indexer_rope_interleaved=False)
def indexer_layout_is_not_read(model):
    """The flag of the other models is parsed and ignored (A06)."""


@wrong("config", of="optimized")
def no_yarn_factor_in_the_softmax_scale(model):
    config = model.config
    for attention in attentions(model):
        attention.scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5


@wrong("official_files")
def factor_folded_into_wk(model):
    """A trainer's own scale of the index keys goes into the files (D15)."""
    for attention in attentions(model):
        attention.indexer.wk.weight.data.mul_(1.5)
