"""Measuring the indexer on sequences whose L×S tensors would not fit: some rows, one layer at a time.

Letters: B batch, R measured rows, S key slots.
"""

import weakref
from dataclasses import astuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.training import metrics
from harness.training.layers import spread_rows
from harness.training.metrics import attention_mode, indexer_tensors, layer_quality, measure_indexer
from harness.training.verdicts import judge_indexer
from optimized import DeepseekV32ForCausalLM
from suites.support import MODELS, both_models
from suites.training.runs import LENGTH, batch_of, losses, model_for, run, short

ROWS = 12


@pytest.fixture
def small_limit(monkeypatch):
    """A limit that leaves `ROWS` rows of a sequence of `LENGTH` tokens."""
    monkeypatch.setattr(metrics, "LARGEST", ROWS * (LENGTH + 1))


class Largest(TorchDispatchMode):
    """The most elements that any tensor made in the block has."""

    elements = 0

    def __torch_dispatch__(self, function, types, given=(), more=None):
        made = function(*given, **(more or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_rows_are_evenly_spaced_up_to_the_last():
    assert spread_rows(10, 3).tolist() == [2, 5, 9]
    assert spread_rows(7, 7).tolist() == list(range(7))
    assert spread_rows(7, 1).tolist() == [6]
    for count in (0, 8):
        with pytest.raises(ValueError, match=f"count is {count}; it must be 1 … 7"):
            spread_rows(7, count)


@pytest.mark.parametrize("name", ["warmup", "sparse", "sft"])
@both_models
def test_some_rows_are_told_what_they_are_told_among_all(model_class, name, small_limit):
    stage = short(name, batch=3)
    model, batch = model_for(model_class, torch.float64), batch_of(stage)
    rows = spread_rows(LENGTH, ROWS)
    some = measure_indexer(model, batch, sparse=stage.sparse)
    # The whole of the first sequence, from the model's own answers.
    inputs = {"input_ids": batch.input_ids_BL[:1], "use_cache": False, "output_indexer_kl_target": True}
    if batch.attention_mask_BL is not None:
        inputs |= {"attention_mask": batch.attention_mask_BL[:1], "position_ids": batch.position_ids_BL[:1]}
    outs = []
    for sparse in (False, True):
        with attention_mode(model, sparse=sparse), torch.no_grad():
            outs.append(model(**inputs, output_indexer_scores=sparse or "visible"))
    dense, own = (list(zip(out.indexer_scores, out.indexer_kl_targets, strict=True)) for out in outs)
    assert (some.rows, len(some.layers)) == (ROWS, len(dense))
    for layer, visible, candidates in zip(some.layers, dense, own, strict=True):
        within = tuple(x[:, rows] for x in candidates) if stage.sparse else None
        whole = layer_quality(*(x[:, rows] for x in visible), some.k, within)
        assert astuple(layer) == pytest.approx(astuple(whole), abs=1e-9)
        assert layer.same is not None


def test_both_models_measure_the_same_rows(small_limit):
    stage = short("sparse")
    ours, theirs = (
        measure_indexer(model_for(m, torch.float64), batch_of(stage), sparse=True).values() for m in MODELS.values()
    )
    assert ours.pop("captured_layers") == pytest.approx(theirs.pop("captured_layers"), abs=1e-9)
    assert ours == pytest.approx(theirs, abs=1e-9)
    assert ours["rows measured"] == ROWS


@pytest.mark.parametrize("name", ["warmup", "sparse"])
def test_no_tensor_is_larger_than_the_limit(name, monkeypatch):
    # Long enough that what grows with the length alone is smaller.
    length = 1536
    limit = length**2 // 2
    stage = short(name, length=length, batch=2)
    model, batch = model_for(DeepseekV32ForCausalLM), batch_of(stage)
    monkeypatch.setattr(metrics, "LARGEST", limit)
    some = Largest()
    with some:
        judge_indexer(model, stage, batch)
    assert some.elements <= limit
    monkeypatch.setattr(metrics, "LARGEST", length**2)
    whole = Largest()
    with whole:
        measure_indexer(model, batch, sparse=stage.sparse)
    assert whole.elements >= length**2, "it would have shown"


@both_models
@pytest.mark.parametrize("limited", [False, True])
def test_one_layer_is_there_at_a_time(model_class, limited, monkeypatch):
    if limited:
        monkeypatch.setattr(metrics, "LARGEST", ROWS * (LENGTH + 1))
    stage = short("warmup")
    seen = []

    def look(layer, *tensors):
        assert [ref() for pair in seen for ref in pair] == [None] * 2 * layer
        seen.append([weakref.ref(tensor) for tensor in tensors])

    model = model_for(model_class)
    measure_indexer(model, batch_of(stage), sparse=False, visible=look)
    assert len(seen) == model.config.num_hidden_layers


def test_a_large_batch_is_measured_on_its_first_sequences(monkeypatch):
    stage = short("warmup", batch=3)
    model, batch = model_for(DeepseekV32ForCausalLM), batch_of(stage)
    monkeypatch.setattr(metrics, "LARGEST", 2 * LENGTH**2)
    shapes = []
    quality = measure_indexer(model, batch, sparse=False, visible=lambda _, x, p: shapes.append((x.shape, p.shape)))
    assert shapes == [((2, LENGTH, LENGTH),) * 2] * 3
    assert quality.rows is None and "rows measured" not in quality.values()
    assert indexer_tensors(model, batch)[0][0].shape[0] == 3


def test_a_run_says_on_how_many_rows_it_measured(monkeypatch):
    stage = short("sparse", steps=3)
    whole = run(model_for(DeepseekV32ForCausalLM), stage, measure_every=2, stop_early=False)
    monkeypatch.setattr(metrics, "LARGEST", ROWS * (LENGTH + 1))
    some = run(model_for(DeepseekV32ForCausalLM), stage, measure_every=2, stop_early=False)
    assert losses(some.steps) == losses(whole.steps)
    assert [row.get("rows measured") for row in some.steps] == [ROWS, None, ROWS]
    assert not any("rows measured" in row for row in whole.steps)
    told = {v.check: v for v in some.verdicts}
    for check in ("train.captured", "train.selection"):
        assert told[check].data["indexer"]["rows measured"] == ROWS
        assert all(null.rejected for null in told[check].nulls)


def test_measuring_leaves_the_model_as_it_was(small_limit):
    model = model_for(DeepseekV32ForCausalLM)
    before = [dict(vars(layer.self_attn)) for layer in model.model.layers]
    measure_indexer(model, batch_of(short("sparse")), sparse=True)
    assert [dict(vars(layer.self_attn)) for layer in model.model.layers] == before
    with pytest.raises(ZeroDivisionError):
        measure_indexer(model, batch_of(short("sparse")), sparse=True, visible=lambda *_: 1 / 0)
    assert [dict(vars(layer.self_attn)) for layer in model.model.layers] == before
    assert model.config.use_sparse_attention
