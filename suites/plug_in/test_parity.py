"""Where transformers' own model is right, the one that is plugged in is the same, up to rounding; else it is right.

The yardstick is transformers' own: how far its sdpa and eager attention lie apart on the same input.

Letters: B batch, L tokens.
"""

import copy
import functools

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, StaticCache

from harness.cases import build_case
from suites.plug_in.pairs import FAMILIES, built, config_of, reference_config
from suites.plug_in.yardstick import assert_near, upstream

L = 60
families = pytest.mark.parametrize("family", list(FAMILIES))
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*:FutureWarning")


@functools.cache
def model(family, kind):
    """transformers' own under "sdpa" or "eager", or the one that is "plugged"."""
    return built(family, plugged=True) if kind == "plugged" else upstream(family, kind)


def case_of(family, name="text", length=L):
    return build_case(name, reference_config(family), seed=5, length=length)


def run(of, case, **asked):
    """Logits and gradients of the LM loss."""
    of.zero_grad()
    out = of(**case.inputs(), labels=case.labels, **asked)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in of.named_parameters() if p.grad is not None}


@functools.cache
def two_right_logits(family, name="text"):
    """transformers' own logits of a case without a cache, by each of its attentions."""
    case = case_of(family, name)
    with torch.no_grad():
        return tuple(model(family, kind)(**case.inputs()).logits for kind in ("eager", "sdpa"))


@families
@pytest.mark.parametrize("name", ["text", "left-padded", "right-padded", "packed"])
def test_logits_and_gradients_are_those_of_transformers(family, name):
    case = case_of(family, name)
    logits, gradients = run(model(family, "sdpa"), case)
    # Eager adds finfo.min to masked logits; its pad rows hold other junk.
    of_eager, gradients_of_eager = run(model(family, "eager"), case)
    ours, our_gradients = run(model(family, "plugged"), case)
    real = case.real_BL
    assert_near(ours[real], logits[real], (of_eager[real], logits[real]))
    assert our_gradients.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        assert_near(our_gradients[parameter], gradient, (gradients_of_eager[parameter], gradient), name=parameter)


@families
@pytest.mark.parametrize("asked", [{}, {"output_indexer_kl_loss": True}], ids=["plain", "with the KL"])
def test_hidden_states_and_router_logits_are_handed_out(family, asked):
    case = case_of(family)
    wanted = {"output_hidden_states": True, "output_router_logits": True}
    with torch.no_grad():
        eager, sdpa = (model(family, kind)(**case.inputs(), **wanted) for kind in ("eager", "sdpa"))
        ours = model(family, "plugged")(**case.inputs(), **wanted, **asked)
    # In 5.17 a causal LM has no field for its routers.
    handed_out = [field for field in ("hidden_states", "router_logits") if field in sdpa]
    assert "hidden_states" in handed_out
    for field in handed_out:
        for actual, other, expected in zip(ours[field], eager[field], sdpa[field], strict=True):
            assert_near(actual, expected, (other, expected), name=field)


@families
def test_short_rows_select_every_key(family):
    case = case_of(family, length=12)
    assert config_of(family).index_topk > 12
    with torch.no_grad():
        expected, eager, ours = (model(family, kind)(**case.inputs()).logits for kind in ("sdpa", "eager", "plugged"))
    assert_near(ours, expected, (eager, expected))


@families
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_same_bits(family, reentrant):
    case = case_of(family, "left-padded")
    plain = built(family, plugged=True).train()
    recomputed = built(family, plugged=True).train()
    recomputed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = []
    for of in (plain, recomputed):
        of.model.embed_tokens.requires_grad_(True)
        out = of(**case.inputs(), labels=case.labels, output_indexer_kl_loss=True)
        (out.lm_loss + out.indexer_kl_loss).backward()
        found.append({n: p.grad for n, p in of.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


@families
@pytest.mark.parametrize(
    "asked", [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}],
    ids=["dynamic", "static", "beams", "uncached"],
)  # fmt: skip
def test_generate_writes_the_same_tokens(family, asked):
    ids = case_of(family, length=30).input_ids
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    made = [
        model(family, kind).generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **asked)
        for kind in ("sdpa", "plugged")
    ]
    assert torch.equal(*made)
    assert made[0].shape[1] > 30


@families
@pytest.mark.parametrize("static", [False, True])
def test_chunks_through_a_cache_are_the_uncached_forward(family, static):
    of, case = model(family, "plugged"), case_of(family)
    cache = StaticCache(of.config, max_cache_len=L + 13) if static else DynamicCache(config=of.config)
    parts, start = [], 0
    with torch.no_grad():
        whole = of(case.input_ids, use_cache=False).logits
        for size in (25, 1, 1, L - 27):
            parts.append(of(case.input_ids[:, start : start + size], past_key_values=cache).logits)
            start += size
        # Without what the cache holds, the last chunk is another text.
        forgotten = torch.cat([*parts[:-1], of(case.input_ids[:, 27:], use_cache=False).logits], 1)
    assert_near(torch.cat(parts, 1), whole, two_right_logits(family), {"an empty cache": forgotten})


@families
def test_packed_rows_are_kept_apart_however_they_are_asked(family):
    """transformers' own reads them as one document as soon as there is a cache or a mask (docs/findings-transformers.md 1)."""
    of, case = model(family, "plugged"), case_of(family, "packed")
    cuts = [int(i) for i in (case.position_ids[0] == 0).nonzero()] + [L]
    edges = torch.tensor(cuts, dtype=torch.int32)
    eager, right = two_right_logits(family, "packed")
    with torch.no_grad():
        together = of(case.input_ids).logits
        for asked in (
            {"position_ids": case.position_ids},
            {"position_ids": case.position_ids, "attention_mask": torch.ones_like(case.input_ids), "use_cache": False},
        ):
            assert_near(of(case.input_ids, **asked).logits, right, (eager, right), {"one document": together})
        first = of(case.input_ids[:1], cu_seq_lens_q=edges, use_cache=False).logits
        assert_near(first, right[:1], (eager[:1], right[:1]), {"one document": together[:1]})


@families
def test_nan_in_padding_reaches_no_real_row(family):
    of, case = model(family, "plugged"), case_of(family, "left-padded")
    embedded = of.model.embed_tokens(case.input_ids).detach()
    with torch.no_grad():
        clean = of(inputs_embeds=embedded, attention_mask=case.attention_mask).logits[case.real_BL]
        embedded[~case.real_BL] = torch.nan
        assert torch.equal(of(inputs_embeds=embedded, attention_mask=case.attention_mask).logits[case.real_BL], clean)


def test_the_cache_follows_beams_crops_and_repeats():
    of, case = model("deepseek", "plugged"), case_of("deepseek")
    ids = case.input_ids
    with torch.no_grad():
        whole, two = of(ids, use_cache=False).logits, two_right_logits("deepseek")
        cache = DynamicCache(config=of.config)
        of(ids[:, :40], past_key_values=cache)
        uncropped = of(ids[:, 30:50], past_key_values=copy.deepcopy(cache)).logits
        cache.crop(-10)
        cropped = of(ids[:, 30:50], past_key_values=cache).logits
        assert_near(cropped, whole[:, 30:50], tuple(x[:, 30:50] for x in two), {"not cropped": uncropped})
        cache.batch_repeat_interleave(2)
        twice = ids.repeat_interleave(2, 0)
        last, forgotten = of(twice[:, 50:], past_key_values=cache).logits, of(twice[:, 50:], use_cache=False).logits
        expected, *two = (x[:, 50:].repeat_interleave(2, 0) for x in (whole, *two))
        assert_near(last, expected, tuple(two), {"an empty cache": forgotten})
        packed = DynamicCache(config=of.config)
        of(ids[:, :40], position_ids=case_of("deepseek", "packed").position_ids[:, :40], past_key_values=packed)
        packed.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match="holds packed documents in 2 rows"):
            of(ids[:, 40:].repeat_interleave(2, 0), past_key_values=packed)


def test_what_the_operators_cannot_honour_is_refused():
    of, ids = built("deepseek", plugged=True), case_of("deepseek").input_ids

    def refused(sentence, call=of, **asked):
        with pytest.raises(ValueError, match=sentence):
            call(ids, **asked)

    refused("4-D masks", attention_mask=torch.ones(2, 1, L, L, dtype=torch.bool))
    refused("values other than 0 and 1", attention_mask=torch.full_like(ids, 2))
    refused("output_attentions is True", output_attentions=True)
    refused("asked for, by output_indexer_kl_loss", call=of.model, output_indexer_kl_loss=True)
    for field, value, sentence in (
        ("use_sparse_attention", "yes", "use_sparse_attention is 'yes'"), ("indexer_kl_coef", -1, "indexer_kl_coef is -1"),
        ("indexer_precision", "fp8", "indexer_precision is 'fp8'"), ("attention_dropout", 0.1, "attention_dropout is 0.1"),
    ):  # fmt: skip
        before = getattr(of.config, field, None)
        setattr(of.config, field, value)
        refused(sentence)
        delattr(of.config, field) if before is None else setattr(of.config, field, before)
    AttentionInterface.register("mine", lambda *_, **__: None)
    of.config._attn_implementation_internal = "mine"
    refused("attn_implementation is 'mine'")


def test_training_on_a_filled_cache_under_checkpointing_is_refused():
    of, ids = built("deepseek", plugged=True), case_of("deepseek").input_ids
    cache = DynamicCache(config=of.config)
    of(ids[:, :30], past_key_values=cache)
    of.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing drops caches"):
        of(ids[:, 30:], past_key_values=cache)
