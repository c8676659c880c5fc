"""The decision tape: recorded, replayed, moved between layouts, saved, and refused when it does not fit.

Prompts are longer than index_topk (16), so that a tape holds real choices.

Letters: B batch, L rows, K chosen keys, T chosen experts.
"""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from reference import Decisions, DeepseekV32ForCausalLM, LatentCache, LayerDecisions
from suites.support import assert_same, both_models, both_modes, build, in_chunks, text

L = 40


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def record(model, ids, **kwargs):
    return model(ids, output_decisions=True, **kwargs).decisions


def changed(tape, layer_idx, **fields):
    """`tape` with one layer's tensors replaced."""
    layers = list(tape.layers)
    layers[layer_idx] = replace(layers[layer_idx], **fields)
    return Decisions(tuple(layers))


def tensors(tape):
    return [x for layer in tape for x in (layer.topk_indices, layer.expert_indices)]


def assert_same_tape(a, b):
    """Equal choices; lists of keys may differ in how many −1 end them."""
    assert len(a) == len(b)
    for ours, theirs in zip(tensors(a), tensors(b), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            width = max(ours.shape[-1], theirs.shape[-1])
            ours, theirs = (torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=-1) for x in (ours, theirs))
            assert ours.tolist() == theirs.tolist()


def picked(tape, rows_BL):
    """The tape of the rows where `rows_BL` is true, as a batch of one."""
    return Decisions(
        tuple(LayerDecisions(*(None if x is None else x[rows_BL][None] for x in (d.topk_indices, d.expert_indices)))
              for d in tape)
    )  # fmt: skip


@both_models
@both_modes
def test_a_tape_has_the_shapes_of_the_contract(model_class, sparse):
    tape = record(build(model_class, use_sparse_attention=sparse), text(L, batch=2))
    assert [None if d.topk_indices is None else tuple(d.topk_indices.shape) for d in tape] == (
        [(2, L, 16)] * 3 if sparse else [None] * 3
    )
    assert [None if d.expert_indices is None else tuple(d.expert_indices.shape) for d in tape] == [
        None,
        (2, L, 2),
        (2, L, 2),
    ]
    assert {x.dtype for x in tensors(tape) if x is not None} == {torch.int32}


@both_models
def test_a_short_prompt_has_lists_as_long_as_itself(model_class):
    assert record(build(model_class), text(7))[0].topk_indices.shape == (1, 7, 7)


@both_models
def test_keys_ascend_and_unused_places_hold_minus_one_at_the_tail(model_class):
    topk = record(build(model_class), text(L))[2].topk_indices[0]
    for t, row in enumerate(topk.tolist()):
        count = min(t + 1, 16)
        assert row[count:] == [-1] * (16 - count)
        assert row[:count] == sorted(set(row[:count]))
        assert row[0] >= 0 and row[count - 1] <= t


@both_models
def test_recorded_keys_are_those_with_the_highest_scores(model_class):
    out = build(model_class)(text(L), output_indexer_scores="visible", output_decisions=True)
    for scores_BLS, layer in zip(out.indexer_scores, out.decisions, strict=True):
        for t in range(L):
            chosen = [s for s in layer.topk_indices[0, t].tolist() if s >= 0]
            row = scores_BLS[0, t, : t + 1].tolist()
            assert chosen == sorted(sorted(range(t + 1), key=lambda s, row=row: -row[s])[:16])


@both_models
def test_both_models_make_the_same_choices(model_class):
    assert_same_tape(record(build(model_class), text(L)), record(build(DeepseekV32ForCausalLM), text(L)))


@both_models
@both_modes
def test_replaying_its_own_tape_gives_bitwise_the_free_run(model_class, sparse):
    model = build(model_class, use_sparse_attention=sparse)
    free = model(text(L, batch=2), output_decisions=True, output_indexer_kl_loss=True)
    replayed = model(text(L, batch=2), decisions=free.decisions, output_indexer_kl_loss=True, output_decisions=True)
    assert torch.equal(replayed.logits, free.logits)
    assert torch.equal(replayed.indexer_kl_loss, free.indexer_kl_loss)
    assert_same_tape(replayed.decisions, free.decisions)


@both_models
@torch.enable_grad()
def test_replaying_its_own_tape_gives_bitwise_the_gradients_of_the_free_run(model_class):
    model, ids = build(model_class), text(L)
    gradients = []
    for tape in (None, record(model, ids)):
        model.zero_grad()
        out = model(ids, labels=ids, decisions=tape, output_indexer_kl_loss=True)
        (out.loss + out.indexer_kl_loss).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())


@both_models
def test_a_tape_without_a_choice_leaves_it_to_the_model(model_class):
    model = build(model_class)
    free = model(text(L), output_decisions=True)
    nothing = Decisions((LayerDecisions(),) * 3)
    assert torch.equal(model(text(L), decisions=nothing).logits, free.logits)


@both_models
def test_a_tape_of_int64_is_taken(model_class):
    model = build(model_class)
    free = model(text(L), output_decisions=True)
    wide = Decisions(
        tuple(LayerDecisions(d.topk_indices.long(), None if d.expert_indices is None else d.expert_indices.long())
              for d in free.decisions)
    )  # fmt: skip
    assert torch.equal(model(text(L), decisions=wide).logits, free.logits)


PADDED = {
    "left": torch.arange(L) >= 13,
    "right": torch.arange(L) < 27,
    "middle": (torch.arange(L) < 9) | (torch.arange(L) >= 22),
}


@both_models
@pytest.mark.parametrize("side", PADDED)
def test_a_tape_does_not_depend_on_padding(model_class, side):
    model, short, real_L = build(model_class), text(27, 1), PADDED[side]
    ids = torch.full((1, L), 258)
    ids[0, real_L] = short[0]
    tape = record(model, ids, attention_mask=real_L[None].long())
    assert_same_tape(picked(tape, real_L[None]), record(model, short))
    assert all((x[:, ~real_L] == -1).all() for x in tensors(tape) if x is not None)


@both_models
def test_a_tape_does_not_depend_on_packing(model_class):
    model, lengths = build(model_class), (7, 30, 21)
    documents = [text(n, seed) for seed, n in enumerate(lengths)]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = record(model, torch.cat(documents, 1), position_ids=positions)
    assert_same_tape(packed, Decisions.cat([record(model, ids) for ids in documents]))


@both_models
@pytest.mark.parametrize("sizes", [[17, 23], [9, 9, 9, 13], [1] * L], ids=["two", "four", "token by token"])
def test_a_tape_does_not_depend_on_chunks(model_class, sizes):
    model, ids = build(model_class), text(L)
    _, _, tape = in_chunks(model, ids, sizes)
    assert_same_tape(tape, record(model, ids))


@both_models
def test_the_tape_of_a_document_replays_wherever_it_lies(model_class):
    model = build(model_class)
    ids = text(L)
    # A tape that no model would choose: every row keeps the first keys of its document.
    foreign = foreign_tape(record(model, ids))
    alone = model(ids, decisions=foreign).logits
    assert (alone - model(ids).logits).abs().max() > 1e-2

    other = text(12, 5)
    packed = Decisions.cat([record(model, other), foreign])
    positions = torch.cat((torch.arange(12), torch.arange(L)))[None]
    assert_same(model(torch.cat((other, ids), 1), position_ids=positions, decisions=packed).logits[:, 12:], alone)

    pads = tuple(None if x is None else torch.full((1, 6, x.shape[-1]), -1).int() for x in tensors(foreign))
    padded = Decisions.cat([Decisions(tuple(LayerDecisions(*pads[i : i + 2]) for i in (0, 2, 4))), foreign])
    mask = (torch.arange(L + 6) >= 6).long()[None]
    row = torch.cat((torch.full((1, 6), 258), ids), 1)
    assert_same(model(row, attention_mask=mask, decisions=padded).logits[:, 6:], alone)

    cache, logits = LatentCache(model.config), []
    for start, stop in ((0, 19), (19, 20), (20, L)):
        part = foreign.rows(start, stop)
        logits.append(model(ids[:, start:stop], past_key_values=cache, decisions=part).logits)
    assert_same(torch.cat(logits, 1), alone)


def foreign_tape(tape):
    """The first keys of every row instead of the best ones; and the next experts instead of the chosen."""
    first = torch.arange(16).expand(1, L, 16)
    first = torch.where(first <= torch.arange(L)[None, :, None], first, -1).int()
    return Decisions(
        tuple(LayerDecisions(first, None if d.expert_indices is None else (d.expert_indices + 1) % 8) for d in tape)
    )


@both_models
def test_one_altered_key_changes_its_row_and_nothing_before(model_class):
    model, ids = build(model_class), text(L)
    free = model(ids, output_decisions=True)
    topk = free.decisions[0].topk_indices.clone()
    unused = next(s for s in range(31) if s not in topk[0, 30].tolist())
    kept = topk[0, 30, 1:].tolist()
    topk[0, 30] = torch.tensor(sorted([unused, *kept]))
    logits = model(ids, decisions=changed(free.decisions, 0, topk_indices=topk)).logits
    assert_same(logits[:, :30], free.logits[:, :30])
    assert (logits - free.logits)[:, 30].abs().max() > 1e-6


@both_models
def test_one_altered_expert_changes_its_row_and_nothing_before(model_class):
    model, ids = build(model_class), text(L)
    free = model(ids, output_decisions=True)
    experts = free.decisions[2].expert_indices.clone()
    experts[0, 30] = torch.tensor([e for e in range(8) if e not in experts[0, 30].tolist()][:2])
    logits = model(ids, decisions=changed(free.decisions, 2, expert_indices=experts)).logits
    assert_same(logits[:, :30], free.logits[:, :30])
    # Layer 2 is the last: no later row reads what this one became.
    assert_same(logits[:, 31:], free.logits[:, 31:])
    assert (logits - free.logits)[:, 30].abs().max() > 1e-3


@both_models
def test_a_shorter_list_of_keys_attends_to_fewer(model_class):
    model, ids = build(model_class), text(L)
    free = model(ids, output_decisions=True)
    topk = free.decisions[0].topk_indices.clone()
    topk[0, 20] = torch.tensor([4] + [-1] * 15)
    out = model(ids, decisions=changed(free.decisions, 0, topk_indices=topk), output_indexer_kl_target=True)
    target = out.indexer_kl_targets[0][0, 20]
    assert target[4] == pytest.approx(1.0)
    assert target.count_nonzero() == 1


@both_models
def test_weights_of_replayed_experts_come_from_the_models_own_scores(model_class):
    model = build(model_class)
    gate = model.model.layers[1].mlp.gate
    x = torch.randn(5, 64, dtype=torch.float64)
    scores = gate(x)
    chosen = torch.tensor([[0, 7]]).expand(5, 2)
    expected = scores[:, [0, 7]] / scores[:, [0, 7]].sum(-1, keepdim=True) * 2.5
    assert_same(gate.weights(scores, chosen), expected)


@both_models
def test_with_a_foreign_tape_the_models_own_choice_comes_back(model_class):
    model, ids = build(model_class), text(L)
    own = record(model, ids)
    foreign = foreign_tape(own)
    # Layer 0 reads the embedding, whatever is replayed: its own choice stays what it was.
    answered = record(model, ids, decisions=foreign)
    assert answered[0].topk_indices.tolist() == own[0].topk_indices.tolist()
    assert answered[0].topk_indices.tolist() != foreign[0].topk_indices.tolist()
    # Later layers choose on the replayed states: neither the tape nor the free run comes back.
    for ours in (own, foreign):
        assert answered[2].topk_indices.tolist() != ours[2].topk_indices.tolist()
        assert answered[2].expert_indices.tolist() != ours[2].expert_indices.tolist()


@both_models
def test_scores_and_targets_are_those_of_the_replayed_keys(model_class):
    model, ids = build(model_class), text(L)
    foreign = foreign_tape(record(model, ids))
    out = model(ids, decisions=foreign, output_indexer_scores=True, output_indexer_kl_target=True)
    expected = torch.ones(L, L).tril().bool() & (torch.arange(L) < 16)
    for scores, target in zip(out.indexer_scores, out.indexer_kl_targets, strict=True):
        assert torch.equal(scores[0].isfinite(), expected)
        assert torch.equal(target[0] > 0, expected)


def test_a_tape_survives_a_file(tmp_path):
    for sparse in (True, False):
        tape = record(build(DeepseekV32ForCausalLM, use_sparse_attention=sparse), text(L, batch=2))
        tape.save(tmp_path / "tape.safetensors")
        loaded = Decisions.load(tmp_path / "tape.safetensors")
        assert_same_tape(loaded, tape)
        assert {x.dtype for x in tensors(loaded) if x is not None} == {torch.int32}


def test_rows_and_cat_undo_each_other():
    tape = record(build(DeepseekV32ForCausalLM), text(L, batch=2))
    assert_same_tape(Decisions.cat([tape.rows(0, 9), tape.rows(9, 10), tape.rows(10, L)]), tape)
    assert tape.rows(9, 12)[1].expert_indices.tolist() == tape[1].expert_indices[:, 9:12].tolist()


def test_cat_fills_narrower_lists_with_minus_one():
    narrow, wide = (Decisions((LayerDecisions(torch.zeros(1, 2, k).int()),)) for k in (2, 5))
    joined = Decisions.cat([narrow, wide])[0]
    assert joined.topk_indices.tolist() == [[[0, 0, -1, -1, -1]] * 2 + [[0] * 5] * 2]
    assert joined.expert_indices is None


def test_cat_refuses_chunks_of_which_only_some_hold_choices():
    some = Decisions((LayerDecisions(torch.zeros(1, 2, 2).int()),))
    with pytest.raises(ValueError, match="chunks of one layer must all hold choices, or none"):
        Decisions.cat([some, Decisions((LayerDecisions(),))])


def row_20(*values):
    """An edit of a tape's row 20: these keys first, −1 behind."""

    def edit(topk_BLK):
        topk_BLK[0, 20] = torch.tensor([*values] + [-1] * (16 - len(values)))
        return topk_BLK

    return edit


@both_models
@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda x: x[:, :-1], r"has shape \(1, 39, 16\); it must be \[1, 40, 'k'\]"),
        (lambda x: x[0], r"has shape \(40, 16\); it must be"),
        (lambda x: x.repeat(2, 1, 1), r"has shape \(2, 40, 16\); it must be"),
        (lambda x: x.float(), "is torch.float32; it must be int32 or int64"),
        (lambda x: x >= 0, "is torch.bool; it must be int32 or int64"),
        (row_20(0, 21), "holds an index outside its row's document, or after its row's own position"),
        (row_20(-2, 3), "holds an index outside its row's document"),
        (row_20(3, 3), "must be ascending without repeats, with −1 only at the tail"),
        (row_20(4, 3), "must be ascending without repeats, with −1 only at the tail"),
        (row_20(1, -1, 3), "must be ascending without repeats, with −1 only at the tail"),
        (row_20(-1, 1, 3), "must be ascending without repeats, with −1 only at the tail"),
        (row_20(), "leaves a real row without any key"),
    ],
    ids=["short", "2-D", "two rows", "float", "bool", "future", "negative", "repeated", "descending", "gap", "front",
         "empty"],
)  # fmt: skip
def test_keys_that_do_not_fit_are_refused_in_one_sentence(model_class, edit, sentence):
    model, ids = build(model_class), text(L)
    tape = record(model, ids)
    bad = changed(tape, 1, topk_indices=edit(tape[1].topk_indices.clone()))
    with pytest.raises(ValueError, match=f"^decisions, layer 1: topk_indices {sentence}"):
        model(ids, decisions=bad)


@both_models
def test_keys_of_another_document_are_refused(model_class):
    model, ids = build(model_class), text(L)
    tape = record(model, ids)
    positions = torch.cat((torch.arange(15), torch.arange(25)))[None]
    with pytest.raises(ValueError, match="layer 0: topk_indices holds an index outside its row's document"):
        model(ids, position_ids=positions, decisions=tape)


def set_row_20(*values):
    def edit(experts_BLT):
        experts_BLT[0, 20] = torch.tensor(values)
        return experts_BLT

    return edit


@both_models
@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda x: x[..., :1], r"has shape \(1, 40, 1\); it must be \[1, 40, 2\]"),
        (lambda x: x[:, :-1], r"has shape \(1, 39, 2\); it must be"),
        (lambda x: x.double(), "is torch.float64; it must be int32 or int64"),
        (set_row_20(0, 8), "holds an expert outside 0 … 7 in a real row"),
        (set_row_20(-1, 3), "holds an expert outside 0 … 7 in a real row"),
        (set_row_20(3, 3), "names an expert twice in one row"),
    ],
    ids=["narrow", "short", "float", "unknown", "missing", "repeated"],
)
def test_experts_that_do_not_fit_are_refused_in_one_sentence(model_class, edit, sentence):
    model, ids = build(model_class), text(L)
    tape = record(model, ids)
    bad = changed(tape, 2, expert_indices=edit(tape[2].expert_indices.clone()))
    with pytest.raises(ValueError, match=f"^decisions, layer 2: expert_indices {sentence}"):
        model(ids, decisions=bad)


@both_models
def test_a_tape_of_another_number_of_layers_is_refused(model_class):
    model, ids = build(model_class), text(L)
    with pytest.raises(ValueError, match="decisions holds 2 layers; the model has 3"):
        model(ids, decisions=Decisions(record(model, ids).layers[:2]))


@both_models
def test_keys_in_dense_mode_are_refused(model_class):
    tape = record(build(model_class), text(L))
    with pytest.raises(ValueError, match="layer 0: topk_indices given, but use_sparse_attention is False"):
        build(model_class, use_sparse_attention=False)(text(L), decisions=tape)


@both_models
def test_experts_in_a_dense_ffn_layer_are_refused(model_class):
    model, ids = build(model_class), text(L)
    tape = record(model, ids)
    with pytest.raises(ValueError, match="layer 0: expert_indices given, but this layer has no experts"):
        model(ids, decisions=changed(tape, 0, expert_indices=tape[1].expert_indices))


@pytest.mark.parametrize("left", [0, 5, 100, -1], ids=["empty", "a few bytes", "header", "all but one byte"])
def test_a_truncated_tape_is_refused_with_its_file_name(tmp_path, left):
    path = tmp_path / "tape.safetensors"
    record(build(DeepseekV32ForCausalLM), text(L)).save(path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match="tape.safetensors cannot be read as a decision tape"):
        Decisions.load(path)


def test_a_missing_tape_is_refused_with_its_file_name(tmp_path):
    with pytest.raises(ValueError, match="gone.safetensors cannot be read as a decision tape"):
        Decisions.load(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=["no metadata", "another format"])
def test_another_safetensors_file_is_no_tape(tmp_path, metadata):
    path = tmp_path / "weights.safetensors"
    save_file({"layers.0.topk_indices": torch.zeros(1, 3, 2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"weights.safetensors is not a decision tape: its format is"):
        Decisions.load(path)


@pytest.mark.parametrize("layers", [None, "three", "-1"])
def test_a_tape_that_does_not_say_how_many_layers_it_has_is_refused(tmp_path, layers):
    path = tmp_path / "tape.safetensors"
    metadata = {"format": "v32-decisions-1"} | ({} if layers is None else {"layers": layers})
    save_file({"layers.0.topk_indices": torch.zeros(1, 3, 2, dtype=torch.int32)}, path, metadata=metadata)
    with pytest.raises(ValueError, match="tape.safetensors"):
        Decisions.load(path)
