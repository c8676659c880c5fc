"""The numbers that say whether an indexer learns: against plain loops, at their fixed points, and without a trace.

Letters: B batch, L rows, S key slots.
"""

import math
import mmap

import pytest
import torch

from harness.budgets import MOST_COLLAPSE, NO_INFORMATION
from harness.training.metrics import (
    layer_quality,
    measure_indexer,
    resident_mib,
    sameness,
    uniform_kl_rows,
)
from optimized import DeepseekV32ForCausalLM
from suites.support import MODELS, assert_same, both_models
from suites.training.runs import batch_of, losses, model_for, run, short

K = 4
INF = torch.inf


def example(rows=24, batch=2, seed=0):
    """Causal scores and targets `[B, L, L]` in fp64, peaked."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.ones(rows, rows).tril().bool()
    scores, logits = (2 * torch.randn(batch, rows, rows, generator=generator, dtype=torch.float64) for _ in range(2))
    return scores.masked_fill(~seen, -INF), logits.masked_fill(~seen, -INF).softmax(-1)


def constant(scores):
    return torch.where(scores == -INF, -INF, 0.0)


def test_the_zero_information_line_is_the_divergence_from_uniform():
    scores, target = example()
    by_hand = [
        sum(p * math.log(p * (t + 1)) for p in row[: t + 1]) for rows in target.tolist() for t, row in enumerate(rows)
    ]
    assert_same(uniform_kl_rows(target, scores != -INF).flatten(), torch.tensor(by_hand, dtype=torch.float64), 1e-12)


def test_constant_scores_capture_nothing_and_log_p_everything():
    scores, target = example()
    for level in (-30.0, 0.0, 7.0):
        assert layer_quality(constant(scores) + level, target, K).captured == pytest.approx(0, abs=1e-12)
    assert layer_quality(torch.where(target > 0, target.log(), -INF), target, K).captured == pytest.approx(1, abs=1e-12)
    assert layer_quality(torch.where(target > 0, -target.log(), -INF), target, K).captured < -1


def test_rounding_of_the_target_does_not_move_the_zero_line():
    # The sum of fp32 probabilities differs from 1 by as much as an even row differs from uniform.
    scores, target = example()
    even = (target * 1e-3 + (scores != -INF) / (scores != -INF).sum(-1, keepdim=True)).float()
    quality = layer_quality(constant(scores), even, K)
    assert quality.uniform_kl < 1e-3
    assert 1 - quality.captured == pytest.approx(1, abs=1 - NO_INFORMATION)


def test_a_row_without_a_choice_and_padding_count_for_nothing():
    scores, target = example(rows=1)
    assert math.isnan(layer_quality(scores, target, K).captured)
    scores, target = example()
    padded_scores, padded_target = scores.clone(), target.clone()
    padded_scores[:, -3:], padded_target[:, -3:] = -INF, 0.0
    assert layer_quality(padded_scores, padded_target, K).kl == pytest.approx(
        layer_quality(scores[:, :-3], target[:, :-3], K).kl, abs=1e-12
    )


def masses(scores, target, k):
    """Selected and best mass of each row with more than k keys, by sorting each row."""
    found = []
    for rows, targets in zip(scores.tolist(), target.tolist(), strict=True):
        for t, (row, p) in enumerate(zip(rows, targets, strict=True)):
            if t + 1 > k:
                chosen = sorted(range(t + 1), key=lambda s, row=row: -row[s])[:k]
                found.append((sum(p[s] for s in chosen), sum(sorted(p, reverse=True)[:k])))
    return found


def test_recall_and_mass_left_out_are_what_sorting_each_row_gives():
    scores, target = example()
    found = masses(scores, target, K)
    quality = layer_quality(scores, target, K)
    selected, best = (sum(column) for column in zip(*found, strict=True))
    assert quality.recall == pytest.approx(selected / best, abs=1e-12)
    assert quality.left_out == pytest.approx(1 - selected / len(found), abs=1e-12)
    # Scores of the keys before, as an indexer with a position too few would have.
    shifted = (
        torch.cat((scores[..., :1], scores[..., :-1]), -1).masked_fill(scores == -INF, -INF).nan_to_num(neginf=-INF)
    )
    assert layer_quality(shifted, target, K).recall != pytest.approx(selected / best, abs=1e-3)


def test_recall_is_one_at_best_and_needs_rows_that_choose():
    scores, target = example()
    best = layer_quality(torch.where(target > 0, target.log(), -INF), target, K)
    assert best.recall == pytest.approx(1, abs=1e-12)
    assert best.collapse == pytest.approx(0, abs=1e-12)
    assert layer_quality(scores, target, K).recall < 0.9
    nobody = layer_quality(scores, target, scores.shape[-1])
    assert (nobody.recall, nobody.left_out, nobody.same, nobody.collapse) == (None,) * 4


def ranked(scores, ranking):
    return torch.where(scores == -INF, -INF, ranking.to(scores))


def test_sameness_tells_one_ranking_from_rows_that_differ():
    scores, target = example(rows=96, batch=8)
    keys = scores.shape[-1]
    one_ranking = ranked(scores, torch.rand(8, 1, keys, generator=torch.Generator().manual_seed(1)))
    recent = ranked(scores, torch.arange(keys))
    assert layer_quality(constant(scores), target, 12).same == pytest.approx(2, abs=0.2)
    assert layer_quality(one_ranking, target, 12).same == pytest.approx(1, abs=0.15)
    assert abs(layer_quality(scores, target, 12).same) < 0.05
    assert layer_quality(recent, target, 12).same < 0.1


def test_only_a_selection_alike_where_attention_is_not_is_a_collapse():
    scores, target = example(rows=96, batch=8)
    assert layer_quality(constant(scores), target, 12).collapse > MOST_COLLAPSE
    assert layer_quality(scores, target, 12).collapse < MOST_COLLAPSE
    # Attention that reads the same keys in every row must be followed.
    first = torch.where(scores == -INF, -INF, -torch.arange(96.0, dtype=torch.float64)).softmax(-1)
    followed = layer_quality(torch.where(first > 0, first.log(), -INF), first, 12)
    assert followed.same == pytest.approx(2, abs=0.2)
    assert followed.collapse == pytest.approx(0, abs=1e-12)


def test_rows_of_different_documents_are_not_compared():
    # Two documents, each of which selects its own first keys: as pairs of one document they would share nothing.
    visible = torch.block_diag(torch.ones(12, 12).tril(), torch.ones(12, 12).tril()).bool()[None]
    selected = torch.zeros(1, 24, 24, dtype=torch.bool)
    selected[0, :12, :K], selected[0, 12:, 12 : 12 + K] = True, True
    selected &= visible
    apart = sameness(selected, visible, K)
    assert apart == pytest.approx(sameness(selected[:, :12, :12], visible[:, :12, :12], K), abs=1e-12)
    together = sameness(selected, torch.ones(1, 24, 24).tril().bool(), K)
    assert together < 0.7 * apart


@both_models
@pytest.mark.parametrize("name", ["warmup", "sparse"])
def test_the_measured_kl_is_that_of_the_loss(model_class, name):
    stage = short(name, steps=1)
    model = model_for(model_class, torch.float64, use_sparse_attention=stage.sparse)
    batch = batch_of(stage)
    quality = measure_indexer(model, batch, sparse=stage.sparse)
    loss = model(batch.input_ids_BL, output_indexer_kl_loss=True, use_cache=False).indexer_kl_loss.detach()
    assert sum(layer.kl for layer in quality.layers) == pytest.approx(float(loss), rel=1e-9)
    other = measure_indexer(model, batch, sparse=not stage.sparse)
    assert sum(layer.kl for layer in other.layers) != pytest.approx(float(loss), rel=1e-2)


@pytest.mark.parametrize("name", ["warmup", "sft"])
def test_both_models_measure_the_same(name):
    stage = short(name, steps=1)
    found = [
        measure_indexer(model_for(m, torch.float64), batch_of(stage), sparse=stage.sparse) for m in MODELS.values()
    ]
    for ours, theirs in zip(*(quality.layers for quality in found), strict=True):
        assert ours.captured == pytest.approx(theirs.captured, abs=1e-9)
        assert ours.recall == pytest.approx(theirs.recall, abs=1e-9)
        assert ours.same == pytest.approx(theirs.same, abs=1e-9)


def test_measuring_leaves_nothing_behind():
    model = model_for(DeepseekV32ForCausalLM, use_sparse_attention=True).train()
    model.config.indexer_kl_coef = 0.5
    before = torch.get_rng_state()
    measure_indexer(model, batch_of(short("warmup")), sparse=False)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training and model.config.use_sparse_attention and model.config.indexer_kl_coef == 0.5
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["warmup", "sparse"])
def test_a_measured_run_computes_the_same_bits(name):
    stage = short(name, steps=5)
    often, never = (
        run(model_for(DeepseekV32ForCausalLM), stage, measure_every=every, stop_early=False) for every in (1, 1000)
    )
    assert losses(often.steps) == losses(never.steps)
    assert ["captured" in row for row in often.steps] == [True] * 5
    assert ["captured" in row for row in never.steps] == [True, False, False, False, True]


def test_memory_is_that_of_this_process():
    before = resident_mib()
    # Not from the allocator, which may hand out what is resident already.
    block = mmap.mmap(-1, 64 * 2**20)
    torch.frombuffer(block, dtype=torch.uint8).fill_(1)
    assert resident_mib() - before > 0.9 * len(block) / 2**20
