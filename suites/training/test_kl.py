"""The KL contract: the loss function alone, the loss inside the models, and who gets gradient from it.

    KL(p ‖ softmax(I)),   d KL / d I = softmax(I) − p   on the candidate set of a row

Letters: B batch, L rows, S key slots.
"""

import math

import pytest
import torch

from reference import DeepseekV32ForCausalLM, LatentCache, compute_indexer_kl_loss, kl_rows
from reference.attention import Ask
from reference.training import is_indexer
from suites.support import assert_same, both_models, both_modes, build, text

L = 40
INF = torch.inf


def example(rows=6, keys=9, seed=0):
    """Causal scores `[2, rows, keys]` (−inf outside) and targets of random mass on the same support, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.ones(rows, keys).tril(keys - rows).bool()
    scores = torch.randn(2, rows, keys, generator=generator, dtype=torch.float64).masked_fill(~seen, -INF)
    target = torch.randn(2, rows, keys, generator=generator, dtype=torch.float64).masked_fill(~seen, -INF).softmax(-1)
    return scores, target


def by_hand(scores, target):
    """Σ over rows, written as the report has it, key by key."""
    total = 0.0
    for row, p in zip(scores.flatten(0, 1).tolist(), target.flatten(0, 1).tolist(), strict=True):
        normaliser = math.log(sum(math.exp(v) for v in row))
        total += sum(q * (math.log(q) - (v - normaliser)) for v, q in zip(row, p, strict=True) if q > 0)
    return total


def test_the_sum_is_the_reports_formula():
    scores, target = example()
    assert float(compute_indexer_kl_loss(scores, target, "sum")) == pytest.approx(by_hand(scores, target), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_never_negative(seed):
    scores, target = example(seed=seed)
    assert (kl_rows(scores, target) >= -1e-15).all()


def test_it_is_zero_when_the_prediction_equals_the_target():
    scores, _ = example()
    assert_same(kl_rows(scores, scores.softmax(-1)), torch.zeros(2, 6, dtype=torch.float64), 1e-14)


def test_adding_a_constant_to_a_row_changes_nothing():
    scores, target = example()
    shift = torch.linspace(-30, 30, 6, dtype=torch.float64)[:, None]
    assert_same(kl_rows(scores + shift, target), kl_rows(scores, target), 1e-12)


def test_multiplying_a_row_changes_it():
    scores, target = example()
    assert (kl_rows(scores * 1.1, target) - kl_rows(scores, target)).abs().max() > 1e-3


def test_its_gradient_is_softmax_minus_p():
    scores, target = example()
    scores.requires_grad_()
    compute_indexer_kl_loss(scores, target, "sum").backward()
    assert_same(scores.grad, scores.detach().softmax(-1) - target, 1e-14)


def test_its_gradient_agrees_with_finite_differences():
    scores, target = example(rows=3, keys=4)
    finite = scores.isfinite()
    leaf = scores[finite].requires_grad_()

    def loss(values):
        return compute_indexer_kl_loss(torch.full_like(scores, -INF).masked_scatter(finite, values), target)

    assert torch.autograd.gradcheck(loss, (leaf,))


def test_the_mean_divides_by_the_valid_rows():
    scores, target = example()
    target[0, 2] = 0
    total = compute_indexer_kl_loss(scores, target, "sum")
    assert_same(compute_indexer_kl_loss(scores, target), total / 11)


@pytest.mark.parametrize("rows", [5, torch.tensor(5)], ids=["int", "tensor"])
def test_num_rows_replaces_the_count_of_the_mean(rows):
    scores, target = example()
    total = compute_indexer_kl_loss(scores, target, "sum")
    assert_same(compute_indexer_kl_loss(scores, target, num_rows=rows), total / 5)
    assert_same(compute_indexer_kl_loss(scores, target, "sum", num_rows=rows), total)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_layers_are_summed(reduction):
    first, second = example(seed=1), example(seed=2)
    both = compute_indexer_kl_loss((first[0], second[0]), (first[1], second[1]), reduction)
    assert_same(both, sum(compute_indexer_kl_loss(*one, reduction) for one in (first, second)))


def test_a_layers_gradient_does_not_depend_on_how_many_layers_there_are():
    scores, target = example()
    gradients = []
    for layers in (1, 7):
        leaf = scores.clone().requires_grad_()
        compute_indexer_kl_loss([leaf, *[scores] * (layers - 1)], [target] * layers).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_row_0_with_its_one_key_is_valid_and_costs_nothing():
    scores = torch.tensor([[[1.7, -INF], [0.3, 0.9]]]).double()
    target = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]).double()
    assert kl_rows(scores, target)[0, 0] == 0
    assert_same(compute_indexer_kl_loss(scores, target), kl_rows(scores, target)[0, 1] / 2)


def test_a_row_without_candidates_costs_nothing_and_gets_no_gradient():
    scores, target = example()
    scores[1, 3], target[1, 3] = -INF, 0
    scores.requires_grad_()
    loss = compute_indexer_kl_loss(scores, target)
    loss.backward()
    assert loss.isfinite()
    assert torch.equal(scores.grad[1, 3], torch.zeros(9).double())
    assert scores.grad.isfinite().all()


def test_a_pad_row_with_scores_but_no_target_is_never_valid():
    scores, target = example()
    target[1, 3] = 0
    scores.requires_grad_()
    compute_indexer_kl_loss(scores, target, "sum").backward()
    assert kl_rows(scores, target)[1, 3] == 0
    assert torch.equal(scores.grad[1, 3], torch.zeros(9).double())
    assert scores.grad[1, 4].abs().max() > 0


def test_rows_of_padding_alone_give_zero():
    loss = compute_indexer_kl_loss(torch.full((1, 3, 4), -INF), torch.zeros(1, 3, 4))
    assert loss == 0


def test_target_mass_outside_the_support_is_infinite():
    scores, target = example()
    scores[0, 2, 0] = -INF
    assert kl_rows(scores, target)[0, 2] == INF
    assert kl_rows(scores, target).isfinite().sum() == 11
    assert compute_indexer_kl_loss(scores, target) == INF


def test_target_mass_without_any_support_is_infinite():
    scores, target = example()
    scores[0, 2] = -INF
    assert kl_rows(scores, target)[0, 2] == INF


def test_a_candidate_without_target_mass_counts_in_the_normaliser():
    scores = torch.zeros(1, 1, 4).double()
    target = torch.tensor([[[0.5, 0.5, 0.0, 0.0]]]).double()
    assert float(compute_indexer_kl_loss(scores, target)) == pytest.approx(math.log(2))


def test_very_unequal_scores_stay_finite():
    scores = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    target = torch.tensor([[[0.0, 0.5, 0.5]]])
    loss = compute_indexer_kl_loss(scores, target)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(15000, rel=1e-4)
    assert scores.grad.isfinite().all()


def test_the_target_gets_no_gradient():
    scores, target = example()
    target.requires_grad_()
    compute_indexer_kl_loss(scores.requires_grad_(), target).backward()
    assert target.grad is None


def test_low_precision_is_summed_in_fp32():
    scores, target = example()
    loss = compute_indexer_kl_loss(scores.bfloat16(), target.bfloat16())
    assert loss.dtype == torch.float32
    assert loss == compute_indexer_kl_loss(scores.bfloat16().float(), target.bfloat16().float())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([], []), "0 layers of scores and 0 of targets"),
        (([torch.zeros(1, 2, 2)], [torch.zeros(1, 2, 2)] * 2), "1 layers of scores and 2 of targets"),
        ((torch.zeros(1, 2, 2), torch.zeros(1, 2, 3)), r"layer 0 has scores \(1, 2, 2\) and targets \(1, 2, 3\)"),
        ((torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), "batchmean"), "reduction is 'batchmean'; it must be"),
    ],
    ids=["none", "layers", "shapes", "reduction"],
)
def test_what_does_not_fit_is_refused_in_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=f"compute_indexer_kl_loss: .*{sentence}"):
        compute_indexer_kl_loss(*arguments)


def padded_batch():
    """Two rows, one of them with a left and one with a right gap."""
    ids, mask = text(L, batch=2), torch.ones(2, L, dtype=torch.long)
    mask[0, :9], mask[1, 33:] = 0, 0
    return {"input_ids": ids.masked_fill(mask == 0, 258), "attention_mask": mask}


ANSWERS = {"output_indexer_scores": True, "output_indexer_kl_target": True, "output_indexer_kl_loss": True}


@both_models
@both_modes
def test_the_models_loss_is_that_of_its_scores_and_targets(model_class, sparse):
    out = build(model_class, use_sparse_attention=sparse)(**padded_batch(), **ANSWERS)
    assert_same(compute_indexer_kl_loss(out.indexer_scores, out.indexer_kl_targets), out.indexer_kl_loss)
    assert out.indexer_kl_loss > 0.1


@both_models
@both_modes
def test_the_models_gradient_is_that_of_its_scores_and_targets(model_class, sparse):
    model = build(model_class, use_sparse_attention=sparse)
    out = model(**padded_batch(), **ANSWERS)
    helper = compute_indexer_kl_loss(out.indexer_scores, out.indexer_kl_targets)
    parameters = [p for n, p in model.named_parameters() if is_indexer(n)]
    for ours, theirs in zip(
        *(torch.autograd.grad(x, parameters, retain_graph=True) for x in (out.indexer_kl_loss, helper)), strict=True
    ):
        assert_same(ours, theirs)


@both_models
@both_modes
def test_candidates_are_the_selected_keys_or_all_visible_ones(model_class, sparse):
    batch = padded_batch()
    out = build(model_class, use_sparse_attention=sparse)(**batch, **ANSWERS)
    real = batch["attention_mask"].bool()
    visible = torch.ones(L, L).tril().bool() & real[:, None] & real[:, :, None]
    for scores, target in zip(out.indexer_scores, out.indexer_kl_targets, strict=True):
        assert torch.equal(scores > -INF, target > 0)
        assert torch.equal((scores > -INF).sum(-1), visible.sum(-1).clamp_max(16 if sparse else L))
        assert not (scores.isfinite() & ~visible).any()
        assert_same(target.sum(-1), real.double())


@both_models
@both_modes
def test_visible_scores_are_raw_on_every_visible_key_in_both_modes(model_class, sparse):
    model, batch = build(model_class, use_sparse_attention=sparse), padded_batch()
    real = batch["attention_mask"].bool()
    visible = torch.ones(L, L).tril().bool() & real[:, None] & real[:, :, None]
    seen = model(**batch, output_indexer_scores="visible").indexer_scores
    candidates = model(**batch, output_indexer_scores=True).indexer_scores
    for everywhere, chosen in zip(seen, candidates, strict=True):
        assert torch.equal(everywhere.isfinite(), visible)
        inside = chosen.isfinite()
        assert_same(everywhere[inside], chosen[inside])


@both_models
@both_modes
def test_targets_are_the_heads_probabilities_summed_and_normalised(model_class, sparse):
    # Both models against the plain formula of the reference, on the keys that the model itself chose.
    out = build(model_class, use_sparse_attention=sparse)(text(L), **ANSWERS, output_decisions=True)
    plain = build(DeepseekV32ForCausalLM, use_sparse_attention=sparse)
    heads = []
    projections = plain.model.layers[0].self_attn
    x = plain.model.layers[0].input_layernorm(plain.model.embed_tokens(text(L)))
    rotary = plain.model.rotary_emb(torch.arange(L)[None], torch.float64)
    t = projections.project(x, rotary, None, Ask())
    k_nope, _ = projections.keys_and_values(t.c_kv_BSC)
    inside = out.indexer_scores[0][0].isfinite()
    for h in range(4):
        k = torch.cat((k_nope[0, :, h], t.k_pe_BSR[0]), -1)
        q = torch.cat((t.q_nope_BLHN[0, :, h], t.q_pe_BLHR[0, :, h]), -1)
        heads.append((q @ k.T * projections.scale).masked_fill(~inside, -INF).softmax(-1))
    assert_same(out.indexer_kl_targets[0][0], sum(heads) / 4)


@both_models
def test_a_coefficient_switches_the_kl_on_and_weighs_it(model_class):
    ids = text(L)
    out = build(model_class, indexer_kl_coef=0.25)(ids, labels=ids)
    assert_same(out.loss, out.lm_loss + 0.25 * out.indexer_kl_loss)
    assert out.indexer_kl_loss > 0.1


@both_models
def test_without_a_coefficient_the_loss_is_the_language_models(model_class):
    ids = text(L)
    out = build(model_class)(ids, labels=ids, output_indexer_kl_loss=True)
    assert torch.equal(out.loss, out.lm_loss)
    assert build(model_class)(ids, labels=ids).indexer_kl_loss is None


@both_models
def test_labels_of_minus_100_leave_the_kl_as_it_is(model_class):
    model, ids = build(model_class), text(L)
    labels = ids.clone()
    labels[:, :30] = -100
    some, all_of_them = (model(ids, labels=x, output_indexer_kl_loss=True) for x in (labels, ids))
    assert torch.equal(some.indexer_kl_loss, all_of_them.indexer_kl_loss)
    assert some.lm_loss != all_of_them.lm_loss


def gradients(model, loss):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


@both_models
@both_modes
def test_the_language_models_loss_never_reaches_the_indexer(model_class, sparse):
    model, ids = build(model_class, use_sparse_attention=sparse), text(L)
    found = gradients(model, model(ids, labels=ids, output_indexer_kl_loss=True).lm_loss)
    assert {n for n, g in found.items() if g is None} == {n for n in found if is_indexer(n)}


@both_models
@pytest.mark.parametrize(
    ("asked", "calls"),
    [({}, []), ({"output_indexer_kl_target": True}, []), ({"use_cache": True}, ["wk"]),
     ({"output_indexer_kl_loss": True}, ["wk", "wq_b"]), ({"output_indexer_scores": True}, ["wk", "wq_b"])],
    ids=["nothing", "target", "cache", "loss", "scores"],
)  # fmt: skip
def test_dense_mode_computes_no_more_of_the_indexer_than_is_asked_for(model_class, asked, calls):
    model, seen = build(model_class, use_sparse_attention=False), []
    for name in ("wk", "wq_b"):
        module = model.model.layers[1].self_attn.indexer.get_submodule(name)
        module.register_forward_hook(lambda *call, name=name: seen.append(name))
    model(text(L), **{"use_cache": False, **asked})
    assert sorted(seen) == calls


@both_models
@both_modes
def test_detached_the_kl_reaches_the_indexer_and_nothing_else(model_class, sparse):
    model = build(model_class, use_sparse_attention=sparse)
    found = gradients(model, model(text(L), output_indexer_kl_loss=True).indexer_kl_loss)
    assert {n for n, g in found.items() if g is not None} == {n for n in found if is_indexer(n)}
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in found.values() if g is not None)


@both_models
@both_modes
def test_attached_the_kl_reaches_what_the_indexer_reads_but_never_p(model_class, sparse):
    model = build(model_class, use_sparse_attention=sparse, detach_indexer_input=False)
    found = gradients(model, model(text(L), output_indexer_kl_loss=True).indexer_kl_loss)
    last = "model.layers.2."
    # In the last layer only p depends on these.
    only_p = {f"{last}self_attn.{n}.weight" for n in ("q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")}
    behind = {
        "model.norm.weight",
        "lm_head.weight",
        f"{last}self_attn.o_proj.weight",
        f"{last}post_attention_layernorm.weight",
    }
    behind |= {n for n in found if n.startswith(f"{last}mlp.")}
    assert {n for n, g in found.items() if g is None} == only_p | behind
    assert found["model.embed_tokens.weight"].abs().max() > 0
    assert found[f"{last}self_attn.q_a_proj.weight"].abs().max() > 0


@both_models
def test_both_losses_together_train_everything(model_class):
    model, ids = build(model_class, indexer_kl_coef=1.0), text(L, batch=2)
    found = gradients(model, model(ids, labels=ids).loss)
    assert [n for n, g in found.items() if g is None or not g.isfinite().all()] == []
    # An expert that nobody chose has gradient 0; whole tensors have some.
    assert [n for n, g in found.items() if g.abs().max() == 0] == []


def micro_batches():
    """Four rows of unequal length, each as a batch of its own, and as one right-padded batch."""
    lengths = (40, 25, 33, 18)
    rows = [text(n, seed) for seed, n in enumerate(lengths)]
    ids = torch.cat([torch.nn.functional.pad(r, (0, L - r.shape[1]), value=258) for r in rows])
    mask = (torch.arange(L) < torch.tensor(lengths)[:, None]).long()
    together = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return [{"input_ids": r, "labels": r} for r in rows], together


@both_models
@pytest.mark.parametrize("padded", [False, True], ids=["own length", "padded"])
def test_gradients_of_micro_batches_add_up_to_those_of_the_batch(model_class, padded):
    model = build(model_class, indexer_kl_coef=0.5)
    alone, together = micro_batches()
    items = (together["labels"] != -100).sum()
    if padded:
        alone = [{k: v[i : i + 1] for k, v in together.items()} for i in range(4)]
    whole = gradients(model, model(**together, num_items_in_batch=items).loss)
    parts = [gradients(model, model(**one, num_items_in_batch=items).loss) for one in alone]
    for name, expected in whole.items():
        assert_same(sum(part[name] for part in parts), expected)


@both_models
def test_num_items_in_batch_divides_both_losses(model_class):
    model, ids = build(model_class, indexer_kl_coef=0.5), text(L)
    own, given = model(ids, labels=ids), model(ids, labels=ids, num_items_in_batch=torch.tensor(78))
    assert_same(given.lm_loss, own.lm_loss / 2)
    assert_same(given.indexer_kl_loss * 78, own.indexer_kl_loss * 40)


@both_models
@both_modes
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing_gives_equal_gradients_kl_included(model_class, sparse, reentrant):
    model = build(model_class, use_sparse_attention=sparse, indexer_kl_coef=0.5).train()
    batch = padded_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    recorded = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        out = model(**batch, labels=labels)
        out.loss.backward()
        recorded.append((out.loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (loss, plain), (other_loss, checkpointed) = recorded
    assert_same(other_loss, loss, 1e-13)
    for name, expected in plain.items():
        assert_same(checkpointed[name], expected, 1e-13)


@both_models
def test_checkpointing_in_training_fills_no_cache(model_class):
    # The way back runs each layer a second time, which would append every key twice.
    model = build(model_class).train()
    model.gradient_checkpointing_enable()
    cache = LatentCache(model.config)
    out = model(text(L), labels=text(L), past_key_values=cache, use_cache=True)
    out.loss.backward()
    assert out.past_key_values is None
    assert cache.get_seq_length() == 0


@both_models
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_trains_the_indexer_alone(model_class, reentrant):
    model = build(model_class).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_indexer(name))
    expected = gradients_of_indexer(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    # A frozen embedding ends reentrant checkpointing at its output, unless that is told to require grad.
    model.enable_input_require_grads()
    found = gradients_of_indexer(model)
    for name, value in expected.items():
        assert_same(found[name], value, 1e-13)


def gradients_of_indexer(model):
    model.zero_grad()
    model(text(L), output_indexer_kl_loss=True).indexer_kl_loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@both_models
def test_autocast_leaves_scores_and_selection_in_fp32(model_class):
    model = build(model_class, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(text(L), output_indexer_scores="visible", output_decisions=True)
    for scores, layer in zip(out.indexer_scores, out.decisions, strict=True):
        assert scores.dtype == torch.float32
        finite = scores[scores.isfinite()]
        # Products of bf16 projections, but not themselves rounded to bf16.
        assert (finite.bfloat16().float() != finite).float().mean() > 0.9
        for t in range(L):
            row = scores[0, t, : t + 1].tolist()
            chosen = [s for s in layer.topk_indices[0, t].tolist() if s >= 0]
            assert chosen == sorted(sorted(range(t + 1), key=lambda s, row=row: -row[s])[:16])


@both_models
def test_autocast_leaves_head_weights_and_gate_in_fp32(model_class):
    model = build(model_class, torch.float32)
    x = torch.randn(1, 5, 64)
    layer = model.model.layers[1]
    plain = layer.self_attn.indexer.head_weights(x), layer.mlp.gate(x[0])
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer.self_attn.indexer.head_weights(x), layer.mlp.gate(x[0])
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(plain[1], cast[1])


@both_models
@both_modes
def test_autocast_trains_near_what_fp32_trains(model_class, sparse):
    model, ids = build(model_class, torch.float32, use_sparse_attention=sparse, indexer_kl_coef=0.5).train(), text(L)
    tape = model(ids, output_decisions=True).decisions
    plain = model(ids, labels=ids, decisions=tape)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(ids, labels=ids, decisions=tape)
    assert 1e-5 < abs(float(cast.lm_loss / plain.lm_loss) - 1) < 0.02
    assert 1e-5 < abs(float(cast.indexer_kl_loss / plain.indexer_kl_loss) - 1) < 0.05
    assert cast.lm_loss.dtype == cast.indexer_kl_loss.dtype == torch.float32
    found = gradients(model, cast.loss)
    assert [n for n, g in found.items() if g is None or not g.isfinite().all()] == []
