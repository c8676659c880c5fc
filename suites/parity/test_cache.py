"""The cache: one prefill, chunks of any size and token-by-token decode are the same computation.

Prompts are longer than index_topk (16), so that cached keys must be selected among. Padded and packed rows
are compared with each document alone, uncached.
"""

import functools

import pytest
import torch
from transformers import DynamicCache

from reference import Decisions, DeepseekV32ForCausalLM, LatentCache, LayerDecisions
from reference.fp8 import fp8_round_trip
from suites.support import assert_same, both_models, both_modes, build, in_chunks, text, tiny

pytestmark = pytest.mark.usefixtures("no_grad")
L = 40


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@both_models
@both_modes
@pytest.mark.parametrize(
    "sizes",
    [[L], [1] * L, [16, 24], [17, 1, 1, 21], [5, 13, 2, 20], [39, 1]],
    ids=["whole", "token by token", "up to k", "past k", "odd", "last token"],
)
def test_chunks_of_any_size_equal_one_forward(model_class, sparse, sizes):
    model = build(model_class, use_sparse_attention=sparse)
    ids = text(L, batch=2)
    logits, cache, _ = in_chunks(model, ids, sizes)
    assert_same(logits, model(ids, use_cache=False).logits)
    assert cache.get_seq_length() == L


@both_models
@pytest.mark.parametrize("flag", [{"indexer_precision": "fp8"}, {"kv_latent_precision": "fp8"}], ids=str)
def test_chunks_equal_one_forward_when_keys_pass_through_fp8(model_class, flag):
    model = build(model_class, **flag)
    ids = text(L)
    assert_same(in_chunks(model, ids, [17, *[1] * 23])[0], model(ids, use_cache=False).logits)


@both_models
def test_kl_of_chunks_adds_up_to_that_of_one_forward(model_class):
    model = build(model_class)
    ids, cache, total = text(L), LatentCache(model.config), 0.0
    for part in ids.split(13, 1):
        out = model(part, past_key_values=cache, output_indexer_kl_loss=True)
        total = total + out.indexer_kl_loss * part.shape[1]
    assert_same(total / L, model(ids, output_indexer_kl_loss=True).indexer_kl_loss)


@both_models
@both_modes
def test_left_padded_rows_of_unequal_length_decode_as_alone(model_class, sparse):
    model = build(model_class, use_sparse_attention=sparse)
    short, full = text(27, 1), text(L, 2)
    ids = torch.stack((torch.cat((torch.full((13,), 258), short[0])), full[0]))
    mask = (torch.arange(L) >= torch.tensor([[13], [0]])).long()
    logits, _, _ = in_chunks(model, ids, [30, *[1] * 10], attention_mask=mask)
    assert_same(logits[0, 13:], model(short).logits[0])
    assert_same(logits[1], model(full).logits[0])


@both_models
def test_a_chunk_of_padding_alone_changes_nothing(model_class):
    model = build(model_class)
    short = text(27, 1)
    ids = torch.cat((torch.full((1, 13), 258), short), 1)
    mask = (torch.arange(L) >= 13).long()[None]
    logits, _, _ = in_chunks(model, ids, [6, 6, 14, 14], attention_mask=mask)
    assert_same(logits[:, 13:], model(short).logits)


@both_models
@both_modes
def test_a_right_padded_prompt_decodes_as_if_it_had_no_pads(model_class, sparse):
    model = build(model_class, use_sparse_attention=sparse)
    short, full = text(31, 1), text(L, 2)
    # Prompts of 21 and 30 tokens in 30 slots, then 10 tokens of each, one by one.
    ids = torch.stack((torch.cat((short[0, :21], torch.full((9,), 258), short[0, 21:])), full[0]))
    mask = torch.ones(2, L, dtype=torch.long)
    mask[0, 21:30] = 0
    logits, _, _ = in_chunks(model, ids, [30, *[1] * 10], attention_mask=mask)
    assert_same(logits[0, mask[0].bool()], model(short).logits[0])
    assert_same(logits[1], model(full).logits[0])


PACKED = (7, 30, 21)


@both_models
@both_modes
@pytest.mark.parametrize(
    "sizes", [[20, 38], [7, 30, 21], [36, 2, 20], [3, *[1] * 55]], ids=["inside", "at ends", "odd", "one"]
)
def test_packed_documents_stay_apart_in_a_cache(model_class, sparse, sizes):
    model = build(model_class, use_sparse_attention=sparse)
    documents = [text(n, seed) for seed, n in enumerate(PACKED)]
    positions = torch.cat([torch.arange(n) for n in PACKED])[None]
    logits, _, _ = in_chunks(model, torch.cat(documents, 1), sizes, position_ids=positions)
    expected = torch.cat([model(ids).logits for ids in documents], 1)
    assert_same(logits, expected)


@both_models
def test_decode_after_packing_by_cu_seq_lens_continues_the_last_document(model_class):
    model = build(model_class)
    documents = [text(n, seed) for seed, n in enumerate(PACKED)]
    cache = LatentCache(model.config)
    edges = torch.tensor([0, 7, 37, 50])
    model(torch.cat(documents, 1)[:, :50], cu_seq_lens_q=edges, past_key_values=cache)
    logits, _, _ = in_chunks(model, documents[2][:, 13:], [1] * 8, cache=cache)
    assert_same(logits, model(documents[2]).logits[:, 13:])


@both_models
def test_positions_continue_after_the_cache_by_themselves(model_class):
    model = build(model_class)
    ids, positions = text(L), torch.arange(5000, 5000 + L)[None]
    cache = LatentCache(model.config)
    model(ids[:, :30], position_ids=positions[:, :30], past_key_values=cache)
    logits = model(ids[:, 30:], past_key_values=cache).logits
    assert_same(logits, model(ids, position_ids=positions).logits[:, 30:])


@both_models
@both_modes
def test_the_cache_holds_three_vectors_a_token_and_layer(model_class, sparse):
    model = build(model_class, use_sparse_attention=sparse)
    _, cache, _ = in_chunks(model, text(L, batch=2), [30, 10])
    shapes = [{name: tuple(getattr(layer, name).shape) for name in layer.fields} for layer in cache.layers]
    assert shapes == [{"c_kv": (2, L, 32), "k_pe": (2, L, 16), "k_idx": (2, L, 32)}] * 3


@both_models
def test_the_cache_holds_the_latent_after_its_norm(model_class):
    model = build(model_class)
    seen = []
    model.model.layers[1].self_attn.kv_a_layernorm.register_forward_hook(lambda *call: seen.append(call[2]))
    cache = model(text(L), use_cache=True).past_key_values
    assert torch.equal(cache.layers[1].c_kv, seen[0])


@both_models
def test_the_cache_holds_rope_keys_turned_in_interleaved_pairs(model_class):
    model = build(model_class)
    seen = []
    attention = model.model.layers[1].self_attn
    attention.kv_a_proj_with_mqa.register_forward_hook(lambda *call: seen.append(call[2]))
    cache = model(text(L), use_cache=True).past_key_values
    pairs = torch.view_as_complex(seen[0][..., 32:].unflatten(-1, (-1, 2)).contiguous())
    angles = (torch.arange(L)[:, None].float() * model.model.rotary_emb.inv_freq).double()
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    assert_same(cache.layers[1].k_pe, turned)


@both_models
def test_the_cache_holds_indexer_keys_before_the_hadamard_rotation_and_fp8(model_class):
    native, fp8 = (build(model_class, indexer_precision=p)(text(L), use_cache=True) for p in ("native", "fp8"))
    # Layer 0 reads the embedding, which no selection has touched yet.
    assert torch.equal(native.past_key_values.layers[0].k_idx, fp8.past_key_values.layers[0].k_idx)
    assert not torch.equal(native.logits, fp8.logits)


@both_models
def test_the_cache_holds_the_latent_as_fp8_reads_it_back(model_class):
    cache = build(model_class, kv_latent_precision="fp8")(text(L), use_cache=True).past_key_values
    held = cache.layers[0].c_kv
    assert torch.equal(fp8_round_trip(held), held)


@both_models
def test_indexer_keys_written_in_dense_mode_serve_sparse_decode(model_class):
    ids = text(L)
    expected = build(model_class)(ids, use_cache=False).logits
    model = build(model_class, use_sparse_attention=False)
    # Up to index_topk tokens dense attention is the sparse one, so that both prefills leave the same states.
    cache = LatentCache(model.config)
    model(ids[:, :16], past_key_values=cache)
    model.config.use_sparse_attention = True
    logits, _, _ = in_chunks(model, ids[:, 16:], [1] * 24, cache=cache)
    assert_same(logits, expected[:, 16:])


@both_models
def test_use_cache_decides_whether_a_cache_comes_back(model_class):
    model = build(model_class)
    assert model(text(5), use_cache=False).past_key_values is None
    assert isinstance(model(text(5), use_cache=True).past_key_values, LatentCache)
    assert model.train()(text(5)).past_key_values is None


@both_models
@pytest.mark.parametrize("drop", [1, 17, -17])
def test_a_cropped_cache_continues_as_a_shorter_one(model_class, drop):
    model = build(model_class)
    ids = text(L)
    _, cache, _ = in_chunks(model, ids, [L])
    cache.crop(drop)
    keep = L - abs(drop)
    assert cache.get_seq_length() == keep
    logits, _, _ = in_chunks(model, ids[:, keep:], [abs(drop)], cache=cache)
    assert_same(logits, model(ids).logits[:, keep:])


@both_models
def test_cropping_a_padded_cache_keeps_its_layout(model_class):
    model = build(model_class)
    short = text(31, 1)
    ids = torch.cat((short[:, :21], torch.full((1, 9), 258), short[:, 21:]), 1)
    mask = torch.ones(1, L, dtype=torch.long)
    mask[0, 21:30] = 0
    _, cache, _ = in_chunks(model, ids, [30, 10], attention_mask=mask)
    cache.crop(14)
    logits = model(short[:, 21:], past_key_values=cache, attention_mask=torch.cat((mask[:, :26], mask[:, 30:]), 1))
    assert_same(logits.logits, model(short).logits[:, 21:])


@both_models
def test_rows_of_a_cache_can_be_reordered_repeated_and_selected(model_class):
    model = build(model_class)
    short, full = text(27, 1), text(L, 2)
    ids = torch.stack((torch.cat((torch.full((13,), 258), short[0])), full[0]))
    mask = (torch.arange(L) >= torch.tensor([[13], [0]])).long()
    _, cache, _ = in_chunks(model, ids[:, :30], [30], attention_mask=mask[:, :30])
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([2, 0, 3, 1]))
    cache.batch_select_indices(torch.tensor([0, 1, 2]))
    rows = [1, 0, 1]
    logits, _, _ = in_chunks(model, ids[rows, 30:], [10], attention_mask=mask[rows], cache=cache)
    expected = [model(full).logits[0, 30:], model(short).logits[0, 17:]]
    assert_same(logits, torch.stack((expected[0], expected[1], expected[0])))


def test_a_reset_cache_is_empty_and_starts_anew():
    model = build(DeepseekV32ForCausalLM)
    _, cache, _ = in_chunks(model, text(L, 1), [L])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_same(in_chunks(model, text(L, 2), [L], cache=cache)[0], model(text(L, 2)).logits, 0)


def test_a_cache_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"past_key_values is a DynamicCache; .* pass a LatentCache\(config\)"):
        build(DeepseekV32ForCausalLM)(text(5), past_key_values=DynamicCache())


@both_models
def test_a_cache_of_another_batch_size_is_refused(model_class):
    model = build(model_class)
    _, cache, _ = in_chunks(model, text(5, batch=2), [5])
    with pytest.raises(ValueError, match="past_key_values"):
        model(text(5), past_key_values=cache)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 2}, {"num_hidden_layers": 4}, {"kv_lora_rank": 16}], ids=str)
def test_a_cache_of_another_model_is_refused(change):
    model = build(DeepseekV32ForCausalLM)
    cache = LatentCache(tiny(**change))
    in_chunks(build(DeepseekV32ForCausalLM, **change), text(5), [5], cache=cache)
    with pytest.raises(ValueError, match="past_key_values"):
        model(text(5), past_key_values=cache)


@both_models
def test_a_refused_forward_leaves_the_cache_as_it_was(model_class):
    model = build(model_class)
    ids = text(L)
    _, cache, _ = in_chunks(model, ids[:, :30], [30])
    tape = model(ids, output_decisions=True).decisions.rows(30, L)
    # Layers 0 and 1 can replay it, layer 2 cannot.
    bad = Decisions((*tape.layers[:2], LayerDecisions(tape[2].topk_indices, tape[2].expert_indices + 8)))
    with pytest.raises(ValueError, match="decisions, layer 2: expert_indices"):
        model(ids[:, 30:], past_key_values=cache, decisions=bad)
    assert [cache.get_seq_length(i) for i in range(3)] == [30, 30, 30]
    assert_same(in_chunks(model, ids[:, 30:], [10], cache=cache)[0], model(ids).logits[:, 30:])


@both_models
def test_logits_to_keep_takes_the_last_rows_or_those_named(model_class):
    model = build(model_class)
    ids = text(L, batch=2)
    full = model(ids).logits
    assert_same(model(ids, logits_to_keep=1).logits, full[:, -1:])
    assert_same(model(ids, logits_to_keep=torch.tensor([3, 17])).logits, full[:, [3, 17]])
    assert_same(model(ids, logits_to_keep=0).logits, full)


def generator(model_class, **settings):
    """A model that generates until it is told to stop: no token ends a text."""
    model = build(model_class)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 258
    return model, functools.partial(model.generate, do_sample=False, max_new_tokens=8, **settings)


def greedy(model, ids, steps=8):
    """The oracle: argmax of a whole forward, without a cache."""
    for _ in range(steps):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return ids


@both_models
def test_generate_equals_argmax_by_hand(model_class):
    model, generate = generator(model_class)
    prompts = text(24, batch=2)
    assert torch.equal(generate(prompts), greedy(model, prompts))


@both_models
def test_generate_from_left_padded_prompts_equals_each_alone(model_class):
    model, generate = generator(model_class)
    short, full = text(19, 1), text(24, 2)
    ids = torch.stack((torch.cat((torch.full((5,), 258), short[0])), full[0]))
    mask = (torch.arange(24) >= torch.tensor([[5], [0]])).long()
    out = generate(ids, attention_mask=mask)
    assert torch.equal(out[:1, 5:], greedy(model, short))
    assert torch.equal(out[1:], greedy(model, full))


@both_models
def test_beam_search_reorders_the_cache_as_it_reorders_the_beams(model_class):
    _, generate = generator(model_class, num_beams=3, num_return_sequences=3)
    ids = torch.stack((torch.cat((torch.full((5,), 258), text(19, 1)[0])), text(24, 2)[0]))
    mask = (torch.arange(24) >= torch.tensor([[5], [0]])).long()
    cached = generate(ids, attention_mask=mask)
    assert torch.equal(cached, generate(ids, attention_mask=mask, use_cache=False))
    assert len(cached.unique(dim=0)) == 6


@both_models
def test_several_samples_of_one_prompt_are_those_without_a_cache(model_class):
    _, generate = generator(model_class, num_return_sequences=3)
    prompts = text(24, batch=2)
    torch.manual_seed(7)
    cached = generate(prompts, do_sample=True)
    torch.manual_seed(7)
    assert torch.equal(cached, generate(prompts, do_sample=True, use_cache=False))
    assert cached.shape == (6, 32)
    assert len(cached.unique(dim=0)) > 2


@both_models
def test_assisted_decoding_crops_the_cache_and_equals_greedy(model_class, monkeypatch):
    model, generate = generator(model_class)
    assistant = build(model_class, num_hidden_layers=2)
    assistant.generation_config.eos_token_id = None
    crops = []
    crop = LatentCache.crop
    monkeypatch.setattr(LatentCache, "crop", lambda self, n: (crops.append(n), crop(self, n))[1])
    prompt = text(24)
    assert torch.equal(generate(prompt, assistant_model=assistant), greedy(model, prompt))
    # The two-layer assistant guesses wrong now and then, or nothing would have been tested.
    assert any(crops)


@both_models
def test_a_model_can_assist_itself(model_class):
    model, generate = generator(model_class)
    prompt = text(24)
    assert torch.equal(generate(prompt, assistant_model=model), greedy(model, prompt))


@both_models
def test_generate_refuses_another_kind_of_cache(model_class):
    _, generate = generator(model_class)
    with pytest.raises(ValueError, match="cache_implementation is 'static'.*LatentCache only"):
        generate(text(24), cache_implementation="static")


@both_models
def test_generate_continues_a_cache_that_it_is_given(model_class):
    model, generate = generator(model_class)
    prompt = text(24)
    _, cache, _ = in_chunks(model, prompt[:, :20], [20])
    assert torch.equal(generate(prompt, past_key_values=cache), greedy(model, prompt))
