"""Padding, packing and positions: a document gives the same numbers wherever it lies in a batch.

The oracle is always the document alone, without mask or positions. Documents are longer than index_topk
(16) where it matters: below that, selection is blind.
"""

import pytest
import torch

from reference import DeepseekV32ForCausalLM, LatentCache
from reference.layout import build_layout
from suites.support import assert_same, both_models, both_modes, build, text

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def padded_row(ids_L, places, length, pad=258):
    """The tokens at `places` of a row of `length`, pads elsewhere; and the mask."""
    row, mask = torch.full((length,), pad), torch.zeros(length, dtype=torch.long)
    row[places], mask[places] = ids_L, 1
    return row, mask


PLACES = {
    "left": list(range(16, 40)),
    "right": list(range(24)),
    "middle": [*range(9), *range(25, 40)],
    "scattered": [s for s in range(40) if s % 5 not in (1, 3)],
}


@both_models
@both_modes
@pytest.mark.parametrize("side", PLACES)
def test_padding_changes_nothing_in_either_row(model_class, sparse, side):
    model = build(model_class, use_sparse_attention=sparse)
    short, full = text(24, 1), text(40, 2)
    row, mask = padded_row(short[0], PLACES[side], 40)
    logits = model(torch.stack((row, full[0])), attention_mask=torch.stack((mask, torch.ones_like(mask)))).logits
    assert_same(logits[0, PLACES[side]], model(short).logits[0])
    assert_same(logits[1], model(full).logits[0])


@both_models
def test_padding_leaves_the_kl_of_each_row_as_it_is(model_class):
    model = build(model_class)
    short, full = text(24, 1), text(40, 2)
    row, mask = padded_row(short[0], PLACES["middle"], 40)
    batch, masks = torch.stack((row, full[0])), torch.stack((mask, torch.ones_like(mask)))
    together = model(batch, attention_mask=masks, output_indexer_kl_loss=True).indexer_kl_loss
    alone = [model(ids, output_indexer_kl_loss=True).indexer_kl_loss * ids.shape[1] for ids in (short, full)]
    assert_same(together * (24 + 40), alone[0] + alone[1])


@both_models
@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32, torch.float64])
def test_a_mask_may_have_any_dtype(model_class, kind):
    model = build(model_class)
    row, mask = padded_row(text(24, 1)[0], PLACES["left"], 40)
    expected = model(row[None], attention_mask=mask[None]).logits
    assert_same(model(row[None], attention_mask=mask[None].to(kind)).logits, expected, 0)


@both_models
def test_a_row_of_padding_alone_is_finite_and_leaves_its_neighbour_alone(model_class):
    model = build(model_class)
    full = text(40, 2)
    ids = torch.cat((torch.full((1, 40), 258), full))
    mask = torch.tensor([[0], [1]]).expand(2, 40)
    out = model(ids, attention_mask=mask, output_indexer_kl_loss=True)
    assert out.logits.isfinite().all()
    alone = model(full, output_indexer_kl_loss=True)
    assert_same(out.logits[1], alone.logits[0])
    assert_same(out.indexer_kl_loss, alone.indexer_kl_loss)


@both_models
@both_modes
def test_nan_in_the_embedding_of_padding_reaches_no_real_row(model_class, sparse):
    model = build(model_class, use_sparse_attention=sparse)
    short, full = text(24, 1), text(40, 2)
    row, mask = padded_row(short[0], PLACES["scattered"], 40)
    batch, masks = torch.stack((row, full[0])), torch.stack((mask, torch.ones_like(mask)))
    expected = model(batch, attention_mask=masks).logits
    model.model.embed_tokens.weight[258] = torch.nan
    logits = model(batch, attention_mask=masks).logits
    assert_same(logits[0, PLACES["scattered"]], expected[0, PLACES["scattered"]], 0)
    assert_same(logits[1], expected[1], 0)


@both_models
@torch.enable_grad()
def test_nan_in_padding_reaches_no_gradient(model_class):
    model = build(model_class)
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[:, :16] = 0
    embeds = model.model.embed_tokens(text(40)).detach()
    embeds[:, :16] = torch.nan
    embeds.requires_grad_()
    out = model(inputs_embeds=embeds, attention_mask=mask, labels=text(40), output_indexer_kl_loss=True)
    (out.loss + out.indexer_kl_loss).backward()
    wrong = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    assert wrong == []
    assert embeds.grad[:, 16:].isfinite().all()


LENGTHS = (7, 30, 21)


def documents():
    return [text(n, seed) for seed, n in enumerate(LENGTHS)]


def assert_each_document_alone(model, logits_LW):
    start = 0
    for ids in documents():
        stop = start + ids.shape[1]
        assert_same(logits_LW[start:stop], model(ids).logits[0])
        start = stop


@both_models
@both_modes
def test_documents_packed_by_their_positions_do_not_see_each_other(model_class, sparse):
    model = build(model_class, use_sparse_attention=sparse)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    assert_each_document_alone(model, model(torch.cat(documents(), 1), position_ids=positions).logits[0])


@both_models
@both_modes
@pytest.mark.parametrize("with_positions", [True, False])
def test_documents_packed_by_cu_seq_lens_do_not_see_each_other(model_class, sparse, with_positions):
    model = build(model_class, use_sparse_attention=sparse)
    edges = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None] if with_positions else None
    logits = model(torch.cat(documents(), 1), cu_seq_lens_q=edges, position_ids=positions).logits
    assert_each_document_alone(model, logits[0])


@both_models
def test_the_keyword_arguments_of_a_flattening_collator_are_taken(model_class):
    model = build(model_class)
    edges = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    out = model(
        torch.cat(documents(), 1), position_ids=positions, cu_seq_lens_q=edges, cu_seq_lens_k=edges,
        max_length_q=30, max_length_k=30,
    )  # fmt: skip
    assert_each_document_alone(model, out.logits[0])


@both_models
@both_modes
def test_a_mask_does_not_switch_packing_off(model_class, sparse):
    model = build(model_class, use_sparse_attention=sparse)
    ids = torch.cat((torch.full((1, 6), 258), *documents()), 1)
    positions = torch.cat([torch.zeros(6).long(), *(torch.arange(n) for n in LENGTHS)])[None]
    mask = torch.cat((torch.zeros(1, 6), torch.ones(1, sum(LENGTHS))), 1).long()
    assert_each_document_alone(model, model(ids, attention_mask=mask, position_ids=positions).logits[0, 6:])


@both_models
def test_pads_between_packed_documents_separate_nothing_and_join_nothing(model_class):
    model = build(model_class)
    a, b, c = documents()
    pads = torch.full((1, 3), 258)
    # Two pads stand inside document b, three between b and c.
    ids = torch.cat((a, b[:, :11], pads[:, :2], b[:, 11:], pads, c), 1)
    real = ids[0] != 258
    positions = torch.zeros_like(ids)
    positions[0, real] = torch.cat([torch.arange(n) for n in LENGTHS])
    logits = model(ids, attention_mask=real[None].long(), position_ids=positions).logits[0, real]
    assert_each_document_alone(model, logits)


@both_models
def test_the_kl_of_packed_documents_is_that_of_each_alone(model_class):
    model = build(model_class)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    together = model(torch.cat(documents(), 1), position_ids=positions, output_indexer_kl_loss=True).indexer_kl_loss
    alone = sum(model(ids, output_indexer_kl_loss=True).indexer_kl_loss * ids.shape[1] for ids in documents())
    assert_same(together * sum(LENGTHS), alone)


@both_models
def test_positions_of_one_row_serve_a_whole_batch(model_class):
    model = build(model_class)
    ids = text(40, batch=2)
    positions = torch.cat((torch.arange(13), torch.arange(27)))[None]
    expected = model(ids, position_ids=positions.expand(2, -1)).logits
    assert_same(model(ids, position_ids=positions).logits, expected, 0)


def test_a_padded_first_token_does_not_join_two_documents_of_cu_seq_lens():
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, 10] = 0
    # Positions that count real tokens only run on across the boundary, so that nothing but cu_seq_lens marks it.
    layout = build_layout(
        1, 20, torch.device("cpu"), attention_mask=mask, position_ids=mask.cumsum(1) - 1,
        cu_seq_lens=torch.tensor([0, 10, 20]),
    )  # fmt: skip
    assert not layout.visible_BLS()[0, 11:, :10].any()


@both_models
def test_shifting_every_position_leaves_attention_as_it_is(model_class):
    # Both RoPEs are relative. Angles are fp32 data: at position 300 they are rounded to 2e-5.
    model = build(model_class, use_sparse_attention=False)
    ids = text(40)
    shifted = model(ids, position_ids=torch.arange(40)[None] + 300, output_indexer_scores=True)
    plain = model(ids, output_indexer_scores=True)
    assert_same(shifted.logits, plain.logits, 1e-3)
    seen = plain.indexer_scores[0].isfinite()
    assert_same(shifted.indexer_scores[0][seen], plain.indexer_scores[0][seen], 1e-3)


@both_models
def test_moving_the_last_token_alone_makes_it_a_document_of_its_own(model_class):
    model = build(model_class)
    ids = text(40)
    positions = torch.arange(40)[None].clone()
    positions[0, -1] += 1
    logits = model(ids, position_ids=positions).logits
    assert_same(logits[:, :-1], model(ids).logits[:, :-1])
    alone = model(ids[:, -1:], position_ids=torch.tensor([[40]])).logits
    assert_same(logits[:, -1], alone[:, -1])
    assert (logits[:, -1] - model(ids).logits[:, -1]).abs().max() > 0.1


@both_models
def test_a_change_of_a_later_token_changes_no_earlier_row(model_class):
    model = build(model_class)
    ids = text(40)
    other = ids.clone()
    other[0, 30] = (other[0, 30] + 1) % 256
    before, after = model(ids).logits, model(other).logits
    assert_same(before[:, :30], after[:, :30])
    assert (before - after)[:, 30:].abs().amax(-1).min() > 1e-6


@both_models
def test_a_row_with_at_most_index_topk_keys_attends_to_all_of_them(model_class):
    ids = text(40)
    sparse, dense = (build(model_class, use_sparse_attention=s)(ids).logits for s in (True, False))
    assert_same(sparse[:, :16], dense[:, :16])
    assert (sparse - dense)[:, 16:].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"attention_mask": torch.ones(1, 1, 20, 20)}, r"attention_mask has shape \(1, 1, 20, 20\).*4-D masks"),
        ({"attention_mask": torch.ones(20)}, r"attention_mask has shape \(20,\); it must be"),
        ({"attention_mask": torch.ones(1, 19)}, r"attention_mask has shape \(1, 19\).*\[1, 20\]"),
        ({"attention_mask": torch.full((1, 20), 2)}, "attention_mask holds values other than 0 and 1"),
        ({"attention_mask": torch.full((1, 20), 0.5)}, "attention_mask holds values other than 0 and 1"),
        ({"attention_mask": torch.full((1, 20), torch.nan)}, "attention_mask holds values other than 0 and 1"),
        ({"attention_mask": torch.full((1, 20), -1)}, "attention_mask holds values other than 0 and 1"),
        ({"position_ids": torch.arange(19)[None]}, r"position_ids has shape \(1, 19\); it must be \[1, 20\]"),
        ({"position_ids": torch.arange(20)}, r"position_ids has shape \(20,\)"),
        ({"position_ids": torch.arange(20).expand(3, -1)}, r"position_ids has shape \(3, 20\)"),
        ({"position_ids": torch.arange(20)[None] - 1}, "position_ids holds a negative position"),
        ({"position_ids": torch.arange(20)[None] + 0.5}, "position_ids"),
        ({"cu_seq_lens_q": torch.tensor([0, 8])}, r"cu_seq_lens_q is \[0, 8\]; it must rise from 0 to the 20 tokens"),
        ({"cu_seq_lens_q": torch.tensor([1, 20])}, "cu_seq_lens_q is .*must rise from 0"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 9, 20])}, "cu_seq_lens_q is .*must rise from 0"),
        ({"cu_seq_lens_q": torch.tensor([0, 12, 9, 20])}, "cu_seq_lens_q is .*must rise from 0"),
        ({"cu_seq_lens_q": torch.tensor([20])}, "cu_seq_lens_q is .*must rise from 0"),
        ({"cu_seq_lens_q": torch.tensor([[0, 20]])}, "cu_seq_lens_q is .*must rise from 0"),
        ({"cu_seq_lens_q": torch.tensor([0, 8.5, 20])}, "cu_seq_lens_q"),
        (
            {"labels": torch.zeros(1, 19).long()},
            r"labels has shape \(1, 19\); it must be that of the tokens, \(1, 20\)",
        ),
        ({"labels": torch.full((1, 20), 320)}, "labels holds 320; labels must be −100 or 0 … 319"),
        ({"labels": torch.full((1, 20), -1)}, "labels holds -1"),
        ({"inputs_embeds": torch.zeros(1, 20, 64)}, "Exactly one of input_ids and inputs_embeds"),
        ({"output_indexer_scores": "all"}, "output_indexer_scores is 'all'; it must be False, True or 'visible'"),
        ({"output_attentions": True}, r"forward\(\) got 'output_attentions'=True"),
        ({"output_indexer_score": True}, r"forward\(\) got 'output_indexer_score'=True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_argument_that_does_not_fit_is_refused_in_one_sentence(arguments, sentence):
    model = build(DeepseekV32ForCausalLM)
    with pytest.raises(ValueError, match=sentence):
        model(text(20), **arguments)


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        (torch.tensor([[5, 320]]), "input_ids holds token id 320; ids must be 0 … 319"),
        (torch.tensor([[5, -1]]), "input_ids holds token id -1"),
        (torch.zeros(1, 0).long(), r"input_ids has shape \(1, 0\)"),
        (torch.zeros(20).long(), r"input_ids has shape \(20,\)"),
        (None, "Exactly one of input_ids and inputs_embeds"),
    ],
    ids=["too high", "negative", "empty", "1-D", "none"],
)
def test_token_ids_that_do_not_fit_are_refused_in_one_sentence(ids, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(DeepseekV32ForCausalLM)(ids)


def test_cu_seq_lens_need_a_batch_of_one():
    with pytest.raises(ValueError, match="cu_seq_lens_q needs a flattened batch of one.*batch is 2"):
        build(DeepseekV32ForCausalLM)(text(20, batch=2), cu_seq_lens_q=torch.tensor([0, 20]))


def test_cu_seq_lens_need_an_empty_cache():
    model = build(DeepseekV32ForCausalLM)
    cache = LatentCache(model.config)
    model(text(5), past_key_values=cache)
    with pytest.raises(ValueError, match="cu_seq_lens_q needs .* an empty cache; batch is 1, cache 5"):
        model(text(20), past_key_values=cache, cu_seq_lens_q=torch.tensor([0, 20]))


def test_a_mask_must_cover_what_the_cache_holds():
    model = build(DeepseekV32ForCausalLM)
    cache = LatentCache(model.config)
    model(text(5), past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 20\).*\[1, 25\]"):
        model(text(20), past_key_values=cache, attention_mask=torch.ones(1, 20))
